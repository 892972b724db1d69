"""Compiles every Triton kernel for GPUs that are not here, and checks that each fits there.

``python -m benchmarks.check_compile [--arch 80,86,89,90,100,120] [--only WORDS] [--output FILE]``
prints one line for each kernel that the launchers compile for the calls of
:mod:`benchmarks.compile_cases`, and exits with 1 if any is wrong. No GPU is needed; triton brings
ptxas.

What is compiled is what would be launched: the launchers run on CPU tensors, told that the device
has the wanted compute capability, and the launch is intercepted. Triton itself then derives the
signature from the arguments, as it would before the launch. Wrong is

* what does not compile,
* shared memory beyond what a block may have on that architecture,
* registers that are spilled inside a loop: more than ``SPILLS_IN_LOOPS`` accesses a pass. What is
  spilled before a loop and loaded after it costs nothing that could be measured,
* a TMA descriptor, or the kernel for Hopper, where the device does not have it.

That a kernel is fast, or right, it does not show.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.compile_cases import Case, cases
from benchmarks.row_file import write_rows
from dit_sparse.kernels import ops, triton_mask
from dit_sparse.kernels.triton_common import INTERPRETED

# KiB of shared memory that one block of threads may have; CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Kernels whose spills are listed but not judged: with the slope a program holds a dim x dim matrix
# of fp32 beside a whole block of keys and values.
SPILLS_ALLOWED = {"_summarize_kernel"}
# What runs on Hopper was chosen by measuring it there.
MEASURED_ARCH = 90
# Loads and stores of spilled registers in one pass of a loop: at the head dims of the models that
# are supported, and at others.
SPILLS_IN_LOOPS, SPILLS_ELSEWHERE = 4, 64
MODEL_DIMS = (0, 64, 96, 128)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    Attributes:
        kernel: Its name.
        case: The call that led to it, of :func:`~benchmarks.compile_cases.cases`.
        arch: Compute capability times ten.
        shared: Bytes of shared memory of a block.
        registers: Of a thread.
        local: Bytes of local memory of a thread: spilled registers.
        spills: Loads and stores of these in one pass of the innermost loop that has most.
        warps: Of a block.
        stages: Depth of the software pipeline.
        descriptors: Whether it is given TMA descriptors.
        faults: What is wrong with it.
    """

    kernel: str
    case: str
    arch: int
    shared: int
    registers: int
    local: int
    spills: int
    warps: int
    stages: int
    descriptors: bool
    faults: tuple[str, ...]

    def __str__(self) -> str:
        path = "tma" if self.descriptors else ""
        return (
            f"{'FAIL' if self.faults else 'ok  '} sm_{self.arch:<3} {self.kernel:24} "
            f"{self.shared / 1024:6.1f} KiB {self.registers:3} regs {self.local:4} local "
            f"{self.spills:3} spills {self.warps:2}w{self.stages} {path:3} {self.case}"
            + "".join(f"\n     {fault}" for fault in self.faults)
        )


