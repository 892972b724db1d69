"""Putting sparse attention on a model, and taking it off without a trace."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.attention import AttentionMixin
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from dit_sparse import SparseProcessor, disable_sparse_attention, enable_sparse_attention
from dit_sparse.methods.transfer import release_host_memory, transfer_for
from dit_sparse.processors import one_liner
from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.processor import release
from dit_sparse.processors.rewrap import site_of


def sites(model: Any) -> list[str]:
    """Attention modules that run sparse."""
    return [name for name, p in model.attn_processors.items() if site_of(p) is not None]


def footprint(model: Any) -> dict[str, Any]:
    """Everything on a model that installing could leave something in."""
    hooks = {
        name: (dict(module._forward_pre_hooks), dict(module._forward_hooks))
        for name, module in model.named_modules()
    }
    registry = getattr(model, "_diffusers_hook", None)
    return {
        "processors": [(name, id(p)) for name, p in model.attn_processors.items()],
        "processor attributes": [dict(vars(p)) for p in model.attn_processors.values()],
        "hooks": hooks,
        "diffusers hooks": [] if registry is None else list(registry._hook_order),
        "attributes": sorted(set(vars(model)) - {"_diffusers_hook"}),
        "weights": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
    }


def test_only_self_attention_of_the_main_stack_is_touched(wan: Any) -> None:
    model = wan(image_dim=16, added_kv_proj_dim=24)
    before = dict(model.attn_processors)
    keys, config = list(model.state_dict()), dict(model.config)
    model.set_attn_processor(SparseProcessor("adaspa", sparsity=0.5))
    assert sites(model) == [f"blocks.{i}.attn1.processor" for i in range(2)]
    for name, processor in model.attn_processors.items():
        if "attn1" in name:
            # A copy with the class's own name and attributes, so that code that looks still works.
            assert processor is not before[name] and isinstance(processor, WanAttnProcessor)
        else:
            assert processor is before[name]
    assert list(model.state_dict()) == keys and dict(model.config) == config


@pytest.mark.parametrize("how", ["remove", "context", "disable model", "disable pipe", "ordinary"])
def test_every_way_back_leaves_no_trace(how: str, clip: Any, inputs: Any) -> None:
    run = clip()
    model = run.pipe.transformer
    before, expected = footprint(model), model(**inputs())[0]
    sparse = SparseProcessor("adaspa", sparsity=0.5, search=(0,))
    model.set_attn_processor(sparse)
    assert not torch.equal(run(steps=3), run(steps=3, seed=1))
    model(**inputs())
    assert not torch.equal(model(**inputs(t=400.0))[0], model(**inputs(t=300.0))[0])
    if how == "remove":
        sparse.remove()
        sparse.remove()
    elif how == "context":
        with sparse:
            pass
    elif how == "disable model":
        disable_sparse_attention(model)
    elif how == "disable pipe":
        disable_sparse_attention(run.pipe)
        disable_sparse_attention(run.pipe)
    else:
        model.set_attn_processor(originals(sparse, model))
    assert footprint(model) == before
    assert torch.equal(model(**inputs())[0], expected)
    assert binding_of(model) is None and sparse.bindings == []


def originals(sparse: SparseProcessor, model: Any) -> dict[str, Any]:
    held = {site.name + ".processor": site.original for site in sparse.bindings[0].sites}
    return {name: held.get(name, p) for name, p in model.attn_processors.items()}


def test_an_exception_inside_the_context_restores_too(wan: Any, inputs: Any) -> None:
    model = wan()
    before = footprint(model)
    with pytest.raises(KeyError), enable_sparse_attention(model):
        model(**inputs())
        raise KeyError
    assert footprint(model) == before


def test_installing_twice_and_another(wan: Any, inputs: Any) -> None:
    model = wan()
    before = footprint(model)
    first = SparseProcessor("adaspa", sparsity=0.5)
    model.set_attn_processor(first)
    model.set_attn_processor(first)
    assert len(first.bindings) == 1 and len(sites(model)) == 2
    second = SparseProcessor("dense")
    model.set_attn_processor(second)
    assert first.bindings == [] and len(second.bindings) == 1
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    model(**inputs())
    assert first.report().layers == [] and len(second.report().layers) == 2
    first.remove()
    assert len(sites(model)) == 2
    second.remove()
    assert footprint(model) == before


def test_one_processor_on_two_models(wan: Any, inputs: Any) -> None:
    sparse = SparseProcessor("dense")
    models = [wan(seed=0), wan(seed=1, num_layers=3)]
    for model in models:
        model.set_attn_processor(sparse)
        model(**inputs())
    assert [(e["model"], e["name"]) for e in sparse.report().layers] == [
        (0, "blocks.0.attn1"),
        (0, "blocks.1.attn1"),
        (1, "blocks.0.attn1"),
        (1, "blocks.1.attn1"),
        (1, "blocks.2.attn1"),
    ]
    disable_sparse_attention(models[0])
    assert [binding.model for binding in sparse.bindings] == [models[1]]
    sparse.remove()
    assert sites(models[0]) == sites(models[1]) == []


def test_host_memory_is_kept_between_generations_and_given_back_in_the_end(
    wan: Any, inputs: Any
) -> None:
    transfer = transfer_for(torch.device("cpu"))
    release_host_memory()
    options = {"warmup": 1, "refresh": "never", "offload": True, "budget_gb": 0.1}
    sparse = enable_sparse_attention(wan(), "compensated_delta", **options)
    model = sparse.bindings[0].model
    for t in (900.0, 800.0):
        model(**inputs(t=t))
    assert sparse.report().cache_bytes > 0
    sparse.reset()
    slabs = len(transfer._free)
    sparse.remove()
    assert slabs > 0 and len(transfer._free) == 0


def test_an_ordinary_processor_afterwards_releases_the_model(wan: Any, inputs: Any) -> None:
    model = wan()
    expected = model(**inputs())[0]
    sparse = SparseProcessor("adaspa", sparsity=0.5)
    model.set_attn_processor(sparse)
    ordinary = WanAttnProcessor()
    model.set_attn_processor(ordinary)
    assert all(processor is ordinary for processor in model.attn_processors.values())
    assert binding_of(model) is None and sparse.bindings == []
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(model(**inputs())[0], expected)


def test_processors_read_and_set_again_stay_sparse(wan: Any, inputs: Any, calls: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5):
        model.set_attn_processor(model.attn_processors)
        model(**inputs())
        assert len(sites(model)) == len(calls) == 2


def test_a_wrong_dict_changes_nothing(wan: Any) -> None:
    model = wan()
    with enable_sparse_attention(model):
        with pytest.raises(ValueError, match="number of processors"):
            model.set_attn_processor({"blocks.0.attn1.processor": WanAttnProcessor()})
        assert len(sites(model)) == 2


@pytest.mark.filterwarnings("ignore:1 of 2 self-attention layers")
def test_a_dict_may_take_single_layers_off(wan: Any, inputs: Any, calls: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5) as sparse:
        processors = model.attn_processors
        own = processors["blocks.1.attn1.processor"] = WanAttnProcessor()
        model.set_attn_processor(processors)
        model(**inputs())
        assert sites(model) == ["blocks.0.attn1.processor"] and [c.layer for c in calls] == [0]
        assert len(sparse.bindings) == 1
    assert model.blocks[1].attn1.processor is own


def test_both_experts_are_bound_each_with_its_own_state(clip: Any, wan: Any) -> None:
    run = clip(second=wan(seed=1), boundary_ratio=0.7)
    with enable_sparse_attention(run.pipe, "adaspa", sparsity=0.5) as sparse:
        assert [b.model for b in sparse.bindings] == [run.pipe.transformer, run.pipe.transformer_2]
        assert sparse.bindings[0].run is not sparse.bindings[1].run
        assert len(sites(run.pipe.transformer)) == len(sites(run.pipe.transformer_2)) == 2
    assert sites(run.pipe.transformer) == sites(run.pipe.transformer_2) == []


def test_a_refusal_by_one_expert_leaves_neither_bound(clip: Any, wan: Any) -> None:
    run = clip(second=wan(seed=1, num_layers=1), boundary_ratio=0.7)
    before = footprint(run.pipe.transformer), footprint(run.pipe.transformer_2)
    with pytest.raises(ValueError, match="dense_layers must be below 1"):
        enable_sparse_attention(run.pipe, dense_layers=(1,))
    assert (footprint(run.pipe.transformer), footprint(run.pipe.transformer_2)) == before


def test_a_refusal_keeps_the_sparse_attention_that_was_there(wan: Any, inputs: Any) -> None:
    model = wan()
    sparse = enable_sparse_attention(model, "dense")
    with pytest.raises(ValueError, match="dense_layers must be below 2"):
        model.set_attn_processor(SparseProcessor(dense_layers=(2,)))
    model(**inputs())
    assert len(sites(model)) == 2 and len(sparse.report().layers) == 2


def test_a_model_without_adapter_is_refused_with_the_supported_ones(wan: Any) -> None:
    class Unknown(nn.Module, AttentionMixin):
        def __init__(self) -> None:
            super().__init__()
            self.block = wan().blocks[0]

    model = Unknown()
    before = dict(model.attn_processors)
    for put_on in (model.set_attn_processor, SparseProcessor().install):
        with pytest.raises(ValueError, match=r"no adapter for Unknown.*WanTransformer3DModel"):
            put_on(SparseProcessor() if put_on == model.set_attn_processor else model)
    assert model.attn_processors == before
    with pytest.raises(ValueError, match=r"pipeline or transformer, got int"):
        enable_sparse_attention(3)
    with pytest.raises(ValueError, match=r"pipeline or transformer, got str"):
        disable_sparse_attention("wan")


def test_a_pipeline_without_supported_models_names_its_components(clip: Any) -> None:
    run = clip()
    run.pipe.transformer = type("Strange", (nn.Module,), {})()
    with pytest.raises(ValueError, match=r"no component of this WanPipeline.*'Strange'"):
        enable_sparse_attention(run.pipe)


def test_a_subclass_of_a_supported_model_is_supported(wan: Any, inputs: Any, calls: Any) -> None:
    model = wan()
    model.__class__ = type("MyWan", (type(model),), {})
    with enable_sparse_attention(model, "adaspa", sparsity=0.5):
        model(**inputs())
    assert len(calls) == 2


def test_a_sparse_processor_in_the_wrong_place_says_where_it_goes(wan: Any, inputs: Any) -> None:
    model = wan()
    everywhere = {name: SparseProcessor() for name in model.attn_processors}
    with pytest.raises(ValueError, match=r"pass it alone.*dense_layers"):
        model.set_attn_processor(everywhere)
    assert sites(model) == []
    model.blocks[0].attn1.set_processor(SparseProcessor())
    with pytest.raises(TypeError, match=r"whole model.*model\.set_attn_processor"):
        model(**inputs())


def test_the_patch_is_idempotent_and_can_be_undone(wan: Any) -> None:
    patched = AttentionMixin.set_attn_processor
    one_liner.patch(SparseProcessor, release)
    assert AttentionMixin.set_attn_processor is patched
    one_liner.unpatch()
    try:
        assert AttentionMixin.set_attn_processor is patched._dit_sparse_original
        one_liner.unpatch()
        assert AttentionMixin.set_attn_processor is patched._dit_sparse_original
    finally:
        one_liner.patch(SparseProcessor, release)
    model = wan()
    model.set_attn_processor(SparseProcessor())
    assert len(sites(model)) == 2


def test_nothing_keeps_a_removed_model_alive(wan: Any, inputs: Any) -> None:
    model = wan()
    sparse = enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,))
    model(**inputs())
    sparse.remove()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(sparse.report().layers) == 2


def test_a_model_dropped_while_sparse_is_freed(wan: Any, inputs: Any) -> None:
    model = wan()
    model.set_attn_processor(SparseProcessor("adaspa", sparsity=0.5))
    model(**inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
