"""Transformers of diffusers that sparse attention refuses, each with the reason.

Every class of ``diffusers.models.transformers`` is either here or has a :class:`Family`; a test
says so. A class in neither (a newer diffusers) gets a general error.
"""

from __future__ import annotations

_AUDIO = "its tokens are audio, one-dimensional and without a frame grid"
_LINEAR = "its self-attention is linear already; there is no quadratic attention to make sparse"
_UNET = "it is one attention layer inside a U-Net and not a diffusion transformer of its own"

REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": _AUDIO,
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": "it decodes a handful of audio codes one by one, causally",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "most of its layers are linear attention or recurrent",
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it attends to a key cache that grows from chunk to chunk, and its forward arguments tell "
        "neither the grid nor the length of that cache"
    ),
    "AnyFlowFARTransformer3DModel": (
        "its self-attention is causal over chunks with a key cache, through FlexAttention"
    ),
    "Kandinsky6SRTransformer3DModel": (
        "it computes its own block-sparse attention (NABLA, through FlexAttention) in every layer"
    ),
    "WanAnimate2Transformer3DModel": (
        "it attends over a packed, padded sequence with cached reference keys under a "
        "FlexAttention mask"
    ),
    "Cosmos3OmniTransformer": (
        "text, video, sound and actions are one unbatched packed sequence, with causal and full "
        "attention and grouped key heads in the same layer"
    ),
    "QwenImage21Transformer2DModel": (
        "it attends segment by segment, causally over text, with a cached prefix"
    ),
    "OmniGenTransformer2DModel": (
        "its attention mask is causal over the condition and differs from row to row"
    ),
    "LatteTransformer3DModel": (
        "it alternates attention within frames and across frames; both sequences are short, so "
        "there is nothing to skip"
    ),
    "PriorTransformer": "it maps one text embedding to one image embedding, causally, 80 tokens",
    "RFD4ProteinaTransformer": "its tokens are residues of a protein with a pair bias",
    "DreamLiteTransformer2DModel": _UNET,
    "TransformerTemporalModel": _UNET,
    "TransformerSpatioTemporalModel": _UNET,
    "DualTransformer2DModel": _UNET,
    "Transformer2DModel": (
        "it is the legacy container of U-Net layers, DiT and PixArt; load such weights as "
        "DiTTransformer2DModel or PixArtTransformer2DModel"
    ),
}
