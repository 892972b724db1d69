"""MMInference without weights: search, budgets, tables, text and output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenLayout
from dit_sparse.mask import packed_width
from dit_sparse.methods.base import ModelIdentity
from dit_sparse.methods.mminference import MMInference
from dit_sparse.methods.modality_parts import BOUNDARIES, Part, head_order
from dit_sparse.methods.pattern_table import GRID, KINDS, HeadPatterns, Pattern, PatternTable
from dit_sparse.processors.run import stored_bytes
from dit_sparse.schedule import Phase

TEXTS = [(text, order) for text in (0, 1, 5, 226) for order in ("video_text", "text_video")]
# Frames 0 and 3 of four.
REFERENCES = (((0, 128), (384, 512)),)


def found(method: MMInference, data: Any, memory: dict[str, Any] | None = None) -> Part:
    """The one part that the first step finds."""
    memory = {} if memory is None else memory
    method.attend(data.call(0, memory))
    (part,) = memory["parts"].values()
    return part


def kept_pairs(data: Any, part: Part) -> Tensor:
    """``[batch, heads, tokens, tokens]`` bool."""
    batch, tokens, heads, _ = data.q.shape
    order, _ = head_order(part.queries, part.order, data.key_valid)
    keep = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    blocks = part.mask.lists().tokens()
    for b in range(batch):
        for h in range(heads):
            q = order.perm[b, h].long()
            keep[b, h, q[:, None], q] = blocks[b, h]
    return keep


def look_at_columns(data: Any, head: int, strength: float = 40.0) -> None:
    """Every query of ``head`` looks at the keys of its own column, in all rows and frames."""
    column = data.layout.coords()[:, 2].clamp(min=0)
    axes = torch.eye(data.q.shape[-1], dtype=data.q.dtype)[column]
    data.q[:, :, head], data.k[:, :, head] = strength * axes, axes


# --- search ----------------------------------------------------------------------------------


def test_states(make: Any) -> None:
    data, memory, method = make(), {}, MMInference(0.5, (3, 6))
    dense, phases = data.attention(), []
    for index in range(8):
        call = data.call(index, memory, 8)
        out = method.attend(call)
        phases.append(call.phase)
        assert torch.equal(out, dense) == (index < 3)
        assert ("parts" in memory) == (index >= 2)
    expected = [Phase.DENSE] * 2 + [Phase.SEARCH] + [Phase.SPARSE] * 2 + [Phase.REFRESH]
    assert phases == [*expected, Phase.SPARSE, Phase.SPARSE]


def test_a_refresh_looks_anew(make: Any) -> None:
    method, memory = MMInference(0.5, (0, 3)), {}
    first = found(method, make(seed=0), memory)
    method.attend(make(seed=1).call(1, memory))
    assert memory["parts"]["2d", 0, 0] is first
    method.attend(make(seed=1).call(2, memory))
    (second,) = memory["parts"].values()
    assert not torch.equal(first.mask.bits, second.mask.bits)
    assert torch.equal(second.mask.bits, found(method, make(seed=1)).mask.bits)


def test_heads_are_found_by_what_they_look_at(make: Any) -> None:
    data = make(grid=(8, 8, 16), heads=3, dim=16, sharp=0.05, text=7, batch=2)
    look_at_columns(data, 1)
    row = data.layout.coords()[:, 1]
    data.q[:, :, 2, 0], data.k[:, :, 2, 0] = 8.0, 4.0 * (row == 5)
    method = MMInference(0.8, (0,))
    part = found(method, data)
    names = ("raster", *method.strides)
    assert [names[o] for o in part.order[0, 1:]] == ["w", "h"]
    assert (part.kind[:, 1:] == GRID).all()
    assert (part.phase[:, 2] == 5).all()
    keep, column = kept_pairs(data, part), data.layout.coords()[:, 2]
    video = column >= 0
    assert keep[:, 1, video][:, :, video][:, column[video][:, None] == column[video]].all()
    assert keep[:, 2][..., row == 5].all()
    # A head that looks everywhere is none, whatever the fullest class holds by chance.
    assert (part.kind[:, 0] != GRID).all()


@pytest.mark.parametrize("lift", [0.05, 1.0])
def test_no_lift_is_enough_for_a_lift_of_one(make: Any, lift: float) -> None:
    data = make(grid=(8, 8, 16), heads=1, dim=16)
    look_at_columns(data, 0)
    part = found(MMInference(0.8, (0,), lift=lift), data)
    assert (part.kind == GRID).all() == (lift < 1)
    assert (part.order == 0).all() == (lift == 1)


def test_batch_elements_have_patterns_of_their_own(make: Any) -> None:
    both, memory = make(grid=(8, 8, 16), text=7, batch=2, dim=16), {}
    look_at_columns(both, 1)
    other = make(grid=(8, 8, 16), text=7, dim=16, seed=5)
    for mine, theirs in ((both.q, other.q), (both.k, other.k), (both.v, other.v)):
        mine[1] = theirs[0]
    both.key_valid = torch.ones(2, both.layout.tokens, dtype=torch.bool)
    both.key_valid[1, -5:] = False
    method = MMInference(0.6, (0,))
    part = found(method, both, memory)
    out = method.attend(both.call(1, memory))
    assert part.order[0, 1] != part.order[1, 1]
    for element in range(2):
        one, alone = make(grid=(8, 8, 16), text=7, dim=16), {}
        index = slice(element, element + 1)
        one.q, one.k, one.v, one.key_valid = (
            x[index] for x in (both.q, both.k, both.v, both.key_valid)
        )
        single = found(method, one, alone)
        assert torch.equal(single.mask.dense(), part.mask.dense()[index])
        assert torch.equal(single.order, part.order[index])
        assert (method.attend(one.call(1, alone)) - out[index]).abs().max() < 1e-12


def test_permuting_heads_permutes_patterns(make: Any) -> None:
    data = make(grid=(8, 8, 16), heads=4, dim=16, text=5)
    look_at_columns(data, 2)
    method, index = MMInference(0.7, (0,)), torch.tensor([2, 0, 3, 1])
    part, moved = found(method, data), found(method, data.heads(index))
    assert torch.equal(moved.mask.dense(), part.mask.dense()[:, index])
    assert torch.equal(moved.order, part.order[:, index])
    assert len(part.order.unique()) > 1


def test_heads_in_turns_are_heads_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(grid=(8, 8, 16), heads=5, dim=16, text=5)
    look_at_columns(data, 3)
    at_once = found(MMInference(0.7, (0,)), data)
    monkeypatch.setattr("dit_sparse.methods.mminference._SCRATCH", 1)
    in_turns = found(MMInference(0.7, (0,)), data)
    assert torch.equal(at_once.mask.bits, in_turns.mask.bits)
    assert torch.equal(at_once.order, in_turns.order)


@pytest.mark.parametrize("order", ["video_text", "text_video"])
def test_padding_is_never_read(make: Any, order: str) -> None:
    data = make(text=21, order=order, batch=2)
    data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
    end = data.layout.text if order == "text_video" else data.layout.tokens
    data.key_valid[0, end - 9 : end] = False
    padding = ~data.key_valid
    method, results = MMInference(0.6, (0, 3)), []
    for poison in (0.0, 50.0, float("nan")):
        data.k[padding] = data.v[padding] = poison
        memory: dict[str, Any] = {}
        outs = [method.attend(data.call(index, memory)) for index in range(3)]
        results.append((torch.stack(outs), memory["parts"]["2d", 0, 0].mask.bits))
        assert outs[1].isfinite().all()
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)


# --- output and budget -----------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (2, 4, 4)])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (9, 0), (4, 5)])
def test_output_is_attention_under_the_pairs_kept(
    make: Any, tile: tuple[int, int, int] | None, before: int, after: int
) -> None:
    data, memory = make(text=before + after, batch=2, dim=16, heads=3), {}
    data.layout = TokenLayout.around(data.layout.grid, before, after)
    look_at_columns(data, 1, 6.0)
    method = MMInference(0.6, (0,), tile=tile)
    keep = kept_pairs(data, found(method, data, memory))
    call = data.call(1, memory)
    out = method.attend(call)
    assert not keep.all()
    assert (out - data.attention(keep)).abs().max() < 1e-10
    assert (out - data.attention()).abs().max() > 1e-4
    torch.testing.assert_close(call.head_density, keep.double().mean((-1, -2)).float())


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_all_heads_cost_the_same(make: Any, block: int, sparsity: float) -> None:
    data = make(grid=(8, 16, 16), heads=4, dim=16, sharp=0.5, dtype=torch.float32)
    look_at_columns(data, 1)
    part = found(MMInference(sparsity, (0,), block), data)
    assert len(part.kind.unique()) > 1
    blocks = 2048 // block
    density = part.mask.head_density[0]
    assert ((density - (1 - sparsity)).abs() <= 0.5 / blocks + 1e-6).all()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_text_sees_and_is_seen_by_everything(make: Any, block: int, text: int, order: str) -> None:
    # 800 video tokens end inside a block of either size.
    data = make(grid=(4, 10, 20), text=text, order=order)
    keep = kept_pairs(data, found(MMInference(0.7, (0,), block), data))
    is_text = data.layout.coords()[:, 0] < 0
    assert int(is_text.sum()) == text
    assert keep[..., is_text, :].all()
    assert keep[..., is_text].all()
    assert not keep[..., ~is_text, :][..., ~is_text].all()


@pytest.mark.parametrize("grid", [(1, 5, 5), (1, 1, 1)])
def test_text_that_shares_the_only_block_with_video_leaves_it_dense(
    make: Any, grid: tuple[int, int, int]
) -> None:
    data, memory = make(grid=grid, text=5), {}
    method = MMInference(0.9, (0,))
    assert found(method, data, memory).mask.dense().all()
    assert (method.attend(data.call(1, memory)) - data.attention()).abs().max() < 1e-12


@pytest.mark.parametrize("grid", [(1, 12, 20), (3, 1, 70), (70, 1, 3), (2, 2, 50)])
def test_grids_of_one_row_or_frame(make: Any, grid: tuple[int, int, int]) -> None:
    data, memory = make(grid=grid, batch=2), {}
    method = MMInference(0.6, (0,))
    keep = kept_pairs(data, found(method, data, memory))
    assert keep.any(-1).all() and not keep.all()
    assert (method.attend(data.call(1, memory)) - data.attention(keep)).abs().max() < 1e-10


# --- modalities ------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("text", "order"), [(0, "video_text"), (9, "video_text")])
def test_exact_settings_are_dense_across_modalities(
    make: Any, boundary: str, text: int, order: str
) -> None:
    data, memory = make(grid=(4, 8, 16), text=text, order=order, batch=2), {}
    method = MMInference(0.0, (0,), modalities=REFERENCES, boundary=boundary)
    for index in range(3):
        out = method.attend(data.call(index, memory))
        assert (out - data.attention()).abs().max() < 1e-10
    assert len(memory["parts"]) == {"none": 1, "q": 2, "2d": 4}[boundary]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_pair_of_modalities_gets_its_budget(make: Any, boundary: str) -> None:
    data, memory = make(grid=(4, 16, 32), batch=2, dtype=torch.float32), {}
    modalities = (((0, 512), (1536, 2048)),)
    method = MMInference(0.75, (0,), modalities=modalities, boundary=boundary)
    method.attend(data.call(0, memory))
    for part in memory["parts"].values():
        lines = max(part.queries.blocks, part.keys.blocks)
        cells = part.queries.blocks * part.keys.blocks
        kept = part.mask.dense().sum((-1, -2))
        assert ((kept - 0.25 * cells).abs() <= lines / 2).all()
    call = data.call(1, memory)
    out = method.attend(call)
    assert out.isfinite().all()
    assert ((call.head_density - 0.25).abs() < 0.05).all()


def test_pairs_of_modalities_have_patterns_of_their_own(make: Any) -> None:
    # References look at their own row, the others at one column of the references.
    data, memory = make(grid=(4, 8, 16), heads=1, dim=16, sharp=0.05), {}
    coords = data.layout.coords()
    reference = (coords[:, 0] == 0) | (coords[:, 0] == 3)
    axes = torch.eye(16).double()
    data.k[0, :, 0] = axes[coords[:, 1]]
    data.k[0, :, 0, 8] = 1.0 * (coords[:, 2] == 5) * reference
    data.q[0, :, 0] = 40 * axes[coords[:, 1]]
    data.q[0, ~reference, 0] = 40 * axes[8]
    method = MMInference(0.6, (0,), modalities=REFERENCES, strides=("h", "w"))
    method.attend(data.call(0, memory))
    parts = memory["parts"]
    own, across = parts["2d", 0, 0], parts["2d", 0, 1]
    assert (own.kind.item(), own.order.item()) == (GRID, 1)
    assert (across.kind.item(), across.order.item(), across.phase.item()) == (GRID, 2, 5)
    out = method.attend(data.call(1, memory))
    assert (out - data.attention()).norm() / data.attention().norm() < 0.05


# --- tables ----------------------------------------------------------------------------------

PATTERNS = (
    Pattern("a-shape", density=0.5),
    Pattern("grid", "t", "hvs", 0.45),
    Pattern("vertical-slash", density=0.4),
)


def write_table(path: Path, method: MMInference, choices: Any, modalities: int = 1) -> str:
    rows = tuple(
        tuple(HeadPatterns(boundary, indices, 0.0) for boundary, indices in row) for row in choices
    )
    PatternTable(
        ModelIdentity("AModel"),
        len(rows),
        len(rows[0]),
        8,
        modalities,
        method.table_settings(),
        PATTERNS,
        rows,
        {},
    ).save(path)
    return str(path)


def test_heads_compute_what_their_table_says(make: Any, tmp_path: Path) -> None:
    data, memory = make(grid=(8, 16, 16), heads=3), {}
    choices = [[("none", (1,)), ("none", (2,)), ("none", (0,))]]
    path = write_table(tmp_path / "t.json", MMInference(0.5, (0,)), choices)
    method = MMInference(0.5, (0,), table=path)
    part = found(method, data, memory)
    assert [KINDS[k] for k in part.kind[0]] == ["grid", "vertical-slash", "a-shape"]
    assert part.order[0].tolist() == [1 + method.strides.index("t"), 0, 0]
    assert part.mask.head_density[0].tolist() == pytest.approx([0.45, 0.4, 0.5], abs=0.02)
    # Rows and columns of the frame that is looked at most, and the frames of all.
    keep, frame = kept_pairs(data, part)[0, 0], data.layout.coords()[:, 0]
    phase = int(part.phase[0, 0])
    assert keep[frame == phase].all() and keep[:, frame == phase].all()
    assert keep[frame[:, None] == frame].all()
    config = SparseConfig(method)
    assert SparseConfig.from_dict(config.to_dict()) == config


def test_heads_of_a_table_may_differ_in_boundary(make: Any, tmp_path: Path) -> None:
    data, memory = make(grid=(4, 8, 16), heads=4, text=9, batch=2), {}
    choices = [[("2d", (1, 2, 0, 1)), ("none", (2,)), ("q", (1, 0)), ("2d", (0, 0, 2, 1))]]
    base = MMInference(0.5, (0,), modalities=REFERENCES)
    path = write_table(tmp_path / "t.json", base, choices, modalities=2)
    method = MMInference(0.5, (0,), modalities=REFERENCES, table=path)
    method.attend(data.call(0, memory))
    parts = memory["parts"]
    # Query groups in order, and within each the key groups.
    names = {key: [KINDS[k] for k in part.kind[0]] for key, part in parts.items()}
    assert {key: part.heads.tolist() for key, part in parts.items() if key[1:] == (0, 0)} == {
        ("none", 0, 0): [1],
        ("q", 0, 0): [2],
        ("2d", 0, 0): [0, 3],
    }
    assert names["2d", 1, 0] == ["vertical-slash", "a-shape"]
    assert names["2d", 0, 1] == ["a-shape", "vertical-slash"]
    assert names["q", 0, 1] == ["a-shape"]
    assert len(parts) == 1 + 2 + 4
    call = data.call(1, memory)
    out = method.attend(call)
    times = torch.zeros(2, 4, 521, 521, dtype=torch.int64)
    for part in parts.values():
        orders = [
            head_order(side, part.order, None)[0].perm.long() for side in (part.queries, part.keys)
        ]
        blocks = part.mask.lists().tokens().long()
        for b in range(2):
            for n, h in enumerate(part.heads.tolist()):
                times[b, h, orders[0][b, n][:, None], orders[1][b, n]] += blocks[b, n]
    assert times.max() == 1
    assert (out - data.attention(times.bool())).abs().max() < 1e-10
    torch.testing.assert_close(call.head_density, times.double().mean((-1, -2)).float())


def test_tables_that_do_not_fit_are_refused(make: Any, tmp_path: Path) -> None:
    base = MMInference(0.5, (0,))
    path = write_table(tmp_path / "t.json", base, [[("none", (0,)), ("none", (1,))]])
    for wrong in ({"sparsity": 0.6}, {"block": 128}, {"tile": (4, 4, 4)}, {"strides": ("t",)}):
        with pytest.raises(ValueError, match="was searched with"):
            MMInference(**{"sparsity": 0.5, "table": path} | wrong)
    method = MMInference(0.5, (0,), table=path)
    method.attend(make().call(0))
    for data in (make(heads=3), make(dim=16)):
        with pytest.raises(ValueError, match="does not fit"):
            method.attend(data.call(0))
    two = MMInference(0.5, (0,), table=path, modalities=REFERENCES)
    with pytest.raises(ValueError, match="modalities"):
        two.attend(make().call(0))
    with pytest.raises(ValueError, match=r"absent\.json"):
        MMInference(table=str(tmp_path / "absent.json"))


# --- memory and settings ---------------------------------------------------------------------


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_matrix_of_all_pairs_is_ever_made(make: Any) -> None:
    data = make(grid=(8, 16, 32), text=70, heads=1, dtype=torch.float32)
    pairs, memory = data.layout.tokens**2, {}
    dense = data.attention()
    with LargestOutput() as largest:
        for index in range(3):
            call = data.call(index, memory)
            call.dense_attention = lambda with_lse: (dense, None)
            MMInference(0.8, (0, 3)).attend(call)
    assert 0 < largest.numel < pairs / 10


def test_what_is_kept_is_the_mask_and_a_few_numbers_a_head(make: Any) -> None:
    data = make(grid=(8, 16, 16), heads=2, dtype=torch.float32)
    part = found(MMInference(0.8, (0,)), data)
    assert part.mask.bits.numel() == 2 * 32 * packed_width(32)
    assert part.kind.numel() == part.order.numel() == part.phase.numel() == 2
    assert stored_bytes(part) < part.mask.nbytes() + 100
    # The orders themselves are shared by all layers.
    assert part.queries is part.keys is found(MMInference(0.8, (0,)), make(grid=(8, 16, 16))).keys


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0},
        {"sparsity": True},
        {"search": ()},
        {"block": 32},
        {"tile": (4, 4)},
        {"strides": ()},
        {"strides": "hw"},
        {"strides": ("z",)},
        {"lift": -0.1},
        {"lift": True},
        {"lift": "much"},
        {"samples": 0},
        {"modalities": ((0, 5),)},
        {"boundary": "3d"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name.rstrip("s")):
        MMInference(**wrong)
