"""Processors that features of diffusers put in the place of ours, and what is left in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from features import FAMILIES, load_image_prompt
from torch import Tensor

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.rewrap import site_of


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def cogvideox() -> Any:
    return FAMILIES["CogVideoX"].build()


def run(pipe: Any) -> Tensor:
    return FAMILIES["CogVideoX"].run(pipe)


def kinds(model: Any) -> set[type]:
    return {type(processor) for processor in model.attn_processors.values()}


def test_fusing_and_unfusing_under_sparse_attention(cogvideox: Any) -> None:
    model, plain = cogvideox.transformer, run(cogvideox)
    originals = dict(model.attn_processors)
    with enable_sparse_attention(cogvideox, "full", strict=True) as sparse:
        expected = run(cogvideox)
        model.fuse_qkv_projections()
        assert all(
            site.original.__class__ is FusedCogVideoXAttnProcessor2_0 for site in sites(sparse)
        )
        assert torch.equal(run(cogvideox), expected)
        model.unfuse_qkv_projections()
        assert [site.original for site in sites(sparse)] == list(originals.values())
        assert torch.equal(run(cogvideox), expected)
    assert model.attn_processors == originals
    assert torch.equal(run(cogvideox), plain)


def sites(sparse: SparseProcessor) -> Any:
    return sparse.bindings[0].sites


def test_sparse_attention_removed_while_projections_are_fused(cogvideox: Any) -> None:
    model = cogvideox.transformer
    originals = dict(model.attn_processors)
    sparse = enable_sparse_attention(cogvideox, "full", strict=True)
    model.fuse_qkv_projections()
    sparse.remove()
    assert kinds(model) == {FusedCogVideoXAttnProcessor2_0}
    # What CogVideoX has kept to put back are processors of ours.
    model.unfuse_qkv_projections()
    assert model.attn_processors == originals


def test_sparse_attention_put_on_while_projections_are_fused(cogvideox: Any) -> None:
    model = cogvideox.transformer
    sparse = enable_sparse_attention(cogvideox, "full")
    expected = run(cogvideox)
    model.fuse_qkv_projections()
    with enable_sparse_attention(cogvideox, "full", strict=True) as second:
        assert sparse.bindings == [] and second.bindings[0].is_active()
        model.unfuse_qkv_projections()
        assert {type(site.original) for site in sites(second)} == {CogVideoXAttnProcessor2_0}
        assert torch.equal(run(cogvideox), expected)
    assert kinds(model) == {CogVideoXAttnProcessor2_0}


def test_a_user_who_fuses_by_hand_takes_sparse_attention_off(cogvideox: Any) -> None:
    model = cogvideox.transformer
    enable_sparse_attention(cogvideox, "full")
    model.set_attn_processor(FusedCogVideoXAttnProcessor2_0())
    assert binding_of(model) is None and not model._forward_hooks


def test_what_is_set_on_processors_meanwhile_is_kept() -> None:
    tiny = FAMILIES["SD 3"]
    pipe = tiny.build()
    load_image_prompt(pipe)
    model, keys = pipe.transformer, list(pipe.transformer.state_dict())
    originals = dict(model.attn_processors)
    with enable_sparse_attention(pipe, "full"):
        pipe.set_ip_adapter_scale(0.2)
        for block in model.transformer_blocks:
            block.attn.processor._parallel_config = "anything"
        assert list(model.state_dict()) == keys
    assert model.attn_processors == originals
    for processor in (block.attn.processor for block in model.transformer_blocks):
        assert isinstance(processor, SD3IPAdapterJointAttnProcessor2_0)
        assert processor.scale == 0.2 and processor._parallel_config == "anything"
        assert not [name for name in vars(processor) if "dit_sparse" in name]


def test_an_instance_of_a_class_of_ours_is_one_of_its_base() -> None:
    """load_ip_adapter of FLUX.1 makes processors of the class that it finds."""
    tiny = FAMILIES["FLUX.1"]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    block = pipe.transformer.single_transformer_blocks[0]
    with enable_sparse_attention(pipe, "full"):
        stray = type(block.attn.processor)()
        assert site_of(stray) is None
        block.attn.set_processor(stray)
        with pytest.warns(UserWarning, match="1 of 3 self-attention layers"):
            out = tiny.run(pipe)
    assert (out - plain).abs().max() < 1e-4
    pipe.transformer.set_attn_processor(dict(pipe.transformer.attn_processors))
    assert "Sparse" not in "".join(kind.__name__ for kind in kinds(pipe.transformer))
    assert torch.equal(tiny.run(pipe), plain)
