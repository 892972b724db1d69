"""The engine, the report and the videos, on a tiny pipeline and on a fake one."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from dit_sparse.config import SparseConfig
from dit_sparse.eval.arms import Arm, parse_arms
from dit_sparse.eval.compare import Request, prepare, run_comparison
from dit_sparse.eval.html import format_number, psnr_plot
from dit_sparse.eval.video import difference_map, side_by_side, write_mp4


class FakePipeline:
    """Returns noise of the generator; an arm may distort it through `shift`."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.shift: float | None = None

    def __call__(
        self,
        prompt: str,
        height: int = 16,
        width: int = 18,
        num_frames: int = 3,
        num_inference_steps: int = 4,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        callback_on_step_end: Any = None,
    ) -> SimpleNamespace:
        self.calls.append((num_inference_steps, output_type))
        frames = 0.8 * torch.rand((1, num_frames, height, width, 3), generator=generator)
        frames[:, 1:] += self.shift or 0.0
        for step in range(num_inference_steps):
            callback_on_step_end(self, step, torch.tensor(0.0), {})
        return SimpleNamespace(frames=frames.numpy())


class FakeHandle:
    removed = 0

    def __init__(self, pipe: FakePipeline, config: Any) -> None:
        self.pipe = pipe
        pipe.shift = {"dense": 0.0, "full": 0.0}.get(config.method.name, 0.1)

    def report(self) -> SimpleNamespace:
        return SimpleNamespace(
            density=0.5,
            sparse_density=0.25,
            dense_steps=1,
            sparse_steps=3,
            attention_seconds=0.5,
            search_seconds=0.125,
            cache_bytes=2_000_000,
            layers=[],
            kernels={"own": 2},
        )

    def remove(self) -> None:
        FakeHandle.removed += 1
        self.pipe.shift = None


def request(tmp_path: Path, methods: str, **options: Any) -> Request:
    options.setdefault("prompts", ("a heart",))
    return Request(arms=tuple(parse_arms(methods)), output=tmp_path / "out", **options)


@pytest.fixture
def fake(tmp_path: Path) -> tuple[FakePipeline, Any, list[Any]]:
    pipe, steps = FakePipeline(), []
    result = run_comparison(
        request(tmp_path, "noise-floor,adaspa", model="some/model", device="cpu"),
        pipe=pipe,
        enable=FakeHandle,
        on_step=lambda *args: steps.append(args),
    )
    return pipe, result, steps


def test_order_of_calls(fake: tuple[FakePipeline, Any, list[Any]]) -> None:
    pipe, _, steps = fake
    warm_up = [(1, "np"), (2, "latent"), (2, "latent")]
    assert pipe.calls == [*warm_up, (4, "np"), (4, "np"), (4, "np")]
    assert pipe.shift is None
    labels = ("dense", "noise-floor", "adaspa")
    assert steps == [("a heart", label, step, 4) for label in labels for step in (1, 2, 3, 4)]


def test_defaults_of_a_foreign_pipeline_are_recorded(
    fake: tuple[FakePipeline, Any, list[Any]],
) -> None:
    settings = fake[1].to_dict()["settings"]
    expected = {"steps": 4, "height": 16, "width": 18, "frames": 3, "guidance_scale": 2.0}
    assert expected.items() <= settings.items()
    assert settings["fps"] == 16 and settings["dtype"] == "float32"


def test_report_json(fake: tuple[FakePipeline, Any, list[Any]]) -> None:
    result = fake[1]
    text = result.json_path.read_text()
    assert "Infinity" not in text and "NaN" not in text
    report = json.loads(text)
    assert list(report)[:4] == ["schema_version", "created", "command", "machine"]
    keys = {"cpu", "gpu", "driver", "torch", "diffusers", "triton", "dit_sparse", "python"}
    assert keys <= set(report["machine"])
    dense, floor, sparse = report["runs"]
    assert dense["psnr_mean"] is None and dense["side_by_side"] is None
    assert dense["speedup"] == 1.0
    assert floor["psnr_mean"] == floor["psnr_clip"] == "inf" and floor["ssim"] == 1.0
    assert floor["psnr_frames"] == ["inf"] * 3
    # The first of three frames is identical, the others are off by 0.1.
    assert sparse["psnr_frames"] == ["inf", pytest.approx(20, 1e-3), pytest.approx(20, 1e-3)]
    assert sparse["psnr_mean"] == pytest.approx(20, 1e-3) and sparse["identical_frames"] == 1
    assert sparse["psnr_clip"] == pytest.approx(21.76, abs=0.01)
    assert sparse["cache_mb"] == 2.0 and sparse["density"] == 0.5
    assert sparse["attention_s"] == 0.5 and sparse["search_s"] == 0.125
    assert sparse["speedup"] == pytest.approx(dense["total_s"] / sparse["total_s"])
    for run in report["runs"]:
        assert (result.request.output / run["video"]).stat().st_size > 0


def test_html_is_self_contained(fake: tuple[FakePipeline, Any, list[Any]]) -> None:
    page = fake[1].html_path.read_text()
    assert not re.search(r"https?:|//[a-z]+\.", page)
    sources = re.findall(r"""(?:src|href)=["']([^"']{0,40})""", page)
    assert len(sources) == 2 and all(s.startswith("data:video/mp4;base64,") for s in sources)
    assert "prefers-color-scheme: dark" in page and "noise-floor" in page
    assert "<polyline" in page and "∞" in page


