"""When attention is dense, when masks are searched and when they are used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.schedule import Cadence, Phase, Schedule, Step, phases

DENSE, SEARCH, REFRESH, SPARSE = Phase.DENSE, Phase.SEARCH, Phase.REFRESH, Phase.SPARSE


def at(index: int, total: int | None, progress: float = 0.0) -> Step:
    return Step(index, total, progress, "cond", 0)


def table(dense: int, total: int, *refreshes: int) -> list[Phase]:
    """``dense`` dense steps, a search, then sparse steps with some refreshes."""
    result = [DENSE] * dense + [SEARCH] + [SPARSE] * (total - dense - 1)
    for index in refreshes:
        result[index] = REFRESH
    return result


@pytest.mark.parametrize(
    ("search", "total", "expected"),
    [
        # The paper: 0-based, the first 10 steps are dense, step 9 searches on the way.
        ((10, 30), 50, table(9, 50, 29)),
        # Its scaling study has no warm-up.
        ((0, 30), 50, table(0, 50, 29)),
        ((10,), 50, table(9, 50)),
        ((10, 20, 30, 40), 50, table(9, 50, 19, 29, 39)),
        ((0,), 4, table(0, 4)),
        ((1,), 4, table(0, 4)),
        ((0.2, 0.6), 4, table(0, 4, 1)),
        ((0.2, 0.6), 8, table(1, 8, 4)),
        ((0.2, 0.6), 20, table(3, 20, 11)),
        ((0.2, 0.6), 30, table(5, 30, 17)),
        ((0.2, 0.6), 50, table(9, 50, 29)),
        # A run of one step can only search, and two shares that meet search once.
        ((0.2, 0.6), 1, [SEARCH]),
        ((0.2, 0.21), 10, table(1, 10)),
        # Shorter than the warm-up: all dense.
        ((10, 30), 8, [DENSE] * 8),
    ],
)
def test_phase_table(search: tuple[float, ...], total: int, expected: list[Phase]) -> None:
    assert phases(Schedule(search), total) == expected


def test_default_is_the_papers_share_of_50_steps() -> None:
    assert phases(Schedule(), 50) == phases(Schedule((10, 30)), 50)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True).map(sorted), st.integers(1, 60)
)
def test_no_step_is_sparse_before_a_search(shares: list[float], total: int) -> None:
    run = list(phases(Schedule(tuple(shares)), total))
    assert run.count(SEARCH) == 1
    start = run.index(SEARCH)
    assert run[:start] == [DENSE] * start
    assert set(run[start + 1 :]) <= {SPARSE, REFRESH}
    assert run.count(REFRESH) <= len(shares) - 1


def test_missing_mask_becomes_a_search() -> None:
    schedule = Schedule((10, 30))
    for index in (9, 10, 25, 29, 49):
        assert schedule.phase(at(index, 50), None) is SEARCH
    # Never before the warm-up is over.
    assert schedule.phase(at(8, 50), None) is DENSE
    assert schedule.phase(at(10, 50), 9) is SPARSE
    assert schedule.phase(at(29, 50), 9) is REFRESH


def test_a_skipped_refresh_is_made_up_for_at_the_next_call() -> None:
    schedule = Schedule((10, 30, 40))
    for index in (29, 30, 38):
        assert schedule.phase(at(index, 50), found=28) is REFRESH
        assert schedule.phase(at(38, 50), found=index) is SPARSE
    # Two that were skipped are made up for by one.
    assert schedule.phase(at(45, 50), found=9) is REFRESH
    assert schedule.phase(at(46, 50), found=45) is SPARSE
    # The first one late: what was due before is done with it.
    assert schedule.phase(at(33, 50), found=None) is SEARCH
    assert schedule.phase(at(34, 50), found=33) is SPARSE


def test_unknown_total_with_shares_goes_by_progress() -> None:
    schedule = Schedule((0.2, 0.6))
    assert schedule.phase(at(12, None, 0.19), None) is DENSE
    assert schedule.phase(at(3, None, 0.2), None) is SEARCH
    assert schedule.phase(at(4, None, 0.25), 3) is SPARSE
    # A refresh cannot be placed without the number of steps.
    assert schedule.phase(at(30, None, 0.6), 3) is SPARSE
    assert schedule.phase(at(30, None, 0.6), None) is SEARCH


def test_unknown_total_with_counts_goes_by_index() -> None:
    schedule = Schedule((2, 5))
    last = [None, None, 1, 1, 1, 4, 4]
    assert [schedule.phase(at(n, None, 1.0), found) for n, found in enumerate(last)] == [
        DENSE,
        SEARCH,
        SPARSE,
        SPARSE,
        REFRESH,
        SPARSE,
        SPARSE,
    ]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ((), "at least one"),
        ((-1,), "int >= 0"),
        ((-0.1,), "int >= 0"),
        ((1.5,), "share in"),
        ((float("nan"),), "share in"),
        ((30, 10), "ascend"),
        ((10, 10), "ascend"),
        ((0, 0.6), "either ints or shares"),
        ((True,), "int or a float"),
        (("10",), "int or a float"),
    ],
)
def test_impossible_schedules_are_refused(search: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(search)


@pytest.mark.parametrize(
    ("warmup", "every", "total", "expected"),
    [
        (2, 3, 10, "DDRSSRSSRS"),
        (0.2, 1, 10, "DDRRRRRRRR"),
        (0, None, 4, "RSSS"),
        (0.5, 2, 5, "DDRSR"),  # round(2.5) is 2
        (1.0, 1, 3, "DDD"),
    ],
)
def test_cadence(warmup: int | float, every: int | None, total: int, expected: str) -> None:
    cadence, found, seen = Cadence(warmup, every), None, ""
    for index in range(total):
        phase = cadence.phase(Step(index, total, index / total, "cond", 0), found)
        if phase is Phase.REFRESH:
            found = index
        seen += {Phase.DENSE: "D", Phase.REFRESH: "R", Phase.SPARSE: "S"}[phase]
    assert seen == expected


def test_cadence_without_a_number_of_steps_reads_the_noise() -> None:
    cadence = Cadence(0.3, 1)
    assert cadence.phase(Step(9, None, 0.29, "cond", 0), None) is Phase.DENSE
    assert cadence.phase(Step(1, None, 0.31, "cond", 0), None) is Phase.REFRESH
    # A count needs no total.
    assert Cadence(2, 1).phase(Step(1, None, 0.9, "cond", 0), None) is Phase.DENSE


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.1}, "warmup"),
        ({"warmup": float("nan")}, "warmup"),
        ({"warmup": True}, "warmup"),
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
    ],
)
def test_impossible_cadences_are_refused(wrong: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Cadence(**wrong)
