"""Codec, caption encoder, pipeline and the loader of the embedded model, at a tiny size."""

from __future__ import annotations

import functools
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)

from dit_sparse.pipelines.codec import PatchCodec
from dit_sparse.pipelines.embedded import load_embedded
from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline
from dit_sparse.pipelines.text_encoder import CaptionEncoder
from dit_sparse.processors.hooks import tells_steps

SIZE = {"height": 16, "width": 24, "num_frames": 4, "num_inference_steps": 3}
WORDS = ["red", "heart", "moving", "right"]


def make_pipeline() -> EmojiVideoPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=48,
        out_channels=48,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
    )
    pipe = EmojiVideoPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        codec=PatchCodec(mid_channels=8, hidden_channels=16, refine_channels=4),
        text_encoder=CaptionEncoder(words=WORDS, max_words=6, dim=16, num_heads=2, ffn_dim=16),
    )
    for module in (pipe.transformer, pipe.codec, pipe.text_encoder):
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> EmojiVideoPipeline:
    return make_pipeline()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_codec_shapes_and_budget() -> None:
    codec = PatchCodec()
    assert sum(p.numel() for p in codec.parameters()) <= 600_000
    with torch.no_grad():
        latents = codec.encode(torch.rand(2, 3, 6, 16, 24) * 2 - 1)
        assert latents.shape == (2, 48, 3, 2, 3)
        assert codec.decode(latents).shape == (2, 3, 6, 16, 24)


def test_codec_normalisation_is_inverted_by_decode() -> None:
    codec = PatchCodec(mid_channels=8, hidden_channels=16)
    video = torch.rand(1, 3, 2, 8, 8)
    with torch.no_grad():
        raw = codec.encode_raw(video)
        codec.latent_mean.copy_(torch.randn(48))
        codec.latent_std.copy_(torch.rand(48) + 0.5)
        latents = codec.encode(video)
        assert not torch.allclose(latents, raw)
        torch.testing.assert_close(
            codec.decode(latents), codec.decode_raw(raw), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 3, 3, 16, 16), "even number of frames, got 3"),
        ((1, 3, 2, 20, 16), "height to be a positive multiple of 8, got 20; use 16"),
        ((1, 3, 2, 16, 4), "width to be a positive multiple of 8, got 4; use 8"),
        ((1, 2, 3, 16, 16), r"\[B, 3, F, H, W\], got \[1, 2, 3, 16, 16\]"),
    ],
)
def test_codec_rejects_bad_videos(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PatchCodec(mid_channels=8, hidden_channels=16).encode(torch.zeros(shape))


def test_codec_rejects_bad_latents() -> None:
    with pytest.raises(ValueError, match=r"expected latents of shape \[B, 48"):
        PatchCodec(mid_channels=8, hidden_channels=16).decode(torch.zeros(1, 16, 1, 2, 2))


def test_text_encoder_padding_and_empty_caption() -> None:
    encoder = CaptionEncoder(words=WORDS, max_words=6, dim=16, num_heads=2, ffn_dim=16).eval()
    with torch.no_grad():
        out = encoder.encode(["Red heart!", "", "red blob"])
    assert out.shape == (3, 6, 16)
    assert torch.isfinite(out).all()
    assert (out[0, 2:] == 0).all()
    assert (out[1] == 0).all()
    assert (out[0, :2] != 0).any()
    assert encoder.tokenize("red blob") == [2, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="at most 6 words, got 7"):
        encoder.tokenize("red " * 7)


def test_text_encoder_ignores_padding_length() -> None:
    encoder = CaptionEncoder(words=WORDS, max_words=6, dim=16, num_heads=2, ffn_dim=16).eval()
    ids = encoder.tokenize_batch(["red heart"])
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids)[:, :2], encoder(ids[:, :2]))


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_output_types(pipe: EmojiVideoPipeline, output_type: str) -> None:
    frames = pipe(
        ["red heart", "heart"], output_type=output_type, num_videos_per_prompt=2, **SIZE
    ).frames
    if output_type == "np":
        assert frames.shape == (4, 4, 16, 24, 3)
        assert frames.dtype == np.float32
        assert frames.min() >= 0
        assert frames.max() <= 1
    elif output_type == "pt":
        assert frames.shape == (4, 4, 3, 16, 24)
    elif output_type == "pil":
        assert len(frames) == 4
        assert len(frames[0]) == 4
        assert frames[0][0].size == (24, 16)
    else:
        assert frames.shape == (4, 48, 2, 2, 3)


def test_generator_and_latents_determine_the_result(pipe: EmojiVideoPipeline) -> None:
    first = pipe("red heart", generator=seeded(1), **SIZE).frames
    again = pipe("red heart", generator=seeded(1), **SIZE).frames
    other = pipe("red heart", generator=seeded(2), **SIZE).frames
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    noise = torch.randn(1, 48, 2, 2, 3, generator=seeded(1))
    np.testing.assert_array_equal(first, pipe("red heart", latents=noise, **SIZE).frames)
    batched = pipe(["red heart", "heart"], generator=[seeded(1), seeded(2)], **SIZE).frames
    np.testing.assert_allclose(batched[0], first[0], atol=1e-5)


