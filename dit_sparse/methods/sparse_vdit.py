"""Sparse-vDiT: a fixed pattern for every head, searched once offline.

Source: Sparse-vDiT, arXiv 2506.03065. No code was released; where the text leaves a choice open it
is made here and said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from torch import Tensor

from dit_sparse.bands import BandMask, video_blocks
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call, Method, ModelIdentity
from dit_sparse.methods.plan import DENSE, MODE_NAMES, Mode, Plan, load_plan
from dit_sparse.schedule import Phase, Step

AUTO = "auto"
SHIPPED = Path(__file__).parent / "plans"
UNIFORM_DENSITY = 0.25
UNIFORM_BLOCK = 64


@dataclass(frozen=True)
class SparseVDiT(Method):
    """Every head computes the pattern that a plan, searched offline, gives it at this step.

    The observation behind it: which pattern a head's attention has depends on the layer, the head
    and the denoising step, hardly on the prompt. Patterns (``dit_sparse.methods.plan.Mode``):

    * ``dense``;
    * ``skip``: the head's output is zero, its keys and values are never read;
    * ``diagonal``: a band around the diagonal of the frame-major matrix;
    * ``multi_diagonal``: evenly spaced diagonals, the same place in other frames: a band once
      tokens are ordered by place and then by frame;
    * ``vertical_stripe``: evenly spaced key blocks that every query sees.

    Patterns count in blocks of video tokens. Blocks with text are kept as rows and as columns of
    every head that is not skipped. A layer whose heads are all dense runs the model's own
    attention, bit for bit; otherwise all heads of the layer run in at most two kernel launches.

    A plan fits one model at one video size. Other step counts and schedulers are mapped to the
    plan's steps by the noise level.

    Attributes:
        plan: Path of a plan (``*.json``) that ``dit-sparse search`` wrote, the name of a shipped
            one, or ``"auto"``: the shipped plan that fits the model.
        mode: One pattern for all heads at all steps instead of a plan, e.g. ``"diagonal"``: the
            window attention that the paper compares with.
        density: With ``mode``: share of the video blocks that it keeps, in (0, 1]; 0.25 if None.
        block: With ``mode``: tokens in a block, 64 or 128; 64 if None. A plan brings its own.
        warmup: Steps at the beginning that are dense whatever the plan says: a count (int) or a
            share of all steps (float in [0, 1]).
        any_grid: Whether to use a plan at a video size that it was not searched at. Patterns keep
            their densities, but nothing says that they are the right ones there.

    Raises:
        ValueError: On a value outside these ranges, or an unusable plan. A plan that does not fit
            the model is refused at its first attention call, with all reasons.
        FileNotFoundError: If there is no such plan.

    Source: arXiv 2506.03065, section 4. Band widths, stripe counts and the treatment of text are
    not in the text; see ``docs/methods/sparse_vdit.md`` for what is chosen here.
    """

    name = "sparse_vdit"
    splits_heads = True

    plan: str = AUTO
    mode: str | None = None
    density: float | None = None
    block: int | None = None
    warmup: int | float = 0
    any_grid: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.plan, str) or not self.plan:
            raise ValueError(f"plan must be a path or the name of a plan, got {self.plan!r}")
        if self.mode is None:
            if self.density is not None or self.block is not None:
                raise ValueError(
                    "density and block go with mode, a plan brings its own; got "
                    f"density={self.density!r}, block={self.block!r}"
                )
            # Reads the plan now, so that an unusable one is refused here.
            _ = self._chosen
        else:
            self._check_mode()
        is_share = isinstance(self.warmup, float)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int | float):
            raise ValueError(f"warmup must be a number of steps or a share, got {self.warmup!r}")
        if not self.warmup >= 0 or (is_share and self.warmup > 1):
            raise ValueError(
                f"warmup must be a count >= 0 (int) or a share in [0, 1] (float), got {self.warmup}"
            )

    @cached_property
    def _chosen(self) -> Plan | None:
        """The plan that the user named, or None."""
        return None if self.plan == AUTO else _load(self.plan)

    def _check_mode(self) -> None:
        if self.plan != AUTO:
            raise ValueError(f"give a plan or a mode, got plan={self.plan!r}, mode={self.mode!r}")
        if self.mode in ("dense", "skip") and self.density is not None:
            raise ValueError(f"mode {self.mode!r} has no density, got {self.density!r}")
        if self.block not in (None, 64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")
        self._uniform()

    def _uniform(self) -> Mode:
        """The mode of all heads."""
        assert self.mode is not None
        if self.mode not in MODE_NAMES or self.mode in ("dense", "skip"):
            return Mode(self.mode)
        return Mode(self.mode, UNIFORM_DENSITY if self.density is None else self.density)

    @classmethod
    def exact(cls) -> SparseVDiT:
        # Through the banded kernels, which "dense" would not use.
        return cls(mode="diagonal", density=1.0)

    def attend(self, call: Call) -> Tensor:
        bands = self._bands(call)
        if bands is None:
            call.record(Phase.DENSE)
            return call.dense()
        call.record(Phase.SPARSE, bands)
        return call.banded_attention(bands).out

    def _bands(self, call: Call) -> BandMask | None:
        """Pattern of every head, None where all are dense."""
        if is_warmup(self.warmup, call.step):
            return None
        if self.mode is not None:
            block, row = self.block or UNIFORM_BLOCK, (0,) * len(call.heads.own)
            return _band_mask((self._uniform(),), row, block, call.layout)
        grid = None if self.any_grid else call.layout.grid
        dim = call.q.shape[3]
        total = call.heads.total
        plan = fitting_plan(self._chosen, call.model, call.layers, total, dim, grid)
        component = call.model.component if call.model else ""
        step = plan.step_at(call.step.progress, component)
        row = step.table[call.layer]
        row = tuple(row[number] for number in call.heads.own)
        return _band_mask(plan.modes, row, plan.block, call.layout)


def is_warmup(warmup: int | float, step: Step) -> bool:
    """Whether ``step`` belongs to the dense beginning; shares go by noise where no count is known.

    Args:
        warmup: Steps (int) or a share of all steps (float).
        step: Where the generation stands.
    """
    if isinstance(warmup, int):
        return step.index < warmup
    if step.total is None:
        return step.progress < warmup
    return step.index < round(warmup * step.total)


@lru_cache(maxsize=4096)
def _band_mask(
    modes: tuple[Mode, ...], row: tuple[int, ...], block: int, layout: TokenLayout
) -> BandMask | None:
    """The patterns of heads with the modes ``row``; None if all are dense."""
    chosen = [modes[mode] for mode in row]
    if all(mode == DENSE for mode in chosen):
        return None
    blocks = video_blocks(layout, block)
    return BandMask(tuple(mode.pattern(blocks) for mode in chosen), block, layout)


def shipped_plans() -> dict[str, Path]:
    """The plans that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def _load(name: str) -> Plan:
    shipped = shipped_plans()
    if name in shipped:
        return load_plan(shipped[name])
    if not name.endswith(".json"):
        raise ValueError(
            f"plan must be {AUTO!r}, a path that ends in .json or one of {sorted(shipped)}, got "
            f"{name!r}"
        )
    return load_plan(name)


