"""What has to be known about a model family, and which family a model belongs to."""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.refused import REFUSED

Arguments = Mapping[str, Any]
Split = Literal["whole", "text first", "text last"]


class Family(abc.ABC):
    """The adapter of one model family. A file in this package that defines one is found.

    Attributes:
        models: Names of the transformer classes it covers. Strings, so that nothing is imported.
        tokens: What the main self-attention sees, in order, for the reader of docs/families.md.
        outer_mask: Whether the processors build square masks as products of token weights.
        penalty_mask: Whether they take padding as 0 and -10000, added to the scores.
        timestep_name: The forward argument that holds the timestep.
        side_calls: Processor classes that make other attention calls beside self-attention (image
            prompts); those calls run as they are.
        always_trims: Whether the model itself cuts padding off before its attention call.
        splits: By transformer class what context parallelism splits one by one: the ``"whole"``
            sequence, or the text in front (``"text first"``) or behind (``"text last"``) and the
            rest. Classes of which no plan is known are not in it.
    """

    models: ClassVar[tuple[str, ...]]
    tokens: ClassVar[str] = "video"
    outer_mask: ClassVar[bool] = False
    penalty_mask: ClassVar[bool] = False
    timestep_name: ClassVar[str] = "timestep"
    side_calls: ClassVar[tuple[str, ...]] = ()
    always_trims: ClassVar[bool] = False
    splits: ClassVar[Mapping[str, Split]] = {}

    @abc.abstractmethod
    def sites(self, model: Any) -> list[tuple[str, Any]]:
        """The main-stack self-attention modules with their names, in execution order."""

    @abc.abstractmethod
    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        """The tokens of one forward pass, from the transformer's own forward arguments.

        Reads shapes only, so that nothing is copied from the device and torch.compile can trace
        it, except where a model's forward itself turns lengths into Python numbers.
        """

    def encode(self, model: Any, arguments: Arguments) -> tuple[list[int], Tensor | None]:
        """The layout as numbers, and the position ids that are still to be read.

        This runs while torch.compile traces; :meth:`decode` runs inside the operator.
        """
        layout = self.layout(model, arguments)
        after = layout.text - layout.text_before
        return [*layout.grid, layout.text_before, after, *self.offsets(model, arguments)], None

    def decode(self, numbers: Sequence[int], positions: Tensor | None) -> TokenLayout:
        """The layout that :meth:`encode` wrote down."""
        frames, height, width, before, after = numbers[:5]
        return TokenLayout.around((frames, height, width), before, after)

    def offsets(self, model: Any, arguments: Arguments) -> list[int]:
        """Where the grid starts in each batch element, if that differs between them; else empty.

        The layout is then that of the sequences rotated so that the grid comes first.
        """
        return []

    def site_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        """The tokens that the layer called ``name`` sees, where not all layers see the same."""
        return layout

    def split_of(self, model: Any) -> Split | None:
        """How context parallelism splits the sequence of ``model``, or None if nobody knows."""
        names = (kind.__name__ for kind in type(model).__mro__)
        return next((self.splits[name] for name in names if name in self.splits), None)

    def streams(self, model: Any, numbers: Sequence[int], layout: TokenLayout) -> tuple[int, ...]:
        """Lengths of the parts of the sequence that are split one by one, in order.

        Args:
            model: One that is in :attr:`splits`.
            numbers: From :meth:`encode`.
            layout: What they mean.
        """
        split = self.split_of(model)
        if split == "text first":
            text = self.leading_text(numbers)
            return text, layout.tokens - text
        return (layout.video, layout.text) if split == "text last" else (layout.tokens,)

    def leading_text(self, numbers: Sequence[int]) -> int:
        """Tokens of the text in front, which references and conditioning frames may follow.

        Args:
            numbers: From :meth:`encode`.
        """
        return numbers[3]

    def parallel_plan(self, model: Any) -> dict[str, Any] | None:
        """Where to split and gather for context parallelism, if diffusers has no plan of its own.

        See :func:`dit_sparse.processors.parallel_plan.context_parallel_plan`, which asks for models
        in :attr:`splits` alone.
        """
        return None

    def unqueried(self, layout: TokenLayout, queries: int) -> tuple[int, int] | None:
        """Start and number of tokens that are keys only, in a call with ``queries`` queries.

        None if the family has no such calls.
        """
        return None

    def timestep(self, arguments: Arguments) -> Tensor | None:
        """The noise level of this pass, see :meth:`noise_level`."""
        timestep = arguments.get(self.timestep_name)
        return None if timestep is None else self.noise_level(timestep)

    def noise_level(self, timestep: Tensor) -> Tensor:
        """The model's timestep as something whose largest value falls during a generation."""
        return timestep

    def explicit_call(self, processor: type) -> Callable[..., Any] | None:
        """A ``__call__`` for ``processor`` where upstream's own cannot be used; with its signature.

        It must call :func:`dit_sparse.processors.rewrap.sparse_dispatch` or ``sparse_sdpa``.
        """
        return None

    def refusal(self, model: Any) -> str | None:
        """Why this one model cannot be bound although its class is supported, or None."""
        return None


