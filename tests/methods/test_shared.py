"""What layers of one branch share: handed on by the binding, dropped and counted by the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from dit_sparse import SparseConfig, SparseProcessor
from dit_sparse.methods.tidaldecode import TidalDecode
from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.run import Branch, Run


@dataclass
class Context:
    """What a pipeline tells through ``cache_context``."""

    name: str
    step_index: int
    num_inference_steps: int


def forward(model: Any, branch: str, index: int) -> None:
    rng = torch.Generator().manual_seed(index)
    binding = binding_of(model)
    assert binding is not None
    binding.run.context = Context(branch, index, 4)
    model(
        hidden_states=torch.randn(1, 4, 4, 8, 8, generator=rng),
        timestep=torch.tensor([1000 - 100 * index]),
        encoder_hidden_states=torch.randn(1, 3, 16, generator=rng),
    )


@torch.no_grad()
def test_layers_share_within_a_branch_and_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=3,
    ).eval()
    searches: list[tuple[str, int]] = []
    original = TidalDecode.search

    def search(self: Any, call: Any) -> Any:
        searches.append((call.step.branch, call.layer))
        return original(self, call)

    monkeypatch.setattr(TidalDecode, "search", search)
    model.set_attn_processor(
        SparseProcessor(SparseConfig(TidalDecode(0.5, (1,), warmup=1, every=1)))
    )
    run = binding_of(model).run  # type: ignore[union-attr]
    for index in range(3):
        for branch in ("cond", "uncond"):
            forward(model, branch, index)
    # Layer 0 is dense, layer 1 searches in each branch, layer 2 takes over.
    assert searches == [("cond", 1), ("uncond", 1)] * 2
    cond, uncond = run.shared.values()
    assert cond["mask"] is run.branches["cond"].memory[1]["mask"]
    assert uncond["mask"] is run.branches["uncond"].memory[1]["mask"]
    assert cond["mask"] is not uncond["mask"]
    density = run.log["cond", 2].sparse_density
    assert density is not None and density.max() < 1
    forward(model, "cond", 0)
    assert run.generation == 1
    assert run.shared == {}


def test_shared_tensors_are_counted_once(make: Any) -> None:
    run = Run()
    run.branches["cond"] = Branch(None, None, None)  # type: ignore[arg-type]
    kept = torch.zeros(100)
    run.branches["cond"].memory[0] = {"a": kept}
    call = make().call()
    call.shared = run.shared
    call.branch_shared["b"] = kept
    assert run.held_bytes() == 400
    call.branch_shared["c"] = [torch.zeros(50), (torch.zeros(5),)]
    assert run.held_bytes() == 400 + 200 + 20


def test_what_is_shared_is_of_one_branch_and_one_number_of_tokens(make: Any) -> None:
    shared: dict[str, Any] = {}
    calls = [make(text=text).call() for text in (5, 5, 5, 7)]
    calls[1].step = replace(calls[1].step, branch="uncond")
    calls[2] = calls[2].ordered(calls[2].tile_order((4, 4, 4)))
    for call in calls:
        call.shared = shared
    assert calls[0].branch_shared is calls[2].branch_shared
    assert calls[0].branch_shared is not calls[1].branch_shared
    assert calls[0].branch_shared is not calls[3].branch_shared
