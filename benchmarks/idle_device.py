"""A GPU that does nothing, for what the host does around launches.

A library of empty functions stands for the CUDA driver, so that triton compiles, loads and launches
as it would on an H100, from tensors on the CPU. What kernels would compute is left undone. Needs a
C compiler, as triton does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from dit_sparse import layout
from dit_sparse.kernels import (
    ops,
    residual,
    signature,
    triton_common,
    triton_mask,
    triton_reorder,
)

# What triton calls in libcuda. Everything succeeds; the device has room for every kernel. Of a
# launch the parameters are noted, as many as asked for, 8 bytes of each.
LIBCUDA = """
#include <string.h>
typedef unsigned long long word;
#define OK(name) int name(void) { return 0; }
OK(cuInit) OK(cuCtxSetCurrent) OK(cuCtxSetLimit) OK(cuDeviceGet) OK(cuFuncSetAttribute)
OK(cuFuncSetCacheConfig) OK(cuModuleUnload) OK(cuOccupancyMaxActiveClusters)
OK(cuTensorMapEncodeIm2col) OK(cuStreamIsCapturing)
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module) { *module = (void *)1; return 0; }
int cuCtxGetLimit(word *value) { *value = 1 << 20; return 0; }
int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int which) { *value = which ? 0 : 1024; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
int cuPointerGetAttribute(void *value, int which, word pointer)
{ *(word *)value = pointer; return 0; }
/* A descriptor is a number that tells its address, shape and strides. */
int cuTensorMapEncodeTiled(word *map, int type, int rank, word address, word *shape, word *strides)
{
  memset(map, 0, 128);
  map[0] = address;
  for (int i = 0; i < rank; i++) map[0] = 31 * map[0] + shape[i];
  for (int i = 0; i < rank - 1; i++) map[0] = 31 * map[0] + strides[i];
  return 0;
}
word functions = 0, launches = 0, started = 0, wanted = 0, parameters[64];
int cuModuleGetFunction(word *function) { *function = ++functions; return 0; }
int cuLaunchKernelEx(void *config, word function, void **given)
{
  launches++;
  started = function;
  for (word i = 0; i < wanted; i++) memcpy(parameters + i, given[i], 8);
  return 0;
}
"""


class Noted:
    """What the driver was told."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def launches(self) -> int:
        """Kernels that were launched so far."""
        return self._number("launches").value

    @property
    def function(self) -> int:
        """Number of the loaded kernel that was launched last."""
        return self._number("started").value

    def parameters(self, sizes: tuple[int, ...]) -> list[int]:
        """The first parameters of the last launch, given the bytes of each (8 at most)."""
        found = (ctypes.c_ulonglong * 64).in_dll(self._library, "parameters")
        return [value % 256**size for value, size in zip(found, sizes, strict=False)]

    def want(self, count: int) -> None:
        """Notes ``count`` parameters of the launches that follow, which have as many."""
        self._number("wanted").value = count

    def _number(self, name: str) -> ctypes.c_ulonglong:
        return ctypes.c_ulonglong.in_dll(self._library, name)


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """:func:`dit_sparse.layout._take` as on CUDA."""
    return ops.reorder(index, x)[0] if dim == 1 else x.index_select(dim, index)


@contextlib.contextmanager
def idle_device() -> Iterator[Noted]:
    """Makes the launchers, and triton, see an H100 in tensors on the CPU."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        source, library = Path(folder, "libcuda.c"), Path(folder, "libcuda.so.1")
        source.write_text(LIBCUDA)
        link = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["cc", *link, "-o", str(library), str(source)], check=True)
        Path(folder, "libcuda.so").symlink_to(library)
        # Who asks for libcuda.so.1 later is given the one that is loaded.
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        # Modules take what is patched below from each other when they are imported.
        ops.implementations("attention")
        patch = mock.patch.object
        folders = {"TRITON_LIBCUDA_PATH": folder, "LIBRARY_PATH": folder}
        stack.enter_context(mock.patch.dict(os.environ, folders))
        for forget in (ops.compute_capability.cache_clear, signature.forget):
            forget()
            stack.callback(forget)
        stack.enter_context(patch(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        # CPU tensors are launched on, and calls on them remembered.
        for module in (triton_common, triton_mask, triton_reorder):
            stack.enter_context(patch(module, "INTERPRETED", True))
        stack.enter_context(patch(triton_common, "capability", lambda tensor: (9, 0)))
        stack.enter_context(patch(ops, "has_signature", lambda x: True))
        stack.enter_context(patch(residual, "_fused", lambda *x: residual._load()))
        stack.enter_context(patch(layout, "_take", _take))
        with contextlib.suppress(ImportError):  # a triton without Gluon
            from dit_sparse.kernels.gluon import attention as hopper
            from dit_sparse.kernels.gluon import block_mass

            # The numeric test needs the GPU; before triton 3.6, of another interface, it fails.
            old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
            failed = ["has another interface"] if old else []
            stack.enter_context(patch(hopper, "probe_reasons", lambda *call: failed))
            stack.enter_context(patch(block_mass, "mass_reasons", lambda *call: failed))
            for module in (hopper, block_mass):
                stack.enter_context(patch(module, "multiprocessors", lambda device: 132))
        from triton.backends.nvidia.driver import CudaDriver

        idle = CudaDriver()
        idle.get_device_capability = torch.cuda.get_device_capability
        idle.get_current_device = lambda: 0
        idle.get_current_stream = lambda device: 0
        stack.enter_context(patch(driver, "_active", idle))
        yield Noted(loaded)
