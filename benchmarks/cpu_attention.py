"""Block-sparse against dense attention on the CPU, over densities.

``python -m benchmarks.cpu_attention --output benchmarks/results/cpu-attention.json``
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import ops
from dit_sparse.mask import BlockMask, block_count

DENSITIES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def random_mask(
    density: float, rows: str, heads: int, tokens: int, block: int, rng: torch.Generator
) -> BlockMask:
    """A random mask per head whose rows keep equally many blocks, or from 0 to twice as many."""
    blocks = block_count(tokens, block)
    draw = torch.rand(1, heads, blocks, blocks, generator=rng)
    if rows == "equal":
        keep = draw.argsort(-1).argsort(-1) < round(density * blocks)
    else:
        keep = draw < torch.rand(1, heads, blocks, 1, generator=rng) * 2 * density
    return BlockMask.from_dense(keep, block, tokens)


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> float:
    """Largest difference to SDPA under the same mask on the last query block of each head."""
    got = ops.attention(q, k, v, mask, impl="cpu").out
    start = (mask.shape[2] - 1) * mask.block[0]
    keep = mask.dense()[:, :, -1:].repeat_interleave(mask.block[1], -1)[..., : mask.seq[1]]
    exact = F.scaled_dot_product_attention(
        q[:, start:].transpose(1, 2).double(),
        k.transpose(1, 2).double(),
        v.transpose(1, 2).double(),
        keep,
    ).transpose(1, 2)
    # SDPA leaves rows without keys undefined; here they are 0.
    exact = exact.masked_fill(~keep.any(-1).transpose(1, 2)[..., None], 0.0)
    return float((got[:, start:] - exact).abs().max())


def interleaved(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm, one after the other in every round; the first round is dropped."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, args.tokens, args.heads, args.dim, generator=rng) for _ in range(3))
    results = []
    print(f"{'rows':>8} {'density':>8} {'sdpa ms':>9} {'sparse ms':>10} {'speed-up':>9}")
    for rows in ("equal", "unequal"):
        for density in DENSITIES:
            if rows == "unequal" and density > 0.5:
                continue  # twice the mean would exceed 1
            mask = random_mask(density, rows, args.heads, args.tokens, args.block, rng)
            error = check(q, k, v, mask)
            # fp32 rounding of outputs of order 1 is near 1e-6; a wrong block shows as 1e-2.
            if not error < 1e-4:
                raise SystemExit(f"wrong result at density {density} ({rows}): error {error}")
            times = interleaved(
                {
                    "sdpa": lambda: F.scaled_dot_product_attention(
                        *(x.transpose(1, 2) for x in (q, k, v))
                    ),
                    "sparse": lambda mask=mask: ops.attention(q, k, v, mask, impl="cpu"),
                },
                args.repeats,
            )
            sdpa, sparse = (statistics.median(times[name]) for name in ("sdpa", "sparse"))
            results.append(
                {
                    "rows": rows,
                    "density": mask.density(),
                    "sdpa_s": sdpa,
                    "sparse_s": sparse,
                    "speedup": sdpa / sparse,
                    "sdpa_range_s": [min(times["sdpa"]), max(times["sdpa"])],
                    "sparse_range_s": [min(times["sparse"]), max(times["sparse"])],
                    "max_error": error,
                }
            )
            print(
                f"{rows:>8} {mask.density():8.3f} {1e3 * sdpa:9.1f} {1e3 * sparse:10.1f} "
                f"{sdpa / sparse:8.2f}x"
            )
    report = {
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "threads": args.threads,
        "dtype": "float32",
        "tokens": args.tokens,
        "heads": args.heads,
        "dim": args.dim,
        "block": args.block,
        "repeats": args.repeats,
        "results": results,
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
