"""k-means routing without weights: clusters, the estimate and the order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.routing import Routing, nearest


@pytest.fixture
def grouped(make: Any) -> Any:
    """Scattered groups of 64 tokens with nearly the same query and key, and each token's group.

    Queries of group g look for the keys of group g + 1.
    """

    def build(spread: float = 0.02, text: int = 0) -> tuple[Any, torch.Tensor]:
        data = make(grid=(8, 8, 16), heads=2, dim=16, text=text)
        rng = torch.Generator().manual_seed(7)
        group = (torch.arange(1024) // 64)[torch.randperm(1024, generator=rng)]
        axes = torch.eye(16).double()
        noise = [spread * torch.randn(1024, 2, 16, generator=rng).double() for _ in range(2)]
        data.q[0, :1024] = 30 * (axes[(group + 1) % 16][:, None] + noise[0])
        data.k[0, :1024] = axes[group][:, None] + noise[1]
        return data, group

    return build


def test_the_nearest_centroid_is_found_in_parts(make: Any, monkeypatch: Any) -> None:
    data = make(heads=3, dim=16)
    x, centroids = data.q.transpose(1, 2), data.k.transpose(1, 2)[:, :, ::50]
    expected = torch.cdist(x, centroids).argmin(-1)
    assert torch.equal(nearest(x, centroids), expected)
    monkeypatch.setattr("dit_sparse.methods.routing._SCRATCH_ELEMENTS", 1000)
    assert torch.equal(nearest(x, centroids), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_planted_clusters_are_recovered(grouped: Any, shared: bool) -> None:
    data, group = grouped()
    # More clusters than groups, so that no group is without a start.
    method, memory = Routing(0.9, 64, shared=shared, warmup=0), {}
    method.attend(data.call(0, memory))
    order = data.layout.ordering((4, 4, 4)).perm
    for which in (0, 1):
        perm = memory["orders"][which].perm[0].long()
        for head in range(2):
            ordered = group[order[perm[head]]]
            # Every cluster holds tokens of one group: there are no more runs than clusters.
            assert 1 + int((ordered.diff() != 0).sum()) <= 64
            # And clusters of one group lie together: most of a block is of one group. Before, it
            # was an eighth.
            blocks = ordered.view(16, 64)
            assert (blocks == blocks.mode(-1, keepdim=True).values).double().mean() > 0.65


def test_routing_finds_scattered_structure_that_tiles_cannot(grouped: Any) -> None:
    from dit_sparse.methods.biformer import BiFormer

    data, _ = grouped()
    dense, errors = data.attention(), []
    for method in (Routing(0.75, 64, warmup=0), BiFormer(0.75, warmup=0)):
        errors.append(float((method.attend(data.call(0)) - dense).norm() / dense.norm()))
    assert errors[0] < 0.15
    assert errors[1] > 1


def test_the_estimate_is_exact_for_clusters_of_equal_points(grouped: Any) -> None:
    data, _ = grouped(spread=0.0)
    method, memory = Routing(0.5, 64, tile=None, warmup=0), {}
    call = data.call(0, memory)
    estimate = method.scores(call)
    queries, keys = memory["orders"]
    moved = call.ordered(None)
    moved.q, moved.k = queries.apply(call.q), keys.apply(call.k)
    lse = moved.row_lse()
    true = moved.block_mass(lse, 64)
    torch.testing.assert_close(estimate, true, rtol=1e-6, atol=1e-6)


def test_one_cluster_routes_nothing(make: Any) -> None:
    data, memory = make(grid=(8, 8, 16)), {}
    estimate = Routing(0.5, 1, tile=None, warmup=0).scores(data.call(0, memory))
    torch.testing.assert_close(estimate, torch.full((1, 2, 16, 16), 4.0).double())
    for order in memory["orders"]:
        assert torch.equal(order.perm[0, 0].long(), torch.arange(1024))


def test_clusters_are_kept_and_refined(grouped: Any, monkeypatch: Any) -> None:
    from dit_sparse.methods import routing

    data, _ = grouped()
    method, memory = Routing(0.9, 32, iterations=25, every=2, warmup=0), {}
    passes: list[int] = []
    original = routing.nearest

    def counted(x: Any, centroids: Any) -> Any:
        passes.append(1)
        return original(x, centroids)

    monkeypatch.setattr(routing, "nearest", counted)
    method.attend(data.call(0, memory))
    assert len(passes) == 2 * 26
    first = memory["orders"]
    method.attend(data.call(1, memory))
    assert memory["orders"] is first
    method.attend(data.call(2, memory))
    assert len(passes) == 2 * (26 + 3)
    # It had converged, so going on from its centroids changes nothing.
    for old, new in zip(first, memory["orders"], strict=True):
        assert torch.equal(old.perm, new.perm)


def test_the_number_of_clusters_is_by_default_a_root(make: Any) -> None:
    data, memory = make(grid=(4, 8, 16)), {}
    Routing(0.5, warmup=0).attend(data.call(0, memory))
    assert [c.shape[2] for c in memory["centroids"]] == [23, 23]
