"""The checks of diffusers' own test mixins that no other file here has, on every family.

Their wording is upstream's idea of a well-behaved model: what it returns, in which dtype, what
training does. ``tests/mirror`` runs the originals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import Draw, Tiny, tiny_models
from tiny_pipelines import PIPELINES, TinyPipeline
from torch import Tensor

from dit_sparse import disable_sparse_attention, enable_sparse_attention
from dit_sparse.processors.op import NO_GRADIENT

# One configuration a class; the others differ in their tokens alone.
TINY = list({tiny.model: tiny for tiny in reversed(tiny_models())}.values())[::-1]
TRAINED = [
    tiny for tiny in TINY if tiny.model in ("WanTransformer3DModel", "FluxTransformer2DModel")
]


def by_name(tiny: Tiny) -> str:
    return tiny.name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, of whatever kind."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


@pytest.mark.parametrize("tiny", TINY, ids=by_name)
@torch.no_grad()
def test_outputs_as_tuple_and_as_object_are_the_same(tiny: Tiny) -> None:
    model = tiny.build()
    with enable_sparse_attention(model, "full"):
        as_tuple = model(**tiny.inputs(Draw(), tiny.grid, tiny.batch), return_dict=False)
        as_object = model(**tiny.inputs(Draw(), tiny.grid, tiny.batch), return_dict=True)
    assert type(as_tuple) is not type(as_object)
    pairs = list(zip(tensors(as_tuple), tensors(as_object), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("tiny", TINY, ids=by_name)
@torch.no_grad()
def test_half_precision(tiny: Tiny) -> None:
    """bfloat16 weights and inputs: upstream bit for bit in dense steps, and close with our mask."""
    model = tiny.build().to(torch.bfloat16)
    inputs = cast(tiny.inputs(Draw(), tiny.grid, tiny.batch))
    try:
        expected = tensors(model(**inputs, return_dict=False))
    except RuntimeError as error:
        pytest.skip(f"upstream cannot: {error}")
    with enable_sparse_attention(model, "dense"):
        dense = tensors(model(**inputs, return_dict=False))
    with enable_sparse_attention(model, "full"):
        full = tensors(model(**inputs, return_dict=False))
    for a, b, c in zip(expected, dense, full, strict=True):
        assert b.dtype == c.dtype == a.dtype
        start, stop = tiny.used
        a, b, c = (x[..., :] if x.ndim < 2 else x[:, start:stop] for x in (a, b, c))
        assert torch.equal(a, b)
        assert (a - c).abs().max() <= 0.05 * max(1.0, float(a.abs().max()))


def cast(value: Any) -> Any:
    """``value`` with the floating-point tensors in it as bfloat16, except position ids."""
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: v if k.endswith("ids") else cast(v) for k, v in value.items()}
    return [cast(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("tiny", TRAINED, ids=by_name)
def test_training_is_refused_and_goes_on_as_upstreams_afterwards(tiny: Tiny) -> None:
    model = tiny.build().requires_grad_(True).train()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        out = model(**tiny.inputs(Draw(), tiny.grid, tiny.batch), return_dict=False)[0]
        out.square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        enable_sparse_attention(model, "full")
        with pytest.raises(NotImplementedError) as refusal:
            gradients()
        assert str(refusal.value) == NO_GRADIENT
        disable_sparse_attention(model)
        for found, wanted in zip(gradients(), expected, strict=True):
            assert (found is None) == (wanted is None)
            assert found is None or (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("tiny", TRAINED, ids=by_name)
@torch.no_grad()
def test_gradient_checkpointing_changes_no_inference(tiny: Tiny) -> None:
    model = tiny.build()
    with enable_sparse_attention(model, "full"):
        plain = model(**tiny.inputs(Draw(), tiny.grid, tiny.batch), return_dict=False)[0]
        model.enable_gradient_checkpointing()
        out = model(**tiny.inputs(Draw(), tiny.grid, tiny.batch), return_dict=False)[0]
    assert torch.equal(out, plain)


@pytest.mark.parametrize("tiny", PIPELINES, ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_a_pipeline_saved_while_sparse_is_an_ordinary_one(
    tiny: TinyPipeline, tmp_path: Any
) -> None:
    pipe = tiny.build()
    expected = tiny.run(pipe, steps=2)
    with enable_sparse_attention(pipe, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        tiny.run(pipe, steps=2)
        assert sparse.report().sparse_steps == 1
        pipe.save_pretrained(tmp_path)
    absent = {name: None for name, component in pipe.components.items() if component is None}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    out = tiny.run(loaded, steps=2)
    # Mapped weights are aligned differently, which changes the last bits of products.
    assert (out - expected).abs().max() <= 1e-3 * float(expected.abs().max())
    with enable_sparse_attention(loaded, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        tiny.run(loaded, steps=2)
        assert sparse.report().sparse_steps == 1
