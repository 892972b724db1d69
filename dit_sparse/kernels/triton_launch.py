"""Launching a Triton kernel again without working out anew what its first launch found.

At every launch triton binds and specialises each argument, makes the key of its cache from them,
and wraps TMA descriptors one by one: more host time than a small kernel runs. Here the compiled
kernel that triton chose is kept by all that its choice depends on: which tensors are given, their
dtypes and whether they are aligned to 16 bytes, and all numbers and constants as they are. That is
finer than triton's own key (of a number it asks whether it is 1, a multiple of 16, and fits 32
bits), so nothing is compiled more often; a new number only takes triton's way once.

The kept kernel is started as triton's ``JITFunction.run`` would start it. Where that may differ (a
version that is not known, other devices than CUDA, the interpreter) or would be noticed (hooks of
profilers), every launch takes triton's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dit_sparse.kernels.triton_common import INTERPRETED

# Versions of triton whose way to start a compiled kernel is the one below.
_KNOWN = ((3, 5), (3, 9))
# Launches kept; beyond that all are forgotten, and found again one by one.
_MOST = 4096


class _Nowhere(NamedTuple):
    """Stands for a tensor whose address is not known yet."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return 0


class BoxShape:
    """A TMA descriptor without its address: made, and checked, once for all tensors of a shape.

    Args:
        kind: The descriptor's class, of triton or Gluon.
        dtype: Of the tensor.
        shape: Of the tensor, as TMA sees it.
        strides: Likewise.
        box: Entries that are read at a time, by axis.
        layout: In shared memory; Gluon's descriptors have one.
    """

    __slots__ = ("_fields", "_kind", "trait")

    def __init__(
        self,
        kind: type,
        dtype: torch.dtype,
        shape: list[int],
        strides: list[int],
        box: list[int],
        *layout: Any,
    ):
        made = kind(_Nowhere(dtype), shape, strides, box, *layout)
        self._kind = kind
        self._fields = {name: x for name, x in vars(made).items() if name != "base"}
        # What triton specialises on; a string, whose hash is computed once.
        self.trait = f"{dtype} {box} {layout}"

    def of(self, tensor: Tensor) -> Any:
        """The descriptor of ``tensor``, which is aligned to 16 bytes."""
        descriptor: Any = object.__new__(self._kind)
        descriptor.__dict__.update(self._fields, base=tensor)
        return descriptor


class Boxes(NamedTuple):
    """A tensor that a kernel reads through a TMA descriptor."""

    tensor: Tensor
    shape: BoxShape


Argument = Tensor | Boxes | None


class _Compiled(NamedTuple):
    """A compiled kernel as it is started.

    Attributes:
        kernel: Triton's; it is unloaded when nothing refers to it.
        run: Its launcher.
        function: Its handle in the driver.
        metadata: Packed.
    """

    kernel: Any
    run: Any
    function: Any
    metadata: Any


