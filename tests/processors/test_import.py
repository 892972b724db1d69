"""Importing in a fresh process: nothing heavy, and no optional package is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a process sees in which a package is not installed and there is no GPU.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
"""


def fresh(code: str, blocked: tuple[str, ...] = ()) -> str:
    """Standard output of ``code`` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_diffusers_nor_triton() -> None:
    out = fresh(
        "import dit_sparse\n"
        "heavy = {'torch', 'diffusers', 'triton', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(dit_sparse.__file__, sorted(heavy))"
    )
    assert out.strip() == f"{ROOT / 'dit_sparse' / '__init__.py'} []"


USE = """
import time
import torch
from diffusers import WanTransformer3DModel
start = time.process_time()
# Not through the package's own name, which must make no difference.
from dit_sparse.processors.processor import SparseProcessor
import dit_sparse
for name in dit_sparse.__all__:
    getattr(dit_sparse, name)
print(time.process_time() - start)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=1,
    rope_max_seq_len=32,
).eval()
sparse = SparseProcessor("adaspa", sparsity=0.5, search=(0,))
model.set_attn_processor(sparse)
with torch.no_grad():
    for t in (900.0, 500.0):
        model(torch.randn(1, 16, 4, 16, 16), torch.tensor([t]), torch.randn(1, 4, 8))
print(sparse.report().sparse_density, sorted(sparse.report().kernels))
try:
    SparseProcessor(impl="triton")
except NotImplementedError as error:
    print(error)
print(sys.modules.get("triton") is not None, dit_sparse.SparseProcessor is SparseProcessor)
"""


@pytest.fixture(scope="module")
def used() -> list[str]:
    """One process for all questions, because torch and diffusers take seconds to import."""
    return fresh(USE, blocked=("triton",)).strip().splitlines()


def test_everything_works_without_triton_and_without_a_gpu(used: list[str]) -> None:
    _, density, refusal, imported = used
    assert density == "0.5 ['cpu', 'own']"
    assert refusal == "impl='triton' cannot be used: package 'triton' is not installed"
    assert imported == "False True"


def test_import_costs_less_than_a_second_beyond_torch_and_diffusers(used: list[str]) -> None:
    # CPU time of the process, which other load on the machine hardly moves.
    assert 0 < float(used[0]) < 1.0
