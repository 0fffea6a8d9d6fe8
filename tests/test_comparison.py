"""compare.py: grids, seeds, what is kept, divergence, table and page; runs are a formula."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bert_runs import FOLDER, example

BEST = {"adamw": 2.0, "lamb": 8.0, "madam": 4.0, "lamadam": 1.0}


def result(optimizer: str, lr: float, seed: int = 0, rises: bool = False) -> object:
    """A run whose end is the farther from 3 the farther lr is from the best."""
    end = 3 + abs(math.log2(lr / BEST[optimizer])) / 10 + seed / 100
    losses = [6 - (6 - end) * min(1, step / 30) for step in range(1, 41)]
    if rises:
        losses[36:] = [7.0] * 4
    return example.comparison.Result(
        optimizer=optimizer,
        lr=lr,
        seed=seed,
        parameters=1000,
        train_mlm=losses,
        held_out=[[0, 6.0], [20, 5.0], [40, losses[-1]]],
        unigram=5.5,
        mean_beta=[0.9] * 40 if optimizer in ("madam", "lamadam") else [],
        step_size=[] if optimizer == "adamw" else [1e-4] * 40,
        diverged_at=None,
        seconds=10.0,
        optimizer_seconds=0.5,
        data_share=0.01,
    )


def test_divergence() -> None:
    sound = result("madam", 4.0)
    assert not sound.diverged
    assert result("madam", 4.0, rises=True).diverged
    assert replace(sound, diverged_at=7, train_mlm=[6.0, math.nan]).diverged
    # Level, and a little above the best tenth, is not divergence.
    assert not replace(sound, train_mlm=[6.0] * 20 + [5.0] * 10 + [5.1] * 10).diverged


def test_best_lr_passes_over_what_diverged() -> None:
    results = [result("adamw", 1.0), result("adamw", 2.0, rises=True), result("adamw", 8.0)]
    assert example.comparison.best_lr(results, "adamw") == 1.0
    assert example.comparison.best_lr(results[1:2], "adamw") is None


class FakeDriver(example.compare.Driver):
    """Counts what is run."""

    def __init__(self, study: object, out: Path) -> None:
        super().__init__(study, out)
        self.ran: list = []

    def prepare(self) -> None:
        pass

    def results(self, jobs: list) -> list:
        self.ran += [job for job in jobs if job not in self.ran]
        return [result(job.optimizer, job.lr, job.seed) for job in jobs]


def study(**changes: object) -> object:
    lrs = dict.fromkeys(BEST, (1.0, 2.0, 4.0))
    return replace(example.compare.STUDIES["cpu"], lrs=lrs, **changes)


def test_grids_are_extended_where_the_best_is_at_an_end(tmp_path: Path) -> None:
    driver = FakeDriver(study(), tmp_path)
    results = example.compare.run_study(driver)
    grids = {
        name: sorted(job.lr for job in driver.ran if job.optimizer == name and job.seed == 0)
        for name in BEST
    }
    assert grids == {
        "adamw": [1.0, 2.0, 4.0],
        "lamb": [1.0, 2.0, 4.0, 8.0],
        "madam": [1.0, 2.0, 4.0, 8.0],
        "lamadam": [0.5, 1.0, 2.0, 4.0],
    }
    seeds = [(job.optimizer, job.lr, job.seed) for job in driver.ran if job.seed]
    assert sorted(seeds) == sorted((n, lr, s) for n, lr in BEST.items() for s in (1, 2))
    assert len(results) == len(driver.ran)


def test_report_table_figure_numbers_and_page(tmp_path: Path) -> None:
    results = example.compare.run_study(FakeDriver(study(), tmp_path))
    results.append(result("adamw", 16.0, rises=True))
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    page = docs / "comparison.md"
    begin, end = example.comparison._BEGIN, example.comparison._END
    page.write_text(f"Before.\n\n{begin}\nold\n{end}\n\nAfter.\n")
    record = {"study": {}, "machine": "a machine", "seconds": 120.0}
    text = example.comparison.report(results, record, tmp_path, docs)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    assert "1, 2, 4, 16 x | 2 | 3.010 ± 0.010 | 3.010 ± 0.010 | – | 12.50 | 5.00%" in rows["AdamW"]
    assert "0.5, 1, 2, 4 | 1 | 3.010 ± 0.010 | 3.010 ± 0.010 | +0.000 ± 0.000" in rows["LaMAdam"]
    assert "took 2 minutes on a machine" in text
    written = page.read_text()
    assert written.startswith("Before.")
    assert written.endswith("After.\n")
    assert "old" not in written
    assert rows["LAMB"] in written
    numbers = json.loads((docs / "comparison.json").read_text())
    assert len(numbers["runs"]) == len(results)
    for path in (tmp_path / "comparison.png", docs / "images" / "comparison.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    page.write_text("no marks")
    with pytest.raises(example.errors.UserError, match="has no <!--"):
        example.comparison.report(results, record, tmp_path, docs)
    assert page.read_text() == "no marks"


def test_finished_runs_are_kept_and_the_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver with a pretrain.py that writes metrics at once; one run fails the first time."""
    calls: list[list[str]] = []
    failing = {"lamb"}

    def call(driver: object, script: str, options: list[str], log: Path | None) -> None:
        assert script == "pretrain.py"
        optimizer = options[options.index("--optimizer") + 1]
        if optimizer in failing:
            raise example.errors.UserError("killed")
        calls.append(options)
        folder = Path(options[options.index("--out") + 1])
        folder.mkdir(parents=True)
        history = {
            "train": [[7.0, 6.0]],
            "held_out": [[0, 6.0]],
            "telemetry": [[{"mean_beta": 0.5, "mean_step_size": 1e-3}]],
        }
        metrics = {
            "history": history,
            "parameters": 1,
            "unigram_mlm": 5.0,
            "diverged_at": None,
            "train_seconds": 2.0,
            "optimizer_share": 0.25,
            "data_share": 0.0,
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(example.compare.Driver, "_call", call)
    jobs = [example.compare.Job(name, 1.0, 0) for name in BEST]
    small = study(at_once=1)
    with pytest.raises(example.errors.UserError, match="killed"):
        example.compare.Driver(small, tmp_path).results(jobs)
    assert [options[options.index("--optimizer") + 1] for options in calls] == ["adamw"]
    failing.clear()
    found = example.compare.Driver(small, tmp_path).results(jobs)
    assert sorted(options[options.index("--optimizer") + 1] for options in calls) == sorted(BEST)
    assert [r.optimizer for r in found] == list(BEST)
    assert found[0].optimizer_seconds == 0.5
    assert found[0].mean_beta == []
    assert found[2].mean_beta == [0.5]
    assert not list((tmp_path / "runs").iterdir())


def test_an_interrupt_ends_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's Ctrl-C reaches compare.py alone, which ends the script that it waits for."""
    (tmp_path / "prepare.py").write_text(
        "import os, signal, time\n"
        "assert os.getpgrp() == os.getpid()\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(example.compare, "FOLDER", tmp_path)
    driver = example.compare.Driver(study(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        driver.prepare()
    assert [process.returncode for process in driver._running] == [-signal.SIGTERM]


def test_another_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "study"
    out.mkdir()
    record = example.compare._open(out, study(), overwrite=False)
    # From the beginning on, so that the command goes on after a kill.
    assert json.loads((out / "study.json").read_text()) == record
    assert example.compare._open(out, study(), overwrite=False) == record
    assert example.compare.main(["--out", str(out)]) == 2
    assert "another study" in capsys.readouterr().err
    (tmp_path / "notes").touch()
    assert example.compare.main(["--out", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "study"]


def test_a_call_killed_while_it_wrote_the_record_is_no_other_study(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".writing-1-study.json").touch()
    with example.compare.opened(tmp_path, study(), overwrite=False) as (record, _):
        assert record["seconds"] == 0


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import compare, files
out = Path(sys.argv[2])
compare.FOLDER = out.parent
with files.locked(out) as lock:
    compare.Driver(compare.STUDIES["cpu"], out, lock).prepare()
"""


def test_two_at_a_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also while a run goes on whose driver was killed."""
    out = tmp_path / "study"
    out.mkdir()
    go = tmp_path / "go"
    (tmp_path / "prepare.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'running')!r}).touch()\n"
        f"while not Path({str(go)!r}).exists():\n"
        "    time.sleep(0.01)\n"
    )
    argv = [sys.executable, "-c", DRIVER, str(FOLDER), str(out)]
    driver = subprocess.Popen(argv)
    try:
        wait_until((tmp_path / "running").exists)
        assert example.compare.main(["--out", str(out)]) == 2
        assert "another process is at work in" in capsys.readouterr().err
        driver.kill()
        driver.wait()
        assert not is_free(out)
    finally:
        driver.kill()
        go.touch()
    wait_until(lambda: is_free(out))


def is_free(out: Path) -> bool:
    try:
        with example.files.locked(out):
            return True
    except example.errors.UserError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_docstrings_widen_the_corpus_without_importing() -> None:
    before = set(sys.modules)
    documents = example.corpus.docstring_documents()
    assert not {
        name for name in set(sys.modules) - before if "this" in name or "antigravity" in name
    }
    size = sum(len(s) for d in documents for s in d)
    assert size > 1_000_000
    text = {s for d in documents for s in d}
    assert any("json" in s.lower() for s in text)
    source = b'"""Module. Two."""\nclass A:\n    """A."""\n    def f(self):\n        """F."""\n'
    assert example.corpus._docstrings(source) == ["Module. Two.", "A.", "F."]
    assert example.corpus._docstrings(b"print 'old'") == []
