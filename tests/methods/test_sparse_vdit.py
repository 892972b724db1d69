"""Sparse-vDiT without weights: patterns, plans at run time, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import SparseConfig
from dit_sparse.bands import BandMask, video_blocks
from dit_sparse.methods.base import Call, ModelIdentity
from dit_sparse.methods.plan import DENSE, Mode, Plan, PlanStep, load_plan
from dit_sparse.methods.sparse_vdit import SparseVDiT, fitting_plan, is_warmup, shipped_plans
from dit_sparse.schedule import Phase, Step

MODES = (
    DENSE,
    Mode("skip"),
    Mode("diagonal", 0.25),
    Mode("multi_diagonal", 0.25),
    Mode("vertical_stripe", 0.25, 0.5),
)
TEXTS = [(text, order) for text in (0, 1, 226, 256) for order in ("video_text", "text_video")]


@pytest.fixture
def follow(tmp_path: Path) -> Any:
    """A method that follows a plan of one layer, given as rows of digits, one a step."""

    def build(rows: list[str], progress: list[float], grid: tuple, dim: int = 8) -> SparseVDiT:
        steps = tuple(
            PlanStep(p, "", (tuple(int(digit) for digit in row),))
            for row, p in zip(rows, progress, strict=True)
        )
        plan = Plan(ModelIdentity("Toy"), len(rows[0]), dim, grid, 64, MODES, steps, {})
        path = tmp_path / f"{'-'.join(rows)}.json"
        plan.save(path)
        return SparseVDiT(plan=str(path))

    return build


def expected(data: Any, digits: str) -> Tensor:
    """Each head alone, by the dense softmax under its pattern's token mask."""
    blocks = video_blocks(data.layout, 64)
    out = torch.zeros_like(data.q)
    for head, digit in enumerate(digits):
        pattern = MODES[int(digit)].pattern(blocks)
        if not pattern.skip:
            alone = data.heads(torch.tensor([head]))
            keep = BandMask((pattern,), 64, data.layout).tokens(0)
            out[:, :, head] = alone.attention(keep)[:, :, 0]
    return out


@pytest.mark.parametrize("digits", ["0000", "1234", "4321", "3131", "2222", "0420"])
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_heads_in_any_mix_equal_each_head_alone(
    make: Any, follow: Any, digits: str, text: int, order: str
) -> None:
    data = make(grid=(3, 9, 11), text=text, order=order, heads=4)
    call = data.call()
    out = follow([digits], [0.0], data.layout.grid).attend(call)
    torch.testing.assert_close(out, expected(data, digits), atol=1e-10, rtol=0)
    if digits == "0000":
        assert call.phase is Phase.DENSE
    else:
        assert call.phase is Phase.SPARSE
        assert call.head_density is not None
        whole = torch.tensor([digit == "0" for digit in digits])
        assert (call.head_density[0] == 1).equal(whole)
        assert call.kernel == "cpu"


def test_padded_keys_do_not_enter_whichever_sample_has_them(make: Any, follow: Any) -> None:
    data = make(grid=(3, 9, 11), text=20, batch=2, heads=4)
    data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
    data.key_valid[1, -7:] = False
    data.key_valid[0, 100:130] = False
    data.k[~data.key_valid] = data.v[~data.key_valid] = float("nan")
    out = follow(["0234"], [0.0], data.layout.grid).attend(data.call())
    torch.testing.assert_close(out, expected(data, "0234"), atol=1e-10, rtol=0)


def test_skipped_heads_never_read_their_keys_and_values(make: Any, follow: Any) -> None:
    data = make(grid=(3, 9, 11), text=5, heads=4)
    clean = expected(data, "1231")
    data.k[:, :, [0, 3]] = data.v[:, :, [0, 3]] = float("nan")
    out = follow(["1231"], [0.0], data.layout.grid).attend(data.call())
    torch.testing.assert_close(out, clean, atol=1e-10, rtol=0)
    assert not out[:, :, [0, 3]].any()


