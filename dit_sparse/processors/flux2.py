"""FLUX.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Split
from dit_sparse.processors.flux import Flux


class Flux2(Flux):
    """Dual- and single-stream blocks see [text, image, references].

    Mirrors ``Flux2Transformer2DModel.forward`` of diffusers 0.42.1. The Klein variant with a key
    cache puts its references before the image. In its first pass they attend to themselves only,
    in the others they are keys that were kept.
    """

    models = ("Flux2Transformer2DModel",)
    splits: ClassVar[Mapping[str, Split]] = {"Flux2Transformer2DModel": "text first"}
    side_calls = ("Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor")

    def text(self, model: Any, arguments: Arguments) -> int:
        references = 0
        is_cached = arguments.get("kv_cache_mode") == "cached"
        if is_cached and arguments.get("kv_cache") is not None and self._reads_cache(model):
            references = arguments["kv_cache"].num_ref_tokens
        return arguments["encoder_hidden_states"].shape[1] + references

    def _reads_cache(self, model: Any) -> bool:
        # The model's default processors ignore the cache that its forward takes.
        processor = model.transformer_blocks[0].attn.processor
        return any(kind.__name__ in self.side_calls for kind in type(processor).__mro__)

    def encode(self, model: Any, arguments: Arguments) -> tuple[list[int], Tensor | None]:
        numbers, positions = super().encode(model, arguments)
        first = 0
        if arguments.get("kv_cache_mode") == "extract":
            first = arguments.get("num_ref_tokens") or 0
        return [*numbers, first], positions

    def decode(self, numbers: Sequence[int], positions: Tensor | None) -> TokenLayout:
        text, references = numbers
        if positions is None:
            raise ValueError("expected img_ids, got None")
        layout = super().decode([text], positions[references:])
        return TokenLayout.around(
            layout.grid, layout.text_before + references, layout.text - layout.text_before
        )

    def unqueried(self, layout: TokenLayout, queries: int) -> tuple[int, int] | None:
        references = layout.tokens - queries
        return (layout.text_before - references, references) if references > 0 else None
