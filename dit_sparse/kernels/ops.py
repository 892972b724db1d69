"""The attention operations and the choice of who computes them.

Every file beside this one that defines an :class:`Impl` is a candidate. ``impl="auto"`` takes the
first candidate without a reason to refuse, in the order that was measured on such a device
(:mod:`~dit_sparse.kernels.measured`) or else of their priorities; a named one either runs or raises
with all its reasons. Nothing here imports triton or any other optional package.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from dit_sparse.bands import BandMask
from dit_sparse.kernels.measured import Query, device_class, measured_order
from dit_sparse.kernels.signature import (
    has_signature,
    is_recording,
    of_mask,
    of_summary,
    of_tensor,
    settle,
    settled,
)
from dit_sparse.kernels.summary import BlockSummary, add_skipped
from dit_sparse.mask import BlockMask, PackedMask, block_count, block_sides, block_sizes
from dit_sparse.neighborhood_mask import NeighborhoodMask

logger = logging.getLogger(__name__)

OnChoice = Callable[[str], object]
T = TypeVar("T")

# A kernel file may import these at its top; where one is missing its Impl is reported as such.
OPTIONAL_PACKAGES = frozenset({"triton"})


# What the products of attention are computed in: the operands' dtype, 8 bits for queries and keys,
# or for weights and values too (:mod:`~dit_sparse.kernels.fp8`).
FP8 = ("fp8_qk", "fp8_qkpv")
PRECISIONS = ("model", *FP8)


class Unsupported(NotImplementedError):
    """No implementation, or not the named one, can compute this call."""


class Attended(NamedTuple):
    """Attention over a set of keys, in the form that :func:`merge` combines.

    Attributes:
        out: ``[batch, q_len, heads, dim]`` in the queries' dtype; 0 where no key was kept.
        lse: Log of the softmax denominator, ``[batch, heads, q_len]`` fp32 (fp64 for fp64 input),
            natural logarithm, scale included; ``-inf`` where no key was kept. With a summary of
            skipped blocks their share is included.
        lse_kept: With a summary: the same over the kept keys alone. Else None.
    """

    out: Tensor
    lse: Tensor
    lse_kept: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """A validated call of :func:`attention` or :func:`row_lse` (there ``v`` is None).

    Attributes:
        q: As in :func:`attention`; so are the others.
        kept: What was worked out for calls of the same signature, see
            :class:`~dit_sparse.kernels.signature.Settled`; None where nothing is kept. A copy by
            ``replace`` is another call and has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: BlockMask | PackedMask | None
    key_valid: Tensor | None
    scale: float
    summary: BlockSummary | None = None
    precision: str = "model"
    kept: dict[str, Any] | None = field(default=None, init=False)

    def remember(self, kept: dict[str, Any]) -> None:
        """Lets this call know, and add to, what is kept for its signature."""
        object.__setattr__(self, "kept", kept)

    def keep(self, name: str, find: Callable[[AttentionCall], T]) -> T:
        """``find(self)``, called once for each signature; it looks at that alone."""
        if self.kept is None:
            return find(self)
        if name in self.kept:
            return self.kept[name]
        found = find(self)
        # While a CUDA graph is recorded, answers may be those of an exception.
        if not is_recording():
            self.kept[name] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class BandedCall:
    """A validated call of :func:`banded_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bands: BandMask
    key_valid: Tensor | None
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class SummarizeCall:
    """A validated call of :func:`summarize`; ``blocks`` is how many blocks count."""

    k: Tensor
    v: Tensor
    block: int
    blocks: int
    first_order: bool
    key_valid: Tensor | None


class TopBlocks(NamedTuple):
    """What :func:`top_blocks` chose.

    Attributes:
        mask: The kept blocks.
        kept_mass: Mass of the chosen blocks of every query block, ``[batch, heads, q_blocks]``;
            blocks that were kept without choice do not count.
    """

    mask: PackedMask
    kept_mass: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TopBlocksCall:
    """A validated call of :func:`top_blocks`."""

    mass: Tensor
    count: Tensor
    block: tuple[int, int]
    seq: tuple[int, int]
    free: tuple[int, int]
    longest: int

    def packed(self, bits: Tensor, kept_keys: Tensor) -> PackedMask:
        """The mask of ``bits``, given how many keys each query block keeps."""
        shares = _pair_shares(self.seq, self.block[0], bits.device)
        density = (kept_keys.double() @ shares).float()
        return PackedMask(bits, self.longest, density, self.block, self.seq)


@lru_cache(maxsize=64)
def _pair_shares(seq: tuple[int, int], block: int, device: torch.device) -> Tensor:
    """Share of all pairs that one key for all queries of a block is, ``[q_blocks]`` fp64."""
    return block_sizes(seq[0], block, device).double() / (seq[0] * seq[1])


@dataclass(frozen=True, slots=True, eq=False)
class ReorderCall:
    """A validated call of :func:`reorder`."""

    index: Tensor
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BlockMassCall:
    """A validated call of :func:`block_mass`."""

    q: Tensor
    k: Tensor
    lse: Tensor
    block: tuple[int, int]
    key_valid: Tensor | None
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class NeighborhoodCall:
    """The part of :func:`neighborhood_attention` inside partial blocks, validated.

    The result is attention over the visible pairs of ``partial`` and what ``seen`` holds, in one
    softmax.

    Attributes:
        q: Queries ``[batch, tokens, heads, dim]``.
        k: Keys, same shape.
        v: Values, same shape.
        mask: The rule, shared by batch and heads.
        partial: Its partial blocks.
        seen: Attention over the full blocks, or None if there are none. Its tensors may be
            overwritten.
        key_valid: Keys that exist, ``[batch, tokens]`` bool, or None.
        scale: Factor on the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: NeighborhoodMask
    partial: BlockMask
    seen: Attended | None
    key_valid: Tensor | None
    scale: float