class PackedFamily(Family):
    """A family whose forward gets tokens without height and width, and position ids with them.

    The ids are read inside the operator, because their values decide the grid.
    """

    tokens = "text, image, references"

    @abc.abstractmethod
    def text(self, model: Any, arguments: Arguments) -> int:
        """Tokens in front of the packed ones."""

    @abc.abstractmethod
    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        """Ids ``[tokens, 3 or more]`` of the packed tokens."""

    @abc.abstractmethod
    def grid(self, positions: Tensor) -> tuple[tuple[int, int, int], int]:
        """The grid, and how many packed tokens come before it."""

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        return self.decode(*self.encode(model, arguments))

    def encode(self, model: Any, arguments: Arguments) -> tuple[list[int], Tensor | None]:
        return [self.text(model, arguments)], self.positions(model, arguments)

    def decode(self, numbers: Sequence[int], positions: Tensor | None) -> TokenLayout:
        if positions is None:
            raise ValueError("expected position ids of the packed tokens, got None")
        grid, before = self.grid(positions)
        after = positions.shape[0] - before - grid[0] * grid[1] * grid[2]
        return TokenLayout.around(grid, numbers[0] + before, after)

    def leading_text(self, numbers: Sequence[int]) -> int:
        return numbers[0]


def attention_modules(model: Any, stacks: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Attention modules of block lists, e.g. ``{"transformer_blocks": "attn1"}``, with names."""
    return [
        (f"{stack}.{i}.{leaf}", block.get_submodule(leaf))
        for stack, leaf in stacks.items()
        for i, block in enumerate(getattr(model, stack))
    ]


def patched_grid(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of a latent of that shape; one frame without a frame axis.

    Args:
        shape: Ends in (frames, height, width) or (height, width), as ``patch`` is long.
        patch: Latent positions of one token along the same axes.
    """
    sizes = [int(size) // step for size, step in zip(shape[-len(patch) :], patch, strict=True)]
    frames, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    return frames, height, width


@lru_cache(maxsize=1)
def list_families() -> dict[str, Family]:
    """The adapter of every supported transformer class, by class name.

    The installed diffusers need not have all of them: each came with some version of it.
    ``dit-sparse families`` marks those that it lacks.
    """
    package = importlib.import_module("dit_sparse.processors")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dit_sparse.processors.{module.name}")
    return {name: kind() for kind in _concrete(Family) for name in kind.models}  # type: ignore[type-abstract]


def _concrete(kind: type[Family]) -> list[type[Family]]:
    below = [leaf for child in kind.__subclasses__() for leaf in _concrete(child)]
    return below if "models" not in vars(kind) else [kind, *below]


def find_family(model: nn.Module) -> Family | None:
    """The adapter for ``model`` by its class or a base class of it, or None."""
    families = list_families()
    for kind in type(model).__mro__:
        if kind.__name__ in families:
            return families[kind.__name__]
        if kind.__name__ in REFUSED:
            return None
    return None


def is_refused(model: nn.Module) -> bool:
    """Whether the class of ``model`` is known and refused."""
    return find_family(model) is None and any(k.__name__ in REFUSED for k in type(model).__mro__)


def refusal_of(model: nn.Module) -> str:
    """Why :func:`find_family` finds nothing for ``model``."""
    for kind in type(model).__mro__:
        if kind.__name__ in REFUSED:
            return f"sparse attention refuses {kind.__name__}: {REFUSED[kind.__name__]}"
    return (
        f"sparse attention has no adapter for {type(model).__name__}; supported transformers are "
        f"{sorted(list_families())}"
    )


def family_of(model: nn.Module) -> Family:
    """The adapter for ``model``.

    Raises:
        ValueError: If its class is refused or unknown, or this model cannot be bound; says why.
    """
    family = find_family(model)
    if family is None:
        raise ValueError(refusal_of(model))
    reason = family.refusal(model)
    if reason is not None:
        raise ValueError(f"sparse attention refuses this {type(model).__name__}: {reason}")
    return family
