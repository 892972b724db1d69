"""A pytest plugin that runs diffusers' own tests with sparse attention on every transformer.

From a checkout of diffusers, or a folder with nothing but its ``tests`` for an installed one::

    export PYTHONPATH=/path/to/dit-sparse/tests/mirror
    python -m pytest -p sparse_mirror --sparse-record full.json tests/pipelines/wan
    python -m pytest -p sparse_mirror --sparse off --sparse-against full.json --lf

The tests are upstream's, unchanged; every transformer with an adapter gets sparse attention at its
exact setting the moment it is constructed, so nothing that a test expects may change. The summary
counts the tests in which sparse attention really computed something. The second command runs what
failed once more without it, and tells what is upstream's own failure. ``tiny_hub.py`` makes
stand-ins for the tiny components that the tests load from the hub. docs/mirror.md has the results.
"""

from __future__ import annotations

import functools
import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dit_sparse import SparseConfig, enable_sparse_attention
from dit_sparse.methods.base import Call
from dit_sparse.processors.family import find_family
from dit_sparse.processors.op import NO_GRADIENT
from dit_sparse.processors.table import transformer_classes

# What a test that wants a file of the hub fails with where there is none.
HUB_ERRORS = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "EntryNotFoundError")
HUB_WORDS = (
    "is the correct path to a directory",
    "couldn't connect",
    "does not appear to have a file",
    "offline mode",
    "HF_HUB_OF",
)


RESULTS = ("passed", "failed", "skipped", "hub", "training")


@dataclass
class Outcome:
    """What became of one test.

    Attributes:
        result: "passed", "failed", "skipped"; "hub" for a test that needs files of the hub,
            "training" for one that runs into our refusal of gradients.
        calls: Self-attention calls that sparse attention computed in it.
        message: Why it failed or was skipped, one line.
    """

    result: str = "passed"
    calls: int = 0
    message: str = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparse attention")
    group.addoption("--sparse", default="full", help="method whose exact setting is used, or off")
    group.addoption("--sparse-record", type=Path, help="write the outcome of each test (JSON)")
    group.addoption("--sparse-against", type=Path, help="compare with outcomes recorded before")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Mirror(config), "sparse-mirror")


class Mirror:
    """Sparse attention on every transformer, and what the tests say to it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: dict[str, Outcome] = {}
        self.left_dense: Counter[str] = Counter()
        self.calls = 0
        name = config.getoption("--sparse")
        if name != "off":
            method = type(SparseConfig.from_name(name).method).exact()
            self._count_calls(type(method))
            self._bind_all(SparseConfig(method))

    def _count_calls(self, kind: Any) -> None:
        attend = kind.attend

        def counted(method: Any, call: Call) -> Any:
            self.calls += 1
            return attend(method, call)

        kind.attend = counted

    def _bind_all(self, sparse: SparseConfig) -> None:
        for kind in transformer_classes().values():
            is_model = issubclass(kind, nn.Module) and "__init__" in vars(kind)
            if is_model and find_family(kind.__new__(kind)) is not None:
                self._bind_at_construction(kind, sparse)

    def _bind_at_construction(self, kind: Any, sparse: SparseConfig) -> None:
        construct = kind.__init__

        @functools.wraps(construct)
        def constructed(model: Any, *args: Any, **kwargs: Any) -> None:
            construct(model, *args, **kwargs)
            if type(model).__init__ is not constructed:
                return
            try:
                enable_sparse_attention(model, sparse)
            except (ValueError, NotImplementedError) as refusal:
                self.left_dense[f"{type(model).__name__}: {refusal}"] += 1

        kind.__init__ = constructed

    def pytest_collection_finish(self) -> None:
        # Every test collects garbage twice, for seconds if all that was imported is looked through.
        gc.freeze()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.calls = 0
        self.outcomes[name_of(item)] = outcome = Outcome()
        yield
        outcome.calls = self.calls

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report = (yield).get_result()
        outcome = self.outcomes[name_of(item)]
        if report.passed or (outcome.result != "passed" and report.when == "teardown"):
            return
        outcome.result = report.outcome
        for result, is_it, why in EXPECTED:
            if report.failed and is_it(call.excinfo.value):
                report.outcome = "skipped"
                report.longrepr = (str(item.path), 0, f"Skipped: {why}")
                outcome.result = result
        outcome.message = " ".join(
            f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"[:400].split()
        )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        record = self.config.getoption("--sparse-record")
        if record is not None:
            data = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
            record.write_text(json.dumps(data, indent=1) + "\n")
        terminalreporter.section("sparse attention")
        for line in self.summary():
            terminalreporter.line(line)

    def summary(self) -> list[str]:
        """The lines at the end of the run."""
        results = Counter(outcome.result for outcome in self.outcomes.values())
        computed = [o for o in self.outcomes.values() if o.calls and o.result == "passed"]
        lines = [
            f"{len(self.outcomes)} tests: "
            + ", ".join(f"{results[name]} {name}" for name in RESULTS),
            f"{len(computed)} passed with {sum(o.calls for o in computed)} sparse calls in them",
        ]
        lines += [f"left dense x{n}: {why}" for why, n in self.left_dense.most_common()]
        against = self.config.getoption("--sparse-against")
        if against is None:
            return lines
        data = json.loads(against.read_text())
        with_it = {name: Outcome(**o) for name, o in data.items() if o["result"] == "failed"}
        again = [name for name in with_it if name in self.outcomes]
        only = [name for name in again if self.outcomes[name].result == "passed"]
        lines.append(
            f"of {len(with_it)} tests that fail with sparse attention, {len(again)} ran here:"
        )
        lines.append(f"{len(again) - len(only)} fail without it as well, {len(only)} do not")
        lines += [f"  {name} - {with_it[name].message}" for name in only]
        return lines


def name_of(item: pytest.Item) -> str:
    """The id of ``item`` from the working directory; pytest's own depends on what else runs."""
    return f"{os.path.relpath(item.path)}::{item.nodeid.partition('::')[2]}"


def is_gradient_error(error: BaseException) -> bool:
    """Whether ``error`` is our refusal to train."""
    return isinstance(error, NotImplementedError) and str(error) == NO_GRADIENT


def is_hub_error(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, is that a file of the hub could not be had."""
    seen: BaseException | None = error
    while seen is not None:
        names = {kind.__name__ for kind in type(seen).__mro__}
        if names & set(HUB_ERRORS) or any(word in str(seen) for word in HUB_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


EXPECTED = (
    ("hub", is_hub_error, "needs files of the hub"),
    ("training", is_gradient_error, "sparse attention has no gradient"),
)