def test_captions_are_escaped(tmp_path: Path) -> None:
    ask = request(tmp_path, "adaspa", model="a/b", prompts=("<script>x</script>",), device="cpu")
    page = run_comparison(ask, pipe=FakePipeline(), enable=FakeHandle).html_path.read_text()
    assert "<script" not in page


def test_failure_restores_the_model_and_keeps_the_results(tmp_path: Path) -> None:
    pipe = FakePipeline()

    class Failing(FakeHandle):
        def report(self) -> Any:
            if self.pipe.shift:
                raise RuntimeError("out of memory")
            return super().report()

    ask = request(tmp_path, "noise-floor,adaspa", model="a/b", device="cpu")
    with pytest.raises(RuntimeError, match="out of memory"):
        run_comparison(ask, pipe=pipe, enable=Failing)
    assert pipe.shift is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["method"] for run in report["runs"]] == ["dense", "noise-floor"]


def test_image_pipelines_are_refused(tmp_path: Path) -> None:
    ask = request(tmp_path, "adaspa", model="a/b", device="cpu")
    with pytest.raises(ValueError, match=r"expected a video pipeline.*num_frames"):
        run_comparison(ask, pipe=lambda prompt: None, enable=FakeHandle)


def test_real_processors(tmp_path: Path, pipe: Any) -> None:
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    ask = request(
        tmp_path,
        "noise-floor,adaspa:sparsity=0.8,adaspa:sparsity=0.0:search=(0,)",
        prompts=("a heart", "a star", "a heart"),
        steps=4,
        frames=8,
        height=64,
        width=64,
        device="cpu",
    )
    result = run_comparison(ask, pipe=pipe)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert [run.prompt for run in result.runs] == ["a heart"] * 4 + ["a star"] * 4
    dense, floor, sparse, exact = result.runs[:4]
    assert dense.density == 1.0 and dense.dense_steps == 4 and dense.sparse_density is None
    assert floor.density == exact.density == 1.0
    assert floor.quality.psnr_min > 80 and exact.quality.psnr_min > 80
    assert sparse.density < 1 and sparse.sparse_density < sparse.density
    assert sparse.quality.psnr_mean < floor.quality.psnr_mean
    assert sparse.dense_steps == 1 and sparse.sparse_steps == 3
    assert 0 < sparse.search_s < sparse.attention_s < sparse.total_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 15}, "even number of frames"),
        ({"height": 100}, "multiple of 8"),
        ({"width": 8}, "at least 11 pixels"),
        ({"steps": 0}, "steps of at least 1"),
        ({"dtype": "int8"}, "expected a dtype"),
        ({"device": "tpu"}, "expected a device"),
        ({"prompts": ("",)}, "non-empty prompt"),
        ({"prompts": ("a zebra",)}, "does not know the word 'zebra'"),
        ({"model": "./absent"}, "model_index.json"),
    ],
)
def test_requests_are_checked_before_loading(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        request(tmp_path, "adaspa", device=options.pop("device", "cpu"), **options).resolved()


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="writable output folder"):
        request(tmp_path, "adaspa", device="cpu").resolved()


def test_only_dense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one other"):
        request(tmp_path, "dense", device="cpu").resolved()


def test_mp4_round_trip_of_an_odd_size(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 33)[None, None, :, None] * np.ones((4, 31, 1, 3))
    write_mp4(tmp_path / "clip.mp4", ramp, fps=8)
    with imageio.get_reader(tmp_path / "clip.mp4", format="FFMPEG") as reader:
        frames = np.stack([np.asarray(frame) for frame in reader.iter_data()])
    assert frames.shape == (4, 32, 34, 3)
    assert np.abs(frames[:, :31, :33] / 255 - ramp).mean() < 0.02


def test_side_by_side_and_difference() -> None:
    a = np.zeros((2, 16, 64, 3), np.float32)
    b = a.copy()
    b[0, 0, 0, 1] = 0.2
    heat = difference_map(b, a, gain=5.0)
    assert heat[0, 0, 0].sum() > 2.5 and heat[1].max() < 0.02
    panels = side_by_side(a, b, "a method with a label that is too long for its panel")
    # Enlarged 4 times, with a band of text and two gaps.
    assert panels.shape == (2, 16 * 4 + 28, 3 * 256 + 8, 3) and panels.dtype == np.uint8


def test_numbers_and_plot() -> None:
    assert [format_number(v) for v in (None, "inf", 1.234)] == ["–", "∞", "1.23"]
    run = {"method": "m", "psnr_frames": [30.0, "inf", 40.0, 41.0]}
    plot = psnr_plot([{"method": "dense", "psnr_frames": None}, run])
    assert [len(stretch) for stretch in plot["lines"][0]["stretches"]] == [1, 2]
    assert not plot["empty"] and plot["hidden"] == []
    hidden = psnr_plot([{"method": "m", "psnr_frames": ["inf"]}])
    assert hidden["empty"] and hidden["hidden"] == ["m"]


def test_a_dense_warm_up_of_the_engine_is_no_loss_of_sparsity(pipe: Any, tmp_path: Path) -> None:
    size = {"height": 32, "width": 32, "frames": 4, "steps": 4}
    engine = prepare(request(tmp_path, "adaspa", device="cpu", **size), pipe=pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strict in (False, True):
            config = SparseConfig.from_name("adaspa", search=(3,), strict=strict)
            engine.warm_up(Arm("adaspa", config))
