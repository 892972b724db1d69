"""What every supported transformer must do, over a registry of tiny models.

Nothing here knows a family: a new adapter is tested by its line in ``tiny_videos`` or
``tiny_images``.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import Draw, Grid, Tiny, poke, tiny_models
from torch import Tensor

from dit_sparse import SparseConfig, SparseProcessor, TokenLayout
from dit_sparse.methods.base import Call
from dit_sparse.methods.dense import Dense, FullMask
from dit_sparse.processors import site
from dit_sparse.processors.family import family_of

TINY = tiny_models()
MASKED = [tiny for tiny in TINY if tiny.masked]
# Portrait, square and landscape, one frame and odd numbers of them; the last five are the grids of
# Wan 480p and 720p, HunyuanVideo 720p, CogVideoX 1.5 and a portrait image of 2048x1536.
SIZES: list[Grid] = [
    (1, 1, 1),
    (1, 7, 3),
    (1, 5, 5),
    (5, 3, 8),
    (21, 30, 52),
    (21, 45, 80),
    (33, 45, 80),
    (11, 48, 85),
    (1, 128, 96),
]


# What pipelines call the timestep, and where it rises from noise to image.
TIMESTEPS = {"HiDreamImageTransformer2DModel": "timesteps", "ZImageTransformer2DModel": "t"}
RISING = {
    "Ideogram4Transformer2DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "MochiTransformer3DModel",
    "ZImageTransformer2DModel",
}


@functools.cache
def build(tiny: Tiny) -> Any:
    # Every test leaves the model as it was.
    return tiny.build()


def by_name(tiny: Tiny) -> str:
    return tiny.name


def run(tiny: Tiny, change: Callable[[dict[str, Any]], None] | None = None) -> Tensor:
    inputs = tiny.inputs(Draw(), tiny.grid, tiny.batch)
    if change is not None:
        change(inputs)
    out = build(tiny)(**inputs, return_dict=False)[0]
    out = torch.stack(list(out)) if isinstance(out, list) else out
    return out[:, slice(*tiny.used)]


@functools.cache
def upstream(tiny: Tiny) -> Tensor:
    return run(tiny)


def assert_close(out: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert (out - expected).abs().max() <= 1e-5 * scale


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("tiny", TINY, ids=by_name)
class TestFamily:
    def test_dense_steps_are_upstream_bit_for_bit(self, tiny: Tiny) -> None:
        expected = upstream(tiny)
        with SparseProcessor("dense").install(build(tiny)):
            assert torch.equal(run(tiny), expected)
        assert torch.equal(run(tiny), expected)
        assert expected.isfinite().all()

    def test_dense_steps_with_their_lse_are_upstream_too(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def attend(self: Dense, call: Call) -> Tensor:
            attended = call.dense_with_lse()
            difference = attended.lse - call.row_lse()
            assert difference.abs().max() < 1e-5 * max(1, float(attended.lse.abs().max()))
            return attended.out

        monkeypatch.setattr(Dense, "attend", attend)
        with SparseProcessor("dense").install(build(tiny)):
            assert torch.equal(run(tiny), upstream(tiny))

    def test_full_mask_equals_upstream(self, tiny: Tiny) -> None:
        with SparseProcessor("full").install(build(tiny)) as sparse:
            assert_close(run(tiny), upstream(tiny))
            # Not by falling back: each layer computed with our kernels.
            assert {layer["last_phase"] for layer in sparse.report().layers} == {"sparse"}
            assert len(sparse.report().layers) == tiny.sites

    def test_every_site_runs_once_and_in_order(self, tiny: Tiny, calls: list[Call]) -> None:
        with SparseProcessor("dense").install(build(tiny)):
            run(tiny)
        assert [call.layer for call in calls] == list(range(tiny.sites))
        assert all(call.q.shape == call.k.shape == call.v.shape for call in calls)
        assert all(call.q.shape[1] == call.layout.tokens for call in calls)

    def test_every_site_matters(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise the comparisons above would compare nothing."""
        for layer in range(tiny.sites):

            def attend(self: Dense, call: Call, layer: int = layer) -> Tensor:
                return call.dense() * (call.layer != layer)

            with monkeypatch.context() as patch:
                patch.setattr(Dense, "attend", attend)
                with SparseProcessor("dense").install(build(tiny)):
                    assert (run(tiny) - upstream(tiny)).abs().max() > 1e-4, layer

    def test_the_grid_is_where_the_layout_says(self, tiny: Tiny, calls: list[Call]) -> None:
        grid, rng = tiny.grid, random.Random(0)
        places = [(0, 0, 0), tuple(n - 1 for n in grid)]
        places += [tuple(rng.randrange(n) for n in grid) for _ in range(3)]
        with SparseProcessor("dense").install(build(tiny)):
            run(tiny)
            base = calls[0]
            assert base.layout.grid == grid
            coords = base.layout.coords().tolist()
            for place in places:
                calls.clear()
                run(tiny, lambda inputs, place=place: poke(tiny, inputs, grid, place))
                change = (calls[0].q[0] - base.q[0]).abs().sum((-1, -2))
                assert coords[int(change.argmax())] == list(place)
                if not tiny.mixes:
                    assert int((change > 0).sum()) == 1

    def test_steps_are_told_by_the_timestep_alone(self, tiny: Tiny, calls: list[Call]) -> None:
        """Two passes a step, as guidance makes them, without a pipeline or a cache context."""
        name = TIMESTEPS.get(tiny.model, "timestep")
        model = build(tiny)
        with SparseProcessor("dense").install(model) as sparse:
            for step in (*range(3), 0):
                for seed in range(2):
                    inputs = tiny.inputs(Draw(seed=seed), tiny.grid, tiny.batch)
                    share = step / 3 if tiny.model in RISING else 1 - step / 3
                    top = 1000.0 if inputs[name].max() > 1 else 1.0
                    inputs[name] = torch.full_like(inputs[name], top * share)
                    model(**inputs)
            assert sparse.bindings[0].run.generation == 1
        first = [call.step for call in calls if call.layer == 0]
        assert [step.index for step in first] == [0, 0, 1, 1, 2, 2, 0, 0]
        assert [step.generation for step in first] == [0] * 6 + [1] * 2
        assert [step.branch for step in first] == ["call", "call#1"] * 4
        noise = [step.progress for step in first[:6:2]]
        assert noise == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-3)

    def test_the_layout_is_exact_for_any_shape(self, tiny: Tiny) -> None:
        model, rng = build(tiny), random.Random(1)
        family = family_of(model)
        sizes = SIZES + [
            (rng.choice((1, rng.randint(1, 9))), rng.randint(1, 40), rng.randint(1, 40))
            for _ in range(100)
        ]
        for size in sizes:
            # An image has one frame.
            frames = max(size[0], tiny.frames_from) if tiny.grid[0] > 1 else 1
            grid = (frames, *size[1:])
            if math.prod(grid) > tiny.largest:
                continue
            batch = rng.choice((1, 2))
            inputs = tiny.inputs(Draw("meta"), grid, batch)
            layout = family.layout(model, inputs)
            before, after = tiny.expected(grid, batch)
            assert layout == TokenLayout.around(grid, before, after), (grid, batch)

    def test_nothing_else_is_touched(self, tiny: Tiny) -> None:
        model = build(tiny)
        family = family_of(model)
        sites = {id(module) for _, module in family.sites(model)}
        processors = {
            name: (module, module.processor)
            for name, module in model.named_modules()
            if hasattr(module, "processor")
        }
        others = [name for name, (module, _) in processors.items() if id(module) not in sites]
        assert all(any(part in name for name in others) for part in tiny.untouched)
        assert len(sites) == tiny.sites
        keys = list(model.state_dict())
        with SparseProcessor("dense").install(model):
            for name, (module, processor) in processors.items():
                assert (module.processor is processor) == (name in others), name
            assert list(model.state_dict()) == keys
        assert all(module.processor is processor for module, processor in processors.values())
        assert list(model.state_dict()) == keys

    def test_site_names_are_those_of_the_modules(self, tiny: Tiny) -> None:
        model = build(tiny)
        for name, module in family_of(model).sites(model):
            assert model.get_submodule(name.removesuffix(" (decoder)")) is module

    def test_signatures_are_those_of_upstream(self, tiny: Tiny) -> None:
        """Legacy attention modules drop every argument that is not in the signature."""
        model = build(tiny)
        sites = family_of(model).sites(model)
        before = [inspect.signature(module.processor.__call__) for _, module in sites]
        with SparseProcessor("dense").install(model):
            after = [inspect.signature(module.processor.__call__) for _, module in sites]
        assert after == before


