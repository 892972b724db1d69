"""Loads the text-to-video model that ships inside the package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.utils import deprecation_utils

from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline

EMBEDDED_PATH = Path(__file__).resolve().parent / "weights"

_REPAIR = (
    "reinstall dit-sparse (pip install --force-reinstall dit-sparse), or train it again with "
    "`python -m training.train --export {path}`"
)
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(
        f"{component}/{name}"
        for component in ("transformer", "codec", "text_encoder")
        for name in ("config.json", _WEIGHTS)
    ),
)


def _check_file(path: Path, repair: str) -> None:
    """Raises FileNotFoundError or ValueError, naming the file, unless it can be parsed."""
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the embedded model file {path}, got no such file; {repair}"
        )
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            from safetensors import safe_open

            # Opening validates the header and that its offsets cover the whole file, so that a
            # truncated file is found without reading the tensors.
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
    except Exception as error:
        raise ValueError(
            f"expected a readable embedded model file {path}, got a corrupt one ({error}); {repair}"
        ) from error


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``dtype`` under the name that ``from_pretrained`` of the installed diffusers gives it."""
    is_renamed = hasattr(deprecation_utils, "_resolve_dtype")
    return {"dtype" if is_renamed else "torch_dtype": dtype}


def load_embedded(
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    path: str | Path | None = None,
) -> EmojiVideoPipeline:
    """Loads the embedded text-to-video pipeline.

    Args:
        device: Where to put the pipeline.
        dtype: Weight type; None is float32 on CPU and bfloat16 on CUDA.
        path: Folder to load instead of `EMBEDDED_PATH`.

    Returns:
        The pipeline, ready to be called.

    Raises:
        FileNotFoundError: A file of the model is missing.
        ValueError: A file of the model is corrupt.
    """
    folder = EMBEDDED_PATH if path is None else Path(path)
    repair = _REPAIR.format(path=folder)
    for name in _FILES:
        _check_file(folder / name, repair)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = EmojiVideoPipeline.from_pretrained(
        str(folder), **dtype_argument(dtype), local_files_only=True
    )
    return pipe.to(device)