def _is_known() -> bool:
    """Whether kernels can be started here as triton would start them."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not INTERPRETED and torch.version.hip is None and _KNOWN[0] <= version <= _KNOWN[1]


_DIRECT = _is_known()
if _DIRECT:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    _hooks = attrgetter("runtime.launch_enter_hook", "runtime.launch_exit_hook")
    # What triton reads at every launch, beside the arguments.
    _settings = attrgetter(
        *(
            f"{group}.{name}"
            for group, name in (
                ("runtime", "debug"),
                ("runtime", "add_stages_inspection_hook"),
                ("compilation", "instrumentation_mode"),
                ("compilation", "fpsan_homomorphic_casts"),
            )
            if hasattr(getattr(knobs, group), name)
        )
    )


def _is_watched(kernel: Any) -> bool:
    """Whether somebody is to be told of launches."""
    enter, leave = _hooks(knobs)
    # Chains of hooks are there without any, too.
    return bool(
        kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    )


class Launch:
    """A kernel with all its arguments but the tensors.

    Args:
        kernel: A function with ``triton.jit`` or ``gluon.jit``.
        numbers: The arguments between the tensors, which are the first ones, and the constants.
        constants: Its ``constexpr`` arguments, which are the last ones, and options of the launch.
    """

    __slots__ = ("_compiled", "_constants", "_kernel", "_last", "_numbers")

    def __init__(self, kernel: Any, numbers: tuple[int | float, ...], **constants: Any):
        self._kernel = kernel
        self._numbers = numbers
        self._constants = constants
        self._last: tuple[Any, ...] = ()
        if _DIRECT:
            ours = (constants[name] for name in kernel.arg_names if name in constants)
            self._last = (*numbers, *ours)
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, grid: tuple[int, ...], tensors: Sequence[Argument]) -> None:
        """Queues the kernel on the current stream of the device of its first tensor.

        Args:
            grid: Programs along up to three axes.
            tensors: Of one device; the first one is not None.
        """
        if not _DIRECT:
            self._ordinary(grid, tensors)
            return
        first: Any = tensors[0]
        place = (first.tensor if type(first) is Boxes else first).get_device()
        device = driver.active.get_current_device()
        if 0 <= place != device:
            with torch.cuda.device(place):
                self(grid, tensors)
            return
        if _is_watched(self._kernel):
            self._ordinary(grid, tensors)
            return
        key, arguments = traits(tensors)
        key = (device, _settings(knobs), *key)
        known = self._compiled.get(key)
        if known is None:
            found = self._ordinary(grid, tensors)
            # What was only compiled, for a device that is not here, has nothing to start.
            if isinstance(found, CompiledKernel) and found.module is not None:
                kept = found, found.run, found.function, found.packed_metadata
                self._compiled[key] = _Compiled(*kept)
            return
        known.run(
            *grid, *_ONES[len(grid)], driver.active.get_current_stream(device),
            known.function, known.metadata, None, None, None, *arguments, *self._last,
        )  # fmt: skip

    def _ordinary(self, grid: tuple[int, ...], tensors: Sequence[Argument]) -> Any:
        """Triton's own launch; returns the compiled kernel, where there is one."""
        given = [x.shape.of(x.tensor) if type(x) is Boxes else x for x in tensors]
        return self._kernel[grid](*given, *self._numbers, **self._constants)


_ONES = ((1, 1, 1), (1, 1), (1,), ())


def traits(tensors: Sequence[Argument]) -> tuple[tuple[Any, ...], list[Any]]:
    """What triton specialises on in tensors, and these as its launcher takes them.

    Tensors become addresses: the launcher would ask a tensor for its address, and the driver for
    that address.
    """
    arguments: list[Any] = []
    found: list[Any] = []
    for x in tensors:
        if x is None:
            arguments.append(None)
            found.append(None)
        elif type(x) is Boxes:
            arguments.append(x.shape.of(x.tensor))
            found.append(x.shape.trait)
        else:
            address = x.data_ptr()  # type: ignore[union-attr]
            dtype = x.dtype  # type: ignore[union-attr]
            arguments.append(address)
            found.append((dtype,) if address & 15 else dtype)
    return tuple(found), arguments


_launches: dict[tuple[Any, ...], Launch] = {}


def launch_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Argument],
    numbers: tuple[int | float, ...],
    **constants: Any,
) -> None:
    """``Launch(kernel, numbers, **constants)(grid, tensors)``, with a :class:`Launch` that is kept.

    Arguments as there.
    """
    values = constants.values()
    # True equals 1 and 1.0, which triton tells apart.
    kinds = (*map(type, numbers), *map(type, values))
    key = (kernel.fn, numbers, kinds, *constants, *values)
    known = _launches.get(key)
    if known is None:
        known = Launch(kernel, numbers, **constants)
        if len(_launches) >= _MOST:
            _launches.clear()
        _launches[key] = known
    known(grid, tensors)
