"""The training loop end to end on tiny clips and a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse.pipelines.embedded import load_embedded
from training.contact_sheet import contact_sheet
from training.train import (
    Clock,
    Shape,
    Stage,
    TrainConfig,
    Trainer,
    parse_arguments,
    parse_stages,
    quantile_sigmas,
    sample_sigmas,
)

WORDS = ["red", "green", "square"]
STAGES = "codec:60,4x16x16:4:60"


class SquareClips:
    """Stand-in clip source: plain colours, named by the caption."""

    def sample(
        self,
        batch: int,
        frames: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        colours = torch.rand(batch, 3, 1, 1, 1, generator=generator) * 2 - 1
        video = colours.expand(batch, 3, frames, height, width).contiguous()
        return video, [f"{'red' if c[0] > c[1] else 'green'} square" for c in colours]


def config(folder: Path, **changes: object) -> TrainConfig:
    tiny = TrainConfig(
        output=folder,
        stages=STAGES,
        max_steps=3,
        heads=1,
        head_dim=16,
        layers=1,
        ffn_dim=32,
        text_dim=16,
        codec_size=(2, 16, 16),
        codec_batch=2,
        validation_clips=4,
    )
    return replace(tiny, **changes)


def trainer(options: TrainConfig) -> Trainer:
    return Trainer(options, SquareClips(), WORDS, 4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train_resume_and_export(tmp_path: Path, optimizer: str) -> None:
    first = trainer(config(tmp_path, optimizer=optimizer))
    first.run()
    assert first.step == 3
    assert not (tmp_path / "state.pt.tmp").exists()
    log = json.loads((tmp_path / "loss.json").read_text())
    assert {"step", "seconds", "stage", "loss", "clips_per_s", "data_share"} <= set(log[-1])

    export = tmp_path / "model"
    more = config(
        tmp_path, optimizer=optimizer, resume=True, stages="4x16x16:4:60:0.5", export=export
    )
    second = trainer(more)
    assert second.step == 3
    assert second.stages_done == 0
    for old, new in zip(first.trainable(), second.trainable(), strict=True):
        torch.testing.assert_close(old, new)
    second.run()
    assert second.step == 6
    assert len(json.loads((tmp_path / "loss.json").read_text())) == len(log) + 1
    assert [row["loss"] > 0 for row in second.validation if "loss" in row] == [True, True]

    pipe = load_embedded(path=export)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("red square", height=16, width=16, num_frames=4, num_inference_steps=2).frames
    assert frames.shape == (1, 4, 16, 16, 3)
    weight = pipe.transformer.proj_out.weight
    torch.testing.assert_close(
        weight, second.ema_transformer.proj_out.weight.to(torch.bfloat16).float()
    )


def test_resume_goes_on_inside_an_unfinished_plan(tmp_path: Path) -> None:
    options = config(tmp_path)
    first = trainer(options)
    first.train_codec(first.plan[0])
    first.stages_done = 1
    first.stage_steps = 2
    first.stage_elapsed = 5.0
    first.save()
    second = trainer(replace(options, resume=True))
    assert second.stages_done == 1
    second.run()
    assert second.step == 1


def test_optimizer_change_starts_a_new_warm_up(tmp_path: Path) -> None:
    trainer(config(tmp_path)).run()
    changed = trainer(config(tmp_path, optimizer="muon", resume=True))
    assert changed.warmup_from == changed.step == 3


def test_the_denoiser_learns(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, max_steps=60, warmup=5, ema_decay=0.8, lr=5e-3))
    run.train_codec(run.plan[0])
    run.codec_trained = True
    before = run.validate((4, 16, 16))
    assert before == pytest.approx(run.validate((4, 16, 16)), rel=1e-6)
    run.train_denoiser(run.plan[1], final=True)
    assert run.validate((4, 16, 16)) < 0.95 * before


def test_codec_training_normalises_and_freezes(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, max_steps=20))
    run.train_codec(run.plan[0])
    video, _ = SquareClips().sample(64, 2, 16, 16)
    latents = run.codec.encode(video)
    assert not any(p.requires_grad for p in run.codec.parameters())
    assert latents.mean().abs() < 0.3
    assert 0.6 < latents.std() < 1.4
    assert run.validation[-1]["psnr"] > 5


def test_codec_stage_order_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a codec stage before '4x16x16:4:60'"):
        trainer(config(tmp_path, stages="4x16x16:4:60")).run()
    with pytest.raises(ValueError, match="expected codec stages before all denoiser stages"):
        trainer(config(tmp_path, stages=f"{STAGES},codec:60")).run()
    with pytest.raises(ValueError, match="expected a trained codec before 'decoder:60'"):
        trainer(config(tmp_path, stages="decoder:60")).run()


def test_decoder_stage_keeps_the_latents(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, stages=f"{STAGES},decoder:60"))
    video, _ = SquareClips().sample(2, 2, 16, 16)
    run.train_codec(run.plan[0])
    latents, decoded = run.codec.encode(video), run.codec(video)
    run.train_codec(run.plan[2])
    assert torch.equal(run.codec.encode(video), latents)
    assert not torch.equal(run.codec(video), decoded)
    assert not any(p.requires_grad for p in run.codec.parameters())


def test_a_stage_draws_its_shapes_by_weight(tmp_path: Path) -> None:
    sizes: list[tuple[int, ...]] = []

    class Counted(SquareClips):
        def sample(self, batch: int, *size: int, **rest: torch.Generator | None):
            sizes.append((batch, *size))
            return super().sample(batch, *size, **rest)

    options = config(tmp_path, stages="codec:60,4x16x16:2*3+2x24x16:1:60", validation_clips=1)
    run = Trainer(options, Counted(), WORDS, 4)
    run.train_codec(run.plan[0])
    sizes.clear()
    run.config.max_steps = 40
    run.train_denoiser(run.plan[1], final=True)
    drawn = sizes[:40]
    assert set(drawn) == {(2, 4, 16, 16), (1, 2, 24, 16)}
    assert 20 <= drawn.count((2, 4, 16, 16)) <= 38
    assert [row["size"] for row in run.validation[-2:]] == ["4x16x16", "2x24x16"]


def test_init_starts_from_an_exported_model(tmp_path: Path) -> None:
    first = trainer(config(tmp_path / "a", export=tmp_path / "model"))
    first.run()
    second = trainer(config(tmp_path / "b", init=tmp_path / "model", stages="4x16x16:4:60"))
    assert second.step == 0
    expected = first.ema_transformer.proj_out.weight.to(torch.bfloat16).float()
    for model in (second.transformer, second.ema_transformer):
        torch.testing.assert_close(model.proj_out.weight, expected)
    second.run()
    assert second.step == 3
    with pytest.raises(ValueError, match="either --init or --resume"):
        trainer(config(tmp_path / "b", init=tmp_path / "model", resume=True))


def test_resume_without_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint"):
        trainer(config(tmp_path, resume=True))


def test_stage_syntax(tmp_path: Path) -> None:
    options = config(tmp_path)
    codec, decoder, video = parse_stages(
        "codec:90, decoder:30,16x128x64:96*2+8x16x16:4:420:0.5", options
    )
    assert (codec.trains, codec.seconds) == ("codec", 90)
    assert (decoder.trains, decoder.seconds) == ("decoder", 30)
    assert video == Stage(
        "16x128x64:96*2+8x16x16:4:420:0.5",
        420,
        (Shape((16, 128, 64), 96, 2.0), Shape((8, 16, 16), 4)),
        0.5,
    )
    for bad in (
        "codec:90:1",
        "16x128x128:96+codec:9",
        "16x128x128:96*0:9",
        "16x128x128:96:nan",
        "codec",
        "16x128:96:420",
        "16x128x130:96:4",
        "16x128x128:96",
        "16x128x128:1.5:9",
    ):
        with pytest.raises(ValueError, match="expected stages codec:SECONDS, decoder:SECONDS or"):
            parse_stages(bad, options)


def test_learning_rate_schedule(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, warmup=10, lr=1.0))
    stage = Stage("s", 1.0, (Shape((4, 16, 16), 1),), lr_scale=0.5)
    assert run._lr(stage, 0.0, final=True) == pytest.approx(0.05)
    run.step = 100
    assert run._lr(stage, 0.7, final=True) == pytest.approx(0.5)
    assert run._lr(stage, 1.0, final=True) == pytest.approx(0.025)
    assert run._lr(stage, 1.0, final=False) == pytest.approx(0.5)
    run.config.cooldown = 0.0
    assert run._lr(stage, 1.0, final=True) == pytest.approx(0.5)


def test_sigmas_follow_the_shifted_distribution() -> None:
    sampled = sample_sigmas(20000, torch.device("cpu"), torch.Generator().manual_seed(0))
    fixed = quantile_sigmas(64, torch.device("cpu"))
    assert fixed.min() > 0
    assert fixed.max() < 1
    assert sampled.median().item() == pytest.approx(0.75, abs=0.01)
    assert sampled.mean().item() == pytest.approx(fixed.mean().item(), abs=0.01)


def test_clock_ends_by_time_or_steps() -> None:
    assert Clock(seconds=1.0, max_steps=None, elapsed_before=2.0).done
    clock = Clock(seconds=1000.0, max_steps=4)
    clock.steps = 2
    assert clock.fraction == pytest.approx(0.5, abs=0.01)
    clock.steps = 4
    assert clock.done


def test_command_line_defaults() -> None:
    options = parse_arguments(["--atlas", "a.npz", "--output", "o", "--no-cooldown"])
    assert options.cooldown == 0.0
    assert not options.resume
    assert options.compile


def test_contact_sheet_layout() -> None:
    sheet = contact_sheet(np.zeros((2, 16, 32, 32, 3), np.float32), ["red square", "green square"])
    assert sheet.size == (180 + 8 * 34, 2 * 66)
    with pytest.raises(ValueError, match="one caption per video"):
        contact_sheet(np.zeros((2, 4, 8, 8, 3), np.float32), ["red"])
