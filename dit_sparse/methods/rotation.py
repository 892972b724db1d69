"""Refreshing a part of an attention call at each step, another part at the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.methods.base import Call, video_blocks

Unit = Literal["rows", "heads", "all", "never"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some queries of some heads.

    Attributes:
        call: The call of these queries alone, with all keys of their heads.
        rows: Positions of the queries, ascending, or None for all.
        blocks: Their query blocks.
        heads: Their heads.
    """

    call: Call
    rows: Tensor | None
    blocks: slice
    heads: slice | Tensor

    @property
    def index(self) -> tuple[slice | Tensor, ...]:
        """Where the part is in a tensor ``[batch, tokens, heads, dim]``."""
        return slice(None), slice(None) if self.rows is None else self.rows, self.heads

    def put_bits(self, bits: Tensor, value: Tensor) -> None:
        """Writes packed mask rows into ``bits`` ``[batch, heads, q_blocks, bytes]``."""
        bits[:, self.heads, self.blocks] = value


def part_of_turn(call: Call, unit: Unit, period: int, turn: int, block: int) -> Part | None:
    """What turn number ``turn`` refreshes, or None if nothing.

    Every ``period`` turns each video query block (``"rows"``) or each head (``"heads"``) has its
    turn once, or everything at once (``"all"``). Layers are shifted against each other. Turn 0
    refreshes everything.

    Args:
        call: The whole call, tokens ordered video first.
        unit: What is refreshed in turn.
        period: Turns until all had theirs.
        turn: 0-based.
        block: Tokens in a query block.
    """
    everything = slice(None)
    if turn == 0 or (unit == "all" and turn % period == 0):
        return Part(call, None, everything, everything)
    first = (turn + call.layer) % period
    if unit == "heads" and first < call.heads.total:
        heads = call.heads.places(lambda number: number % period == first)
        if heads == slice(0, 0):
            return None
        return Part(call.part(heads=heads), None, everything, heads)
    if unit == "rows" and first < video_blocks(call.layout, block):
        blocks = slice(first, video_blocks(call.layout, block), period)
        rows = _tokens_of(blocks.start, blocks.stop, period, block, call.q.shape[1], call.q.device)
        return Part(call.part(rows=rows), rows, blocks, everything)
    return None


def turns_since(call: Call, unit: Unit, period: int, turn: int, block: int) -> Tensor:
    """Turns since each query and head had its turn.

    Broadcasts over ``[batch, tokens, heads, dim]``; integer.

    Args:
        call: The whole call.
        unit: As for :func:`part_of_turn`.
        period: As for :func:`part_of_turn`.
        turn: As for :func:`part_of_turn`.
        block: As for :func:`part_of_turn`.
    """
    device = call.q.device
    if unit == "rows":
        place = (torch.arange(call.q.shape[1], device=device) // block)[:, None, None]
    elif unit == "heads":
        place = torch.tensor(call.heads.own, device=device)[:, None]
    else:
        return torch.tensor(turn % period if unit == "all" else turn, device=device)
    # Place p has its turn where (turn + layer - p) is a multiple of the period, and at turn 0.
    return ((turn + call.layer - place) % period).clamp(max=turn)


@lru_cache(maxsize=256)
def _tokens_of(
    start: int, stop: int, step: int, block: int, tokens: int, device: torch.device
) -> Tensor:
    """Positions of the tokens of the blocks ``range(start, stop, step)``, ascending."""
    blocks = torch.arange(start, stop, step)
    positions = (blocks[:, None] * block + torch.arange(block)).flatten()
    return positions[positions < tokens].to(device)
