"""Step caches that do not do what was asked, which upstream does not tell."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from features import FAMILIES
from tiny_models import Draw, tiny_models

from dit_sparse import AdaSpa, Method, SparseConfig, enable_sparse_attention
from dit_sparse.methods.dense import FullMask
from dit_sparse.processors.caches import cache_hooks

hooks = pytest.importorskip("diffusers.hooks")
if not hasattr(hooks, "TaylorSeerCacheConfig"):
    pytest.skip("diffusers without TaylorSeer", allow_module_level=True)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def broadcast(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


@pytest.mark.parametrize("family", ["Wan", "CogVideoX", "LTX-Video"])
def test_identifiers_that_match_nothing(family: str) -> None:
    tiny = FAMILIES[family]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    pipe.transformer.enable_cache(hooks.TaylorSeerCacheConfig(cache_interval=2))
    # Upstream says nothing and caches nothing.
    assert torch.equal(tiny.run(pipe), plain)
    with (
        enable_sparse_attention(pipe, "dense"),
        pytest.warns(UserWarning, match="TaylorSeerCacheConfig .* caches nothing") as told,
    ):
        tiny.run(pipe, steps=6)
    told = [warning for warning in told if "caches nothing" in str(warning.message)]
    assert len(told) == 1
    with (
        enable_sparse_attention(pipe, "dense", strict=True),
        pytest.raises(RuntimeError, match="caches nothing"),
    ):
        tiny.run(pipe)
    # The advice is right.
    pipe.transformer.disable_cache()
    identifiers = re.findall(r'r"(.*?)"', str(told[0].message))
    config = hooks.TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=identifiers)
    with warnings.catch_warnings(), enable_sparse_attention(pipe, "dense", strict=True) as sparse:
        warnings.simplefilter("error", UserWarning)
        pipe.transformer.enable_cache(config)
        assert len(cache_hooks(pipe.transformer)) == 2
        tiny.run(pipe, steps=6)
        assert {sum(layer["phases"].values()) for layer in sparse.report().layers} == {4}


@pytest.mark.parametrize("first", ["cache", "sparse"])
def test_a_cache_that_hands_one_pass_to_the_other(first: str) -> None:
    tiny = FAMILIES["Wan"]
    pipe = tiny.build()
    if first == "cache":
        pipe.transformer.enable_cache(broadcast(pipe))
    with enable_sparse_attention(pipe, "dense") as sparse:
        if first == "sparse":
            pipe.transformer.enable_cache(broadcast(pipe))
        with pytest.warns(UserWarning, match=r"passes .* apart \(cond, uncond\)") as told:
            tiny.run(pipe)
        assert sum("apart" in str(warning.message) for warning in told) == 1
        # Every conditional pass computes, and the unconditional one never does.
        assert {layer["branch"] for layer in sparse.report().layers} == {"cond"}
    with (
        enable_sparse_attention(pipe, "dense", strict=True),
        pytest.raises(RuntimeError, match="gets the attention output of the first"),
    ):
        tiny.run(pipe)


def test_what_is_right_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for family, options in (("Wan", {"guidance_scale": 1.0}), ("CogVideoX", {})):
            tiny = FAMILIES[family]
            pipe = tiny.build()
            with enable_sparse_attention(pipe, "dense", strict=True):
                pipe.transformer.enable_cache(broadcast(pipe))
                tiny.run(pipe, **options)
        tiny = FAMILIES["Wan"]
        pipe = tiny.build()
        with enable_sparse_attention(pipe, "dense", strict=True):
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
            tiny.run(pipe)
        tiny = FAMILIES["FLUX.1"]
        pipe = tiny.build()
        with enable_sparse_attention(pipe, "dense", strict=True):
            pipe.transformer.enable_cache(hooks.TaylorSeerCacheConfig())
            tiny.run(pipe)


@pytest.mark.skipif(not hasattr(hooks, "TextKVCacheConfig"), reason="diffusers without it")
@pytest.mark.parametrize("first", ["cache", "sparse"])
def test_keys_and_values_of_the_text_that_are_kept(first: str) -> None:
    """TextKVCache is for one model alone, so it is not in the table."""
    tiny = next(t for t in tiny_models() if t.model == "NucleusMoEImageTransformer2DModel")
    inputs = tiny.inputs(Draw(), (1, 12, 16), 2)
    projected: list[int] = []

    def run(model: Any) -> list[torch.Tensor]:
        projected.clear()
        for block in model.transformer_blocks:
            block.attn.add_k_proj.register_forward_hook(lambda *_: projected.append(1))
        outs = []
        for t in (0.9, 0.7, 0.5):
            inputs["timestep"] = torch.full_like(inputs["timestep"], t)
            with model.cache_context("cond"):
                outs.append(model(**inputs, return_dict=False)[0])
        return outs

    def build(method: Method | None, cached: bool) -> Any:
        model = tiny.build()
        if cached and first == "cache":
            model.enable_cache(hooks.TextKVCacheConfig())
        if method is not None:
            enable_sparse_attention(model, SparseConfig(method, strict=True))
        if cached and first == "sparse":
            model.enable_cache(hooks.TextKVCacheConfig())
        return model

    plain = run(build(None, False))
    assert len(projected) == 3 * tiny.sites
    sparse = run(build(AdaSpa(0.5, (1,)), False))
    assert (torch.stack(sparse) - torch.stack(plain)).abs().max() > 1e-4
    for method, wanted in ((FullMask(), plain), (AdaSpa(0.5, (1,)), sparse)):
        outs = run(build(method, True))
        assert len(projected) == tiny.sites
        assert (torch.stack(outs) - torch.stack(wanted)).abs().max() < 1e-5
