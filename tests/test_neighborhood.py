"""Windows against the definition written down independently, and the simulator."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.neighborhood import Neighborhood, axis_windows, end_to_end, simulate


def sees(i: int, j: int, n: int, w: int, s: int, g: int, causal: bool) -> bool:
    """The definition: does query i see key j along an axis of n tokens?"""
    members = [x for x in range(n) if x % g == i % g]
    if j not in members:
        return False
    a, b = members.index(i), members.index(j)
    group = [x for x in range(len(members)) if x // s == a // s]
    if causal:
        # The window of the last query of the group (of those there are), cut at the query.
        return max(group) - w < b <= a
    leader = min(a // s * s + s // 2, len(members) - 1)
    # Of all windows inside the axis, the one nearest to where the leader wants it: half of the
    # others on each side, the odd one on the left.
    ideal = leader - w // 2
    start = min(range(len(members) - w + 1), key=lambda first: abs(first - ideal))
    return start <= b < start + w


def seen(windows: Any, i: int, j: int) -> bool:
    return windows[i].low <= windows[j].place < windows[i].high


@st.composite
def axis(draw: Any, longest: int = 24) -> tuple[int, int, int, int, bool]:
    n = draw(st.integers(1, longest))
    g = draw(st.integers(1, min(n, 4)))
    w = draw(st.integers(1, n // g))
    return n, w, draw(st.integers(1, w)), g, draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(axis())
def test_windows_follow_the_definition(parameters: tuple[int, int, int, int, bool]) -> None:
    n = parameters[0]
    windows = axis_windows(*parameters)
    assert sorted(w.place for w in windows) == list(range(n))
    for i, j in itertools.product(range(n), repeat=2):
        assert seen(windows, i, j) == sees(i, j, *parameters), (i, j)


def test_all_small_axes_without_dilation() -> None:
    for n in range(1, 9):
        for w in range(1, n + 1):
            for s in range(1, w + 1):
                for causal in (False, True):
                    windows = axis_windows(n, w, s, 1, causal)
                    for i, j in itertools.product(range(n), repeat=2):
                        assert seen(windows, i, j) == sees(i, j, n, w, s, 1, causal)


@settings(max_examples=200, deadline=None)
@given(axis())
def test_properties(parameters: tuple[int, int, int, int, bool]) -> None:
    n, w, s, g, causal = parameters
    windows = axis_windows(*parameters)
    for window in windows:
        assert window.low <= window.place < window.high  # sees itself
        size = window.high - window.low
        assert size <= w if causal else size == w
        if causal:
            assert window.high == window.place + 1
    for residue in range(g):
        members = windows[residue::g]
        for group in range(0, len(members), s):
            assert len({m.low for m in members[group : group + s]}) == 1
    if w == n and not causal:
        assert all((x.low, x.high) == (0, n) for x in windows)


@pytest.mark.parametrize(("n", "w"), [(12, 3), (20, 5), (16, 4), (15, 15)])
def test_a_stride_of_the_window_makes_separate_blocks(n: int, w: int) -> None:
    windows = axis_windows(n, w, w)
    assert [(x.low, x.high) for x in windows] == [(i // w * w, i // w * w + w) for i in range(n)]


def test_symmetry_away_from_borders() -> None:
    n = 20
    inner = range(5, 15)
    odd, even = axis_windows(n, 5), axis_windows(n, 4)
    assert all(seen(odd, i, j) == seen(odd, j, i) for i in inner for j in inner)
    # One key more on the left.
    assert (even[10].low, even[10].high) == (8, 12)
    assert seen(even, 10, 8) and not seen(even, 8, 10)


@pytest.mark.parametrize(
    ("stride", "leaders"), [(1, (0, 1, 2, 3)), (2, (1, 1, 3, 3)), (3, (1, 1, 1, 4)), (4, (2,) * 4)]
)
def test_leader_of_a_group(stride: int, leaders: tuple[int, ...]) -> None:
    windows = axis_windows(40, 9, stride)
    first = 24  # a multiple of every stride, far from the borders
    assert [windows[first + i].low + 4 for i in range(4)] == [first + leader for leader in leaders]


def test_the_last_partial_group_is_led_by_the_last_query() -> None:
    # Queries 8 and 9 would be led by 10, which does not exist.
    assert axis_windows(10, 6, 4)[9][1:] == (4, 10)
    assert axis_windows(10, 5, 4, 1, True)[9][1:] == (5, 10)
    assert axis_windows(10, 5, 4, 1, True)[8][1:] == (5, 9)


def test_one_value_or_one_an_axis() -> None:
    a = Neighborhood.on((9, 10, 11), 3, 2, 2, True)
    assert a == Neighborhood.on((9, 10, 11), (3, 3, 3), [2, 2, 2], (2, 2, 2), (True,) * 3)
    full = Neighborhood.on((4, 6, 9), -1, dilation=(1, 2, 3))
    assert full.window == (4, 3, 3)
    assert not any(Neighborhood.on((4, 6, 9)).restricts(axis) for axis in range(3))
    assert [full.restricts(axis) for axis in range(3)] == [False, True, True]
    assert Neighborhood.on((1, 6, 6), (1, -1, 2)).restricts(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 7}, r"window along frames must be in 1\.\.4"),
        ({"window": (2, 4, 3), "dilation": (1, 2, 1)}, r"along height must be in 1\.\.3"),
        ({"window": 0}, "got 0"),
        ({"window": 2, "stride": (1, 3, 1)}, "stride along height must be at most the window, 2"),
        ({"window": 2, "stride": 0}, "at least 1, got 0"),
        ({"window": 2, "dilation": 0}, "at least 1"),
        ({"window": (2, 2)}, r"window must be one int, or three .*\(2, 2\)"),
        ({"window": (2.0, 2, 2)}, "window must be one int"),
        ({"causal": 1}, "causal must be one bool"),
        ({"causal": (True, 1, False)}, "causal must be one bool"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Neighborhood.on((4, 6, 9), **arguments)


@settings(max_examples=100, deadline=None)
@given(st.tuples(axis(9), axis(7), axis(7)))
def test_density_is_the_share_of_pairs(axes: Any) -> None:
    grid, window, stride, dilation, causal = zip(*axes, strict=True)
    neighborhood = Neighborhood.on(grid, window, stride, dilation, causal)
    kept = [sum(sees(i, j, *a) for i, j in itertools.product(range(a[0]), repeat=2)) for a in axes]
    assert neighborhood.density() == pytest.approx(math.prod(kept) / math.prod(grid) ** 2)
    if not any(causal):
        # Every query sees exactly its window, whatever the dilation.
        assert neighborhood.density() == pytest.approx(math.prod(window) / math.prod(grid))


# --- the simulator -------------------------------------------------------------------------------

HUNYUAN, COSMOS, FLUX = (30, 48, 80), (16, 44, 80), (1, 256, 256)
WIDE = ((4, 8, 8), (2, 8, 8))
TALL = ((2, 16, 8), (2, 8, 8))
IMAGE = ((1, 16, 16), (1, 16, 8))
LONG = ((8, 4, 8), (4, 4, 8))
# Speed-ups of whole generations: by this count, and as the paper prints them.
# The share is self-attention's.
PUBLISHED = [
    (HUNYUAN, (18, 24, 24), stride, WIDE, 0.607, *values)
    for stride, values in {
        (1, 1, 1): (1.73, 1.73), (2, 1, 1): (1.78, 1.78), (1, 1, 8): (1.98, 1.99),
        (2, 1, 8): (2.02, 2.02), (1, 8, 8): (2.18, 2.17), (2, 8, 8): (2.20, 2.20),
        (16, 8, 8): (2.23, 2.23), (18, 24, 24): (2.07, 2.06),
    }.items()
] + [
    (HUNYUAN, (30, 40, 40), stride, TALL, 0.607, *values)
    for stride, values in {
        (1, 1, 1): (1.22, 1.21), (1, 1, 8): (1.44, 1.44), (1, 32, 8): (1.55, 1.55),
        (30, 40, 40): (1.44, 1.44),
    }.items()
] + [
    (FLUX, (1, 80, 80), stride, IMAGE, 0.518, value, value)
    for stride, value in {(1, 1, 1): 1.76, (1, 16, 1): 1.84, (1, 16, 16): 1.88}.items()
] + [
    (COSMOS, window, stride, LONG, 0.587, *values)
    for window, row in {
        (16, 24, 16): ((1.90, 1.90), (1.96, 1.96), (2.05, 2.05), (2.10, 2.10)),
        (16, 32, 48): ((1.33, 1.35), (1.40, 1.42), (1.43, 1.42), (1.49, 1.50)),
    }.items()
    for stride, values in zip(((1, 1, 1), (1, 8, 1), (1, 1, 16), (1, 8, 16)), row, strict=True)
]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tiles", "share", "expected", "printed"), PUBLISHED
)
def test_simulator_reproduces_the_published_bounds(
    grid: Any, window: Any, stride: Any, tiles: Any, share: float, expected: float, printed: float
) -> None:
    found = simulate(Neighborhood.on(grid, window, stride), *tiles)
    assert round(end_to_end(found.speedup, share), 2) == expected
    assert abs(expected - printed) < 0.021


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tiles", "share", "dense", "steps", "expected"),
    [
        (HUNYUAN, (18, 24, 24), (16, 8, 8), WIDE, 0.607, 15, 50, 1.63),
        (FLUX, (1, 80, 80), (1, 16, 16), IMAGE, 0.518, 9, 28, 1.46),
        (COSMOS, (16, 24, 16), (1, 8, 16), LONG, 0.587, 12, 35, 1.52),
    ],
)
def test_dense_steps_leave_less_to_speed_up(
    grid: Any, window: Any, stride: Any, tiles: Any, share: float, dense: int, steps: int,
    expected: float,
) -> None:  # fmt: skip
    found = simulate(Neighborhood.on(grid, window, stride), *tiles)
    assert round(end_to_end(found.speedup, share * (1 - dense / steps)), 2) == expected


def test_full_windows_visit_everything_and_padding_costs() -> None:
    found = simulate(Neighborhood.on((33, 45, 80)), (4, 4, 8), (4, 4, 8))
    assert found.most == found.total == 9 * 12 * 10
    assert found.speedup == found.mean_speedup == 1
    assert found.block_sparse
    assert 1 / found.padding == pytest.approx((36 * 48 / (33 * 45)) ** 2)


@settings(max_examples=200, deadline=None)
@given(axis(16), st.integers(1, 6), st.integers(1, 6))
def test_simulated_visits_are_those_of_the_pairs(
    parameters: tuple[int, int, int, int, bool], q_tile: int, kv_tile: int
) -> None:
    n, w, s, g, causal = parameters
    neighborhood = Neighborhood.on(
        (1, 1, n), (1, 1, w), (1, 1, s), (1, 1, g), (False, False, causal)
    )
    found = simulate(neighborhood, (1, 1, q_tile), (1, 1, kv_tile))
    visits, total, whole = [], 0, True
    for residue in range(g):
        members = range(residue, n, g)
        key_tiles = [members[i : i + kv_tile] for i in range(0, len(members), kv_tile)]
        total += len(key_tiles)
        for start in range(0, len(members), q_tile):
            queries = members[start : start + q_tile]
            pairs = [[sees(i, j, *parameters) for i in queries for j in keys] for keys in key_tiles]
            visits.append(sum(any(p) for p in pairs))
            whole &= all(all(p) for p in pairs if any(p))
    assert (found.total, found.most) == (total, max(visits))
    assert found.mean == pytest.approx(sum(visits) / len(visits))
    assert found.block_sparse == whole


@pytest.mark.parametrize(
    ("window", "whole"), [(8, True), (16, False), (24, True), (32, False), (40, True)]
)
def test_even_strides_need_windows_of_an_odd_number_of_tiles(window: int, whole: bool) -> None:
    neighborhood = Neighborhood.on((1, 1, 80), (1, 1, window), (1, 1, 8))
    assert simulate(neighborhood, (1, 1, 8), (1, 1, 8)).block_sparse is whole