def test_heads_of_a_layer_take_one_kernel_call(
    make: Any, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = Call.banded_attention

    def counted(call: Call, bands: BandMask) -> Any:
        calls.append(bands)
        return original(call, bands)

    monkeypatch.setattr(Call, "banded_attention", counted)
    data = make(grid=(3, 9, 11), heads=6)
    follow(["123401"], [0.0], data.layout.grid).attend(data.call())
    assert len(calls) == 1
    assert calls[0].groups() == {"frame_major": (1, 3, 4), "position_major": (2,)}


def test_a_layer_of_dense_heads_is_the_models_own_output(make: Any, follow: Any) -> None:
    data = make(heads=2)
    call = data.call()
    own = torch.randn_like(data.q)
    call.dense_attention = lambda with_lse: (own, None)
    assert follow(["00"], [0.0], data.layout.grid).attend(call) is own


@pytest.mark.parametrize("total", [3, 4, 10, 50])
def test_other_step_counts_take_the_nearest_noise_level(make: Any, follow: Any, total: int) -> None:
    rows, progress = ["0000", "2222", "1111"], [0.0, 0.4, 0.8]
    data = make(grid=(3, 9, 11), heads=4)
    method = follow(rows, progress, data.layout.grid)
    for index in range(total):
        out = method.attend(data.call(index, {}, total))
        nearest = min(range(3), key=lambda i: abs(progress[i] - index / total))
        torch.testing.assert_close(out, expected(data, rows[nearest]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["skip", "diagonal", "multi_diagonal", "vertical_stripe"])
def test_one_mode_for_all_heads(make: Any, mode: str) -> None:
    data = make(grid=(3, 9, 11), text=3, heads=2)
    call = data.call()
    out = SparseVDiT(mode=mode).attend(call)
    digit = {m.name: str(i) for i, m in enumerate(MODES)}[mode]
    if mode == "vertical_stripe":
        keep = BandMask((Mode(mode, 0.25).pattern(4),), 64, data.layout).tokens(0)
        wanted = data.attention(keep)
    else:
        wanted = expected(data, digit * 2)
    torch.testing.assert_close(out, wanted, atol=1e-10, rtol=0)
    assert call.phase is Phase.SPARSE


def test_wide_bands_are_dense_and_thin_ones_block_diagonal(make: Any) -> None:
    data = make(grid=(4, 8, 16), heads=2)
    for mode in ("diagonal", "multi_diagonal", "vertical_stripe"):
        out = SparseVDiT(mode=mode, density=1.0).attend(data.call())
        torch.testing.assert_close(out, data.attention(), atol=1e-10, rtol=0)
    blocks = torch.arange(512) // 64
    keep = blocks[:, None] == blocks
    out = SparseVDiT(mode="diagonal", density=0.01).attend(data.call())
    torch.testing.assert_close(out, data.attention(keep), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("warmup", "total", "dense"),
    [(0, 10, 0), (3, 10, 3), (0.25, 12, 3), (1.0, 4, 4), (0.0, 4, 0), (0.3, 4, 1)],
)
def test_the_first_steps_stay_dense(warmup: int | float, total: int, dense: int) -> None:
    steps = [Step(i, total, i / total, "cond", 0) for i in range(total)]
    assert [is_warmup(warmup, step) for step in steps] == [i < dense for i in range(total)]


def test_warmup_goes_by_noise_where_no_step_count_is_known(make: Any) -> None:
    assert is_warmup(0.3, Step(5, None, 0.2, "cond", 0))
    assert not is_warmup(0.3, Step(1, None, 0.4, "cond", 0))
    data = make(heads=2)
    method = SparseVDiT(mode="skip", warmup=0.5)
    assert method.attend(data.call(0, {}, 4)).any()
    assert not method.attend(data.call(2, {}, 4)).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plan": ""}, "plan must be a path"),
        ({"plan": "nothing"}, "plan must be 'auto', a path that ends in .json or one of"),
        ({"density": 0.5}, "density and block go with mode"),
        ({"block": 64}, "density and block go with mode"),
        ({"mode": "window"}, "mode must be one of"),
        ({"mode": "skip", "density": 0.5}, "has no density"),
        ({"mode": "diagonal", "density": 0.0}, r"density in \(0, 1\]"),
        ({"mode": "diagonal", "block": 32}, "block must be 64 or 128"),
        ({"mode": "diagonal", "plan": "x.json"}, "give a plan or a mode"),
        ({"warmup": -1}, "warmup must be"),
        ({"warmup": 1.5}, "warmup must be"),
        ({"warmup": float("nan")}, "warmup must be"),
        ({"warmup": True}, "warmup must be"),
        ({"warmup": "all"}, "warmup must be"),
    ],
)
def test_wrong_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVDiT(**values)


def test_a_missing_plan_is_refused_when_it_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        SparseConfig.from_name("sparse_vdit", plan="none.json")


def test_without_a_plan_the_method_says_how_to_make_one(make: Any) -> None:
    data = make(grid=(3, 9, 11), heads=5)
    with pytest.raises(ValueError, match="dit-sparse search --model MODEL --output") as caught:
        SparseVDiT().attend(data.call())
    for name in shipped_plans():
        assert name in str(caught.value)


def test_a_plan_that_does_not_fit_is_refused_with_every_reason(make: Any, follow: Any) -> None:
    method = follow(["0123"], [0.0], (3, 9, 11))
    call = make(grid=(3, 9, 12), heads=5).call()
    call.model = ModelIdentity("Other")
    with pytest.raises(ValueError) as caught:
        method.attend(call)
    for reason in ("it is for a Toy, not a Other", "4 heads, the model 5", "this is (3, 9, 12)"):
        assert reason in str(caught.value)


def test_another_video_size_takes_an_explicit_wish(make: Any, follow: Any) -> None:
    method = follow(["0234"], [0.0], (3, 9, 11))
    data = make(grid=(4, 8, 16), heads=4)
    with pytest.raises(ValueError, match="any_grid=True"):
        method.attend(data.call())
    out = dataclasses.replace(method, any_grid=True).attend(data.call())
    torch.testing.assert_close(out, expected(data, "0234"), atol=1e-10, rtol=0)


def test_configs_with_a_plan_survive_a_round_trip(follow: Any) -> None:
    method = follow(["01"], [0.0], (3, 9, 11))
    again = SparseConfig.from_dict(SparseConfig(method).to_dict()).method
    assert again == method and hash(again) == hash(method)


def test_auto_takes_a_shipped_plan_that_fits_and_no_other() -> None:
    assert shipped_plans()
    for path in shipped_plans().values():
        plan = load_plan(path)
        fits = (plan.model, plan.layers, plan.heads, plan.dim, plan.grid)
        assert fitting_plan(None, *fits) is plan
        with pytest.raises(ValueError, match="has no plan for this"):
            fitting_plan(None, plan.model, plan.layers + 1, *fits[2:])