class _Driver:
    """What triton asks of its driver before a launch, for a GPU that is not here."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _device(arch: int) -> Iterator[None]:
    """Makes the launchers, and triton, see a GPU of ``arch``."""
    patch = mock.patch.object
    with contextlib.ExitStack() as stack:
        # It is asked once a device.
        ops.compute_capability.cache_clear()
        stack.callback(ops.compute_capability.cache_clear)
        stack.enter_context(
            patch(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10))
        )
        # Lists are made by the kernel on CPU tensors too.
        stack.enter_context(patch(triton_mask, "INTERPRETED", True))
        with contextlib.suppress(ImportError):  # a triton without Gluon
            from dit_sparse.kernels.gluon import attention, attention_fp8, block_mass

            # The numeric tests need the GPU.
            tests = {attention: "probe_reasons", attention_fp8: "probe_reasons"}
            for hopper, name in {**tests, block_mass: "mass_reasons"}.items():
                stack.enter_context(patch(hopper, name, lambda *call: []))
                stack.enter_context(patch(hopper, "multiprocessors", lambda device: 132))
        stack.enter_context(patch(driver, "_active", _Driver(arch)))
        yield


def _dump(cubin: Path, *options: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *options, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers and bytes of local memory of a thread, and spills of its worst loop."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _dump(file, "-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        spills = _spills_in_loops(_dump(file, "-sass")) if stack + local else 0
    return registers, stack + local, spills


def _spills_in_loops(sass: str) -> int:
    """The most loads and stores of local memory in one innermost loop."""
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    ]
    assert lines, "cuobjdump shows no instructions"
    back = ((re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text), at) for at, text in lines)
    loops = {(int(to[1], 16), at) for to, at in back if to is not None and int(to[1], 16) < at}
    inner = [
        (start, end)
        for start, end in loops
        if not any(a >= start and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    spills = [at for at, text in lines if re.search(r"\b(LDL|STL)\b", text)]
    return max((sum(start <= at <= end for at in spills) for start, end in inner), default=0)


def _faults(
    case: Case, kernel: str, arch: int, shared: int, spills: int, ptx: str, tma: bool
) -> list[str]:
    faults = []
    if shared > SHARED_KIB[arch] << 10:
        faults.append(f"{shared / 1024:.1f} KiB of shared memory of {SHARED_KIB[arch]}")
    judged = arch != MEASURED_ARCH and kernel not in SPILLS_ALLOWED
    if judged and spills > (SPILLS_IN_LOOPS if case.dim in MODEL_DIMS else SPILLS_ELSEWHERE):
        faults.append(f"{spills} accesses to spilled registers in a loop")
    if arch < 90 and (tma or "cp.async.bulk" in ptx):
        faults.append("TMA is chosen, which came with compute capability 9.0")
    if arch != 90 and "wgmma" in ptx:
        faults.append("the kernel for Hopper is chosen")
    return faults


def compile_case(case: Case, arch: int) -> list[Compiled]:
    """What the launchers compile for ``case`` on a GPU of ``arch``."""
    found: list[Compiled] = []
    original = JITFunction.run

    def record(function: JITFunction, *args, grid, warmup, **options):
        name, stages = function.__name__, options.get("num_stages", 0)
        warps = options.get("num_warps", 0)
        try:
            kernel = original(function, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # whatever the compilers raise
            lines = [line for line in str(error).splitlines() if "fatal" in line] or [str(error)]
            fault = f"{type(error).__name__}: {lines[0][:300]}"
            found.append(
                Compiled(name, case.name, arch, 0, 0, 0, 0, warps, stages, False, (fault,))
            )
            return None
        shared = kernel.metadata.shared
        registers, local, spills = _resources(kernel.asm["cubin"])
        tma = any(str(kind).startswith("tensordesc") for kind in kernel.src.signature.values())
        faults = tuple(_faults(case, name, arch, shared, spills, kernel.asm["ptx"], tma))
        found.append(
            Compiled(
                name, case.name, arch, shared, registers, local, spills, kernel.metadata.num_warps,
                stages, tma, faults,
            )
        )  # fmt: skip
        return kernel

    with _device(arch), mock.patch.object(JITFunction, "run", record):
        case.launch()
    return found


def _compile_named(task: tuple[str, int]) -> list[Compiled]:
    name, arch = task
    return compile_case(next(case for case in cases() if case.name == name), arch)


def kernels() -> set[str]:
    """Names of all kernels of this package that are launched."""
    modules = [m for name, m in sys.modules.items() if name.startswith("dit_sparse.kernels.")]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def run(archs: list[int], only: str, output: Path | None, jobs: int) -> bool:
    """Prints one line for each kernel; whether all are right and, without ``only``, occurred."""
    wanted = [set(words.split()) for words in only.split(",")]
    names = [c.name for c in cases() if any(words <= set(c.name.split()) for words in wanted)]
    if not names:
        raise ValueError(f"expected words of a case in --only, got {only!r}")
    tasks = [(name, arch) for arch in archs for name in names]
    rows: list[Compiled] = []
    seen = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for compiled in pool.map(_compile_named, tasks):
            for row in compiled:
                # Helpers, such as lists from packed masks, are launched by many cases alike.
                key = (row.arch, row.kernel, row.case if row.kernel != "_lists_kernel" else "")
                if key in seen and not row.faults:
                    continue
                seen.add(key)
                rows.append(row)
                print(row, flush=True)
    good = not any(row.faults for row in rows)
    if not only and (missing := kernels() - {row.kernel for row in rows}):
        print(f"FAIL no case launches {sorted(missing)}")
        good = False
    if output is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
        versions |= {
            tool: getattr(triton.knobs.nvidia, tool).version
            for tool in ("ptxas", "ptxas_blackwell")
        }
        write_rows(output, {"versions": versions, "only": only}, map(asdict, rows))
    print(f"{len(rows)} kernels, {sum(bool(row.faults) for row in rows)} wrong")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", default=",".join(map(str, SHARED_KIB)))
    parser.add_argument("--only", default="", help="words of names, e.g. 'attention 128,summarize'")
    parser.add_argument("--output", type=Path, help="writes the rows as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 makes kernels that cannot be compiled; unset it")
    archs = [int(arch) for arch in arguments.arch.split(",")]
    if unknown := set(archs) - set(SHARED_KIB):
        sys.exit(f"--arch must be some of {sorted(SHARED_KIB)}, got {sorted(unknown)}")
    sys.exit(0 if run(archs, arguments.only, arguments.output, arguments.jobs) else 1)


if __name__ == "__main__":
    main()