class Impl(abc.ABC):
    """One way to compute one operation. A file in this package that defines one is found.

    Attributes:
        op: ``"attention"``, ``"row_lse"``, ``"block_mass"``, ``"summarize"``, ``"top_blocks"``,
            ``"reorder"``, ``"neighborhood"`` or ``"banded_attention"``.
        name: What ``impl=`` selects, e.g. ``"triton"``; of a file that imports an optional package
            at its top, also the first word of the file's name.
        rank: Preference of ``impl="auto"`` where nothing was measured; higher wins.
        summaries: Whether an attention implementation adds ``call.summary`` itself. If not, it is
            given calls without one and :func:`~dit_sparse.kernels.summary.add_skipped` follows.
        precisions: Of :data:`PRECISIONS`, what an attention implementation computes.
        packages: Names of the distributions any of which it needs; empty if none.
        partner: Who computes the operations that it does not have, where it is named.
    """

    op: ClassVar[str]
    name: ClassVar[str]
    rank: ClassVar[int]
    summaries: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = ("model",)
    packages: ClassVar[tuple[str, ...]] = ()
    partner: ClassVar[str | None] = None

    def priority(self, call: Any) -> int:
        """``rank``, where it depends on the call."""
        return self.rank

    @abc.abstractmethod
    def reasons(self, call: Any) -> list[str]:
        """Why this implementation cannot compute ``call``; empty if it can.

        On CUDA it is asked once for calls of the same operands but for their numbers, see
        :mod:`dit_sparse.kernels.signature`, so it must not look at these.
        """

    @abc.abstractmethod
    def __call__(self, call: Any) -> Any:
        """Computes the validated ``call``."""


class _Found(NamedTuple):
    """What the files of this package define.

    Attributes:
        ranked: Implementations by operation, best first.
        missing: Why some kernel files could not load, by implementation.
        operations: What each implementation computes.
        partners: Who computes the rest, where an implementation says so.
    """

    ranked: dict[str, tuple[Impl, ...]]
    missing: dict[str, str]
    operations: dict[str, set[str]]
    partners: dict[str, str]


