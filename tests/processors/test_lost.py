"""Sparsity that is lost without anybody asking for it is noticed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from installed import find

from dit_sparse import SparseConfig, enable_sparse_attention
from dit_sparse.processors.binding import LONE_STEPS


def replace_processors(model: Any, layers: Any = (0, 1)) -> None:
    """As fuse_qkv_projections of CogVideoX, SD3 and others does."""
    for layer in layers:
        model.blocks[layer].attn1.set_processor(WanAttnProcessor())


def test_replaced_processors_warn_once(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model):
        model(**inputs(900.0))
        replace_processors(model)
        with pytest.warns(UserWarning, match=r"2 of 2 self-attention layers.*blocks\.0\.attn1"):
            model(**inputs(800.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs(700.0))
    # Installing again starts afresh.
    with enable_sparse_attention(model):
        replace_processors(model, layers=[1])
        with pytest.warns(UserWarning, match=r"1 of 2 self-attention layers.*blocks\.1\.attn1\)"):
            model(**inputs(900.0))


def test_strict_raises_every_time(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, strict=True):
        model(**inputs(900.0))
        replace_processors(model, layers=[1])
        for t in (800.0, 700.0):
            with pytest.raises(RuntimeError, match=r"1 of 2 self-attention layers.*put sparse"):
                model(**inputs(t))


def test_replaced_modules_are_noticed(wan: Any, inputs: Any) -> None:
    model, other = wan(), wan()
    with enable_sparse_attention(model, strict=True):
        model.blocks[1].attn1 = other.blocks[1].attn1
        with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1"):
            model(**inputs())


def test_processors_of_another_model_are_noticed(wan: Any, inputs: Any) -> None:
    model, other = wan(), wan()
    with enable_sparse_attention(other), enable_sparse_attention(model, strict=True):
        model.blocks[0].attn1.set_processor(other.blocks[0].attn1.processor)
        other(**inputs())
        with pytest.raises(RuntimeError, match=r"blocks\.0\.attn1"):
            model(**inputs())


def test_blocks_that_do_not_call_their_processors_are_noticed(
    wan: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wan()
    for block in model.blocks:
        monkeypatch.setattr(block.attn1, "forward", lambda hidden, *rest: hidden)
    enable_sparse_attention(model, strict=True)
    with pytest.raises(RuntimeError, match="no self-attention call"):
        model(**inputs())
    with enable_sparse_attention(model), pytest.warns(UserWarning, match="no self-attention call"):
        model(**inputs())


@pytest.mark.parametrize("timesteps", [(100.0, 200.0, 300.0, 400.0, 500.0), (500.0,) * 5])
def test_steps_that_cannot_be_followed_are_noticed(timesteps: Any, wan: Any, inputs: Any) -> None:
    # Some models take a noise level that rises; a benchmark loop repeats one.
    model = wan()
    assert len(timesteps) > LONE_STEPS
    enable_sparse_attention(model, strict=True)
    with pytest.raises(RuntimeError, match=r"cannot be followed.*cache_context\(name, step"):
        for t in timesteps:
            with model.cache_context("cond"):
                model(**inputs(t))


def test_a_warm_up_that_never_ends_is_noticed(clip: Any) -> None:
    run = clip()
    settings = {"sparsity": 0.5, "search": (10, 30)}
    with enable_sparse_attention(run.pipe, "adaspa", **settings) as sparse:
        with pytest.warns(UserWarning, match="dense in all 4 steps.*warm-up of AdaSpa") as told:
            run(steps=4)
        assert len(told) == 1
        # An interrupted generation may not have come to its sparse steps yet.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(steps=8, callback_on_step_end=interrupt)
        assert sparse.report().dense_steps == 3
    with (
        enable_sparse_attention(run.pipe, "adaspa", strict=True, **settings),
        pytest.raises(RuntimeError, match="dense in all 4 steps"),
    ):
        run(steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (
            SparseConfig.from_name("dense", strict=True),
            SparseConfig.from_name("adaspa", dense_layers=(0, 1), strict=True),
        ):
            with enable_sparse_attention(run.pipe, config):
                run(steps=4)


def interrupt(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
    pipe._interrupt = step == 2
    return {}


def test_ordinary_use_is_silent(clip: Any, wan: Any, inputs: Any) -> None:
    run = clip(second=wan(seed=1), boundary_ratio=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with enable_sparse_attention(run.pipe, "adaspa", sparsity=0.5, strict=True) as sparse:
            run(steps=4)
            run(steps=1)
            run(steps=1)
            run(steps=1)
            run(steps=1)
            run(steps=4, guidance_scale=1.0)
            sparse.reset()
            # A dense warm-up, and steps that a cache skips as a whole, are no loss.
            run.pipe.transformer.enable_cache(
                find("diffusers.hooks", "MagCacheConfig")(
                    threshold=10.0, max_skip_steps=2, num_inference_steps=8, mag_ratios=[1.0] * 8
                )
            )
            run(steps=8)
            assert sum(sparse.report().layers[0]["phases"].values()) < 8


def test_strict_is_saved_with_the_configuration(tmp_path: Any) -> None:
    config = SparseConfig.from_name("adaspa", strict=True)
    config.save(tmp_path / "strict.json")
    loaded = SparseConfig.load(tmp_path / "strict.json")
    assert loaded == config and loaded.strict is True
    assert SparseConfig().to_dict()["strict"] is False
    # Files from before it are read as not strict.
    data = {k: v for k, v in SparseConfig().to_dict().items() if k != "strict"}
    assert SparseConfig.from_dict(data).strict is False