@pytest.mark.parametrize("tiny", MASKED, ids=by_name)
def test_trimmed_padding_gives_the_same_image_without_a_mask(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor | None] = []
    tokens: list[int] = []
    attention = site.upstream_attention

    def spy(processor: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any) -> Any:
        masks.append(mask)
        tokens.append(k.shape[1])
        return attention(processor, q, k, v, mask, *rest)

    monkeypatch.setattr(site, "upstream_attention", spy)
    config = SparseConfig(Dense(), dense_padding="trim")
    with SparseProcessor(config).install(build(tiny)) as sparse:
        assert_close(run(tiny), upstream(tiny))
        full = sparse.bindings[0].passing.layout.tokens
    assert masks.count(None) == len(masks) >= tiny.sites
    assert min(tokens) < full


@pytest.mark.parametrize("tiny", MASKED, ids=by_name)
def test_padding_is_what_the_method_is_told(tiny: Tiny, calls: list[Call]) -> None:
    with SparseProcessor("dense").install(build(tiny)):
        run(tiny)
    told = [call.key_valid for call in calls if call.key_valid is not None]
    assert told
    for valid in told:
        assert valid.dtype == torch.bool
        assert valid.shape == (tiny.batch, calls[0].layout.tokens)
        assert not valid.all()


@pytest.mark.parametrize("tiny", MASKED, ids=by_name)
def test_padding_never_enters(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = FullMask.attend

    def poison(self: FullMask, call: Call) -> Tensor:
        if call.key_valid is not None:
            padding = ~call.key_valid[..., None, None]
            call.k = call.k.masked_fill(padding, float("nan"))
            call.v = call.v.masked_fill(padding, float("nan"))
        return attend(self, call)

    monkeypatch.setattr(FullMask, "attend", poison)
    with SparseProcessor("full").install(build(tiny)):
        assert_close(run(tiny), upstream(tiny))
