"""What all methods on the skeleton of scored.py have in common; found by their base class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.mask import block_count
from dit_sparse.methods import list_methods
from dit_sparse.methods.estimates import (
    as_mass,
    best_blocks,
    block_means,
    probe_mass,
    probe_rows,
    rank_of,
    top_share,
)
from dit_sparse.methods.scored import BlockMasked, BlockScored, BlockSearched
from dit_sparse.schedule import Phase

# MoA searches in a dense step of its own, see test_moa.py.
METHODS = {
    name: kind
    for name, kind in list_methods().items()
    if issubclass(kind, BlockMasked) and name != "moa"
}
SEARCHED = sorted(name for name, k in METHODS.items() if issubclass(k, BlockSearched))
SCORED = sorted(name for name, k in METHODS.items() if issubclass(k, BlockScored))
TEXTS = [(0, "video_text"), (1, "text_video"), (5, "text_video"), (226, "video_text")]
# Settings at which small calls are sparse.
SMALL: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.5, "probes": 32, "least": 64, "block": 64},
    "zipvl": {"tau": 0.3},
    "s2": {"stride": 4, "band": 0},
    "dsvt": {"sets": 3},
    "tidaldecode": {"sparsity": 0.6, "anchors": (0,)},
    "routing": {"sparsity": 0.6, "clusters": 12},
    "hyperattention": {"sparsity": 0.6, "sample": False},
}


def small(name: str, **more: Any) -> BlockMasked:
    options = SMALL.get(name, {"sparsity": 0.6})
    return METHODS[name](**{"warmup": 0, **options, **more})  # type: ignore[arg-type]


def kept_pairs(method: BlockMasked, call: Any) -> Tensor:
    """The pairs kept by the mask that ``call`` left in memory, in the model's order.

    Told by the output: with one-hot values it is the attention weights themselves.
    """
    tokens = call.layout.tokens
    eye = torch.eye(tokens, dtype=call.q.dtype)
    order = method.order(call)
    moved = call.ordered(order)
    seen = []
    for part in eye.split(call.q.shape[-1], -1):
        width = part.shape[-1]
        moved.v = torch.zeros_like(call.v)
        values = part if order is None else part[order.perm]
        moved.v[..., :width] = values[None, :, None]
        out = method.attention(moved, call.memory["mask"])
        seen.append((out if order is None else order.undo(out))[..., :width])
    weights = torch.cat(seen, -1).transpose(1, 2)  # [batch, heads, tokens, tokens]
    return weights > 0


@pytest.mark.parametrize(("text", "order"), TEXTS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_output_is_softmax_over_kept_pairs_and_text_sees_everything(
    make: Any, name: str, text: int, order: str
) -> None:
    # Video ends inside a block, beside text; low scores keep every weight above rounding.
    data = make(grid=(3, 13, 11), text=text, order=order, batch=2, dim=64, sharp=0.5)
    method, memory = small(name), {}
    call = data.call(0, memory)
    out = method.attend(call)
    assert call.phase is Phase.REFRESH
    keep = kept_pairs(method, call)
    assert (out - data.attention(keep)).abs().max() < 1e-10
    assert (out - data.attention()).abs().max() > 1e-4
    is_text = data.layout.coords()[:, 0] < 0
    assert keep[..., is_text, :].all()
    assert keep[..., is_text].all()
    assert not keep[..., ~is_text, :][..., ~is_text].all((-1, -2)).any()
    density = call.head_density.expand(2, 2)
    torch.testing.assert_close(density, keep.double().mean((-1, -2)).float())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_text_on_both_sides_of_the_video(make: Any, name: str) -> None:
    data = make(grid=(3, 13, 11), text=9, dim=64, sharp=0.5)
    data.layout = TokenLayout.around((3, 13, 11), 4, 5)
    method, memory = small(name), {}
    call = data.call(0, memory)
    out = method.attend(call)
    keep = kept_pairs(method, call)
    assert (out - data.attention(keep)).abs().max() < 1e-10
    assert keep[..., :4, :].all() and keep[..., -5:, :].all()
    assert keep[..., :4].all() and keep[..., -5:].all()
    assert not keep.all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_padding_is_never_read_and_batch_elements_are_apart(make: Any, name: str) -> None:
    both = make(grid=(3, 12, 11), text=21, order="text_video", batch=2)
    both.key_valid = torch.ones(2, both.layout.tokens, dtype=torch.bool)
    # Padding of text, and of a whole block of video.
    both.key_valid[0, 12:21] = False
    both.key_valid[1, -80:] = False
    padding = ~both.key_valid
    method, results = small(name), []
    for poison in (0.0, float("nan")):
        both.k[padding] = both.v[padding] = poison
        both.q[padding] = 0.0 if poison == 0 else 50.0
        memory: dict[str, Any] = {}
        outs = torch.stack([method.attend(both.call(index, memory)) for index in range(2)])
        outs[:, padding] = 0
        assert outs.isfinite().all()
        results.append((outs, memory["mask"].dense()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    both.q[padding] = both.k[padding] = both.v[padding] = 0
    for element in range(2):
        one = make(grid=(3, 12, 11), text=21, order="text_video")
        index = slice(element, element + 1)
        one.q, one.k, one.v, one.key_valid = (
            x[index] for x in (both.q, both.k, both.v, both.key_valid)
        )
        out = method.attend(one.call(0))
        difference = (out - results[0][0][0, index])[both.key_valid[index]]
        assert difference.abs().max() < 1e-10


@pytest.mark.parametrize("name", sorted(METHODS))
def test_density_rises_with_the_budget_up_to_everything(make: Any, name: str) -> None:
    data, densities = make(grid=(4, 12, 20), heads=3), []
    for share in (0.1, 0.3, 0.6, 0.9, 1.0):
        call = data.call(0)
        method = small(name).at_budget(share)
        method.attend(call)
        densities.append(float(call.head_density.mean()))
    assert densities == sorted(densities)
    assert densities[0] < 0.6
    assert densities[-1] == 1.0


@pytest.mark.parametrize("name", SEARCHED)
def test_masks_are_found_every_few_steps_and_kept_between(
    make: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, memory, searches = small(name, every=3, warmup=0.2), {}, []
    original = type(method).find

    def find(self: Any, call: Any) -> Any:
        searches.append(call.step.index)
        return original(self, call)

    monkeypatch.setattr(type(method), "find", find)
    phases = []
    # A step cache skips step 7.
    for index in (0, 1, 2, 3, 4, 5, 6, 8, 9):
        data = make(seed=index)
        call = data.call(index, memory, total=10)
        out = method.attend(call)
        assert (call.phase is Phase.DENSE) is torch.equal(out, data.attention())
        phases.append(call.phase.value)
    assert searches == [2, 5, 8]
    assert phases == ["dense"] * 2 + ["refresh", "sparse", "sparse"] + ["refresh", "sparse"] * 2


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(SEARCHED)))
def test_static_masks_are_found_once(make: Any, name: str) -> None:
    method, memory, masks = small(name), {}, []
    for index in range(3):
        method.attend(make(seed=index).call(index, memory))
        masks.append(memory["mask"])
    assert masks[0] is masks[1] is masks[2]


@pytest.mark.parametrize("name", sorted(set(SEARCHED) - {"zipvl"}))
def test_permuted_heads_have_permuted_masks(make: Any, name: str) -> None:
    data = make(heads=4)
    method, index = small(name), torch.tensor([2, 0, 3, 1])
    memory, moved = {}, {}
    out = method.attend(data.call(0, memory))
    permuted = method.attend(data.heads(index).call(0, moved))
    assert torch.equal(memory["mask"].dense()[:, index], moved["mask"].dense())
    assert (out[:, :, index] - permuted).abs().max() < 1e-12
    assert not torch.equal(memory["mask"].dense()[:, 0], memory["mask"].dense()[:, 1])


@pytest.mark.parametrize("name", SCORED)
def test_rows_keep_the_rounded_share_and_their_own_block(make: Any, name: str) -> None:
    data, memory = make(grid=(4, 8, 20), text=5), {}
    small(name, sparsity=0.7).attend(data.call(0, memory))
    keep = memory["mask"].dense()[..., :10, :10]
    assert (keep.sum(-1) == 3).all()
    if name != "routing":  # whose rows are not places of the video
        assert keep.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_matrix_of_all_pairs_is_ever_made(make: Any, largest_output: Any, name: str) -> None:
    data = make(grid=(4, 20, 32), text=70, heads=1, dtype=torch.float32)
    method = small(name)
    with largest_output as largest:
        method.attend(data.call(0))
    assert 0 < largest.numel < data.layout.tokens**2 / 2


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("minference_block", {"sparsity": 1.0}),
        ("minference_block", {"block": 48}),
        ("minference_block", {"every": 0}),
        ("minference_block", {"warmup": 1.5}),
        ("minference_vs", {"probes": 0}),
        ("biformer", {"tile": (4, 4)}),
        ("flexprefill", {"gamma": 1.1}),
        ("flexprefill", {"tau": -0.1}),
        ("double_sparsity", {"channels": 15}),
        ("double_sparsity", {"rotary": "other"}),
        ("zipvl", {"tau": True}),
        ("s2", {"stride": 0}),
        ("s2", {"band": -1}),
        ("dsvt", {"window": (0, 4, 4)}),
        ("tidaldecode", {"anchors": ()}),
        ("tidaldecode", {"anchors": (-1,)}),
        ("tidaldecode", {"min_recall": 2.0}),
        ("routing", {"clusters": 0}),
        ("hyperattention", {"bits": 0}),
        ("hip", {"sparsity": "0.5"}),
    ],
)
def test_impossible_settings_are_refused(name: str, wrong: dict[str, Any]) -> None:
    (option,) = wrong
    with pytest.raises(ValueError, match="anchor" if option == "anchors" else option):
        METHODS[name](**wrong)


# --- estimates -------------------------------------------------------------------------------


def test_block_means_count_what_exists(make: Any) -> None:
    data = make(grid=(1, 10, 15), batch=2)
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, 60:140] = False
    poisoned = data.k.masked_fill(~valid[..., None, None], float("nan"))
    means, count = block_means(poisoned, 64, valid)
    assert count.tolist() == [[64, 64, 22], [60, 0, 10]]
    torch.testing.assert_close(means[1, :, 0], data.k[1, :60].mean(0))
    torch.testing.assert_close(means[1, :, 2], data.k[1, 140:].mean(0))
    assert (means[1, :, 1] == 0).all()
    means, count = block_means(data.k, 64)
    assert count.tolist() == [[64, 64, 22]]
    torch.testing.assert_close(means[:, :, 2], data.k[:, 128:].mean(1))
    assert block_means(data.k.half(), 64)[0].dtype == torch.float32


def test_probe_mass_is_the_block_sum_of_softmax(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(grid=(3, 9, 10), text=6, batch=2)
    data.key_valid = torch.ones(2, 276, dtype=torch.bool)
    data.key_valid[1, 250:] = False
    data.k[1, 250:] = float("nan")
    data.q[1, 250:] = float("nan")
    call = data.call()
    rows = torch.tensor([0, 77, 260])
    weights = torch.nn.functional.pad(data.softmax(), (0, 320 - 276))
    expected = weights[:, :, rows].view(2, 2, 3, 5, 64).sum(-1)
    expected[1, :, 2] = 0  # a query of padding
    whole = probe_mass(call, rows, 64)
    assert (whole - expected).abs().max() < 1e-12
    monkeypatch.setattr("dit_sparse.methods.estimates._SCRATCH_ELEMENTS", 1)
    assert (probe_mass(call, rows, 64) - expected).abs().max() < 1e-12


def test_probes_reach_every_block_and_no_text(make: Any) -> None:
    call = make(grid=(3, 13, 11), text=226).call()
    rows = probe_rows(call, 18, 64)
    assert len(rows) == 18
    assert (rows // 64).unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert (rows // 64).bincount().tolist() == [3] * 6
    assert probe_rows(make(grid=(1, 2, 2)).call(), 64, 64).tolist() == [0, 1, 2, 3]


def test_top_share_is_the_shortest_prefix() -> None:
    mass = torch.tensor([[1.0, 5.0, 0.0, 4.0], [0.0, 0.0, 1.0, 0.0]])
    assert top_share(mass, 0.5).tolist() == [
        [False, True, False, False],
        [False] * 2 + [True, False],
    ]
    assert top_share(mass, 0.51)[0].tolist() == [False, True, False, True]
    assert top_share(mass, 0.9)[0].tolist() == [False, True, False, True]
    assert top_share(mass, 0.91)[0].tolist() == [True, True, False, True]
    assert top_share(mass, 1.0).all()
    assert not top_share(mass, 0.0).any()


def test_ranks_break_ties_by_place() -> None:
    assert rank_of(torch.tensor([3.0, 5.0, 3.0])).tolist() == [1, 0, 2]


def test_scores_above_zero_keep_their_order() -> None:
    scores = torch.tensor([[-3.0, float("-inf"), 7.0, -90.0], [2.0, 1.0, float("-inf"), 3.0]])
    mass = as_mass(scores)
    assert torch.equal(rank_of(mass), rank_of(scores))
    assert (mass == 0).nonzero().tolist() == [[0, 1], [1, 2]]
    assert (mass >= 0).all()


@pytest.mark.parametrize("text", [0, 70])
def test_the_best_blocks_are_kept_and_padding_wins_nothing(make: Any, text: int) -> None:
    call = make(grid=(1, 3, 64), text=text).call()
    scores = torch.tensor([[0.1, 2.0, 1.0], [0.5, 0.0, 1.0], [0.5, 2.0, 1.0]])
    keep = best_blocks(call, scores[None, None], 0.7, 64).dense()[0, 0]
    # The second key block does not exist.
    assert keep[:3, :3].int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert keep[3:].all()
    assert keep[:, 3:].all()
    two = best_blocks(call, scores[None, None], 0.3, 64).dense()[0, 0, :3, :3]
    assert two.int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


def test_a_mask_of_text_alone_is_dense(make: Any) -> None:
    for name in METHODS:
        data, memory = make(grid=(1, 5, 5), text=5), {}
        out = small(name).attend(data.call(0, memory))
        assert memory["mask"].shape[2:] == (block_count(30, 64),) * 2
        assert (out - data.attention()).abs().max() < 1e-12
