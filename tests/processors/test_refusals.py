"""What is refused, when and with which words: before any denoising, naming what is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from dit_sparse import SparseConfig, SparseProcessor, enable_sparse_attention, list_methods
from dit_sparse.kernels import ops
from dit_sparse.kernels.cpu import CpuAttention
from dit_sparse.processors import checks
from dit_sparse.processors.rewrap import site_of


@pytest.fixture
def untouched(wan: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that must stay as it is and whose forward must not start."""
    model = wan()
    before = dict(model.attn_processors)

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work has started")

    with monkeypatch.context() as patched:
        patched.setattr(WanTransformer3DModel, "forward", forward)
        yield model
    assert model.attn_processors == before
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("adaspo",), {}, ["method must be one of", "Did you mean 'adaspa'", *list_methods()]),
        (("adaspa",), {"sparcity": 0.8}, ["accepts", "'sparsity'", "unknown", "sparcity"]),
        (("adaspa",), {"sparsity": 80}, ["must be in [0, 1)", "80", "sparsity=0.8 keeps 20 %"]),
        (("adaspa",), {"sparsity": -0.1}, ["must be in [0, 1)", "-0.1"]),
        (("adaspa",), {"sparsity": float("nan")}, ["must be in [0, 1)", "nan"]),
        (("adaspa",), {"impl": "flash9"}, ["'auto' or one of", "cpu", "reference", "'flash9'"]),
        (("adaspa",), {"strict": "yes"}, ["strict must be True or False", "'yes'"]),
        (("adaspa",), {"dense_layers": [0, 2]}, ["must be below 2", "[2]"]),
    ],
)
def test_wrong_settings(arguments: Any, options: Any, words: list[str], untouched: Any) -> None:
    with pytest.raises(ValueError) as error:
        enable_sparse_attention(untouched, *arguments, **options)
    for word in words:
        assert word in str(error.value)


def test_a_file_of_another_version(untouched: Any, tmp_path: Any) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(SparseConfig().to_dict() | {"version": 0}))
    with pytest.raises(ValueError, match=r"version must be 1, got 0; save it again"):
        enable_sparse_attention(untouched, path)


def refusing(limit: int) -> Callable[..., list[str]]:
    def reasons(self: Any, call: ops.AttentionCall) -> list[str]:
        dim = call.q.shape[-1]
        return [f"head dim must be at most {limit}, got {dim}"] if dim > limit else []

    return reasons


def test_a_head_dim_that_a_named_kernel_cannot_do(
    untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuAttention, "reasons", refusing(8))
    with pytest.raises(ops.Unsupported, match=r"impl='cpu'.*\n.*at most 8, got 12"):
        enable_sparse_attention(untouched, "adaspa", impl="cpu")
    # By the other door too; "auto" takes another kernel.
    with pytest.raises(ops.Unsupported, match="at most 8, got 12"):
        untouched.set_attn_processor(SparseProcessor("full", impl="cpu"))
    with enable_sparse_attention(untouched, "adaspa"):
        pass


def test_a_dtype_that_a_named_kernel_cannot_do(
    untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons(self: Any, call: ops.AttentionCall) -> list[str]:
        return [] if call.q.dtype == torch.float32 else [f"dtype must be fp32, got {call.q.dtype}"]

    monkeypatch.setattr(CpuAttention, "reasons", reasons)
    with enable_sparse_attention(untouched, impl="cpu"):
        pass
    with pytest.raises(ops.Unsupported, match=r"fp32, got torch\.bfloat16"):
        enable_sparse_attention(untouched.to(torch.bfloat16), impl="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the CUDA kernel can run")
def test_a_named_kernel_that_cannot_run_on_this_device(
    untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from dit_sparse.kernels import triton_common

    # Tests run Triton under its interpreter; users on a CPU do not.
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    with pytest.raises(ops.Unsupported, match=r"impl='triton'.*\n.*(CUDA|cuda)"):
        enable_sparse_attention(untouched, impl="triton")


def test_a_model_not_yet_on_its_device_is_checked_at_the_first_call(
    wan: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch, calls: Any
) -> None:
    # With a GPU in the machine a model on the CPU may still be moved, so it is too early to refuse.
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(CpuAttention, "reasons", refusing(8))
    model = wan()
    enable_sparse_attention(model, "adaspa", search=(9,), impl="cpu")
    # The warm-up would be dense for eight steps more; the refusal comes in the first layer of all.
    with pytest.raises(ops.Unsupported, match="at most 8, got 12"):
        model(**inputs())
    assert calls == []


def test_ring_attention(untouched: Any) -> None:
    parallel = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    untouched._parallel_config = parallel
    with pytest.raises(NotImplementedError, match=r"ring attention: it shows .* one chunk"):
        enable_sparse_attention(untouched)
    untouched._parallel_config = SimpleNamespace(context_parallel_config=None)
    with enable_sparse_attention(untouched):
        pass


def test_ring_attention_enabled_afterwards(wan: Any, inputs: Any, calls: Any) -> None:
    model = wan()
    with enable_sparse_attention(model):
        model._parallel_config = SimpleNamespace(
            context_parallel_config=SimpleNamespace(ring_degree=2)
        )
        with pytest.raises(NotImplementedError, match="under ring attention"):
            model(**inputs())
    assert calls == []


def test_tokens_that_do_not_match_the_forward_arguments(
    wan: Any, inputs: Any, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wan()
    enable_sparse_attention(model)
    block = model.blocks[0]
    given = inputs()
    model(**given)
    hidden = torch.randn(1, 100, 24)
    cos, sin = model.rope(given["hidden_states"])
    with pytest.raises(RuntimeError) as error:
        block.attn1(hidden, None, None, (cos[:, :100], sin[:, :100]))
    for word in ("blocks.0.attn1", "100 queries", "256 tokens"):
        assert word in str(error.value)


def test_a_mask_that_is_not_padding(wan: Any, inputs: Any) -> None:
    model = wan()
    enable_sparse_attention(model)
    model(**inputs())
    square = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    with pytest.raises(
        NotImplementedError, match=r"blocks\.0\.attn1.*bool \[batch, 1, 1, tokens\]"
    ):
        model.blocks[0].attn1(
            torch.randn(1, 256, 24), None, square, model.rope(inputs()["hidden_states"])
        )


def test_a_processor_that_makes_no_attention_call_leaves_all_as_they_were(wan: Any) -> None:
    class Silent:
        def __call__(self, attn: Any, hidden_states: Tensor, *rest: Any) -> Tensor:
            return hidden_states

    model = wan()
    model.blocks[1].attn1.set_processor(Silent())
    before = dict(model.attn_processors)
    with pytest.raises(NotImplementedError, match="Silent calls neither dispatch_attention_fn"):
        enable_sparse_attention(model)
    assert model.attn_processors == before
    assert not any(site_of(p) for p in model.attn_processors.values())


def test_a_pass_without_a_timestep(wan: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan()
    sparse = enable_sparse_attention(model)
    model(**inputs())
    sparse.reset()
    sparse.bindings[0].scope.timestep = None
    with pytest.raises(RuntimeError, match="neither a cache context nor a timestep"):
        model.blocks[0].attn1(
            torch.randn(1, 256, 24), None, None, model.rope(inputs()["hidden_states"])
        )
