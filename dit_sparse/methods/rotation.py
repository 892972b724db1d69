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
    blocks: slice | Tensor
    heads: slice | Tensor

    @property
    def index(self) -> tuple[slice | Tensor, ...]:
        """Where the part is in a tensor ``[batch, tokens, heads, dim]``."""
        return slice(None), slice(None) if self.rows is None else self.rows, self.heads

    def put_bits(self, bits: Tensor, value: Tensor) -> None:
        """Writes packed mask rows into ``bits`` ``[batch, heads, q_blocks, bytes]``."""
        bits[:, self.heads, self.blocks] = value


def part_of_turn(
    call: Call, unit: Unit, period: int, turn: int, block: int, turns: int = 1
) -> Part | None:
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
        turns: Turns that this call takes at once, the last of them ``turn``; with 0 nothing but
            turn 0 is refreshed.
    """
    everything = slice(None)
    whole = Part(call, None, everything, everything)
    if turn == 0:
        return whole
    if unit == "never" or turns == 0:
        return None
    if unit == "all":
        return whole if turn // period > (turn - turns) // period else None
    if turns > 1 and turns >= period:
        return whole
    last = (turn + call.layer) % period
    if unit == "heads":
        heads = call.heads.places(lambda number: (last - number) % period < turns)
        if isinstance(heads, slice) and heads == slice(0, 0):
            return None
        return Part(call.part(heads=heads), None, everything, heads)
    video = video_blocks(call.layout, block)
    blocks = _places(last, turns, period, video, call.q.device)
    if blocks is None:
        return None
    rows = _tokens_of(last, turns, period, video, block, call.q.shape[1], call.q.device)
    return Part(call.part(rows=rows), rows, blocks, everything)


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
def _places(
    last: int, turns: int, period: int, count: int, device: torch.device
) -> slice | Tensor | None:
    """Which of ``count`` places have their turn in ``turns`` turns that end with place ``last``.

    A slice where it is one turn, else positions, ascending; None if there are none.
    """
    if last < count and turns == 1:
        return slice(last, count, period)
    places = [n for n in range(count) if (last - n) % period < turns]
    return torch.tensor(places, device=device) if places else None


@lru_cache(maxsize=256)
def _tokens_of(
    last: int,
    turns: int,
    period: int,
    count: int,
    block: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """Positions of the tokens of the blocks at :func:`_places`, ascending."""
    blocks = torch.arange(count)
    blocks = blocks[(last - blocks) % period < turns]
    positions = (blocks[:, None] * block + torch.arange(block)).flatten()
    return positions[positions < tokens].to(device)
