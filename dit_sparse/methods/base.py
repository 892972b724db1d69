"""What a method is, and what one attention call gives it to work with."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.bands import BandMask, video_blocks
from dit_sparse.kernels import ops
from dit_sparse.kernels.ops import Attended
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.layout import Ordering, TokenLayout, spread_rows_on, tile_ordering_on
from dit_sparse.mask import Block, BlockMask, PackedMask, block_sides
from dit_sparse.methods.head_share import HeadShare
from dit_sparse.neighborhood_mask import NeighborhoodMask
from dit_sparse.schedule import Phase, Step


@dataclass(slots=True, eq=False)
class Stopwatch:
    """Time spent on a device between pairs of marks, read back only when asked.

    On CUDA the marks are events in the current stream, so measuring does not stall it.
    """

    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def start(self, device: torch.device) -> Callable[[], None]:
        """Marks the beginning; call the result to mark the end."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()

            def stop() -> None:
                end.record()
                self.marks.append((begin, end))
        else:
            started = time.perf_counter()

            def stop() -> None:
                self.marks.append((started, time.perf_counter()))

        return stop

    def seconds(self) -> float:
        """The sum of all marked spans; waits for the device."""
        total = 0.0
        for begin, end in self.marks:
            if isinstance(begin, float):
                total += end - begin
            else:
                end.synchronize()
                total += begin.elapsed_time(end) / 1000
        return total


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a call belongs to.

    Attributes:
        kind: Class name of the transformer.
        config: Its configuration as (key, JSON of the value), sorted.
        component: Its name in the pipeline, which tells the experts of Wan 2.2 apart; empty where
            the pipeline is not known.
    """

    kind: str
    config: tuple[tuple[str, str], ...] = ()
    component: str = ""

    def differences(self, other: ModelIdentity) -> list[str]:
        """Why what was made for this model does not fit ``other``; empty if it does.

        Components are not compared. Configuration keys that only one side knows come from another
        release of diffusers and do not count.
        """
        reasons = []
        if other.kind != self.kind:
            reasons.append(f"it is for a {self.kind}, not a {other.kind}")
        here = dict(other.config)
        return reasons + [
            f"its model has {key} = {value}, this one {here[key]}"
            for key, value in self.config
            if here.get(key, value) != value
        ]


def check_block(block: Block) -> None:
    """Raises ValueError unless ``block`` is a size of blocks that kernels walk."""
    sides = block if isinstance(block, tuple) else (block, block)
    if len(sides) != 2 or any(side not in (64, 128) for side in sides):
        raise ValueError(
            f"block must be 64 or 128 tokens, or (queries, keys) of these, got {block!r}; some "
            "methods also take 'auto'"
        )


def check_box(name: str, value: Any) -> None:
    """Refuses what is neither (frames, height, width) in tokens nor None."""
    if value is not None and (
        not isinstance(value, tuple)
        or len(value) != 3
        or any(not isinstance(n, int) or n < 1 for n in value)
    ):
        raise ValueError(
            f"{name} must be (frames, height, width) in tokens, or None, got {value!r}"
        )


@dataclass(slots=True, eq=False)
class Call:
    """One self-attention call, with everything a method may use.

    Attributes:
        q: Queries ``[batch, tokens, heads, dim]`` after rotary embedding.
        k: Keys, same shape.
        v: Values, same shape.
        layout: What the tokens are.
        step: Where the generation stands.
        layer: Index of the self-attention layer in execution order.
        layers: Number of self-attention layers of the model.
        key_valid: Keys that are not padding, ``[batch, tokens]`` bool, or None.
        memory: What this method kept for this (generation, branch, layer). Emptied with each new
            generation.
        scale: Factor on the scores, or None for ``dim ** -0.5``.
        impl: Implementation the user asked for.
        dense_attention: The model's own attention call with the user's own backend. Given True, it
            also returns the log-sum-exp ``[batch, heads, tokens]`` fp32 of the same kernel run, or
            None where that backend does not tell it.
        dense_layers: Layers that never reach the method: the configuration keeps them dense.
        shared: What this method kept for this generation, over all branches and layers.
        notes: Lines for the report, by topic; a later one replaces an earlier one of its topic.
        model: Which model this is, or None where nothing tells.
        share: Which heads these are, where others are on other devices; None where all are here.
        precision: What :meth:`attention` under a mask computes its products in, see
            :func:`dit_sparse.kernels.ops.attention`.
        models_waiting: How many other models of the pipeline have their turn later in this
            generation, as the second expert of Wan 2.2 has; they need memory too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    step: Step
    layer: int
    layers: int
    key_valid: Tensor | None
    memory: dict[str, Any]
    scale: float | None
    impl: str
    dense_attention: Callable[[bool], tuple[Tensor, Tensor | None]]
    dense_layers: tuple[int, ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    model: ModelIdentity | None = None
    share: HeadShare | None = None
    models_waiting: Callable[[], int] = int
    precision: str = "model"
    # What happened, for the report.
    phase: Phase = Phase.DENSE
    head_density: Tensor | None = None
    # Who computed attention under masks, in the order of the calls; one list for all copies.
    kernels: list[str] = field(default_factory=list)
    search_watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def kernel(self) -> str:
        """Who computed this call, for the report: names of implementations, joined by ``"+"``.

        ``"own"`` where it was the model's own attention, ``"none"`` where nothing was left to do.
        """
        if self.head_density is None:
            return "own"
        return "+".join(dict.fromkeys(self.kernels)) or "none"

    @property
    def branch_shared(self) -> dict[str, Any]:
        """What this method kept for this (generation, branch), one for its layers.

        What one layer found and later ones use. Layers that see other tokens have one of their own.
        """
        batch, tokens = self.q.shape[:2]
        return self.shared.setdefault(f"{self.step.branch}: {batch} x {tokens} tokens", {})

    @property
    def heads(self) -> HeadShare:
        """Which of the layer's heads these are; all of them on one device."""
        return self.share or HeadShare.whole(self.q.shape[2])

    def dense(self) -> Tensor:
        """The output that the model would have computed without us, bit for bit."""
        return self.dense_attention(False)[0]

    def dense_with_lse(self) -> Attended:
        """:meth:`dense` and its row log-sum-exp, in one pass where the user's backend tells it.

        Where it does not, a second pass over queries and keys follows.
        """
        out, lse = self.dense_attention(True)
        return Attended(out, self.row_lse() if lse is None else lse)

    def ordered(self, order: Ordering | None) -> Call:
        """This call with its tokens in another order, text last (queries, keys, values, padding).

        The dense attention stays that of the model, in the model's order.
        """
        if order is None:
            return self
        moved = self._copy()
        moved.q, moved.k, moved.v = ops.reorder(order.perm, self.q, self.k, self.v)
        moved.key_valid = None if self.key_valid is None else order.apply(self.key_valid)
        if self.layout.order != "video_text":
            moved.layout = TokenLayout(self.layout.grid, self.layout.text)
        return moved

    def part(self, rows: Tensor | None = None, heads: slice | Tensor | None = None) -> Call:
        """This call for some of its queries or heads alone; the keys stay all there.

        Args:
            rows: Positions of the queries, ascending, int64; None for all.
            heads: Places of the heads among those of this call; None for all.
        """
        part = self._copy()
        if heads is not None:
            part.share = self.heads.part(heads)
            part.q, part.k, part.v = (x[:, :, heads] for x in (self.q, self.k, self.v))
        if rows is not None:
            part.q = part.q.index_select(1, rows)
        return part

    def in_model_dtype(self) -> Call:
        """This call with all its products in the model's dtype.

        For what is kept and compared with dense attention: rounding to 8 bits is another in every
        step, so that a residual would add that of its own step to all later ones.
        """
        if self.precision == "model":
            return self
        same = self._copy()
        same.precision = "model"
        return same

    def _copy(self) -> Call:
        # A third of the time that building it from its fields takes, in every call.
        copy = object.__new__(Call)
        for name in Call.__slots__:
            setattr(copy, name, getattr(self, name))
        return copy

    def tile_order(self, tile: tuple[int, int, int] | None) -> Ordering | None:
        """The order of the video tokens in tiles, text last; None if the tokens are in it already.

        Args:
            tile: (frames, height, width) of a tile, or None for raster order.
        """
        if tile is None and self.layout.text == 0:
            return None
        # Raster order with text is the order of one-row tiles: video in place, text moved last, so
        # that video blocks start at a block border wherever the model puts its text.
        return tile_ordering_on(self.layout, tile or (1, 1, self.layout.grid[2]), self.q.device)

    def spread_rows(self, tile: tuple[int, int, int] | None, stride: int) -> Tensor:
        """Places of every ``stride``-th query in :meth:`tile_order`, none in line with its next.

        See :func:`~dit_sparse.layout.spread_rows_on`.
        """
        tile = tile or (1, 1, self.layout.grid[2])
        return spread_rows_on(self.layout, tile, stride, self.q.device)

    def attention(
        self, mask: BlockMask | PackedMask | None = None, summary: BlockSummary | None = None
    ) -> Attended:
        """:func:`dit_sparse.kernels.ops.attention` on this call's tensors.

        Without a mask it is dense attention, which is computed in the model's dtype.
        """
        return ops.attention(
            self.q,
            self.k,
            self.v,
            mask,
            summary=summary,
            key_valid=self.key_valid,
            scale=self.scale,
            precision="model" if mask is None else self.precision,
            impl=self.impl,
            on_choice=None if mask is None else self.kernels.append,
        )

    def neighborhood_attention(
        self, mask: NeighborhoodMask, summary: BlockSummary | None = None
    ) -> Attended:
        """:func:`dit_sparse.kernels.ops.neighborhood_attention` on this call's tensors."""
        ops.check_model_precision("neighborhood attention", self.precision)
        return ops.neighborhood_attention(
            self.q,
            self.k,
            self.v,
            mask,
            summary=summary,
            key_valid=self.key_valid,
            scale=self.scale,
            impl=self.impl,
            on_choice=self.kernels.append,
        )

    def banded_attention(self, bands: BandMask) -> Attended:
        """:func:`dit_sparse.kernels.ops.banded_attention` on this call's tensors."""
        ops.check_model_precision("banded attention", self.precision)
        return ops.banded_attention(
            self.q,
            self.k,
            self.v,
            bands,
            key_valid=self.key_valid,
            scale=self.scale,
            impl=self.impl,
            on_choice=self.kernels.append,
        )

    def summarize(self, block: int, first_order: bool = False) -> BlockSummary:
        """:func:`dit_sparse.kernels.ops.summarize` of the blocks made of video alone.

        Expects text last, see :meth:`tile_order`.
        """
        return ops.summarize(
            self.k,
            self.v,
            block,
            blocks=video_blocks(self.layout, block),
            first_order=first_order,
            key_valid=self.key_valid,
            impl=self.impl,
        )

    def row_lse(self) -> Tensor:
        """:func:`dit_sparse.kernels.ops.row_lse` on this call's tensors."""
        return ops.row_lse(
            self.q, self.k, key_valid=self.key_valid, scale=self.scale, impl=self.impl
        )

    def block_mass(self, lse: Tensor, block: Block) -> Tensor:
        """:func:`dit_sparse.kernels.ops.block_mass` on this call's tensors."""
        return ops.block_mass(
            self.q, self.k, lse, block, key_valid=self.key_valid, scale=self.scale, impl=self.impl
        )

    def top_blocks(
        self, mass: Tensor, count: Tensor, block: Block, most: int | None = None
    ) -> ops.TopBlocks:
        """:func:`dit_sparse.kernels.ops.top_blocks` among the blocks made of video alone.

        Rows and columns with text are kept whole, which makes text conditioning exact. Expects text
        last, see :meth:`tile_order`.

        Args:
            mass: Block mass ``[batch, heads, q_blocks, kv_blocks]`` fp32.
            count: Video key blocks that each video query block keeps, ``[batch, heads]`` int.
            block: Tokens in a block, or in a (query, key) block.
            most: Upper bound of ``count``, on the host; None where it is not known.
        """
        rows, columns = block_sides(block)
        return ops.top_blocks(
            mass,
            count,
            block,
            (self.q.shape[1], self.k.shape[1]),
            free=(video_blocks(self.layout, rows), video_blocks(self.layout, columns)),
            longest=None if self.layout.text else most,
            impl=self.impl,
        )

    def record(
        self, phase: Phase, mask: PackedMask | NeighborhoodMask | BandMask | None = None
    ) -> None:
        """Notes what this call does, for the report. Reads nothing back from the device.

        Args:
            phase: What kind of call it is.
            mask: What it computes; None if all.
        """
        self.phase = phase
        if isinstance(mask, BandMask):
            self.head_density = mask.head_density(self.q.device)
        elif mask is not None:
            self.head_density = mask.head_density


@dataclass(frozen=True)
class Method(abc.ABC):
    """One way to compute self-attention, as a frozen dataclass of its hyper-parameters.

    Attributes:
        name: What users write, e.g. ``"adaspa"``.
        splits_heads: Whether it works where a device has some heads only: each head gets what it
            would if the others were there. True needs no more than to treat heads one by one;
            what looks at all of them, or at their numbers, goes through :attr:`Call.heads`.
    """

    name: ClassVar[str]
    splits_heads: ClassVar[bool] = False

    @abc.abstractmethod
    def attend(self, call: Call) -> Tensor:
        """Self-attention ``[batch, tokens, heads, dim]`` of ``call``; records its phase."""

    @classmethod
    @abc.abstractmethod
    def exact(cls) -> Method:
        """Settings at which the method must equal dense attention."""

    def at_budget(self, share: float) -> Method:
        """These settings with the one that sets the density turned so that about ``share`` is kept.

        What is kept exactly depends on blocks, text and, for adaptive methods, on the input; it
        never falls as ``share`` rises. See :mod:`dit_sparse.eval.protocol`.

        Args:
            share: In (0, 1]; 1 keeps everything.

        Raises:
            ValueError: If this method has no such setting.
        """
        settings = {f.name for f in fields(self)}
        if "density" in settings:
            return replace(self, density=share)  # type: ignore[call-arg]
        if "sparsity" in settings:
            return replace(self, sparsity=1 - share)  # type: ignore[call-arg]
        raise ValueError(
            f"method {self.name!r} has no setting for its density, so it cannot be compared at a "
            "given one; leave it out"
        )
