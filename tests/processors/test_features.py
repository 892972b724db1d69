"""Whatever is switched on beside sparse attention, before it or after it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import diffusers.hooks
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.utils.torch_utils import unwrap_module
from features import FAMILIES, STEPS, Feature, all_features
from installed import offloads_groups
from torch import Tensor

from dit_sparse import (
    AdaSpa,
    Method,
    SparseConfig,
    disable_sparse_attention,
    enable_sparse_attention,
)
from dit_sparse.methods.dense import FullMask
from dit_sparse.processors.binding import binding_of

CELLS = [
    pytest.param(feature, family, id=f"{feature.name}-{family}")
    for feature in all_features()
    for family in FAMILIES
]
PRESENT = [cell for cell in CELLS if cell.values[1] not in cell.values[0].absent]
ABSENT = [cell for cell in CELLS if cell.values[1] in cell.values[0].absent]
# The first step is dense and finds the mask.
METHOD = AdaSpa(sparsity=0.5, search=(1,))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads, backend = torch.get_num_threads(), _AttentionBackendRegistry._active_backend
    torch.set_num_threads(1)
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    # set_attention_backend also sets a default for all models of the process.
    _AttentionBackendRegistry._active_backend = backend


def skip_without(feature: Feature) -> None:
    if feature.name.startswith("group offload") and not offloads_groups():
        pytest.skip("group offload of this diffusers asks for an accelerator")
    if not feature.needs or hasattr(diffusers.hooks, feature.needs):
        return
    if importlib.util.find_spec(feature.needs) is None:
        pytest.skip(f"{feature.needs} is not there")


@functools.cache
def without(family: str) -> Tensor:
    """Latents of the pipeline as it is."""
    tiny = FAMILIES[family]
    return tiny.run(tiny.build(), steps=STEPS)


class Generation:
    """One generation with a feature, without sparse attention or with it on a new pipeline."""

    def __init__(
        self,
        feature: Feature,
        family: str,
        method: Method | None = None,
        feature_last: bool = False,
    ) -> None:
        pipe = FAMILIES[family].build()
        self.steps: list[Tensor] = []
        if not feature_last:
            feature.switch_on(pipe)
        if method is not None:
            # Any loss of sparsity raises.
            config = SparseConfig(method, strict=True)
            self.sparse = enable_sparse_attention(pipe, config)
        if feature_last:
            feature.switch_on(pipe)
        self.pipe = pipe
        self.last = feature.run(family, pipe, callback_on_step_end=self._note)

    def _note(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        self.steps.append(tensors["latents"].clone())
        return {}

    @property
    def sparse_calls(self) -> int:
        binding = binding_of(unwrap_module(self.pipe.transformer))
        return sum(log.sparse_calls for log in binding.run.log.values()) if binding else 0


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("feature", "family"), PRESENT)
def test_feature(feature: Feature, family: str) -> None:
    skip_without(feature)
    upstream = Generation(feature, family)
    if not feature.options:
        # Otherwise nothing below would be a test of it.
        assert (apart(upstream.last, without(family)) > 1e-3) == feature.changes
    for feature_last in (False, True) if feature.keeps else (False,):
        exact = Generation(feature, family, FullMask(), feature_last)
        assert exact.sparse_calls > 0
        assert apart(exact.last, upstream.last) < 1e-4
        ours = Generation(feature, family, METHOD, feature_last)
        assert ours.sparse_calls > 0
        assert torch.equal(ours.steps[0], upstream.steps[0])
        assert apart(ours.last, upstream.last) > 1e-4
        if not feature_last:
            first = ours
    if not feature.keeps:
        loaded = Generation(feature, family, METHOD, feature_last=True)
        assert loaded.sparse_calls == 0
        assert torch.equal(loaded.last, upstream.last)
        return
    assert torch.equal(ours.last, first.last)
    disable_sparse_attention(ours.pipe)
    assert torch.equal(feature.run(family, ours.pipe), upstream.last)


def test_perturbed_attention_in_compiled_blocks() -> None:
    """diffusers perturbs it with a function mode, which the compiler sees and operators do not."""
    feature = next(f for f in all_features() if "PAG" in f.name)
    upstream = Generation(feature, "Qwen-Image").last
    pipe = FAMILIES["Qwen-Image"].build()
    feature.switch_on(pipe)
    enable_sparse_attention(pipe, "full")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert apart(feature.run("Qwen-Image", pipe), upstream) < 1e-4


@pytest.mark.parametrize(("feature", "family"), ABSENT)
def test_what_upstream_has_not_got(feature: Feature, family: str) -> None:
    skip_without(feature)
    pipe = FAMILIES[family].build()
    if feature.needs == "SeaCacheConfig" and hasattr(pipe.transformer, "enable_cache"):
        feature.switch_on(pipe)
        assert torch.equal(feature.run(family, pipe), without(family))
        return
    with pytest.raises((AttributeError, IndexError, RuntimeError, ValueError)):
        feature.switch_on(pipe)
        feature.run(family, pipe)
