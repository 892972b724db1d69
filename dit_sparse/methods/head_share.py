"""The heads that one device has of a layer whose others are on other devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadShare:
    """Some heads of a layer.

    Attributes:
        own: Their numbers among all heads of the layer, in the order in which they are held.
        total: Heads of the layer.
        gather: Takes ``[batch, own heads, ...]`` from every device and gives all of them
            ``[batch, all heads, ...]``; every device must call it at the same point. None where
            only some of a device's heads are at hand.
    """

    own: tuple[int, ...]
    total: int
    gather: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def whole(cls, heads: int) -> HeadShare:
        """All heads of a layer on one device."""
        return cls(tuple(range(heads)), heads, lambda x: x)

    def part(self, heads: slice | Tensor) -> HeadShare:
        """Of these heads the ones at the places ``heads``."""
        places = torch.arange(len(self.own))[heads].tolist()
        return replace(self, own=tuple(self.own[place] for place in places), gather=None)

    def all_heads(self, x: Tensor) -> Tensor:
        """``[batch, all heads, ...]`` out of every device's ``[batch, own heads, ...]``."""
        if self.gather is None:
            raise RuntimeError("a part of the heads of a call cannot ask for all of them")
        return self.gather(x)

    def own_heads(self, x: Tensor) -> Tensor:
        """These heads of ``[batch | 1, all heads | 1, ...]``."""
        if x.shape[1] == 1 or len(self.own) == self.total:
            return x
        return x[:, list(self.own)]

    def places(self, numbers: Callable[[int], bool]) -> slice | Tensor:
        """Where the heads are whose number satisfies ``numbers``; a slice if evenly spaced."""
        found = [place for place, number in enumerate(self.own) if numbers(number)]
        step = found[1] - found[0] if len(found) > 1 else 1
        if not found:
            return slice(0, 0)
        if found == list(range(found[0], found[-1] + 1, step)):
            return slice(found[0], found[-1] + 1, step)
        return torch.tensor(found)
