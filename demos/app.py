"""A page that generates a clip dense and sparse: `pip install dit-sparse[demo]`, then run this."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.eval.arms import parse_arms
from dit_sparse.eval.compare import Request, load_pipeline, run_comparison
from dit_sparse.eval.html import format_number
from dit_sparse.methods import list_methods

if TYPE_CHECKING:
    import gradio

COLUMNS = {
    "PSNR mean (dB)": ("psnr_mean", 2),
    "PSNR min (dB)": ("psnr_min", 2),
    "SSIM": ("ssim", 4),
    "density": ("density", 3),
    "attention (s)": ("attention_s", 2),
    "total (s)": ("total_s", 2),
    "speed-up": ("speedup", 2),
}


def arm_of(method: str, sparsity: float) -> str:
    """The `--methods` entry of the chosen method; some have no sparsity to set."""
    fields = getattr(list_methods()[method], "__dataclass_fields__", {})
    # A plan of sparse_vdit brings its own.
    if "density" in fields and fields["density"].default is not None:
        return f"{method}:density={1 - sparsity:g}"
    return f"{method}:sparsity={sparsity:g}" if "sparsity" in fields else method


@lru_cache(maxsize=1)
def loaded(device: str, dtype: str) -> Any:
    """The embedded pipeline, loaded once."""
    return load_pipeline("embedded", device, dtype)


def generate(
    caption: str, method: str, sparsity: float, steps: int, on_step: Any = None
) -> tuple[str, str, list[list[str]]]:
    """Generates both clips.

    Args:
        caption: What to show.
        method: A name out of `list_methods()`.
        sparsity: Share of blocks to skip.
        steps: Denoising steps.
        on_step: See `run_comparison`.

    Returns:
        Paths of the dense and the sparse clip, and the rows of the table.
    """
    folder = Path(tempfile.mkdtemp(prefix="dit-sparse-"))
    request = Request(
        prompts=(caption,),
        arms=tuple(parse_arms(arm_of(method, sparsity))),
        output=folder,
        steps=int(steps),
    ).resolved()
    result = run_comparison(request, pipe=loaded(request.device, request.dtype), on_step=on_step)
    rows = []
    for run in result.runs:
        values = run.to_dict()
        cells = [format_number(values[key], digits) for key, digits in COLUMNS.values()]
        rows.append([run.method, *cells])
    dense, sparse = (str(folder / run.video) for run in result.runs)
    return dense, sparse, rows


def build() -> gradio.Blocks:
    """The page."""
    try:
        import gradio as gr
    except ImportError as error:
        raise SystemExit("the demo needs gradio: pip install 'dit-sparse[demo]'") from error

    def run(
        caption: str,
        method: str,
        sparsity: float,
        steps: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio injects its progress bar
    ) -> tuple[str, str, list[list[str]]]:
        def on_step(prompt: str, label: str, done: int, total: int) -> None:
            progress((done, total), desc=label)

        try:
            return generate(caption, method, sparsity, steps, on_step)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    methods = [name for name in sorted(list_methods()) if name != "dense"]
    with gr.Blocks(title="dit-sparse") as page:
        gr.Markdown("# dit-sparse\nThe same clip with dense and with sparse attention.")
        with gr.Row():
            caption = gr.Textbox(
                "a star moving up over a sunset sky, panning right", label="Caption", scale=3
            )
            method = gr.Dropdown(methods, value="compensated_delta", label="Method")
        with gr.Row():
            sparsity = gr.Slider(0.0, 0.95, value=0.9, step=0.05, label="Sparsity")
            steps = gr.Slider(4, 50, value=12, step=1, label="Steps")
        button = gr.Button("Generate", variant="primary")
        with gr.Row():
            dense = gr.Video(label="Dense", autoplay=True, loop=True)
            sparse = gr.Video(label="Sparse", autoplay=True, loop=True)
        table = gr.Dataframe(headers=["method", *COLUMNS], label="Quality and cost")
        button.click(run, [caption, method, sparsity, steps], [dense, sparse, table])
    return page


if __name__ == "__main__":
    build().launch()