@lru_cache(maxsize=1)
def _discover() -> _Found:
    missing: dict[str, str] = {}
    package = importlib.import_module("dit_sparse.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        try:
            importlib.import_module(f"dit_sparse.kernels.{module.name}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in OPTIONAL_PACKAGES:
                raise
            missing[module.name.split("_")[0]] = f"package {error.name!r} is not installed"
    found: dict[str, list[Impl]] = {}
    operations: dict[str, set[str]] = {}
    partners: dict[str, str] = {}
    for kind in _concrete(Impl):  # type: ignore[type-abstract]
        if kind.packages and not any(_installed(name) for name in kind.packages):
            wanted = " or ".join(repr(name) for name in kind.packages)
            missing[kind.name] = f"package {wanted} is not installed"
            continue
        found.setdefault(kind.op, []).append(kind())
        operations.setdefault(kind.name, set()).add(kind.op)
        if kind.partner is not None:
            partners[kind.name] = kind.partner
    ranked = {op: tuple(sorted(impls, key=lambda i: -i.rank)) for op, impls in found.items()}
    return _Found(ranked, missing, operations, partners)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _concrete(kind: type[Impl]) -> list[type[Impl]]:
    below = [leaf for child in kind.__subclasses__() for leaf in _concrete(child)]
    own = [] if getattr(kind, "__abstractmethods__", None) else [kind]
    return own + below


def implementations(op: str) -> tuple[Impl, ...]:
    """All implementations of ``op``, best ranked first."""
    return _discover().ranked.get(op, ())


# Why each implementation was chosen in this process, in the order of the first times.
_chosen: dict[str, dict[str, None]] = {}


def why_chosen(name: str) -> str:
    """Why calls went to implementation ``name`` so far; empty if none did."""
    return "; ".join(_chosen.get(name, ()))


@lru_cache(maxsize=256)
def _log_choice(op: str, name: str, device: str, dtype: torch.dtype, why: str) -> None:
    logger.info("%s on %s (%s) is computed by %r, %s", op, device, dtype, name, why)


def check_impl(impl: str) -> None:
    """Refuses an implementation name that no call could use, before any work is done.

    Raises:
        ValueError: If ``impl`` is neither ``"auto"`` nor a known name.
        Unsupported: If it is known but its package is not installed.
    """
    found = _discover()
    if impl == "auto" or impl in found.operations:
        return
    if impl in found.missing:
        raise Unsupported(f"impl={impl!r} cannot be used: {found.missing[impl]}")
    names = sorted({*found.operations, *found.missing})
    raise ValueError(f"impl must be 'auto' or one of {names}, got {impl!r}")


def _responsible(op: str, impl: str) -> str:
    """``impl``, or its partner if ``impl`` has no ``op``."""
    found = _discover()
    return impl if op in found.operations.get(impl, ()) else found.partners.get(impl, impl)


AnyCall = (
    AttentionCall
    | BandedCall
    | BlockMassCall
    | NeighborhoodCall
    | ReorderCall
    | SummarizeCall
    | TopBlocksCall
)


def _operand(call: AnyCall) -> tuple[str, Tensor]:
    """The tensor that messages describe a call by, and its name."""
    if isinstance(call, ReorderCall):
        return "tensors", call.tensors[0]
    name = next(name for name in ("q", "k", "mass") if hasattr(call, name))
    return name, getattr(call, name)


@lru_cache(maxsize=16)
def compute_capability(device: torch.device) -> tuple[int, int]:
    """That of a CUDA device; kept, since implementations ask at every call."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def _device_class(index: int) -> str:
    return device_class(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def _measured_query(op: str, call: AnyCall) -> Query | None:
    """What the table of the device is asked; None where nothing is measured."""
    if not isinstance(call, AttentionCall) or not call.q.is_cuda or call.precision != "model":
        return None
    mask, tokens = call.mask, (call.q.shape[1] * call.k.shape[1]) ** 0.5
    density, block = 1.0, None
    if mask is not None:
        # Bounds on the host: the density itself would have to be read back.
        longest = mask.longest if isinstance(mask, PackedMask) else mask.kv_indices.shape[-1]
        density, block = longest / mask.shape[3], mask.block
    if call.summary is not None:
        op += "+summary"
    dtype = str(call.q.dtype).removeprefix("torch.")
    return Query(op, dtype, call.q.shape[-1], block, tokens, density)


def _candidates(op: str, call: AnyCall) -> list[tuple[Impl, str]]:
    """Implementations of ``op`` in the order in which ``auto`` asks them, and why there."""
    ranked = sorted(implementations(op), key=lambda i: -i.priority(call))
    query = _measured_query(op, call)
    if query is None:
        return [(impl, "by its rank") for impl in ranked]
    device = _device_class(_operand(call)[1].device.index or 0)
    order = measured_order(device, query)
    known = {impl.name: impl for impl in ranked if impl.name in order}
    # The measured ones change places among themselves; the others keep theirs.
    measured = iter([known[name] for name in order if name in known])
    return [
        (next(measured), f"as measured on {device}") if i.name in known else (i, "by its rank")
        for i in ranked
    ]


def _precision(call: AnyCall) -> str:
    return call.precision if isinstance(call, AttentionCall) else "model"


def _label(candidate: Impl, call: AnyCall) -> str:
    """What reports call ``candidate`` where it computes ``call``, e.g. ``"triton fp8_qk"``."""
    precision = _precision(call)
    return candidate.name if precision == "model" else f"{candidate.name} {precision}"


def _precision_reasons(candidate: Impl, call: AnyCall) -> list[str]:
    precision = _precision(call)
    if precision in candidate.precisions:
        return []
    return [f"computes in precision {' or '.join(candidate.precisions)}, not {precision}"]


def check_model_precision(op: str, precision: str) -> None:
    """Refuses ``op``, which has no form in 8 bits, unless ``precision`` is ``"model"``.

    Raises:
        ValueError, Unsupported: On an unknown, or another precision.
    """
    check_precision(precision)
    if precision != "model":
        raise Unsupported(
            f"{op} is computed in the model's dtype only, got attention_precision={precision!r}; "
            "leave it at 'model', or choose a method whose masks are lists of blocks"
        )


def check_precision(precision: str) -> None:
    """Raises ValueError unless ``precision`` is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"attention_precision must be one of {PRECISIONS}, got {precision!r}")


def select(op: str, call: AnyCall, impl: str = "auto") -> Impl:
    """The implementation that computes ``call``.

    Raises:
        ValueError: If ``impl`` names nothing known.
        Unsupported: If the named one, or all of them, refuse; every reason is listed.
    """
    check_impl(impl)
    operand_name, operand = _operand(call)
    refusals = []
    if impl == "auto":
        candidates = _candidates(op, call)
    else:
        wanted = _responsible(op, impl)
        why = "as named" if wanted == impl else f"for {impl!r}, which has no {op}"
        candidates = [(i, why) for i in implementations(op) if i.name == wanted]
    # Two of one name may have a precision each; the other one's is no reason worth telling.
    able = [(i, why) for i, why in candidates if not _precision_reasons(i, call)]
    for candidate, why in able or candidates:
        reasons = _precision_reasons(candidate, call) or candidate.reasons(call)
        if not reasons:
            _chosen.setdefault(_label(candidate, call), {})[f"{op} {why}"] = None
            _log_choice(op, candidate.name, operand.device.type, operand.dtype, why)
            return candidate
        refusals += [f"{candidate.name}: {reason}" for reason in reasons]
    if impl == "auto":
        refusals += [f"{name}: {reason}" for name, reason in _discover().missing.items()]
    raise Unsupported(
        f"{op} of {operand_name} {tuple(operand.shape)} {operand.dtype} on {operand.device} with "
        f"impl={impl!r} cannot be computed:\n  "
        + "\n  ".join(refusals or ["no implementation of this operation"])
        + ("" if impl == "auto" else "\nimpl='auto' asks the other implementations too")
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | PackedMask | None = None,
    *,
    summary: BlockSummary | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    precision: str = "model",
    impl: str = "auto",
    on_choice: OnChoice | None = None,
) -> Attended:
    """Softmax attention over the blocks that ``mask`` keeps, with its log-sum-exp.

    ``out_i = sum_j exp(s_ij - lse_i) v_j`` and ``lse_i = log sum_j exp(s_ij)`` over the kept,
    valid keys j, with ``s_ij = scale * q_i . k_j``. Skipped blocks contribute nothing or, with a
    ``summary``, what :class:`BlockSummary` says, inside the same softmax.

    Args:
        q: Queries ``[batch, q_len, heads, dim]``, any strides with a contiguous last dimension.
        k: Keys ``[batch, kv_len, heads, dim]``.
        v: Values ``[batch, kv_len, heads, dim]``.
        mask: Blocks to compute; ``None`` computes all.
        summary: Of the key blocks of ``mask``, from :func:`summarize`; ``None`` drops what the mask
            skips.
        key_valid: Keys that exist (not padding), ``[batch, kv_len]`` bool; ``None`` means all.
            Keys and values of padding may hold anything, NaN included.
        scale: Factor on the scores; ``dim ** -0.5`` if None.
        precision: ``"model"``, the dtype of the operands; ``"fp8_qk"``, queries and keys in 8 bits;
            ``"fp8_qkpv"``, weights and values too. See :mod:`~dit_sparse.kernels.fp8` for what is
            rounded and how. Summaries, output and log-sum-exp are as without it.
        impl: ``"auto"`` or the name of an implementation, which then never falls back.
        on_choice: Told the name of the implementation that computes it, with the precision where
            that is not the model's, e.g. ``"triton fp8_qk"``.

    Returns:
        ``Attended(out, lse, lse_kept)``; a query that has no key gives out 0 and lse ``-inf``.

    Raises:
        ValueError: On a shape, dtype or device mismatch, or an unknown ``impl``.
        Unsupported: If nothing, or not the named implementation, can compute it.
    """
    key = None
    if has_signature(q):
        key = (
            "attention", impl, scale, of_tensor(q), of_tensor(k), of_tensor(v), of_mask(mask),
            of_summary(summary), of_tensor(key_valid), precision,
        )  # fmt: skip
    known = settled(key)
    if known is None:
        _check_operands(q, k, v, key_valid)
        _check_mask(mask, q, k)
        check_precision(precision)
        if summary is not None:
            _check_summary(summary, mask, k)
    call = AttentionCall(q, k, v, mask, key_valid, _scale(q, scale), summary, precision)
    if known is None:
        known = settle(key, select("attention", call, impl))
    call.remember(known.kept)
    chosen: Impl = known.impl
    if on_choice is not None:
        on_choice(_label(chosen, call))
    if summary is None or mask is None or chosen.summaries:
        return chosen(call)
    kept = chosen(replace(call, summary=None))
    out, lse = add_skipped(kept.out, kept.lse, q, mask, summary, call.scale)
    return Attended(out, lse, kept.lse)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: NeighborhoodMask,
    *,
    summary: BlockSummary | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    on_choice: OnChoice | None = None,
) -> Attended:
    """Softmax attention over the pairs that ``mask`` shows, with its log-sum-exp.

    Full blocks go through :func:`attention`. Where there are partial blocks, a second kernel goes
    on with the same softmax inside those and applies the rule of the mask; where there are none,
    no rule is ever computed.

    Args:
        q: Queries ``[batch, tokens, heads, dim]`` in the order of the mask.
        k: Keys, same shape.
        v: Values, same shape.
        mask: What each query sees.
        summary: Of the key blocks, from :func:`summarize`, for those that a query block does not
            visit. Hidden keys of a partial block contribute nothing.
        key_valid: As in :func:`attention`.
        scale: As in :func:`attention`.
        impl: As in :func:`attention`; it has to compute both parts.
        on_choice: Told who computes the full blocks, then who the partial ones.

    Returns:
        As :func:`attention`.

    Raises:
        ValueError, Unsupported: As :func:`attention`.
    """
    shared: dict[str, Any] = {
        "key_valid": key_valid,
        "scale": scale,
        "impl": impl,
        "on_choice": on_choice,
    }
    if mask.partial is None:
        return attention(q, k, v, mask.full, summary=summary, **shared)
    _check_operands(q, k, v, key_valid)
    _check_mask(mask.visited, q, k)
    if summary is not None:
        _check_summary(summary, mask.visited, k)
    call = NeighborhoodCall(q, k, v, mask, mask.partial, None, key_valid, _scale(q, scale))
    chosen = select("neighborhood", call, impl)
    if mask.full is not None:
        call = replace(call, seen=attention(q, k, v, mask.full, **shared))
    if on_choice is not None:
        on_choice(chosen.name)
    kept = chosen(call)
    if summary is None:
        return kept
    out, lse = add_skipped(kept.out, kept.lse, q, mask.visited, summary, call.scale)
    return Attended(out, lse, kept.lse)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bands: BandMask,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    on_choice: OnChoice | None = None,
) -> Attended:
    """:func:`attention` under patterns that are bands and columns of blocks, without block lists.

    Every head has its own pattern, in one of two orders of the video tokens; all tensors stay in
    the model's order. Keys and values of a skipped head are not read.

    Args:
        q: Queries ``[batch, tokens, heads, dim]``, any strides with a contiguous last dimension.
        k: Keys, same shape.
        v: Values, same shape.
        bands: Pattern of each head, and what the tokens are.
        key_valid: As in :func:`attention`.
        scale: As in :func:`attention`.
        impl: As in :func:`attention`.
        on_choice: As in :func:`attention`.

    Returns:
        ``Attended(out, lse)``; a query that has no key gives out 0 and lse ``-inf``.

    Raises:
        ValueError, Unsupported: As :func:`attention`.
    """
    _check_operands(q, k, v, key_valid)
    expected = (bands.layout.tokens, bands.layout.tokens, len(bands.heads))
    if (q.shape[1], k.shape[1], q.shape[2]) != expected:
        raise ValueError(
            f"the bands were made for {expected[0]} tokens and {expected[2]} heads, got "
            f"{q.shape[1]} queries, {k.shape[1]} keys and {q.shape[2]} heads"
        )
    call = BandedCall(q, k, v, bands, key_valid, _scale(q, scale))
    chosen = select("banded_attention", call, impl)
    if on_choice is not None:
        on_choice(chosen.name)
    return chosen(call)


