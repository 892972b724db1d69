"""Plans: their file, what they refuse, and how steps are mapped."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.bands import FULL, SKIP, HeadPattern
from dit_sparse.methods.base import ModelIdentity
from dit_sparse.methods.plan import DENSE, Mode, Plan, PlanStep, load_plan

MODES = (
    DENSE,
    Mode("skip"),
    Mode("diagonal", 0.25),
    Mode("multi_diagonal", 0.5),
    Mode("vertical_stripe", 0.25, 0.5),
)
MODEL = ModelIdentity("WanTransformer3DModel", (("num_layers", "2"), ("patch_size", "[1, 2, 2]")))


@pytest.fixture
def plan() -> Plan:
    steps = (
        PlanStep(0.0, "transformer", ((0, 0, 0), (0, 2, 0))),
        PlanStep(0.1, "transformer", ((0, 1, 2), (3, 4, 0))),
        PlanStep(0.6, "transformer", ((4, 4, 4), (1, 1, 1))),
    )
    return Plan(MODEL, 3, 16, (4, 8, 8), 64, MODES, steps, {"seed": 0, "captions": ["a heart"]})


def test_modes_stand_for_patterns_at_any_length() -> None:
    assert [mode.pattern(32) for mode in MODES] == [
        FULL,
        SKIP,
        HeadPattern(4),
        HeadPattern(9, order="position_major"),
        HeadPattern(columns=8, shift=0.5),
    ]
    assert Mode("vertical_stripe", 0.01).pattern(8).columns == 1
    assert MODES[2].pattern(1) == HeadPattern(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("window",), "mode must be one of"),
        (("diagonal",), "a sparse pattern has a density"),
        (("diagonal", 0.0), "a sparse pattern has a density"),
        (("diagonal", 1.5), "a sparse pattern has a density"),
        (("skip", 0.5), "dense and skip have none"),
        (("diagonal", 0.5, 0.5), "shift is a share"),
        (("vertical_stripe", 0.5, 1.0), "shift is a share"),
    ],
)
def test_modes_are_checked(values: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mode(*values)


def test_a_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    again = load_plan(path)
    for field in dataclasses.fields(Plan):
        assert getattr(again, field.name) == getattr(plan, field.name), field.name
    assert json.loads(path.read_text())["steps"][1]["layers"] == ["012", "340"]


def test_a_changed_file_is_read_again(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_plan(path) is load_plan(path)
    path.write_text(path.read_text().replace('"340"', '"300"'))
    import os

    os.utime(path, ns=(1, 1))
    assert load_plan(path).steps[1].table[1] == (3, 0, 0)


def _set(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        data = data[int(key)] if key.isdigit() else data[key]
    data[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "lora", "expected a plan"),
        ("version", 2, "plan version must be 1, got 2"),
        ("steps.1.layers", ["012"], "every step needs 2 layers of 3 heads"),
        ("steps.1.layers.0", "01", "every step needs 2 layers of 3 heads"),
        ("steps.0.layers.0", "005", "refers to modes outside"),
        ("steps.0.layers.0", "0-0", "unusable"),
        ("steps.0.progress", 1.5, "progress must be in"),
        ("steps", [], "at least one step"),
        ("model.layers", 3, "says 3 layers, its tables have 2"),
        ("modes.0", {"mode": "skip"}, "the first is dense"),
        ("modes.1", {"mode": "skip", "width": 3}, "a mode has the keys"),
        ("modes.1", "skip", "a mode has the keys"),
        ("comment", "x", "a plan has the keys"),
        ("model", {"class": "x"}, "a plan's model has the keys"),
        ("grid", 7, "unusable"),
    ],
)
def test_a_broken_plan_is_refused(
    plan: Plan, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    data = copy.deepcopy(plan.to_dict())
    _set(data, path, value)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        load_plan(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_or_one_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dit-sparse search"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a plan in .*plan\.json"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("progress", "index"),
    [(0.0, 0), (0.04, 0), (0.05, 0), (0.06, 1), (0.34, 1), (0.36, 2), (1.0, 2)],
)
def test_steps_are_mapped_by_noise_level_and_ties_go_to_the_noisier(
    plan: Plan, progress: float, index: int
) -> None:
    assert plan.step_at(progress) is plan.steps[index]
    assert plan.step_at(progress, "transformer") is plan.steps[index]


def test_experts_keep_to_their_own_steps(plan: Plan) -> None:
    low = tuple(
        dataclasses.replace(step, component="transformer_2", progress=step.progress + 0.3)
        for step in plan.steps
    )
    both = dataclasses.replace(plan, steps=plan.steps + low)
    assert both.step_at(0.65, "transformer") is plan.steps[2]
    assert both.step_at(0.0, "transformer_2") is low[0]
    here = dataclasses.replace(MODEL, component="transformer_2")
    assert both.mismatches(here, 2, 3, 16, (4, 8, 8)) == []
    assert "enable_sparse_attention" in both.mismatches(MODEL, 2, 3, 16, (4, 8, 8))[0]
    other = dataclasses.replace(MODEL, component="unet")
    assert "not of 'unet'" in both.mismatches(other, 2, 3, 16, (4, 8, 8))[0]


def test_what_does_not_fit_is_named(plan: Plan) -> None:
    fits = (MODEL, 2, 3, 16, (4, 8, 8))
    assert plan.mismatches(*fits) == []
    assert plan.mismatches(None, 2, 3, 16, None) == []
    # A key that only one side knows comes from another release of diffusers.
    newer = ModelIdentity(MODEL.kind, (*MODEL.config, ("rope_scale", "1.0")), "transformer")
    assert plan.mismatches(newer, *fits[1:]) == []
    cases = {
        "a WanTransformer3DModel, not a FluxTransformer2DModel": (
            ModelIdentity("FluxTransformer2DModel"),
            *fits[1:],
        ),
        "num_layers = 2, this one 4": (
            ModelIdentity(MODEL.kind, (("num_layers", "4"),)),
            *fits[1:],
        ),
        "it has 2 layers, the model 4": (MODEL, 4, *fits[2:]),
        "it has 3 heads, the model 5": (MODEL, 2, 5, *fits[3:]),
        "it has 16 channels a head, the model 64": (MODEL, 2, 3, 64, (4, 8, 8)),
        r"searched at (4, 8, 8) (frames, height, width) tokens, this is (4, 8, 9)": (
            *fits[:4],
            (4, 8, 9),
        ),
    }
    for message, arguments in cases.items():
        reasons = plan.mismatches(*arguments)
        assert len(reasons) == 1 and message in reasons[0], reasons
