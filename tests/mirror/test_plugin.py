"""The plugin switches sparse attention on, tells when it was reached, and whose a failure is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SUITE = """
import torch
from diffusers import WanTransformer3DModel
from transformers import AutoConfig


def forward(**options):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=1, rope_max_seq_len=32,
    )
    model.requires_grad_(bool(options))
    inputs = torch.randn(1, 16, 4, 16, 16), torch.tensor([900]), torch.randn(1, 4, 8)
    return model, model(*inputs, return_dict=False)[0]


def test_forward():
    with torch.no_grad():
        assert forward()[1].isfinite().all()


def test_training():
    forward(train=True)[1].sum().backward()


def test_processors():
    assert not any(hasattr(p, "_dit_sparse_site") for p in forward()[0].attn_processors.values())


def test_hub():
    AutoConfig.from_pretrained("nobody/nothing")


def test_wrong():
    raise AssertionError
"""


def run(folder: Path, *options: str) -> str:
    here = Path(__file__).parent
    paths = (str(here), str(here.parents[1]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "sparse_mirror", *options, "test_suite.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "sparse attention" in done.stdout, done.stdout + done.stderr
    return done.stdout


def test_what_fails_with_it_only_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    out = run(tmp_path, "--sparse-record", "with.json")
    assert "5 tests: 1 passed, 2 failed, 0 skipped, 1 hub, 1 training" in out
    assert "1 passed with 1 sparse calls in them" in out
    record = json.loads((tmp_path / "with.json").read_text())
    assert record["test_suite.py::test_forward"] == {"result": "passed", "calls": 1, "message": ""}
    assert record["test_suite.py::test_hub"]["result"] == "hub"

    out = run(tmp_path, "--sparse", "off", "--lf", "--sparse-against", "with.json")
    assert "of 2 tests that fail with sparse attention, 2 ran here:" in out
    assert "1 fail without it as well, 1 do not" in out
    assert "test_suite.py::test_processors - AssertionError" in out
