"""Kernels that are started without triton's own launch are those that it would have started.

Told by a driver that does nothing but note what it is told. The kernels of a test session are
interpreted, hence processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

ROOT = Path(__file__).parents[2]
HEADER = """
import itertools, json, torch, triton, triton.language as tl
from benchmarks.idle_device import idle_device
from dit_sparse.kernels import triton_launch
from dit_sparse.kernels.triton_launch import Boxes, BoxShape, Launch, launch_kernel

@triton.jit
def small(x, y, n, m, scale, SIZE: tl.constexpr, FLAG: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < n, other=0.0) * scale
    if y is not None:
        tl.store(y + at, value, mask=at < m)
    else:
        tl.store(x + at, value, mask=at < m)

@triton.jit
def boxed(x, y, n, scale, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tile = x.load([n, 0])
    tl.store(y + at[:, None] * SIZE + at[None, :], tile * scale)

room = torch.zeros(4096, dtype=torch.float32)
away = (-room.data_ptr() // 4) % 4  # to an address that is a multiple of 16
x = room[away:]
"""


def outcome(script: str) -> Any:
    """What ``script`` prints last, as JSON."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A function with triton.jit is read from its file.
    done = subprocess.run(
        [sys.executable, str(script)],
        env=env | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(tmp_path: Path, body: str) -> Any:
    file = tmp_path / "script.py"
    file.write_text(HEADER + body)
    return outcome(str(file))


def test_what_triton_compiles_apart_is_kept_apart(tmp_path: Path) -> None:
    rows = run(
        tmp_path,
        """
half = x.half()
tensors = [
    ("aligned", (x, x[64:])), ("8 bytes", (x[2:], x[64:])), ("4 bytes", (x[1:], x[64:])),
    ("both", (x[1:], x[65:])), ("none", (x, None)), ("half", (half, x)), ("halves", (half, half)),
    ("half aside", (half[1:], half)),
]
numbers = [(1, 16), (16, 1), (17, 32), (2**31, 16), (2**31 - 1, 16), (2**32, 17)]
constants = [(16, True), (16, 1), (32, True)]
cases = [(name, given, (17, 32), (16, True)) for name, given in tensors]
cases += [(str(some), tensors[0][1], some, (16, True)) for some in numbers]
cases += [(f"{some} half", tensors[6][1], some, (16, True)) for some in numbers[:3]]
cases += [(str(some), tensors[0][1], (17, 32), some) for some in constants]
cases += [("integer scale", tensors[0][1], (17, 32), (16, True), 1)]
rows = []
with idle_device() as noted:
    noted.want(3)
    # All before any: what is wrongly shared would be found under the key of another.
    for again in range(2):
        for name, given, some, (size, flag), *scale in cases:
            every = (*some, *(scale or [1.0]))
            launch_kernel(small, (1,), given, every, SIZE=size, FLAG=flag)
            started = noted.function
            small[(1,)](*given, *every, SIZE=size, FLAG=flag)
            if again:
                rows.append((name, started, noted.function))
print(json.dumps(rows))
""",
    )
    assert [(name, own) for name, own, _ in rows] == [(name, theirs) for name, _, theirs in rows]
    # 8 bytes and 4 bytes are one to triton; the cases are of more than ten kinds.
    assert len({theirs for _, _, theirs in rows}) > 10


def test_arguments_arrive_as_through_triton(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
from triton.tools.tensor_descriptor import TensorDescriptor
matrix = x[:1024].view(32, 32)
shape = BoxShape(TensorDescriptor, torch.float32, [32, 32], [32, 1], [16, 16])
found = []
with idle_device() as noted:
    for kernel, tensors, numbers, constants, sizes in (
        (small, (x, x[64:]), (17, 31, 0.5), {"SIZE": 16, "FLAG": True}, (8, 8, 4, 4, 4)),
        (boxed, (Boxes(matrix, shape), x[2048:]), (7, 0.25), {"SIZE": 16}, (8, 4, 4, 8, 8)),
        (boxed, (Boxes(x[1024:2048].view(32, 32), shape), x), (7, 0.25), {"SIZE": 16},
         (8, 4, 4, 8, 8)),
    ):
        noted.want(len(sizes))
        launch = Launch(kernel, numbers, **constants)
        for _ in range(2):
            launch((3,), tensors)
        direct = noted.function, noted.parameters(sizes)
        count = noted.launches
        launch._ordinary((3,), tensors)
        found.append((direct, (noted.function, noted.parameters(sizes)), noted.launches - count))
print(json.dumps(found))
""",
    )
    for direct, ordinary, launches in found:
        assert direct == ordinary
        assert launches == 1
    # Two tensors of one shape share a descriptor but for the address.
    assert found[1][0][1][0] != found[2][0][1][0]


def test_the_second_launch_goes_past_triton_unless_somebody_listens(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
from triton import knobs
from triton.runtime.jit import JITFunction
ways = []
original = JITFunction.run
JITFunction.run = lambda *a, **k: (ways.append("triton"), original(*a, **k))[1]
def go(n=17):
    ways.clear()
    before = noted.launches
    launch_kernel(small, (1, 2), (x, None), (n, 32, 1.0), SIZE=16, FLAG=True)
    return list(ways), noted.launches - before
heard = []
hook = lambda *a: heard.append(1)
with idle_device() as noted:
    found = {"first": go(), "second": go(), "other number": go(18), "again": go(18)}
    knobs.runtime.launch_enter_hook.add(hook)
    found["heard"] = go()
    knobs.runtime.launch_enter_hook.remove(hook)
    knobs.runtime.launch_exit_hook.add(hook)
    found["heard after"] = go()
    knobs.runtime.launch_exit_hook.remove(hook)
    small.add_pre_run_hook(lambda *a, **k: heard.append(1))
    found["heard before"] = go()
    small.pre_run_hooks.clear()
    found["silent"] = go()
    knobs.runtime.debug = True
    found["debug"] = go()
    knobs.runtime.debug = False
    triton_launch._MOST = 0
    triton_launch._launches.clear()
    go(33), go(34)
    found["forgotten"] = go(33)
    found["kept"] = len(triton_launch._launches)
found["hooks"] = len(heard)
print(json.dumps(found))
""",
    )
    past, through = [[], 1], [["triton"], 1]
    assert found["first"] == found["other number"] == through
    assert found["second"] == found["again"] == found["silent"] == past
    assert found["heard"] == found["heard after"] == found["heard before"] == through
    assert found["debug"] == found["forgotten"] == through
    assert found["hooks"] == 3 and found["kept"] == 1


def test_attention_is_launched_the_same_at_every_call(tmp_path: Path) -> None:
    # Through the choice of a kernel too: what is remembered for a call is that of its signature.
    found = run(
        tmp_path,
        """
from dit_sparse.kernels import ops, signature
from dit_sparse.mask import BlockMask, PackedMask
torch.manual_seed(0)
def operands(tokens, dtype=torch.float16):
    return [torch.randn(1, tokens, 2, 64, dtype=dtype) for _ in range(3)]
with idle_device() as noted:
    noted.want(3)
    even, ragged = operands(512), operands(500)
    wide = [torch.randn(1, 2, 512, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3)]
    odd = [torch.randn(512 * 128 + 1, dtype=torch.float16)[1:].view(1, 512, 2, 64) for _ in "qkv"]
    def masks(n):
        keep = torch.rand(1, 2, -(-n // 128), -(-n // 64)) < 0.5
        lists = BlockMask.from_dense(keep, (128, 64), n)
        return [None, lists, lists.pack(), PackedMask.from_dense(keep, (128, 64), n, 7)]
    given = []
    for q, k, v in (even, ragged, wide, odd):
        made = [ops.summarize(k, v, 64, first_order=first) for first in (True, False)]
        for mask in masks(q.shape[1]):
            given += [(q, k, v, mask, s) for s in ([None] if mask is None else [None, *made])]
    rows = []
    # Each after all others that may be taken for it, and then as if it were the first.
    for fresh in (False, False, True):
        rows.append([])
        for q, k, v, mask, summary in given:
            if fresh:
                signature.forget()
            before, names = noted.launches, []
            ops.attention(q, k, v, mask, summary=summary, on_choice=names.append)
            told = noted.function, noted.parameters((8, 4, 4))
            rows[-1].append((noted.launches - before, *told, names))
print(json.dumps(rows))
""",
    )
    assert found[0] == found[1] == found[2]
    assert len({function for _, function, *_ in found[2]}) > 3
