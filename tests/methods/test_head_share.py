"""A device that has some heads of a layer computes for them what one with all heads would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.methods import list_methods
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call, Method
from dit_sparse.methods.compensated_delta import CompensatedDelta
from dit_sparse.methods.head_share import HeadShare
from dit_sparse.methods.moa import MoA
from dit_sparse.methods.sparse_vdit import SparseVDiT

HEADS, LAYERS, STEPS = 4, 3, 8
# Which heads each of two devices has, by layer: not the same in all layers.
SHARES = (((0, 2), (1, 3)), ((1, 2), (0, 3)), ((3, 0), (2, 1)))


def settings() -> dict[str, Method]:
    """Every method that says so, and the settings that look at all heads or at their numbers."""
    found = {name: kind() for name, kind in list_methods().items() if kind.splits_heads}
    found["sparse_vdit"] = SparseVDiT(mode="diagonal")
    found["adaspa guarded"] = AdaSpa(sparsity=0.5, search=(2, 4), staleness=1e-3)
    plan = tuple(tuple((layer + head) % 3 for head in range(HEADS)) for layer in range(LAYERS))
    found["moa planned"] = MoA(plan=plan)
    found["delta by drift and level"] = CompensatedDelta(
        density=0.3, period=2.5, refresh="heads", head_adaptive=True, theta=0.6, warmup=1
    )
    for refresh in ("heads", "rows"):
        found[f"delta by {refresh}"] = CompensatedDelta(refresh=refresh, period=3, warmup=2)
    return found


class Rendezvous:
    """What a collective is: every device gives, and gets what all gave."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.given: dict[int, Tensor] = {}

    def gather(self, device: int, layer: int) -> Callable[[Tensor], Tensor]:
        held = [head for heads in SHARES[layer] for head in heads]

        def gather(x: Tensor) -> Tensor:
            self.given[device] = x
            self.barrier.wait()
            joined = torch.cat([self.given[0], self.given[1]], 1)
            self.barrier.wait()
            return joined[:, [held.index(head) for head in range(HEADS)]]

        return gather


def operands(make: Any, layer: int, step: int, text: int) -> Any:
    """Heads of very different sharpness, moving a little from step to step."""
    base = make(text=text, heads=HEADS, seed=100 * layer, dtype=torch.float32)
    noise = make(text=text, heads=HEADS, seed=100 * layer + step + 1, dtype=torch.float32)
    sharpness = torch.tensor([0.3, 4.0, 1.0, 8.0]).roll(layer)[:, None]
    base.q = (base.q + 0.1 * noise.q) * sharpness
    base.k = base.k + 0.1 * noise.k
    base.v = base.v + 0.1 * noise.v
    return base


def generation(
    method: Method, make: Any, text: int, device: int | None = None, meet: Rendezvous | None = None
) -> list[Tensor]:
    """Outputs of all layers at all steps; zeros for heads that are elsewhere."""
    memories: list[dict[str, Any]] = [{} for _ in range(LAYERS)]
    shared: dict[str, Any] = {}
    outs = []
    for step in range(STEPS):
        for layer in range(LAYERS):
            data = operands(make, layer, step, text)
            whole, own = data.q, list(range(HEADS))
            if device is not None and meet is not None:
                own = list(SHARES[layer][device])
                data = data.heads(torch.tensor(own))
            call = data.call(step, memories[layer], total=STEPS)
            call.layer, call.layers, call.shared = layer, LAYERS, shared
            if device is not None and meet is not None:
                call.share = HeadShare(tuple(own), HEADS, meet.gather(device, layer))
            out = torch.zeros_like(whole)
            out[:, :, own] = method.attend(call)
            outs.append(out)
    return outs


def split(method: Method, make: Any, text: int) -> list[Tensor]:
    meet, halves, errors = Rendezvous(), {}, []

    def run(device: int) -> None:
        try:
            halves[device] = generation(method, make, text, device, meet)
        except BaseException as error:
            errors.append(error)
            meet.barrier.abort()

    threads = [threading.Thread(target=run, args=(device,)) for device in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [a + b for a, b in zip(halves[0], halves[1], strict=True)]


@pytest.mark.parametrize("text", [0, 70])
@pytest.mark.parametrize("name", settings())
def test_methods_that_say_so_split_their_heads(name: str, text: int, make: Any) -> None:
    method = settings()[name]
    whole = generation(method, make, text)
    for out, wanted in zip(split(method, make, text), whole, strict=True):
        assert (out - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["adaspa", "zipvl", "moa", "s2", "hyperattention"])
def test_what_looks_at_all_heads_needs_to_be_told(name: str, make: Any, monkeypatch: Any) -> None:
    """Otherwise the test above would not test it."""
    method = settings()[name]
    whole = generation(method, make, 0)
    unaware = property(lambda call: HeadShare.whole(call.q.shape[2]))
    monkeypatch.setattr(Call, "heads", unaware)
    difference = (a - b for a, b in zip(split(method, make, 0), whole, strict=True))
    assert max(float(d.abs().max()) for d in difference) > 1e-2


def test_a_share() -> None:
    share = HeadShare((4, 1, 2), 6, lambda x: x.repeat(1, 2))
    x = torch.arange(6)[None]
    assert share.own_heads(x).tolist() == [[4, 1, 2]]
    assert share.own_heads(x[:, :1]).tolist() == [[0]]
    assert share.all_heads(torch.ones(1, 3)).shape == (1, 6)
    assert share.places(lambda number: number == 5) == slice(0, 0)
    assert share.places(lambda number: number != 1) == slice(0, 3, 2)
    part = share.part(torch.tensor([2, 0]))
    assert part.own == (2, 4) and part.total == 6
    with pytest.raises(RuntimeError, match="part of the heads"):
        part.all_heads(torch.ones(1, 2))
    whole = HeadShare.whole(5)
    assert whole.places(lambda number: number % 2 == 1) == slice(1, 4, 2)
    assert whole.own_heads(x[:, :5]) is not None and whole.own_heads(x[:, :5]).shape == (1, 5)
    uneven = HeadShare((0, 1, 3, 5), 6)
    assert uneven.places(lambda number: number in (0, 1, 5)).tolist() == [0, 1, 3]