@lru_cache(maxsize=256)
def fitting_plan(
    chosen: Plan | None,
    model: ModelIdentity | None,
    layers: int,
    heads: int,
    dim: int,
    grid: tuple[int, int, int] | None,
) -> Plan:
    """``chosen``, or else the first shipped plan that fits.

    Args:
        chosen: The plan that the user named; None to look among the shipped ones.
        model: The model at hand; None where it is not known.
        layers: Its self-attention layers.
        heads: Its attention heads.
        dim: Channels of a head.
        grid: Its video tokens; None to accept a plan for any.

    Raises:
        ValueError: If none fits; lists the reasons and the command that makes one.
    """
    shipped = {name: load_plan(path) for name, path in shipped_plans().items()}
    refusals = []
    for name, plan in shipped.items() if chosen is None else [("this plan", chosen)]:
        reasons = plan.mismatches(model, layers, heads, dim, grid)
        if not reasons:
            return plan
        refusals.append(f"{name}: {'; '.join(reasons)}")
    kind = model.kind if model is not None else "model"
    at = "" if grid is None else f" at {grid} (frames, height, width) tokens"
    raise ValueError(
        f"Sparse-vDiT has no plan for this {kind} of {layers} layers and {heads} heads{at}:\n  "
        + "\n  ".join(refusals)
        + "\nMake one with `dit-sparse search --model MODEL --output plan.json`, with the --height,"
        " --width and --frames of the videos to come, and pass plan='plan.json'. any_grid=True "
        "uses a plan at another video size."
    )
