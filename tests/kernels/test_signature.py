"""Signatures tell apart what validation, the choice of a kernel and its launch tell apart."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_sparse.kernels import ops, signature
from dit_sparse.kernels.ops import AttentionCall
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import BlockMask, PackedMask


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls on CPU tensors are remembered, as those on CUDA are."""
    monkeypatch.setattr(ops, "has_signature", lambda x: True)
    signature.forget()
    yield
    signature.forget()


def operands(tokens: int = 200, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(1, tokens, 2, 16, dtype=dtype) for _ in range(3)]


def test_tensors() -> None:
    room = torch.zeros(4096)
    x = room[(-room.data_ptr() // 4) % 4 :][:1024]
    others = [x[:512], x.half(), x[1:513], x[::2], x.view(2, 512), x.to("meta"), None]
    found = [signature.of_tensor(y) for y in (x, *others)]
    assert len(set(found)) == len(found)
    assert signature.of_tensor(x[4:516]) == signature.of_tensor(x[:512])


def test_masks_and_summaries() -> None:
    keep = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    lists = BlockMask.from_dense(keep, 64, 256)
    packed = lists.pack()
    masks = [
        None, lists, packed, PackedMask.from_dense(keep, 64, 256, 3),
        PackedMask.from_dense(keep[:, :1], 64, 256), PackedMask.from_dense(keep, 64, 255),
        PackedMask.from_dense(torch.ones(1, 2, 2, 4, dtype=torch.bool), (128, 64), 256),
    ]  # fmt: skip
    found = [signature.of_mask(mask) for mask in masks]
    assert len(set(found)) == len(found)
    assert signature.of_mask(packed) == signature.of_mask(PackedMask.from_dense(~keep, 64, 256))
    mean, count, slope = torch.zeros(1, 4, 2, 16), torch.zeros(1, 4), torch.zeros(1, 2, 16, 16)
    summaries = [
        None, BlockSummary(mean, mean, count), BlockSummary(mean, mean, count, slope),
        BlockSummary(mean, mean, count, slope, slope.half()),
        BlockSummary(mean.half(), mean, count), BlockSummary(mean, mean, count.double()),
    ]  # fmt: skip
    found = [signature.of_summary(summary) for summary in summaries]
    assert len(set(found)) == len(found)


def test_what_is_wrong_is_refused_beside_what_is_known() -> None:
    q, k, v = operands()
    keep = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    mask = PackedMask.from_dense(keep, 64, 200)
    valid = torch.ones(1, 200, dtype=torch.bool)
    for _ in range(2):
        known = ops.attention(q, k, v, mask, key_valid=valid)
    assert torch.equal(known.out, ops.attention(q, k, v, mask, key_valid=valid).out)
    for wrong in (
        {"k": k[:, :100]}, {"v": v.double()}, {"mask": PackedMask.from_dense(keep, 64, 256)},
        {"key_valid": valid[:, :100]}, {"key_valid": valid.byte()}, {"impl": "nobody"},
    ):  # fmt: skip
        given = {"q": q, "k": k, "v": v, "mask": mask, "key_valid": valid} | wrong
        with pytest.raises(ValueError):
            ops.attention(**given)


def test_a_named_implementation_is_not_that_of_auto() -> None:
    q, k, v = operands()
    names: list[str] = []
    for impl in ("auto", "reference", "auto", "reference"):
        ops.attention(q, k, v, impl=impl, on_choice=names.append)
    assert names == ["cpu", "reference", "cpu", "reference"]


def test_validation_and_choice_happen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands()
    count = torch.ones(1, 1, dtype=torch.int64)
    mass = torch.rand(1, 2, 4, 4)

    def every() -> None:
        ops.attention(q, k, v)
        lse = ops.row_lse(q, k)
        ops.block_mass(q, k, lse, 64)
        ops.summarize(k, v, 64)
        ops.top_blocks(mass, count, 64, 200)
        ops.reorder(torch.arange(200), q)

    every()
    with monkeypatch.context() as patch:
        for name in ("select", "_check_operands"):
            patch.setattr(ops, name, lambda *a, name=name: pytest.fail(name))
        every()
    # Other numbers of the call itself are not those of its signature.
    assert ops.top_blocks(mass, count, 64, 200, longest=2).mask.longest == 2
    assert ops.top_blocks(mass, count, 64, 200, longest=3).mask.longest == 3


def test_nothing_is_kept_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands()
    call = AttentionCall(q, k, v, None, None, 1.0)
    call.remember({})
    answers = itertools.count()
    with monkeypatch.context() as patch:
        for module in (ops, signature):
            patch.setattr(module, "is_recording", lambda: True)
        ops.attention(q, k, v)
        assert not signature._settled
        assert [call.keep("answer", lambda _: next(answers)) for _ in range(2)] == [0, 1]
    assert [call.keep("answer", lambda _: next(answers)) for _ in range(2)] == [2, 2]
    assert replace(call, scale=2.0).kept is None


def test_signatures_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "_MOST", 3)
    for tokens in range(1, 20):
        ops.summarize(*operands(tokens)[:2], 64)
    assert 0 < len(signature._settled) <= 3
