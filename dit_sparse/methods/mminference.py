"""MMInference: a pattern for each head, over tokens in the order in which that pattern is dense.

Source: MMInference, arXiv 2504.16083. Its subject is the causal prefill of vision-language models;
its appendix F names diffusion transformers as another use. There is no public code of it; where
the text leaves a choice open, or causality has to go, the choice is made here and said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import Call, Method, check_box
from dit_sparse.methods.head_patterns import (
    Chosen,
    Wanted,
    choose,
    sampled_attention,
    sampled_places,
)
from dit_sparse.methods.modality_parts import (
    BOUNDARIES,
    Part,
    Parts,
    attend_parts,
    check_modalities,
    modality_ranges,
    parts_density,
)
from dit_sparse.methods.pattern_table import KINDS, Pattern, PatternTable
from dit_sparse.methods.scored import check_count, check_share
from dit_sparse.methods.strides import Ranges, TokenGroup, check_stride, token_group
from dit_sparse.schedule import Phase, Schedule

# Bytes that the estimate for some heads may take; heads are done in turns that fit.
_SCRATCH = 1 << 28


@dataclass(frozen=True)
class MMInference(Method):
    """Grid, vertical-slash or A-shape attention, chosen head by head, each in its own token order.

    Every head keeps the same share of the blocks between video tokens. What it keeps is estimated
    at a few steps from ``samples`` of its query rows and reused in between; of three patterns it
    takes the one that holds most of the sampled attention:

    * **Grid**, if one of ``strides`` shows: its lines hold at least ``lift`` more of the sampled
      attention than their share of the pairs. Tokens are sorted by their class of the stride, which
      makes vertical and horizontal lines runs of blocks and slash lines squares on the diagonal;
      what remains of the budget goes to columns and diagonals in that order.
    * **Vertical-slash**: the block columns and diagonals of largest sampled attention.
    * **A-shape**: the first 128 tokens and a band around the diagonal.

    With a ``table`` from an offline search the kind, stride, lines and density of each head are the
    table's; phases, columns and diagonals are still estimated from the input.

    Text blocks (and blocks that mix text and video) are kept as rows and as columns and are not
    charged to the budget.

    Attributes:
        sparsity: Share of video blocks that a head skips, in [0, 1).
        search: When patterns are estimated, see :class:`~dit_sparse.schedule.Schedule`.
        block: Tokens in a query and a key block, 64 or 128.
        tile: Order of the video tokens for heads without a grid: (frames, height, width) of a tile
            that becomes one run, or None for raster order as in the paper.
        strides: Strides that a grid may have, see :func:`~dit_sparse.methods.strides.residues`.
        lift: Least excess of sampled attention that makes a head a grid head, in [0, 1].
        samples: Query rows that the estimate looks at; the paper has 64.
        modalities: Video tokens of different kinds, e.g. those of reference frames: for each
            modality a tuple of token ranges (start, stop) in the model's order. What no range
            covers is one more modality. None: all video is one.
        boundary: How patterns respect the borders of modalities: ``"none"``, ``"q"`` or ``"2d"``,
            see :mod:`~dit_sparse.methods.modality_parts`; all the same where there is one modality.
        table: Path of a table from ``dit-sparse search-mminference``, or None. It decides the
            boundary too.

    Raises:
        ValueError: On a value outside these ranges, or a table that is missing, unreadable or was
            made under other settings.

    Source: arXiv 2504.16083, sections 3.2 and 3.3, algorithms 1 to 5, appendix C.
    """

    name = "mminference"
    splits_heads = True

    sparsity: float = 0.8
    search: tuple[int | float, ...] = (0.2, 0.6)
    block: int = 64
    tile: tuple[int, int, int] | None = None
    strides: tuple[str, ...] = ("hw", "w", "t", "wt", "h", "th", "2hw", "2w")
    lift: float = 0.05
    samples: int = 128
    modalities: tuple[Ranges, ...] | None = None
    boundary: str = "2d"
    table: str | None = None

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, least=0, below=1)
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")
        check_box("tile", self.tile)
        if not isinstance(self.strides, tuple) or not self.strides:
            raise ValueError(
                f"strides must be a tuple of at least one stride, got {self.strides!r}; for no "
                "grid heads use lift=1.0"
            )
        for stride in self.strides:
            check_stride(stride)
        check_share("lift", self.lift, least=0)
        check_count("samples", self.samples)
        if self.modalities is not None:
            check_modalities(self.modalities)
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {BOUNDARIES}, got {self.boundary!r}")
        Schedule(self.search)
        if self.table is not None:
            theirs, mine = PatternTable.load(self.table).settings, self.table_settings()
            if theirs != mine:
                raise ValueError(
                    f"{self.table} was searched with {theirs}, got settings {mine}; use the "
                    "table's, or search again"
                )

    @classmethod
    def exact(cls) -> MMInference:
        return cls(sparsity=0.0, search=(0,))

    def table_settings(self) -> dict[str, object]:
        """The settings under which the patterns of a table mean what they meant when found."""
        return {
            "sparsity": float(self.sparsity),
            "block": self.block,
            "tile": None if self.tile is None else list(self.tile),
            "strides": list(self.strides),
        }

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.search)

    def attend(self, call: Call) -> Tensor:
        phase = self._schedule.phase(call.step, call.memory.get("found"))
        if phase is Phase.DENSE:
            call.record(phase)
            return call.dense()
        if phase is not Phase.SPARSE:
            stop = call.search_watch.start(call.q.device)
            parts = call.memory["parts"] = self.find(call)
            tokens = call.layout.tokens
            call.memory["density"] = parts_density(parts, call.q.shape[2], tokens)
            call.memory["found"] = call.step.index
            stop()
        if phase is Phase.SEARCH:
            call.record(phase)
            return call.dense()
        parts = call.memory["parts"]
        call.record(phase, next(iter(parts.values())).mask)
        call.head_density = call.memory["density"]
        return attend_parts(call, parts)

    def find(self, call: Call) -> Parts:
        """The patterns of all heads for this input, by the table or by the estimate alone."""
        if self.table is None:
            return self.parts(call, self.boundary)
        table = PatternTable.load(self.table)
        modalities = len(modality_ranges(self.modalities, call.layout))
        table.check(call, modalities)
        choices = [table.choices[call.layer][number] for number in call.heads.own]
        parts: Parts = {}
        for boundary in BOUNDARIES:
            heads = tuple(h for h, choice in enumerate(choices) if choice.boundary == boundary)
            if not heads:
                continue
            patterns = [
                [table.patterns[i] for i in pair]
                for pair in zip(*(choices[h].patterns for h in heads), strict=True)
            ]
            whole = len(heads) == call.q.shape[2]
            parts |= self.parts(call, boundary, None if whole else heads, patterns)
        return parts

    def parts(
        self,
        call: Call,
        boundary: str,
        heads: tuple[int, ...] | None = None,
        patterns: Sequence[Sequence[Pattern]] | None = None,
    ) -> Parts:
        """The patterns of some heads for this input.

        Args:
            call: The call.
            boundary: Of all these heads.
            heads: Which; None for all.
            patterns: For each pair of groups (query groups in order and, within each, key groups)
                the pattern of each of the heads; None to estimate kind and stride as well.
        """
        queries, keys = self.groups(call, boundary)
        return {
            (boundary, k, q): self.part(
                call,
                queries[q],
                keys[k],
                heads,
                None if patterns is None else patterns[q * len(keys) + k],
            )
            for k in range(len(keys))
            for q in range(len(queries))
        }

    def groups(self, call: Call, boundary: str) -> tuple[list[TokenGroup], list[TokenGroup]]:
        """The groups of queries and of keys that ``boundary`` tells apart; text joins the first."""
        layout = call.layout
        ranges = modality_ranges(self.modalities, layout)

        def side(split: bool) -> list[TokenGroup]:
            return [
                token_group(
                    layout,
                    one,
                    index == 0,
                    self.strides,
                    self.tile,
                    self.block,
                    call.q.device,
                )
                for index, one in enumerate(ranges if split else (None,))
            ]

        return side(boundary != "none"), side(boundary == "2d")

    def part(
        self,
        call: Call,
        queries: TokenGroup,
        keys: TokenGroup,
        heads: tuple[int, ...] | None = None,
        patterns: Sequence[Pattern] | None = None,
    ) -> Part:
        """The patterns of some heads for one pair of groups; arguments as :meth:`parts`."""
        chosen = list(range(call.q.shape[2]) if heads is None else heads)
        batch, device = call.q.shape[0], call.q.device
        rows = sampled_places(queries.video, self.samples, device)
        at_rows, at_keys = queries.tokens[rows], keys.tokens[: keys.video]
        # Weights and two products of theirs, in fp32; ranks, two sort keys of theirs and masks.
        cost = batch * (12 * len(rows) * call.layout.tokens + 32 * queries.blocks * keys.blocks)
        turn = max(1, _SCRATCH // max(cost, 1))
        found = []
        for start in range(0, len(chosen), turn):
            weights = sampled_attention(call, at_rows, chosen[start : start + turn])[..., at_keys]
            weights = weights / weights.sum((-1, -2), keepdim=True).clamp_min(1e-30)
            some = patterns and patterns[start : start + turn]
            wanted = self._wanted(some, weights.shape[1], device)
            found.append(choose(weights, rows, queries, keys, wanted))
        kind, order, phase, video = Chosen(*(torch.cat(x, 1) for x in zip(*found, strict=True)))
        sizes = queries.size, keys.size
        shape = batch, len(chosen), *(block_count(size, self.block) for size in sizes)
        keep = torch.ones(shape, dtype=torch.bool, device=device)
        keep[..., : queries.blocks, : keys.blocks] = video
        mask = PackedMask.from_dense(keep, self.block, sizes)
        index = None if heads is None else torch.tensor(heads, device=device)
        return Part(queries, keys, index, kind, order, phase, mask)

    def _wanted(
        self, patterns: Sequence[Pattern] | None, heads: int, device: torch.device
    ) -> Wanted:
        """``patterns`` of some heads as tensors, or what this method asks of each of them."""
        if patterns is None:
            return Wanted(torch.full((heads,), 1 - self.sparsity, device=device), self.lift)
        rows = [
            (
                p.density,
                KINDS.index(p.kind),
                self.strides.index(p.stride) if p.stride else 0,
                [line in p.lines for line in "hvs"],
            )
            for p in patterns
        ]
        density, kind, stride, lines = (
            torch.tensor(x, device=device) for x in zip(*rows, strict=True)
        )
        return Wanted(density, self.lift, kind, stride, lines)
