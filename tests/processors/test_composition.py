"""Together with what else is put on a model: the cases that ``test_features.py`` does not count."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from torch import Tensor, nn

from dit_sparse import SparseProcessor, disable_sparse_attention, enable_sparse_attention
from dit_sparse.methods.base import Call
from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.rewrap import site_of

SETTINGS = {"sparsity": 0.5, "search": (2, 3)}
STEPS = (900.0, 700.0, 500.0, 300.0)
PHASES = ["dense", "search", "refresh", "sparse"]


def generation(model: Any, inputs: Any) -> list[Tensor]:
    return [model(**inputs(t))[0] for t in STEPS]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def native_backend() -> Iterator[None]:
    """set_attention_backend also sets a default for all models of the process."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.fixture
def backend_calls(monkeypatch: pytest.MonkeyPatch, native_backend: None) -> list[str]:
    """Calls of the math backend, by what they attend over."""
    seen: list[str] = []
    name = AttentionBackendName._NATIVE_MATH
    original = _AttentionBackendRegistry._backends[name]

    def spy(query: Tensor, key: Tensor, **rest: Any) -> Tensor:
        seen.append("self" if query.shape[1] == key.shape[1] else "cross")
        return original(query=query, key=key, **rest)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, spy)
    return seen


@pytest.mark.parametrize("order", ["before", "after"])
def test_dense_steps_run_the_users_attention_backend(
    order: str, wan: Any, inputs: Any, calls: list[Call], backend_calls: list[str]
) -> None:
    model = wan()
    model.set_attention_backend("_native_math")
    upstream = generation(model, inputs)
    model.reset_attention_backend()
    backend_calls.clear()
    if order == "before":
        model.set_attention_backend("_native_math")
    sparse = enable_sparse_attention(model, "adaspa", **SETTINGS)
    if order == "after":
        model.set_attention_backend("_native_math")
    out = generation(model, inputs)
    assert [c.phase.value for c in calls if c.layer == 0] == PHASES
    # Two dense steps of two layers; cross-attention in all steps.
    assert backend_calls.count("self") == 4 and backend_calls.count("cross") == 8
    assert equal(out[:2], upstream[:2]) and not equal(out[2:], upstream[2:])
    sparse.remove()
    # The choice is the processors' own, also without the default that was set beside it.
    _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE
    assert equal(generation(model, inputs), upstream)
    assert backend_calls.count("self") == 4 + 8


def with_lora(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )


def test_lora_is_fused_unfused_and_unloaded_under_sparse_attention(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", **SETTINGS) as sparse:
        plain = generation(model, inputs)

        def changed() -> list[Tensor]:
            sparse.reset()
            return generation(model, inputs)

        with_lora(model)
        adapted = changed()
        assert not torch.equal(adapted[0], plain[0])
        model.fuse_lora()
        fused = changed()
        model.unfuse_lora()
        unfused = changed()
        model.unload_lora()
        unloaded = changed()
        for a, b, c, d in zip(adapted, fused, unfused, unloaded, strict=True):
            # Other rounding may move a block across the threshold only where two blocks tie.
            assert (a - b).abs().max() < 1e-4 and (a - c).abs().max() < 1e-4
            assert not torch.equal(a, d)
        assert (unloaded[3] - plain[3]).abs().max() < 1e-4
        assert sparse.report().sparse_density == 0.5


def test_a_deep_copy_has_its_own_weights_and_state(
    wan: Any, inputs: Any, calls: list[Call]
) -> None:
    model = wan()
    sparse = enable_sparse_attention(model, "adaspa", **SETTINGS)
    expected = generation(model, inputs)
    for t in STEPS[:3]:
        model(**inputs(t))
    twin = copy.deepcopy(model)
    before = len(calls)
    # The copy starts a generation of its own, though the original is in the middle of one.
    assert equal(generation(twin, inputs), expected)
    assert [c.phase.value for c in calls[before:] if c.layer == 0] == PHASES
    assert torch.equal(model(**inputs(STEPS[3]))[0], expected[3])
    for parameter in twin.parameters():
        parameter.zero_()
    assert not twin(**inputs(STEPS[0]))[0].any()
    assert equal(generation(model, inputs), expected)
    disable_sparse_attention(twin)
    assert binding_of(twin) is None and not twin._forward_pre_hooks and not twin._forward_hooks
    assert all(site_of(p) is None for p in twin.attn_processors.values())
    assert all(site_of(block.attn1.processor) is not None for block in model.blocks)
    sparse.remove()
    assert all(site_of(p) is None for p in model.attn_processors.values())


def test_a_saved_model_is_an_ordinary_one(
    wan: Any, inputs: Any, tmp_path: Any, calls: list[Call]
) -> None:
    model = wan()
    upstream = generation(model, inputs)
    with enable_sparse_attention(model, "adaspa", **SETTINGS):
        model(**inputs())
        model.save_pretrained(tmp_path)
    calls.clear()
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    weights = model.state_dict()
    assert list(loaded.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    for out, reference in zip(generation(loaded, inputs), upstream, strict=True):
        # Mapped weights are aligned differently, which changes the last bits of products.
        assert (out - reference).abs().max() < 1e-5
    assert calls == []
    loaded.set_attn_processor(SparseProcessor("adaspa", **SETTINGS))
    generation(loaded, inputs)
    assert [c.phase.value for c in calls if c.layer == 0] == PHASES


@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offload_keeps_contexts_and_phases(order: str, clip: Any, calls: list[Call]) -> None:
    from accelerate import cpu_offload_with_hook

    run = clip()
    model = run.pipe.transformer
    upstream = run(steps=4)
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        expected = run(steps=4)
    calls.clear()
    if order == "before":
        cpu_offload_with_hook(model, "cpu")
    sparse = enable_sparse_attention(run.pipe, "adaspa", **SETTINGS)
    for _ in range(2):
        if order == "after":
            # As maybe_free_model_hooks does after every pipeline call.
            remove_hook_from_module(model, recurse=True)
            cpu_offload_with_hook(model, "cpu")
        assert torch.equal(run(steps=4), expected)
    assert {c.step.branch for c in calls} == {"cond", "uncond"}
    assert [c.phase.value for c in calls if (c.layer, c.step.branch) == (0, "cond")] == PHASES * 2
    made = len(calls)
    sparse.remove()
    assert torch.equal(run(steps=4), upstream) and len(calls) == made


class _Adding(ModelHook):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] + self.amount,)


