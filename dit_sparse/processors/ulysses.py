"""Self-attention over a sequence that diffusers' context parallelism splits over devices.

Each device holds some tokens of all heads. Ulysses exchanges them, inside attention, for all tokens
of some heads, and exchanges the output back; a method then sees the whole sequence and can choose
blocks in all of it. diffusers splits the sequence and gathers the result, outside attention. The
exchange is ours because heads differ in cost here, so they are dealt out by cost.

Models that split text and video one by one, and join them on each device, bring the pieces of all
devices together in an order of their own: ``[text 0, video 0, text 1, video 1, ...]``. Dense
attention runs in that order, as upstream's does, and methods get the model's.

Source of the exchange: DeepSpeed-Ulysses, arXiv 2309.14509, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_sparse.layout import Ordering
from dit_sparse.methods.head_share import HeadShare

Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Ulysses:
    """The devices that share the sequence of one model.

    Attributes:
        group: Their process group.
        rank: Number of this one.
        size: How many there are.
    """

    group: Any
    rank: int
    size: int


def ulysses_of(model: Any) -> Ulysses | None:
    """The devices over which ``model`` splits its sequence, or None.

    Raises:
        NotImplementedError: If it uses ring attention.
    """
    parallel = getattr(model, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return None
    if (getattr(config, "ring_degree", 1) or 1) > 1:
        raise NotImplementedError(
            "sparse attention cannot run under ring attention: it shows each device one chunk of "
            "the keys at a time, so blocks cannot be selected over all of them; use ulysses_degree"
        )
    group = config._ulysses_mesh.get_group()
    return Ulysses(group, dist.get_rank(group), dist.get_world_size(group))


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """Which tokens each device holds.

    Attributes:
        streams: Lengths of the parts of the sequence that are split one by one, in order.
        size: Number of devices.
    """

    streams: tuple[int, ...]
    size: int

    def pieces(self, stream: int) -> list[int]:
        """Tokens of one stream on each device: as even as they can be, the first ones longer."""
        return even_parts(self.streams[stream], self.size)

    @property
    def tokens(self) -> list[int]:
        """Tokens on each device."""
        pieces = [self.pieces(stream) for stream in range(len(self.streams))]
        return [sum(sizes) for sizes in zip(*pieces, strict=True)]


def even_parts(count: int, size: int) -> list[int]:
    """``count`` in ``size`` parts that differ by one at most, the larger ones first."""
    return [count // size + (part < count % size) for part in range(size)]


@lru_cache(maxsize=64)
def model_order(split: TokenSplit, device: torch.device) -> Ordering | None:
    """From the tokens of all devices, one device after the other, to the model's order."""
    if len([length for length in split.streams if length]) < 2:
        return None
    starts = [sum(split.streams[:stream]) for stream in range(len(split.streams))]
    places: list[Tensor] = []
    for rank in range(split.size):
        for stream, start in enumerate(starts):
            pieces = split.pieces(stream)
            first = start + sum(pieces[:rank])
            places.append(torch.arange(first, first + pieces[rank]))
    return Ordering.from_perm(torch.argsort(torch.cat(places))).to(device)


@lru_cache(maxsize=1024)
def head_order(heads: Heads, device: torch.device) -> Ordering | None:
    """From the model's order of heads to that of the devices; None if they are the same."""
    dealt = [head for device_heads in heads for head in device_heads]
    if dealt == sorted(dealt):
        return None
    return Ordering.from_perm(torch.tensor(dealt)).to(device)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Tokens for heads and back, in one layer. Every device must make the same calls.

    Attributes:
        devices: Who takes part.
        split: Which tokens each holds.
        heads: Which heads each gets.
    """

    devices: Ulysses
    split: TokenSplit
    heads: Heads

    @property
    def own_heads(self) -> tuple[int, ...]:
        """Numbers of the heads that this device gets."""
        return self.heads[self.devices.rank]

    def share(self) -> HeadShare:
        """What a method is told of the heads that it gets."""
        heads = sum(len(heads) for heads in self.heads)
        return HeadShare(self.own_heads, heads, self.all_heads)

    def to_heads(self, x: Tensor) -> Tensor:
        """``[batch, own tokens, heads, dim]`` to ``[batch, tokens, own heads, dim]``."""
        batch, _, _, dim = x.shape
        order = head_order(self.heads, x.device)
        x = x if order is None else order.apply(x, 2)
        blocks = x.split([len(heads) for heads in self.heads], 2)
        own = len(self.own_heads)
        shapes = [(batch, tokens, own, dim) for tokens in self.split.tokens]
        return torch.cat(self._swap(blocks, shapes), 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[batch, tokens, own heads, dim]`` to ``[batch, own tokens, heads, dim]``."""
        batch, _, _, dim = x.shape
        blocks = x.split(self.split.tokens, 1)
        own = self.split.tokens[self.devices.rank]
        shapes = [(batch, own, len(heads), dim) for heads in self.heads]
        out = torch.cat(self._swap(blocks, shapes), 2)
        order = head_order(self.heads, x.device)
        return out if order is None else order.undo(out, 2)

    def all_heads(self, x: Tensor) -> Tensor:
        """``[batch, own heads, ...]`` of every device to ``[batch, heads, ...]``."""
        shapes = [(x.shape[0], len(heads), *x.shape[2:]) for heads in self.heads]
        gathered = torch.cat(self._swap([x] * self.devices.size, shapes), 1)
        order = head_order(self.heads, x.device)
        return gathered if order is None else order.undo(gathered, 1)

    def all_tokens(self, mask: Tensor) -> Tensor:
        """A mask over all tokens, as they come together.

        Args:
            mask: Its last dimension is this device's tokens, or all tokens in the model's order.
        """
        tokens = self.split.tokens
        if mask.shape[-1] == sum(tokens):
            order = model_order(self.split, mask.device)
            return mask if order is None else order.undo(mask, -1)
        if mask.shape[-1] != tokens[self.devices.rank]:
            raise RuntimeError(
                f"expected a mask over {tokens[self.devices.rank]} tokens of this device or over "
                f"all {sum(tokens)}, got {tuple(mask.shape)}"
            )
        shapes = [(*mask.shape[:-1], count) for count in tokens]
        # Not every backend sends truth values.
        sent = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        gathered = torch.cat(self._swap([sent] * self.devices.size, shapes), -1)
        return gathered.view(mask.dtype)

    def _swap(self, blocks: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Sends one block to each device; what comes from each has one of ``shapes``."""
        send = torch.cat([block.reshape(-1) for block in blocks])
        sizes = [math.prod(shape) for shape in shapes]
        received = send.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, send, sizes, [block.numel() for block in blocks], group=self.devices.group
        )
        parts = zip(received.split(sizes), shapes, strict=True)
        return [part.view(shape) for part, shape in parts]
