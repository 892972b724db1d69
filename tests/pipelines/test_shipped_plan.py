"""The plan that ships for the embedded model belongs to it, and is what it uses by default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dit_sparse import enable_sparse_attention
from dit_sparse.cli_search import _weights_digest
from dit_sparse.methods.plan import Plan, load_plan
from dit_sparse.methods.sparse_vdit import fitting_plan, shipped_plans
from dit_sparse.pipelines.captions import tokenize
from dit_sparse.pipelines.embedded import load_embedded
from dit_sparse.processors.identity import identify


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = load_embedded("cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(shipped_plans()["embedded-8x16x16"])


@pytest.mark.parametrize("name", shipped_plans())
def test_all_were_searched_on_the_weights_that_ship(pipe: Any, name: str) -> None:
    plan = load_plan(shipped_plans()[name])
    assert name == "embedded-" + "x".join(map(str, plan.grid))
    searched = plan.provenance["weights"]["transformer"]
    assert searched == _weights_digest(pipe.transformer), (
        "the embedded model has been trained on since its plan was searched; run the command in "
        f"the plan's provenance again: {plan.provenance['command']}"
    )


def test_it_fits_the_embedded_model_and_no_other(pipe: Any, plan: Plan) -> None:
    identity = identify(pipe.transformer, pipe)
    assert identity.component == "transformer"
    assert fitting_plan(None, identity, 7, 6, 64, (8, 16, 16)) is plan
    wider = dict(identity.config) | {"ffn_dim": "1024"}
    other = dataclasses.replace(identity, config=tuple(sorted(wider.items())))
    with pytest.raises(ValueError, match="its model has ffn_dim = 768, this one 1024"):
        fitting_plan(None, other, 7, 6, 64, (8, 16, 16))
    with pytest.raises(ValueError, match=r"this is \(16, 32, 64\)"):
        fitting_plan(None, identity, 7, 6, 64, (16, 32, 64))


@pytest.mark.parametrize("name", shipped_plans())
def test_provenance_is_whole(name: str) -> None:
    plan = load_plan(shipped_plans()[name])
    told = plan.provenance
    assert told["model"] == "embedded" and told["command"].startswith("dit-sparse search")
    for caption in told["captions"]:
        tokenize(caption)
    assert told["steps"] == len(plan.steps)
    search = told["search"]
    costs = list(search["costs"].values())
    heads = [costs[mode] for step in plan.steps for row in step.table for mode in row]
    assert sum(heads) / len(heads) == pytest.approx(search["mean_cost"], abs=1e-4)
    assert search["mean_cost"] <= search["target_cost"]
    assert " /" not in told["command"]


def test_the_embedded_model_uses_it_by_default(pipe: Any, plan: Plan) -> None:
    with enable_sparse_attention(pipe, "sparse_vdit") as sparse:
        pipe(
            "a heart growing over grass, still camera",
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        report = sparse.report()
    costs = list(plan.provenance["search"]["costs"].values())
    rows = plan.steps[0].table
    for layer in report.layers:
        row = rows[layer["layer"]]
        if any(row):
            wanted = [costs[mode] for mode in row]
            assert layer["head_density"] == pytest.approx(wanted, abs=1e-4)
        else:
            assert layer["phases"] == {"dense": 1}
    assert report.sparse_steps == 1