@pytest.mark.parametrize(("scale", "names"), [(3.0, ["cond", "uncond"]), (1.0, ["cond"])])
def test_guidance_runs_in_named_contexts(
    pipe: EmojiVideoPipeline, monkeypatch: pytest.MonkeyPatch, scale: float, names: list[str]
) -> None:
    seen = []
    original = pipe.transformer.cache_context

    @contextmanager
    @functools.wraps(original)
    def record(name: str, **fields: object):
        seen.append((name, fields))
        with original(name, **fields):
            yield

    monkeypatch.setattr(pipe.transformer, "cache_context", record)
    pipe("red heart", guidance_scale=scale, **SIZE)
    assert [name for name, _ in seen] == names * 3
    sigmas = pipe.scheduler.sigmas.tolist()
    for index, (_, fields) in enumerate(seen):
        step = index // len(names)
        told = {"step_index": step, "sigma": sigmas[step], "num_inference_steps": 3}
        assert fields == (told if tells_steps(pipe.transformer) else {})


def test_callback_sees_and_replaces_tensors(pipe: EmojiVideoPipeline) -> None:
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe(
        "red heart",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="latent",
        **SIZE,
    ).frames
    assert steps == [0, 1, 2]
    assert (latents == 0).all()


def test_interrupt_skips_the_remaining_steps(pipe: EmojiVideoPipeline) -> None:
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True
        return tensors

    (frames,) = pipe("heart", callback_on_step_end=callback, return_dict=False, **SIZE)
    assert steps == [0]
    assert pipe.interrupt
    assert frames.shape == (1, 4, 16, 24, 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt": []}, "expected prompt"),
        ({"prompt": None}, "expected prompt"),
        ({"prompt": ["red", 3]}, "caption of type str, got int"),
        ({"prompt": ["red", "Dog"]}, r"got 'Dog'; use for example red, heart, .*config\.words"),
        ({"prompt": "\u72d7"}, r"words that this model knows, got '\u72d7'"),
        ({"prompt": "\U0001f436!"}, "words that this model knows"),
        ({"negative_prompt": "low quality"}, "got 'low quality'"),
        ({"negative_prompt": ["a", "b"]}, r"1 strings \(one per prompt\), got 2"),
        ({"height": 20}, "height to be a positive multiple of 8, got 20"),
        ({"width": 0}, "width to be a positive integer, got 0"),
        ({"num_frames": 5}, "even number of frames, got 5"),
        ({"num_inference_steps": 0}, "num_inference_steps to be a positive integer, got 0"),
        ({"num_videos_per_prompt": -1}, "num_videos_per_prompt to be a positive integer"),
        ({"generator": [seeded(), seeded()]}, "a list of 1"),
        ({"latents": torch.zeros(1, 48, 1, 1, 1)}, r"expected latents of shape \[1, 48, 2, 2, 3\]"),
        ({"output_type": "mp4"}, "expected output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"got \['noise'\]"),
    ],
)
def test_bad_inputs_fail_before_any_work(
    pipe: EmojiVideoPipeline, monkeypatch: pytest.MonkeyPatch, changes: dict, match: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model ran before the inputs were checked")

    monkeypatch.setattr(pipe.text_encoder, "forward", fail)
    with pytest.raises(ValueError, match=match):
        pipe(**({"prompt": "red heart", **SIZE} | changes))


def test_an_unknown_word_is_told_once_where_the_pipeline_was_called(
    pipe: EmojiVideoPipeline,
) -> None:
    with pytest.warns(UserWarning) as told:
        for prompt in ("a red hart, moving", ["red hart", "\u72d7 heart"]):
            pipe(prompt, negative_prompt="blue right", **SIZE)
    assert [warning.filename for warning in told] == [__file__] * 2
    first, second = (str(warning.message) for warning in told)
    assert "never trained on 'a', 'hart', 'blue'" in first
    assert "example heart, red, " in first and "pipe.text_encoder.config.words" in first
    assert "never trained on '\u72d7'," in second


def test_known_words_and_the_empty_caption_are_not_warned_of(pipe: EmojiVideoPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(["Red heart, moving!", "", " "], **SIZE)


@pytest.mark.parametrize("loader", [EmojiVideoPipeline, DiffusionPipeline])
def test_save_and_load_is_the_identity(
    pipe: EmojiVideoPipeline, tmp_path: Path, loader: type[DiffusionPipeline]
) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is EmojiVideoPipeline
    assert loaded.scheduler.config.shift == 3.0
    assert list(loaded.text_encoder.config.words) == WORDS
    for name in ("transformer", "codec", "text_encoder"):
        weights = getattr(loaded, name).state_dict()
        for key, value in getattr(pipe, name).state_dict().items():
            assert torch.equal(value, weights[key]), (name, key)
    # Loaded tensors may be aligned differently, which changes the order of some CPU sums.
    np.testing.assert_allclose(
        pipe("red heart", generator=seeded(), **SIZE).frames,
        loaded("red heart", generator=seeded(), **SIZE).frames,
        atol=1e-5,
    )


def test_load_embedded_folder_and_its_errors(pipe: EmojiVideoPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = load_embedded(path=tmp_path)
    assert loaded.transformer.dtype == torch.float32
    assert load_embedded(path=tmp_path, dtype=torch.bfloat16).codec.dtype == torch.bfloat16

    weights = tmp_path / "codec" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"corrupt one .*reinstall dit-sparse"):
        load_embedded(path=tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"codec.*no such file.*training\.train"):
        load_embedded(path=tmp_path)


def test_bf16_pipeline_runs(pipe: EmojiVideoPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = load_embedded(path=tmp_path, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    frames = loaded("red heart", **SIZE).frames
    assert frames.dtype == np.float32
    assert np.isfinite(frames).all()