@pytest.mark.parametrize("removal", ["sparse first", "hook first", "early hook", "late hook"])
def test_diffusers_hooks_on_the_model_come_and_go_around_ours(
    removal: str, wan: Any, inputs: Any
) -> None:
    model = wan()
    plain = model(**inputs())[0]
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(_Adding(1.0), "early")
    sparse = enable_sparse_attention(model, "dense")
    registry.register_hook(_Adding(2.0), "late")
    assert torch.equal(model(**inputs())[0], plain + 1.0 + 2.0)
    if removal == "sparse first":
        sparse.remove()
        assert torch.equal(model(**inputs())[0], plain + 1.0 + 2.0)
        registry.remove_hook("late")
        assert torch.equal(model(**inputs())[0], plain + 1.0)
        registry.remove_hook("early")
    elif removal == "hook first":
        registry.remove_hook("early")
        registry.remove_hook("late")
    elif removal == "early hook":
        registry.remove_hook("early")
        assert torch.equal(model(**inputs())[0], plain + 2.0)
        registry.remove_hook("late")
    else:
        registry.remove_hook("late")
        assert torch.equal(model(**inputs())[0], plain + 1.0)
        registry.remove_hook("early")
    assert torch.equal(model(**inputs())[0], plain)
    # Two layers in each of the passes above while it was on.
    passes = {"sparse first": 1, "hook first": 2}.get(removal, 3)
    assert sparse.report().kernels == {"own": 2 * passes}
    sparse.remove()
    assert torch.equal(model(**inputs())[0], plain)


@pytest.mark.parametrize("first", ["cache", "sparse"])
def test_a_first_block_cache_comes_and_goes_in_either_order(
    first: str, clip: Any, calls: list[Call]
) -> None:
    run = clip()
    model = run.pipe.transformer
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        sparse_only = run(steps=6)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    cache_only = run(steps=6)
    if first == "sparse":
        model.disable_cache()
    calls.clear()
    sparse = enable_sparse_attention(run.pipe, "adaspa", **SETTINGS)
    if first == "sparse":
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    both = run(steps=6)
    per_layer = [sum(c.layer == layer for c in calls) for layer in range(2)]
    assert per_layer[0] == 12 and per_layer[1] < 12
    assert not torch.equal(both, sparse_only) and not torch.equal(both, cache_only)
    if first == "sparse":
        sparse.remove()
        assert torch.equal(run(steps=6), cache_only)
    else:
        model.disable_cache()
        assert torch.equal(run(steps=6), sparse_only)
