"""Sparse attention in one line, on the model that ships with dit-sparse.

Run `python demos/one_liner.py`; it writes one_liner.mp4.
"""

from diffusers.utils import export_to_video

from dit_sparse import SparseProcessor
from dit_sparse.pipelines.embedded import load_embedded

pipe = load_embedded()
pipe.transformer.set_attn_processor(SparseProcessor())
export_to_video(
    pipe("a star moving up over a sunset sky, panning right").frames[0], "one_liner.mp4", fps=8
)
