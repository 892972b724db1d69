"""The command `dit-sparse gna-plan`: windows for a grid, and what they cost, without a model."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_sparse.cli_options import failure, terminal

if TYPE_CHECKING:
    from dit_sparse.methods.gna_plan import Plan
    from dit_sparse.neighborhood import Neighborhood, Triple

HELP = """Propose GNA windows for a grid of tokens, or simulate given ones.

\b
GRID is the tokens along frames, height and width, 33x45x80, or of an image,
64x64. In CogVideoX, HunyuanVideo and Wan 2.1 a clip has
(frames - 1) / 4 + 1 by height / 16 by width / 16 tokens.

\b
Without --window: windows and strides of about --density that fill whole
blocks, best first.
With --window: those windows.
With --q-tile and --kv-tile: those windows under the padded tiles of NATTEN,
counted as the paper's simulator does.

\b
window, stride  tokens, and queries that share a window, along each axis
tile            token order: tokens that stand together
density         kept pairs over all pairs, text included
computed        share of block pairs computed; never less than the density
blocks          full: no pair is tested (perfectly block-sparse); or the
                share of the computed blocks that test their pairs
speed-up        1 / computed, the upper bound for attention itself
end to end      that of a generation, by --attention-share and --warmup
"""


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command("gna-plan", help=HELP)(gna_plan)


def gna_plan(
    grid: Annotated[str, typer.Argument(help="Tokens, FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH.")],
    density: Annotated[float, typer.Option(help="Of the windows to propose, in (0, 1).")] = 0.3,
    window: Annotated[
        str | None, typer.Option(help="Tokens of a window, e.g. 18x24x24; -1 is a whole axis.")
    ] = None,
    stride: Annotated[str, typer.Option(help="Queries that share a window.")] = "1",
    dilation: Annotated[str, typer.Option(help="Distance of neighbouring keys.")] = "1",
    causal: Annotated[str, typer.Option(help="Causal axes, letters out of thw.")] = "",
    tile: Annotated[
        str | None, typer.Option(help="Token order; default: the one that costs least.")
    ] = None,
    block: Annotated[int, typer.Option(help="Tokens in a block, 64 or 128.")] = 128,
    text: Annotated[int, typer.Option(min=0, help="Text tokens beside the video.")] = 0,
    q_tile: Annotated[str | None, typer.Option(help="Query tile of the simulator.")] = None,
    kv_tile: Annotated[str | None, typer.Option(help="Key tile of the simulator.")] = None,
    attention_share: Annotated[
        float, typer.Option(min=0, max=1, help="Self-attention's share of a dense generation.")
    ] = 1.0,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of dense steps.")] = 0.0,
    count: Annotated[int, typer.Option(min=1, help="Proposals to show.")] = 6,
    json_: Annotated[
        bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")
    ] = False,
) -> None:
    """See `HELP`."""
    try:
        size = _grid(grid)
        if (q_tile is None) != (kv_tile is None):
            raise ValueError("--q-tile and --kv-tile go together")
        if window is None and (q_tile or stride != "1" or dilation != "1" or causal or tile):
            raise ValueError(
                "strides, dilation, causal axes and tiles go with --window; without it they are "
                "proposed"
            )
        if block not in (64, 128):
            raise ValueError(f"--block must be 64 or 128, got {block}")
        share = attention_share * (1 - warmup)
        if window is None:
            rows = [
                _measured(plan, text, share) for plan in _proposals(size, density, block, count)
            ]
        else:
            found = _neighborhood(size, window, stride, dilation, causal)
            if q_tile and kv_tile:
                tiles = _axes("--q-tile", q_tile, size), _axes("--kv-tile", kv_tile, size)
                rows = [_simulated(found, *tiles, share)]
            else:
                rows = [_measured(_given(found, tile, block), text, share)]
    except ValueError as error:
        raise failure(error) from error
    if json_:
        sys.stdout.write(json.dumps({"grid": size, "text": text, "plans": rows}, indent=2) + "\n")
        return
    console = terminal()
    console.print(_table(size, rows))


def _axes(name: str, value: str, grid: Triple) -> Triple:
    """Three ints from ``AxBxC``, ``AxB`` (an image) or ``A`` (all axes that have tokens)."""
    if not re.fullmatch(r"-?\d+(x-?\d+){0,2}", value):
        raise ValueError(f"{name} must be numbers joined by x, such as 18x24x24, got {value!r}")
    numbers = [int(number) for number in value.split("x")]
    if len(numbers) == 1:
        frames, height, width = (
            n if length > 1 else 1 for n, length in zip(numbers * 3, grid, strict=True)
        )
        return frames, height, width
    frames, height, width = ([1] if len(numbers) == 2 else []) + numbers
    return frames, height, width


def _grid(value: str) -> Triple:
    if "x" not in value:
        raise ValueError(
            f"GRID must be FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH in tokens, got {value!r}"
        )
    size = _axes("GRID", value, (1, 1, 1))
    if min(size) < 1:
        raise ValueError(f"GRID must hold at least one token along every axis, got {value!r}")
    return size


def _neighborhood(
    grid: Triple, window: str, stride: str, dilation: str, causal: str
) -> Neighborhood:
    from dit_sparse.neighborhood import Neighborhood

    if not set(causal) <= set("thw"):
        raise ValueError(f"--causal must be letters out of thw, got {causal!r}")
    return Neighborhood.on(
        grid,
        _axes("--window", window, grid),
        _axes("--stride", stride, grid),
        _axes("--dilation", dilation, grid),
        tuple(letter in causal for letter in "thw"),
    )


def _proposals(grid: Triple, density: float, block: int, count: int) -> list[Plan]:
    """The best plans, without those whose windows are all within a fifth of a better plan's."""
    from dit_sparse.methods.gna_plan import propose

    chosen: list[Plan] = []
    for plan in propose(grid, density, block):
        sizes = plan.neighborhood.window
        if not any(_alike(sizes, other.neighborhood.window) for other in chosen):
            chosen.append(plan)
        if len(chosen) == count:
            break
    return chosen


