"""What AdaSpa's search loses by looking at some of the query rows, on the embedded model.

``python -m benchmarks.search_recall [--size 128] [--block 64] [--in-order]``
observes dense generations in two steps: the first search, and a later one under the log-sum-exp of
the first. For each stride of rows it prints, over layers and captions,

* the recall: which share of the attention mass of that step the masks of a layer keep, as the exact
  mass of video blocks says;
* what is lost of the recall of the masks by all rows, in the mean and in the worst layer;
* the intersection of both masks over their union.

With ``--in-order`` the rows are every n-th in the order of tokens. Works on the CPU, where 8,192
tokens (``--size 256``) take minutes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.mask import block_sides
from dit_sparse.methods.adaspa import ROW_STRIDES, AdaSpa
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.pipelines.embedded import load_embedded
from dit_sparse.pipelines.observe import observe_step

CAPTIONS = (
    "a ghost spinning over a green wall, still camera",
    "a banana standing still over a sunset sky, still camera",
)


class Comparison:
    """Masks by some of the rows beside those by all, in all calls of some steps."""

    def __init__(self, method: AdaSpa, strides: tuple[int, ...]) -> None:
        self.method = method
        self.strides = strides
        self.cached: dict[int, Tensor] = {}
        # (search, stride) -> recall, recall by all rows, intersection over union; one call each
        self.found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def first(self, call: Call) -> None:
        """Looks at a call of the first search and keeps its log-sum-exp."""
        moved = call.ordered(call.tile_order(self.method.tile))
        self.cached[call.layer] = lse = moved.row_lse()
        self._compare("first", moved, lse, lse)

    def later(self, call: Call) -> None:
        """Looks at a call of a later search, under the log-sum-exp of the first."""
        moved = call.ordered(call.tile_order(self.method.tile))
        self._compare("later", moved, moved.row_lse(), self.cached[call.layer])

    def _compare(self, search: str, call: Call, lse: Tensor, used: Tensor) -> None:
        rows, columns = (video_blocks(call.layout, n) for n in block_sides(self.method.block))
        mass = call.block_mass(lse, self.method.block)[..., :rows, :columns]
        masks = [self._mask(call, used, n)[..., :rows, :columns] for n in self.strides]
        # All heads together, since what one is given at a search another one lacks.
        recalls = [(mass * mask).sum() / mass.sum() for mask in masks]
        for stride, mask, recall in zip(self.strides, masks, recalls, strict=True):
            both = (mask & masks[0]).sum() / (mask | masks[0]).sum()
            self.found[search, stride].append(torch.stack([recall, recalls[0], both]))

    def _mask(self, call: Call, lse: Tensor, stride: int) -> Tensor:
        looking = call.part()
        looking.memory = {}
        method = replace(self.method, row_stride=stride)
        rows = method._rows(looking, stride)
        method._search(looking, stride, lse if rows is None else lse.index_select(-1, rows))
        return looking.memory["mask"].dense()

    def lines(self) -> list[str]:
        """One line for every search and stride."""
        lines = []
        for (search, stride), parts in self.found.items():
            recall, full, both = torch.stack(parts, 1)
            lost = 1 - recall / full
            lines.append(
                f"{search} search, stride {stride}: recall {recall.mean():.4f}, lost "
                f"{lost.mean():.2%} (worst layer {lost.max():.2%}), masks {both.mean():.3f} alike"
            )
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--block", type=int, nargs="+", default=[64], help="or queries and keys")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--in-order", action="store_true", help="every n-th row, not spread")
    arguments = parser.parse_args()
    block = arguments.block[0] if len(arguments.block) == 1 else tuple(arguments.block)
    # The schedule's places of the first search and of the later one.
    method = AdaSpa(arguments.sparsity, block=block)
    comparison = Comparison(method, ROW_STRIDES)
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    if arguments.in_order:
        Call.spread_rows = lambda call, tile, n: torch.arange(0, call.layout.tokens, n)
    for caption in CAPTIONS:
        for share, observer in zip(
            method.search, (comparison.first, comparison.later), strict=True
        ):
            options = {
                "prompt": caption,
                "num_inference_steps": arguments.steps,
                "height": arguments.size,
                "width": arguments.size,
                "num_frames": arguments.frames,
                "guidance_scale": 1.0,
                "generator": torch.Generator().manual_seed(0),
            }
            with torch.no_grad():
                observe_step(pipe, max(0, int(share * arguments.steps) - 1), observer, options)
    print("\n".join(comparison.lines()))


if __name__ == "__main__":
    main()