def summarize(
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    blocks: int | None = None,
    first_order: bool = False,
    key_valid: Tensor | None = None,
    impl: str = "auto",
) -> BlockSummary:
    """Means of all key blocks, and how their keys and values vary together inside them.

    Args:
        k: Keys ``[batch, kv_len, heads, dim]``.
        v: Values, same shape.
        block: Tokens in a key block; the last one may be ragged.
        blocks: Only the first so many blocks count, e.g. those of the video where text follows;
            the others are summarised with a count of 0. None means all.
        first_order: Whether to compute the slope.
        key_valid: Keys that exist, ``[batch, kv_len]`` bool; only these enter.
        impl: As in :func:`attention`.

    Raises:
        ValueError, Unsupported: As :func:`attention`.
    """
    key = None
    if has_signature(k):
        key = (
            "summarize", impl, of_tensor(k), of_tensor(v), block, blocks, first_order,
            of_tensor(key_valid),
        )  # fmt: skip
    known = settled(key)
    if known is None:
        _check_operands(k, k, v, key_valid)
        if block < 1:
            raise ValueError(f"block must be at least 1 token, got {block}")
    present = block_count(k.shape[1], block)
    blocks = present if blocks is None else blocks
    if not 0 <= blocks <= present:
        raise ValueError(f"blocks must be in 0..{present} for {k.shape[1]} keys, got {blocks}")
    call = SummarizeCall(k, v, block, blocks, first_order, key_valid)
    if known is None:
        known = settle(key, select("summarize", call, impl))
    return known.impl(call)