def _alike(a: Triple, b: Triple) -> bool:
    return all(max(x, y) <= 1.2 * min(x, y) for x, y in zip(a, b, strict=True))


def _given(neighborhood: Neighborhood, tile: str | None, block: int) -> Plan:
    from dit_sparse.methods.gna_plan import Plan, best_tile, visited_share

    chosen = (
        best_tile(neighborhood, block) if tile is None else _axes("--tile", tile, neighborhood.grid)
    )
    if min(chosen) < 1:
        raise ValueError(f"--tile must be at least 1 along every axis, got {tile!r}")
    return Plan(neighborhood, chosen, block, visited_share(neighborhood, chosen, block))


def _measured(plan: Plan, text: int, share: float) -> dict[str, Any]:
    """What attention computes under ``plan``: the mask is built and counted."""
    import torch

    from dit_sparse.layout import TokenLayout
    from dit_sparse.neighborhood_mask import arrange

    layout = TokenLayout(plan.neighborhood.grid, text)
    mask = arrange(layout, plan.neighborhood, plan.tile, plan.block, torch.device("cpu")).mask
    computed = mask.visited.density()
    partial = 0.0 if mask.partial is None else mask.partial.density() / computed
    return {
        **_windows(plan.neighborhood),
        "tile": plan.tile,
        "block": plan.block,
        "density": float(mask.head_density),
        "computed": computed,
        "partial": partial,
        "block_sparse": mask.partial is None,
        **_speedups(1 / computed, share),
    }


def _simulated(
    neighborhood: Neighborhood, q_tile: Triple, kv_tile: Triple, share: float
) -> dict[str, Any]:
    from dit_sparse.neighborhood import simulate

    if min(*q_tile, *kv_tile) < 1:
        raise ValueError("tiles must be at least 1 along every axis")
    found = simulate(neighborhood, q_tile, kv_tile)
    return {
        **_windows(neighborhood),
        "q_tile": q_tile,
        "kv_tile": kv_tile,
        "density": neighborhood.density(),
        "computed": found.most / found.total,
        "block_sparse": found.block_sparse,
        "mean_speedup": found.mean_speedup,
        "unpadded_speedup": found.mean_speedup * found.padding,
        **_speedups(found.speedup, share),
    }


def _windows(neighborhood: Neighborhood) -> dict[str, Any]:
    return {
        "window": neighborhood.window,
        "stride": neighborhood.stride,
        "dilation": neighborhood.dilation,
        "causal": neighborhood.causal,
    }


def _speedups(speedup: float, share: float) -> dict[str, float]:
    from dit_sparse.neighborhood import end_to_end

    return {"speedup": speedup, "end_to_end": end_to_end(speedup, share)}


def _table(grid: Triple, rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    simulated = "q_tile" in rows[0]
    table = Table(
        title=f"GNA on {_joined(grid)} tokens ({math.prod(grid):,})",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    extra = [name for name in ("dilation", "causal") if any(_special(row, name) for row in rows)]
    tiles = ["q_tile", "kv_tile"] if simulated else ["tile"]
    more = ["mean speed-up", "against unpadded"] if simulated else []
    titles = ["window", "stride", *extra, *tiles, "density", "computed", "blocks", "speed-up"]
    for title in [*titles, *more, "end to end"]:
        table.add_column(title.replace("_", " "), justify="right")
    for row in rows:
        cells = [_joined(row["window"]), _joined(row["stride"])]
        cells += [_joined(row[name]) for name in extra + tiles]
        cells += [f"{row['density']:.3f}", f"{row['computed']:.3f}", _blocks(row)]
        cells += [f"{row['speedup']:.2f}x"]
        if simulated:
            cells += [f"{row['mean_speedup']:.2f}x", f"{row['unpadded_speedup']:.2f}x"]
        table.add_row(*cells, f"{row['end_to_end']:.2f}x")
    return table


def _special(row: dict[str, Any], name: str) -> bool:
    return any(value not in (1, False) for value in row[name])


def _blocks(row: dict[str, Any]) -> str:
    if row["block_sparse"]:
        return "full"
    return f"{row['partial']:.0%} partial" if "partial" in row else "partial"


def _joined(values: Any) -> str:
    return "x".join(("yes" if v else "no") if isinstance(v, bool) else str(v) for v in values)
