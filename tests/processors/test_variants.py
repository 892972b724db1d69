"""Processors and calls of a family beside its plain ones, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import diffusers.models.transformers as transformers
import pytest
import torch
from diffusers.models.attention_processor import (
    FusedCogVideoXAttnProcessor2_0,
    MochiAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
)
from installed import find
from tiny_models import Draw, Tiny, randomize, tiny_models
from torch import Tensor, nn

from dit_sparse import (
    SparseProcessor,
    TokenLayout,
    enable_sparse_attention,
    list_families,
    list_methods,
)
from dit_sparse.methods.base import Call
from dit_sparse.methods.dense import Dense
from dit_sparse.processors import site
from dit_sparse.processors.family import find_family, refusal_of
from dit_sparse.processors.refused import REFUSED

TINY = {tiny.name: tiny for tiny in tiny_models()}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of the ``dense`` method."""
    seen: list[Call] = []
    attend = Dense.attend

    def spy(self: Dense, call: Call) -> Tensor:
        seen.append(call)
        return attend(self, call)

    monkeypatch.setattr(Dense, "attend", spy)
    return seen


def inputs_of(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    return tiny.inputs(Draw(), tiny.grid, tiny.batch) | changes


def assert_same(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Dense steps bit for bit and the full mask up to rounding."""
    expected = model(**inputs, return_dict=False)[0]
    with SparseProcessor("dense").install(model):
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
    with SparseProcessor("full").install(model) as sparse:
        out = model(**inputs, return_dict=False)[0]
        assert {layer["last_phase"] for layer in sparse.report().layers} == {"sparse"}
    assert (out - expected).abs().max() < 1e-5 * max(1, float(expected.abs().max()))


class TestImagePrompts:
    """IP-Adapter processors attend twice and are modules of their own."""

    def test_flux(self) -> None:
        tiny = TINY["FluxTransformer2DModel"]
        model = tiny.build()
        for block in model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 8))
        randomize(model)
        keys = list(model.state_dict())
        prompt = {"ip_hidden_states": [torch.randn(2, 4, 8)]}
        assert_same(model, inputs_of(tiny, joint_attention_kwargs=prompt))
        with SparseProcessor("dense").install(model):
            assert list(model.state_dict()) == keys
        assert isinstance(model.transformer_blocks[0].attn.processor, FluxIPAdapterAttnProcessor)
        assert list(model.state_dict()) == keys

    def test_sd3(self, calls: list[Call]) -> None:
        tiny = TINY["SD3Transformer2DModel"]
        model = tiny.build()
        for block in model.transformer_blocks:
            block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(16, 6, 8, 12))
        randomize(model)
        prompt = {"ip_hidden_states": torch.randn(2, 4, 6), "temb": torch.randn(2, 12)}
        assert_same(model, inputs_of(tiny, joint_attention_kwargs=prompt))
        # Two calls a layer, of which one is self-attention.
        assert [call.layer for call in calls] == [0, 1]


class TestKeysWithoutQueries:
    def test_flux2_with_a_key_cache(self, calls: list[Call]) -> None:
        tiny = TINY["Flux2Transformer2DModel"]
        model = tiny.build()
        flux2 = "diffusers.models.transformers.transformer_flux2"
        for block in model.transformer_blocks:
            block.attn.set_processor(find(flux2, "Flux2KVAttnProcessor")())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(find(flux2, "Flux2KVParallelSelfAttnProcessor")())
        inputs = inputs_of(tiny)
        image = inputs["hidden_states"]
        references = torch.randn(2, 6, 4)
        reference_ids = Draw().ids((1, 2, 3), columns=4, first=10).expand(2, -1, -1)
        first = inputs | {
            "hidden_states": torch.cat([references, image], 1),
            "img_ids": torch.cat([reference_ids, inputs["img_ids"]], 1),
            "kv_cache_mode": "extract",
            "num_ref_tokens": 6,
        }
        assert_same(model, first)
        cache = model(**first, return_dict=False)[1]
        assert_same(model, inputs | {"kv_cache": cache, "kv_cache_mode": "cached"})
        assert_same(model, inputs)
        layouts = {call.layout for call in calls}
        assert {layout.grid for layout in layouts} == {tiny.grid}
        assert {(layout.text_before, layout.text) for layout in layouts} == {(13, 13), (7, 7)}
        for call in calls:
            assert call.q.shape == call.k.shape
            # The references have no queries, the text before them and the image after them do.
            has_query = call.q.abs().sum((0, 2, 3)) > 0
            references = range(7, 7 + call.layout.text_before - 7)
            assert has_query.logical_not().nonzero().flatten().tolist() == list(references)

    def test_flux2_with_a_key_cache_that_its_processors_ignore(self, calls: list[Call]) -> None:
        tiny = TINY["Flux2Transformer2DModel"]
        cache = find("diffusers.models.transformers.transformer_flux2", "Flux2KVCache")
        kept = cache(num_double_layers=1, num_single_layers=2)
        kept.num_ref_tokens = 6
        assert_same(tiny.build(), inputs_of(tiny, kv_cache=kept, kv_cache_mode="cached"))
        assert {call.layout.text_before for call in calls} == {7}

    def test_glm_image_with_condition_images(self, calls: list[Call]) -> None:
        tiny = TINY["GlmImageTransformer2DModel"]
        model = tiny.build()
        cache = find("diffusers.models.transformers.transformer_glm_image", "GlmImageKVCache")
        caches = cache(num_layers=2)
        caches.set_mode("write")
        condition = tiny.inputs(Draw(seed=1), (1, 2, 2), 1)
        condition["encoder_hidden_states"] = torch.zeros(1, 0, 8)
        model(**condition, kv_caches=caches)
        caches.set_mode("read")
        assert_same(model, inputs_of(tiny, kv_caches=caches))
        assert {call.layout.text_before for call in calls} == {4 + 7}
        assert not any(call.q[:, :4].any() for call in calls)
        caches.set_mode("skip")
        assert_same(model, inputs_of(tiny, kv_caches=caches))


def test_image_shapes_of_older_pipelines(calls: list[Call]) -> None:
    tiny = TINY["QwenImageTransformer2DModel"]
    assert_same(tiny.build(), inputs_of(tiny, img_shapes=[tiny.grid] * tiny.batch))
    assert {call.layout.grid for call in calls} == {tiny.grid}


def test_captions_of_one_length_are_not_rotated(calls: list[Call]) -> None:
    tiny = TINY["Lumina2Transformer2DModel"]
    model = tiny.build()
    mask = Draw().valid(4, 4, tokens=7).bool()
    assert_same(model, inputs_of(tiny, encoder_attention_mask=mask))
    assert {call.layout.text_before for call in calls} == {4}


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "AllegroTransformer3DModel"])
def test_padded_latents(name: str, calls: list[Call]) -> None:
    tiny = TINY[name]
    frames, height, width = tiny.grid
    mask = torch.ones(2, frames, 2 * height, 2 * width)
    mask[1, :, -2:] = 0
    if name.startswith("PixArt"):
        mask = mask[:, 0, ::2, ::2].flatten(1)
    assert_same(tiny.build(), inputs_of(tiny, attention_mask=mask))
    valid = calls[0].key_valid
    assert valid is not None
    assert valid[0].all()
    assert int((~valid[1]).sum()) == frames * width


def test_perturbed_layers_of_ltx2_are_skipped() -> None:
    tiny = TINY["LTX2VideoTransformer3DModel-keyframe"]
    model = tiny.build()
    inputs = inputs_of(tiny, spatio_temporal_guidance_blocks=[0])
    expected = model(**inputs, return_dict=False)[0]
    with SparseProcessor("dense").install(model) as sparse:
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
        assert [layer["layer"] for layer in sparse.report().layers] == [1]


def test_fused_projections_before_binding() -> None:
    tiny = TINY["CogVideoXTransformer3DModel"]
    model = tiny.build()
    model.fuse_qkv_projections()
    assert isinstance(model.transformer_blocks[0].attn1.processor, FusedCogVideoXAttnProcessor2_0)
    with SparseProcessor("full").install(model) as sparse:
        assert type(model.transformer_blocks[0].attn1.processor).__name__ == (
            "FusedCogVideoXAttnProcessor2_0Sparse"
        )
        assert sparse.bindings[0].sites[0].original.__class__ is FusedCogVideoXAttnProcessor2_0


class TestProcessorsOfOurOwn:
    @pytest.mark.parametrize(
        "upstream",
        [HunyuanVideo15AttnProcessor2_0, MochiAttnProcessor2_0],
        ids=lambda k: k.__name__,
    )
    def test_parameters_are_those_of_upstream(self, upstream: type) -> None:
        (own,) = filter(None, (f.explicit_call(upstream) for f in list_families().values()))
        expected = inspect.signature(upstream.__call__).parameters
        found = inspect.signature(own).parameters
        assert list(found) == list(expected)
        assert [p.default for p in found.values()] == [p.default for p in expected.values()]

    def test_hunyuan_15_makes_no_square_mask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes: list[Any] = []
        read = site.read_mask

        def spy(mask: Tensor, *rest: Any) -> Any:
            shapes.append(tuple(mask.shape))
            return read(mask, *rest)

        monkeypatch.setattr(site, "read_mask", spy)
        tiny = TINY["HunyuanVideo15Transformer3DModel"]
        model = tiny.build()
        with SparseProcessor("full").install(model):
            model(**inputs_of(tiny))
        assert shapes == [(2, 1, 1, 24 + 13)] * 2


# Every form that a call can have: text on both sides, padding, an image that starts elsewhere in
# each batch element, weights in the scores, keys without queries, layers that differ.
FORMS = (
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "Lumina2Transformer2DModel",
    "ChromaTransformer2DModel-weights",
    "PRXTransformer2DModel",
    "QwenImageTransformer2DModel-edit",
    "SD3Transformer2DModel-3.5",
    "MotifVideoTransformer3DModel",
)


@pytest.mark.parametrize("method", sorted(list_methods()))
@pytest.mark.parametrize("name", FORMS)
def test_methods_at_exact_settings_equal_upstream(name: str, method: str) -> None:
    tiny = TINY[name]
    model = tiny.build()
    top = 1000.0 if inputs_of(tiny)["timestep"].max() > 1 else 1.0
    shares = [i / 4 if name.startswith("Lumina") else 1 - i / 4 for i in range(4)]
    passes = [inputs_of(tiny, timestep=torch.full((2,), top * share)) for share in shares]
    expected = [model(**inputs, return_dict=False)[0] for inputs in passes]
    with SparseProcessor(list_methods()[method].exact()).install(model) as sparse:
        for inputs, wanted in zip(passes, expected, strict=True):
            out = model(**inputs, return_dict=False)[0]
            assert (out - wanted).abs().max() < 2e-5 * max(1, float(wanted.abs().max()))
        assert sparse.bindings[0].run.generation == 0


class TestLayersThatSeeOtherTokens:
    def layouts(self, name: str, calls: list[Call]) -> list[TokenLayout]:
        tiny = TINY[name]
        model = tiny.build()
        with SparseProcessor("dense").install(model):
            model(**inputs_of(tiny))
        return [call.layout for call in calls]

    def test_the_second_attention_of_sd35_sees_the_image(self, calls: list[Call]) -> None:
        joint, image, last = self.layouts("SD3Transformer2DModel-3.5", calls)
        assert joint == last == TokenLayout((1, 3, 5), 7)
        assert image == TokenLayout((1, 3, 5))

    def test_image_blocks_of_flux3_see_the_image(self, calls: list[Call]) -> None:
        first, *others = self.layouts("Flux3Transformer2DModel", calls)
        assert first == TokenLayout((1, 3, 5))
        assert others == [TokenLayout.around((1, 3, 5), 7, 6)] * 2

    def test_decoder_blocks_of_motif_see_the_video_twice(self, calls: list[Call]) -> None:
        *encoder, decoder = self.layouts("MotifVideoTransformer3DModel", calls)
        assert encoder == [TokenLayout((2, 3, 4), 8)] * 3
        assert decoder == TokenLayout((4, 3, 4))


class TestRefusals:
    def test_every_diffusers_transformer_is_supported_or_refused_by_name(self) -> None:
        known = set(list_families()) | set(REFUSED)
        found = {
            name
            for module in pkgutil.iter_modules(transformers.__path__)
            for name, kind in vars(
                importlib.import_module(f"{transformers.__name__}.{module.name}")
            ).items()
            if inspect.isclass(kind)
            and issubclass(kind, ModelMixin)
            and kind.__module__.startswith(transformers.__name__)
        }
        assert len(found) >= 40
        assert found <= known, sorted(found - known)
        assert not set(list_families()) & set(REFUSED)
        assert {tiny.model for tiny in TINY.values()} == set(list_families())

    def test_a_refused_class_is_named_with_its_reason(self) -> None:
        model = type("SanaTransformer2DModel", (nn.Module,), {})()
        with pytest.raises(ValueError, match=r"refuses SanaTransformer2DModel: .* linear"):
            SparseProcessor().install(model)

    def test_a_subclass_is_what_its_base_is(self) -> None:
        base = type("WanTransformer3DModel", (nn.Module,), {})
        assert find_family(type("Mine", (base,), {})()) is list_families()["WanTransformer3DModel"]
        refused = type("SanaTransformer2DModel", (base,), {})
        assert find_family(type("Mine", (refused,), {})()) is None

    def test_an_unknown_class_gets_a_general_error(self) -> None:
        model = type("NextYearsTransformer", (nn.Module,), {})()
        assert "no adapter for NextYearsTransformer" in refusal_of(model)
        with pytest.raises(ValueError, match=r"no adapter.*WanTransformer3DModel"):
            SparseProcessor().install(model)

    def test_a_pipeline_without_a_supported_transformer_says_why(self) -> None:
        class Pipeline:
            components = {"transformer": type("SanaTransformer2DModel", (nn.Module,), {})()}

        with pytest.raises(ValueError, match=r"SanaTransformer2DModel: .* linear"):
            enable_sparse_attention(Pipeline())

    def test_causal_skyreels(self) -> None:
        model = Tiny(
            "SkyReelsV2Transformer3DModel",
            TINY["SkyReelsV2Transformer3DModel"].config | {"num_frame_per_block": 2},
            TINY["SkyReelsV2Transformer3DModel"].inputs,
        ).build()
        with pytest.raises(ValueError, match="num_frame_per_block"):
            SparseProcessor().install(model)

    def test_kandinsky_with_its_own_sparse_attention(self) -> None:
        tiny = TINY["Kandinsky5Transformer3DModel"]
        model = tiny.build()
        with (
            SparseProcessor("dense").install(model),
            pytest.raises(NotImplementedError, match="sparse_params"),
        ):
            model(**inputs_of(tiny, sparse_params={"to_fractal": False}))
        model.register_to_config(attention_type="nabla")
        with pytest.raises(ValueError, match="nabla"):
            SparseProcessor().install(model)

    def test_images_without_a_common_grid(self) -> None:
        tiny = TINY["ZImageTransformer2DModel"]
        model = tiny.build()
        inputs = inputs_of(tiny)
        inputs["x"][1] = torch.randn(16, 1, 4, 4)
        with (
            SparseProcessor("dense").install(model),
            pytest.raises(NotImplementedError, match="one size"),
        ):
            model(**inputs)

    def test_padding_inside_the_text_of_mochi(self) -> None:
        tiny = TINY["MochiTransformer3DModel"]
        model = tiny.build()
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[1, 2] = False
        with (
            SparseProcessor("dense").install(model),
            pytest.raises(NotImplementedError, match="at the end of the text"),
        ):
            model(**inputs_of(tiny, encoder_attention_mask=mask))

    def test_masks_that_are_not_padding(self) -> None:
        tiny = TINY["LTX2VideoTransformer3DModel"]
        model = tiny.build()
        with (
            SparseProcessor("dense").install(model),
            pytest.raises(NotImplementedError, match="takes a padding mask"),
        ):
            model(**inputs_of(tiny, video_self_attention_mask=torch.ones(2, 24, 24)))

    def test_a_processor_without_a_known_call(self) -> None:
        class Mine:
            def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                return hidden_states

        model = TINY["WanTransformer3DModel"].build()
        model.blocks[1].attn1.set_processor(Mine())
        with pytest.raises(NotImplementedError, match="Mine calls neither"):
            SparseProcessor().install(model)
        # Nothing was bound before the refusal.
        assert "Sparse" not in type(model.blocks[0].attn1.processor).__name__

    def test_another_number_of_tokens_than_the_arguments_describe(self) -> None:
        tiny = TINY["LTXVideoTransformer3DModel"]
        model = tiny.build()
        with (
            SparseProcessor("dense").install(model) as sparse,
            pytest.raises(RuntimeError, match="24 queries and 24 keys"),
        ):
            sparse.bindings[0].family = list_families()["WanTransformer3DModel"]
            sparse.bindings[0].scope.layout = torch.tensor([1, 1, 1, 0, 0])
            sparse.bindings[0].hooks.remove()
            model(**inputs_of(tiny))