def row_lse(
    q: Tensor,
    k: Tensor,
    mask: BlockMask | PackedMask | None = None,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """The ``lse`` of :func:`attention` alone: one pass over the keys, none over the values.

    Returns:
        ``[batch, heads, q_len]`` fp32 (fp64 for fp64 input), natural logarithm, scale included.

    Raises:
        ValueError, Unsupported: As :func:`attention`.
    """
    key = None
    if has_signature(q):
        key = (
            "row_lse", impl, scale, of_tensor(q), of_tensor(k), of_mask(mask), of_tensor(key_valid)
        )  # fmt: skip
    known = settled(key)
    if known is None:
        _check_operands(q, k, None, key_valid)
        _check_mask(mask, q, k)
    call = AttentionCall(q, k, None, mask, key_valid, _scale(q, scale))
    if known is None:
        known = settle(key, select("row_lse", call, impl))
    call.remember(known.kept)
    return known.impl(call)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: tuple[int, int] | int,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention mass of every block under given row normalisers.

    ``W[p, c] = sum_{i in block p, j in block c} exp(s_ij - lse_i)`` over real rows and valid keys.
    With the true LSE the row sums of W are the numbers of rows in each block.

    Args:
        q: Queries ``[batch, q_len, heads, dim]``.
        k: Keys ``[batch, kv_len, heads, dim]``.
        lse: Row normalisers ``[batch, heads, q_len]`` fp32, natural logarithm; rows with ``-inf``
            contribute nothing.
        block: Tokens in a (query, key) block; one int for both.
        key_valid: Keys that exist, ``[batch, kv_len]`` bool.
        scale: Factor on the scores; ``dim ** -0.5`` if None.
        impl: As in :func:`attention`.

    Returns:
        ``[batch, heads, q_blocks, kv_blocks]`` fp32 (fp64 for fp64 input).

    Raises:
        ValueError, Unsupported: As :func:`attention`.

    Source: AdaSpa (arXiv 2502.21079), algorithms 1 and 2; the paper prints ``Log`` where its own
    safe-softmax equation requires ``exp``.
    """
    block = block_sides(block)
    key = None
    if has_signature(q):
        key = (
            "block_mass", impl, scale, of_tensor(q), of_tensor(k), of_tensor(lse), block,
            of_tensor(key_valid),
        )  # fmt: skip
    known = settled(key)
    if known is None:
        _check_operands(q, k, None, key_valid)
        if min(block) < 1:
            raise ValueError(f"block must be at least 1 token, got {block}")
        expected = (q.shape[0], q.shape[2], q.shape[1])
        if tuple(lse.shape) != expected or lse.device != q.device:
            raise ValueError(
                f"lse must be [batch, heads, q_len] = {expected} on {q.device}, got "
                f"{tuple(lse.shape)} on {lse.device}"
            )
    call = BlockMassCall(q, k, lse, block, key_valid, _scale(q, scale))
    if known is None:
        known = settle(key, select("block_mass", call, impl))
    return known.impl(call)


def top_blocks(
    mass: Tensor,
    count: Tensor,
    block: tuple[int, int] | int,
    seq: tuple[int, int] | int,
    *,
    free: tuple[int, int] | int | None = None,
    longest: int | None = None,
    impl: str = "auto",
) -> TopBlocks:
    """Keeps, in every query block, the key blocks of largest mass ("row-wise" selection).

    Args:
        mass: Not negative, ``[batch, heads, q_blocks, kv_blocks]``; fp32 for all implementations.
        count: Key blocks that each query block of a head keeps, ``[batch | 1, heads | 1]`` int;
            equal masses are taken in ascending order of blocks.
        block: Tokens in a (query, key) block; one int for both.
        seq: Tokens of the (query, key) sequence; one int for both.
        free: Only the first so many (query, key) blocks compete (those of the video); all others
            are kept as rows and as columns. One int for both; None means all compete.
        longest: Upper bound of the blocks that a row keeps, on the host; all if None.
        impl: As in :func:`attention`.

    Raises:
        ValueError, Unsupported: As :func:`attention`.
    """
    block = block_sides(block)
    seq = block_sides(seq)
    key = None
    if has_signature(mass):
        key = ("top_blocks", impl, of_tensor(mass), of_tensor(count), block, seq)
    known = settled(key)
    rows, columns = block_count(seq[0], block[0]), block_count(seq[1], block[1])
    if known is None:
        if mass.ndim != 4 or tuple(mass.shape[2:]) != (rows, columns):
            raise ValueError(
                f"mass must be [batch, heads, {rows}, {columns}] for {seq} tokens in blocks of "
                f"{block}, got {tuple(mass.shape)}"
            )
        if count.ndim != 2 or any(
            n not in (1, m) for n, m in zip(count.shape, mass.shape, strict=False)
        ):
            raise ValueError(
                f"count must be [batch, heads] = {tuple(mass.shape[:2])}, got {tuple(count.shape)}"
            )
    if not isinstance(free, tuple):
        free = (rows, columns) if free is None else (free, free)
    longest = columns if longest is None else max(1, min(longest, columns))
    call = TopBlocksCall(mass, count, block, seq, free, longest)
    if known is None:
        known = settle(key, select("top_blocks", call, impl))
    return known.impl(call)


def reorder(index: Tensor, *tensors: Tensor, impl: str = "auto") -> tuple[Tensor, ...]:
    """``x[:, index]`` of every tensor, contiguous.

    Args:
        index: Which token comes at each place, ``[tokens]`` int64.
        tensors: ``[batch, tokens, ...]``.
        impl: As in :func:`attention`.

    Raises:
        ValueError, Unsupported: As :func:`attention`.
    """
    if not tensors:
        raise ValueError("expected at least one tensor, got none")
    key = None
    if has_signature(tensors[0]):
        key = ("reorder", impl, of_tensor(index), *map(of_tensor, tensors))
    known = settled(key)
    if known is None and (index.ndim != 1 or index.dtype != torch.int64):
        raise ValueError(f"index must be [tokens] int64, got {tuple(index.shape)} {index.dtype}")
    call = ReorderCall(index, tensors)
    if known is None:
        known = settle(key, select("reorder", call, impl))
    return known.impl(call)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of log-sum-exps and statistics: fp64 for fp64 operands, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(a: Attended, b: Attended) -> Attended:
    """Attention over the union of two disjoint sets of keys.

    ``lse = logaddexp(lse_a, lse_b)`` and ``out = sum_x exp(lse_x - lse) out_x``. A row that is
    empty in both stays 0 with ``-inf``.

    Args:
        a: Result over the first set, shapes as in :class:`Attended`.
        b: Result over the second set.
    """
    lse = torch.logaddexp(a.lse, b.lse)
    # -inf minus -inf is NaN; a row that is empty on both sides has weight 0 on both.
    floor = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a = (a.lse - floor).exp().transpose(1, 2).unsqueeze(-1)
    weight_b = (b.lse - floor).exp().transpose(1, 2).unsqueeze(-1)
    out = weight_a * a.out.to(lse.dtype) + weight_b * b.out.to(lse.dtype)
    return Attended(out.to(a.out.dtype), lse)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check_operands(q: Tensor, k: Tensor, v: Tensor | None, key_valid: Tensor | None) -> None:
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, tensor in named.items():
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point [batch, tokens, heads, dim] tensor, got "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, got q {q.dtype} on {q.device} and "
                f"{name} {tensor.dtype} on {tensor.device}"
            )
        if (tensor.shape[0], *tensor.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(
                "q, k and v must agree in batch, heads and dim, got q "
                f"{tuple(q.shape)} and {name} {tuple(tensor.shape)}"
            )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if key_valid is not None and (
        key_valid.dtype != torch.bool
        or tuple(key_valid.shape) != (k.shape[0], k.shape[1])
        or key_valid.device != q.device
    ):
        raise ValueError(
            f"key_valid must be bool [batch, kv_len] = {(k.shape[0], k.shape[1])} on {q.device}, "
            f"got {key_valid.dtype} {tuple(key_valid.shape)} on {key_valid.device}"
        )


def _check_mask(mask: BlockMask | PackedMask | None, q: Tensor, k: Tensor) -> None:
    if mask is None:
        return
    if mask.seq != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"the mask was made for {mask.seq} (query, key) tokens, got {(q.shape[1], k.shape[1])}"
        )
    if mask.shape[0] not in (1, q.shape[0]) or mask.shape[1] not in (1, q.shape[2]):
        raise ValueError(
            f"the mask is for (batch, heads) = {mask.shape[:2]}; q has "
            f"{(q.shape[0], q.shape[2])}: each must be 1 or the same"
        )
    if mask.device != q.device:
        raise ValueError(f"the mask is on {mask.device}, q on {q.device}: use mask.to(q.device)")


def _check_summary(summary: BlockSummary, mask: BlockMask | PackedMask | None, k: Tensor) -> None:
    if mask is None:
        raise ValueError("a summary stands for blocks that a mask skips; got a summary and no mask")
    blocks = (k.shape[0], mask.shape[3])
    slope = (k.shape[0], k.shape[2], k.shape[3], k.shape[3])
    shapes = {
        "key_mean": (summary.key_mean, (*blocks, *k.shape[2:])),
        "value_mean": (summary.value_mean, (*blocks, *k.shape[2:])),
        "count": (summary.count, blocks),
        "slope": (summary.slope, slope),
        "rounded": (summary.rounded, slope),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected or tensor.device != k.device:
            raise ValueError(
                f"the summary's {name} must be {expected} on {k.device} for a mask of "
                f"{mask.shape[3]} key blocks, got {tuple(tensor.shape)} on {tensor.device}; make "
                f"it with summarize(k, v, {mask.block[1]})"
            )
