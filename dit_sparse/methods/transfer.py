"""Moving what layers keep between the device and host memory, beside the computation."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import cache

import psutil
import torch
from torch import Tensor

# Host memory comes in slabs of this many bytes. PyTorch rounds pinned allocations up to a power of
# two, which would double what a tensor of 0.6 GB takes; tensors are cut to fill slabs instead.
SLAB_BYTES = 1 << 26
# Starts of tensors in a slab, so that every dtype is aligned.
ALIGNMENT = 256
# Share of the available host memory that may be taken. Pinned pages cannot be swapped out.
HOST_SHARE = 0.8


class Copy(abc.ABC):
    """A copy under way."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Lets the current stream wait for it, so that both ends may be used; not the host."""


class Transfer(abc.ABC):
    """How bytes travel between a device and host memory.

    Slabs that came back are kept for the next generation: page-locking runs at a few GB/s.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []

    @abc.abstractmethod
    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copy:
        """Begins to copy flat uint8 tensors, one to one."""

    @abc.abstractmethod
    def _new_slab(self) -> Tensor: ...

    def take_slab(self) -> Tensor:
        """``SLAB_BYTES`` of host memory, flat uint8."""
        return self._free.pop() if self._free else self._new_slab()

    def return_slabs(self, slabs: Sequence[Tensor]) -> None:
        """Takes slabs back. Copies begun later must not start before those under way ended."""
        self._free += slabs

    def trim(self) -> None:
        """Lets go of the slabs that nobody uses."""
        self._free = []

    def host_budget(self) -> int:
        """Most bytes of host memory that can be had now."""
        available = int(psutil.virtual_memory().available * HOST_SHARE)
        return available + len(self._free) * SLAB_BYTES


class _Done(Copy):
    def wait(self) -> None:
        pass


class PlainTransfer(Transfer):
    """For devices without streams: every copy is over when it returns."""

    def _new_slab(self) -> Tensor:
        return torch.empty(SLAB_BYTES, dtype=torch.uint8)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copy:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return _Done()


class _CudaCopy(Copy):
    """Holds both ends until the copy was waited for.

    The caching allocator hands freed memory to the next allocation of the current stream, so the
    current stream has to wait before either end is let go; therefore an abandoned copy waits when
    it is dropped. ``record_stream`` instead frees memory only once the copy is seen to be over, and
    the host runs many layers ahead of the device: every layer would get a buffer of its own.
    """

    def __init__(self, ends: tuple[Sequence[Tensor], ...], device: torch.device) -> None:
        self._ends: tuple[Sequence[Tensor], ...] = ends
        self._device = device
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        if self._ends:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            self._ends = ()

    def __del__(self) -> None:
        self.wait()


class CudaTransfer(Transfer):
    """Pinned host memory and one side stream.

    A copy begins once the work queued so far is done, so its ends are free of earlier uses, and
    then runs beside what is queued later. Copies follow each other in the order they were begun.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def _new_slab(self) -> Tensor:
        return torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=True)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copy:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            return _CudaCopy((sources, targets), self.device)


_transfers: list[Transfer] = []


@cache
def transfer_for(device: torch.device) -> Transfer:
    """The transfer between ``device`` and host memory; one for the process."""
    transfer = CudaTransfer(device) if device.type == "cuda" else PlainTransfer(device)
    _transfers.append(transfer)
    return transfer


def release_host_memory() -> None:
    """Gives back what no generation uses, and what is kept for the next, since pinning is slow."""
    for transfer in _transfers:
        transfer.trim()


class HostArena:
    """Host memory of one generation; goes back to its transfer when this object is dropped."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._slabs: list[Tensor] = []
        self._used = SLAB_BYTES

    def take(self, count: int) -> tuple[Tensor, ...]:
        """``count`` bytes of host memory, in flat uint8 pieces."""
        pieces = []
        while count:
            if self._used >= SLAB_BYTES:
                self._slabs.append(self._transfer.take_slab())
                self._used = 0
            piece = self._slabs[-1][self._used : self._used + count]
            pieces.append(piece)
            count -= piece.numel()
            self._used += -(-piece.numel() // ALIGNMENT) * ALIGNMENT
        return tuple(pieces)

    def __del__(self) -> None:
        self._transfer.return_slabs(self._slabs)
