"""What is compiled for GPUs that are not here; ``benchmarks.check_compile`` does all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# One of each kernel, at the sizes that are tightest.
CASES = (
    "attention bfloat16 128 128x128 padded",
    "attention bfloat16 64 128x128 ragged",
    "attention bfloat16 256 64x64 ragged",
    "attention_fp8 bfloat16 128 128x128 fp8_qkpv padded",
    "attention_fp8 bfloat16 128 64x64 fp8_qk padded",
    "block_mass bfloat16 128 128x128 padded",
    "block_mass bfloat16 128 16x64 padded",
    "neighborhood bfloat16 128 128 3",
    "bands bfloat16 128 128 True",
    "merge bfloat16 128",
    "reorder bfloat16 128",
    "residual bfloat16 128 torch.float8_e4m3fn",
    "summarize bfloat16 128 128 True",
    "top_blocks 16384",
)
# With the names of cases as arguments; the kernels of a session are interpreted, hence a process.
SCRIPT = """
import dataclasses, json, sys
from benchmarks import check_compile, compile_cases
archs, names, limit = json.loads(sys.argv[1])
check_compile.SHARED_KIB.update({arch: limit for arch in archs if limit})
found = {case.name: case for case in compile_cases.cases()}
rows = []
for arch in archs:
    for name in names:
        rows += check_compile.compile_case(found[name], arch)
print(json.dumps([sorted(check_compile.kernels()), [dataclasses.asdict(row) for row in rows]]))
"""


def compiled(archs: list[int], names: tuple[str, ...], limit: int = 0) -> tuple[set[str], list]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([archs, names, limit])],
        env=env | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels, rows = json.loads(done.stdout.splitlines()[-1])
    return set(kernels), rows


def test_kernels_fit_consumer_cards() -> None:
    kernels, rows = compiled([86, 120], CASES)
    assert [(row["case"], row["arch"], row["faults"]) for row in rows if row["faults"]] == []
    assert max(row["shared"] for row in rows) <= 99 << 10
    assert all(row["registers"] > 0 for row in rows)
    # A new kernel needs a case here. Those for Hopper are not for these cards.
    hopper = {"_attention_kernel", "_attention_fp8_kernel", "_block_mass_kernel"}
    assert {row["kernel"] for row in rows} == kernels - hopper
    assert not any(row["descriptors"] for row in rows if row["arch"] == 86)
    assert any(row["descriptors"] for row in rows if row["arch"] == 120)


def test_what_does_not_fit_is_found() -> None:
    _, rows = compiled([89], ("attention bfloat16 256 64x64 ragged",), limit=16)
    [fault] = next(row["faults"] for row in rows if row["kernel"] == "_attention_fwd_kernel")
    assert "KiB of shared memory of 16" in fault
