"""What must equal upstream: dense steps bit for bit, full masks within rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dit_sparse import enable_sparse_attention
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.processors import rewrap
from dit_sparse.processors.site import Site

# Text-to-video, ragged blocks (3 x 5 x 7 tokens), image conditioning, per-token timesteps.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "t2v": ({}, {}),
    "ragged": ({}, {"frames": 3, "size": (10, 14)}),
    "batch": ({}, {"batch": 2}),
    "one frame": ({}, {"frames": 1, "size": (18, 22)}),
    "i2v 2.1": (
        {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24},
        {"channels": 36, "text": 512},
    ),
    "i2v 2.2": ({"in_channels": 36}, {"channels": 36}),
    "ti2v": ({}, {"per token": True}),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so an output that is not filled shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: Any, wan: Any, inputs: Any) -> tuple[Any, Any]:
    """A model and its forward arguments at a timestep."""
    changes, options = (dict(part) for part in CASES[request.param])
    per_token = options.pop("per token", False)
    model = wan(**changes)

    def arguments(t: float) -> dict[str, Any]:
        built = inputs(t=t, **options)
        if "image_dim" in changes:
            rng = torch.Generator().manual_seed(1)
            built["encoder_hidden_states_image"] = torch.randn(1, 4, 16, generator=rng)
        if per_token:
            frames, height, width = built["hidden_states"].shape[-3:]
            steps = torch.full((1, frames, height // 2, width // 2), t)
            steps[:, 0] = 0
            built["timestep"] = steps.flatten(1)
        return built

    return model, arguments


@pytest.mark.usefixtures("poisoned")
def test_dense_phases_are_bit_identical(case: Any, calls: Any) -> None:
    model, arguments = case
    steps = [900.0, 700.0, 500.0]
    expected = [model(**arguments(t))[0] for t in steps]
    # The third step searches: still the model's own output.
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(3,)):
        for t, reference in zip(steps, expected, strict=True):
            assert torch.equal(model(**arguments(t))[0], reference)
    assert [call.phase.value for call in calls] == ["dense"] * 4 + ["search"] * 2
    with enable_sparse_attention(model, "dense"):
        assert torch.equal(model(**arguments(500.0))[0], expected[2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["full", "adaspa"])
def test_a_full_mask_equals_upstream_within_rounding(case: Any, name: str) -> None:
    model, arguments = case
    steps = [900.0, 500.0]
    single = [model(**arguments(t))[0] for t in steps]
    options = {"sparsity": 0.0, "search": (0,)} if name == "adaspa" else {}
    with enable_sparse_attention(model, name, **options) as sparse:
        ours = [model(**arguments(t))[0] for t in steps]
        assert sparse.report().sparse_density == 1.0
        assert sparse.report().sparse_steps == (1 if name == "adaspa" else 2)
    model.double()
    double = [model(**as_double(arguments(t)))[0] for t in steps]
    for out, upstream, exact in zip(ours, single, double, strict=True):
        own_error = (upstream - exact).abs().max()
        bound = 2 * own_error + torch.finfo(torch.float32).eps * exact.abs().max()
        assert bound < 2e-5
        assert (out - exact).abs().max() <= bound


def as_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def test_a_sparse_mask_differs_and_its_density_is_what_was_asked(wan: Any, inputs: Any) -> None:
    # The counterpart of the tests above: they would pass if nothing were ever sparse.
    model = wan()
    reference = model(**inputs(t=500.0))[0]
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        model(**inputs(t=900.0))
        out = model(**inputs(t=500.0))[0]
        report = sparse.report()
    assert 1e-4 < (out - reference).abs().max() < 1
    assert report.sparse_density == 0.5 and report.density == 0.75


def test_every_site_is_called_once_per_forward(
    wan: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    attend = rewrap.attend

    def spy(site: Site, *operands: Any, **options: Any) -> Tensor:
        seen[site.name] += 1
        return attend(site, *operands, **options)

    model = wan(num_layers=3, image_dim=16, added_kv_proj_dim=24)
    enable_sparse_attention(model, AdaSpa(0.5, search=(0,)))
    monkeypatch.setattr(rewrap, "attend", spy)
    arguments = inputs(text=512)
    arguments["encoder_hidden_states_image"] = torch.randn(1, 4, 16)
    for number, t in enumerate((900.0, 800.0, 700.0), 1):
        model(**{**arguments, "timestep": torch.tensor([t])})
        assert seen == {f"blocks.{i}.attn1": number for i in range(3)}


def test_profilers_see_the_operator(wan: Any, inputs: Any) -> None:
    model = wan()
    enable_sparse_attention(model, AdaSpa(0.5, search=(0,)))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**inputs(t=900.0))
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["dit_sparse::self_attention"] == len(model.blocks)


def test_arguments_may_be_positional(wan: Any, inputs: Any) -> None:
    model = wan()
    given = inputs()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        by_name = model(**given)[0]
        sparse.reset()
        by_place = model(given["hidden_states"], given["timestep"], given["encoder_hidden_states"])
    assert torch.equal(by_place.sample, by_name)


def test_half_precision_dense_steps_are_bit_identical(wan: Any, inputs: Any) -> None:
    model = wan().to(torch.bfloat16)
    given = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in inputs().items()}
    expected = model(**given)[0]
    with enable_sparse_attention(model, "adaspa", sparsity=0.5):
        out = model(**given)[0]
    assert torch.equal(out, expected) and out.dtype == torch.bfloat16
