"""Double Sparsity: blocks scored with the few channels that carry the scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.kernels.ops import work_dtype
from dit_sparse.methods.base import Call
from dit_sparse.methods.estimates import video_mass
from dit_sparse.methods.scored import BlockScored, check_count


@dataclass(frozen=True)
class DoubleSparsity(BlockScored):
    """Top-k key blocks by attention mass computed with the r heaviest channels of a head.

    Channel c of a head weighs ``mean_ij |q_ic k_jc| = mean_i |q_ic| * mean_j |k_jc|``. With S the r
    heaviest ones, ``s'_ij = sum_{c in S} q_ic k_jc / sqrt(d)`` stands for the score, and blocks are
    ranked by their mass under its softmax, at r / d of the cost of the exact search.

    The paper calibrates the channels offline, once a model, and selects tokens of a KV cache. Here
    they are found at the first search of each generation, after the rotary embedding, whose two
    channels of one frequency are kept together; that costs one pass over queries and keys. The
    paper keeps the first two layers dense; see ``SparseConfig.dense_layers``.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1).
        channels: r. Below 16 nothing is saved, the least that a tensor core multiplies at a time.
        rotary: Where the two channels of a frequency are: ``"interleaved"`` (2 c and 2 c + 1),
            ``"halves"`` (c and c + d / 2), or None to take every channel for itself.
        every: Steps that a mask serves; a search makes two passes over queries and keys.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2408.07092, section 3.
    """

    name = "double_sparsity"

    channels: int = 16
    rotary: Literal["interleaved", "halves"] | None = "interleaved"
    every: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("channels", self.channels)
        if self.rotary not in ("interleaved", "halves", None):
            raise ValueError(f"rotary must be 'interleaved', 'halves' or None, got {self.rotary!r}")
        if self.rotary is not None and self.channels % 2:
            raise ValueError(
                f"channels must be even where they are taken in pairs, got {self.channels}; "
                "or pass rotary=None"
            )

    def scores(self, call: Call) -> Tensor:
        if "channels" not in call.memory:
            call.memory["channels"] = self.heaviest(call)
        chosen = call.memory["channels"][:, None]  # [batch, 1, heads, channels]
        queries, keys = (x.take_along_dim(chosen, -1) for x in (call.q, call.k))
        return video_mass(call, queries, keys, self.block)

    def heaviest(self, call: Call) -> Tensor:
        """The channels to score with, ascending, ``[batch, heads, channels]`` int64."""
        sizes = []
        for x in (call.q, call.k):
            if call.key_valid is not None:
                x = x.masked_fill(~call.key_valid[..., None, None], 0)
            # Of video and text alike; a common factor (the number of tokens) ranks nothing.
            sizes.append(x.abs().sum(1, dtype=work_dtype(x.dtype)))
        weight = sizes[0] * sizes[1]  # [batch, heads, dim]
        dim = weight.shape[-1]
        count = min(self.channels, dim)
        if self.rotary is None:
            return weight.topk(count, -1).indices.sort(-1).values
        pair, step = (2, 1) if self.rotary == "interleaved" else (1, dim // 2)
        first = torch.arange(dim // 2, device=weight.device) * pair
        pairs = weight[..., first] + weight[..., first + step]
        chosen = first[pairs.topk(count // 2, -1).indices]
        return torch.cat([chosen, chosen + step], -1).sort(-1).values
