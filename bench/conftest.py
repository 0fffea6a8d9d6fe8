"""Gathers the benchmark's rows, prints them as a table, writes JSON, Markdown and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maxva_kernels.profile.comparison import Row
from maxva_kernels.profile.measure import environment
from maxva_kernels.profile.report import document, plot_bars, table

_ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        metavar="STEM",
        help="write STEM.json, STEM.md and STEM.png beside printing the table",
    )


if importlib.util.find_spec("pytest_benchmark") is None:

    class _Benchmark:
        """As much of pytest-benchmark as bench_step.py needs, for machines without it."""

        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, function: Callable[[], object], rounds: int, iterations: int) -> None:
            for _ in range(rounds * iterations):
                function()

    @pytest.fixture
    def benchmark() -> _Benchmark:
        """Stands in for the plug-in's fixture."""
        return _Benchmark()


@pytest.fixture
def results() -> list[Row]:
    """Where a benchmark leaves its rows."""
    return _ROWS


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    about = environment("cuda" if torch.cuda.is_available() else "cpu")
    text = table(_ROWS, about)
    terminalreporter.write_line(text)
    stem = config.getoption("--results")
    if stem:
        path = Path(stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        report = json.dumps(document(_ROWS, about, {}), indent=1)
        path.with_suffix(".json").write_text(report + "\n")
        path.with_suffix(".md").write_text(text + "\n")
        written = f"wrote {path}.json, .md"
        if importlib.util.find_spec("matplotlib"):
            plot_bars(_ROWS, about, path.with_suffix(".png"))
            written += ", .png"
        terminalreporter.write_line(written)
