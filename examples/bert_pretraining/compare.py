"""Compares optimizers at pretraining: a grid of learning rates each, then seeds at the best.

python examples/bert_pretraining/compare.py

Every finished run is kept as JSON: stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import checkpoint
import comparison
import files
import torch
from comparison import Result
from errors import UserError, exit_status
from options import number
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
OPTIMIZERS = ("adamw", "lamb", "madam", "lamadam")
STUDY, RESULTS, RUNS, SHARDS = "study.json", "results", "runs", "shards"
_DIVERGED = 3  # exit status of pretrain.py


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        prepare: Options of prepare.py.
        pretrain: Options of every run.
        lrs: Grid of each optimizer, rising; where the best is at an end, it is extended.
        seeds: Of the runs at the best lr; the grid has the first.
        extensions: How often a grid may be extended.
        at_once: Runs side by side.
    """

    prepare: str
    pretrain: str
    lrs: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    extensions: int = 1
    at_once: int = 2


_TEXT = "--docstrings --held-out-share 0.1"
STUDIES = {
    # One thread a run: two runs side by side do more than one run on two threads.
    "cpu": Study(
        f"{_TEXT} --sequence-lengths 32 --vocab-size 1024",
        "--config tiny --sequence-length 32 --steps 200 --batch-size 128 --micro-batch-size 64 "
        "--eval-every 25 --eval-examples 1024 --checkpoint-every 50 --device cpu --threads 1",
        {
            "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
            "lamb": (5e-3, 1e-2, 2e-2, 4e-2),
            "madam": (1e-3, 2e-3, 4e-3, 8e-3),
            "lamadam": (1e-3, 2e-3, 4e-3, 8e-3),
        },
    ),
    "small": Study(
        f"{_TEXT} --sequence-lengths 128 --vocab-size 8192",
        "--config small --sequence-length 128 --steps 150 --batch-size 512 --micro-batch-size 256 "
        "--eval-every 15 --checkpoint-every 1000 --precision bfloat16 --device cuda --threads 1 "
        "--data-workers 3",
        {
            "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
            "lamb": (5e-3, 1e-2, 2e-2, 4e-2),
            "madam": (1e-3, 2e-3, 4e-3, 8e-3),
            "lamadam": (1e-3, 2e-3, 4e-3, 8e-3),
        },
        at_once=3,
    ),
}


_FEW = (
    "--steps 6 --batch-size 8 --micro-batch-size 8 --eval-every 3 --eval-examples 8 --device cpu "
    "--data-workers 0 --precision float32"
)


def quick(study: Study) -> Study:
    """The same wiring in minutes: six steps of a small batch on the CPU, two lrs, two seeds."""
    return replace(
        study,
        pretrain=f"{study.pretrain} {_FEW}",
        lrs={optimizer: lrs[:2] for optimizer, lrs in study.lrs.items()},
        seeds=study.seeds[:2],
        extensions=0,
    )


@dataclass(frozen=True)
class Job:
    """One run."""

    optimizer: str
    lr: float
    seed: int
    state_dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of its files."""
        kind = "" if self.state_dtype == "float32" else f"-{self.state_dtype}"
        return f"{self.optimizer}{kind}-{self.lr:.4g}-{self.seed}"


class Driver:
    """Makes the runs of a study that are not there yet.

    Args:
        study: The study.
        out: Its folder.
        lock: What `files.locked` gave; runs hold it, too, since they outlive a killed driver.
    """

    def __init__(self, study: Study, out: Path, lock: int | None = None) -> None:
        self.study = study
        self.out = out
        self._held = () if lock is None else (lock,)
        self._running: set[subprocess.Popen] = set()
        self._stopping = False

    def prepare(self) -> None:
        """Makes the shards."""
        command = [*self.study.prepare.split(), "--out", str(self.out / SHARDS), "--processes", "2"]
        self._call("prepare.py", command, None)

    def results(self, jobs: Sequence[Job]) -> list[Result]:
        """The results of `jobs`; runs those that have none."""
        missing = [job for job in jobs if not self._result_file(job).is_file()]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="run", disable=None)
        with bar, ThreadPoolExecutor(self.study.at_once) as pool:
            futures = [pool.submit(self._run, job) for job in missing]
            try:
                for future in futures:
                    future.result()
                    bar.update()
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return [Result(**json.loads(self._result_file(job).read_bytes())) for job in jobs]

    def _result_file(self, job: Job) -> Path:
        return self.out / RESULTS / f"{job.name}.json"

    def _run(self, job: Job) -> None:
        if self._stopping:
            raise UserError("stopped")
        try:
            self._train(job)
        except BaseException:
            self._stopping = True
            raise

    def _train(self, job: Job) -> None:
        folder = self.out / RUNS / job.name
        options = [*self.study.pretrain.split(), "--shards", str(self.out / SHARDS)]
        options += ["--optimizer", job.optimizer, "--lr", str(job.lr), "--seed", str(job.seed)]
        options += ["--state-dtype", job.state_dtype]
        stopped = folder.is_dir() and checkpoint.checkpoints(folder)
        options += ["--out", str(folder), "--resume" if stopped else "--overwrite"]
        self._call("pretrain.py", options, self.out / RUNS / f"{job.name}.log")
        metrics = json.loads((folder / "metrics.json").read_bytes())
        result = comparison.result(job.optimizer, job.lr, job.seed, metrics)
        path = self._result_file(job)
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, json.dumps(asdict(result)).encode())
        shutil.rmtree(folder)

    def _call(self, script: str, options: list[str], log: Path | None) -> None:
        """Runs a script of this folder; raises a UserError when it fails."""
        if log:
            log.parent.mkdir(exist_ok=True)
        command = [sys.executable, str(FOLDER / script), *options]
        with open(log or os.devnull, "w", encoding="utf-8") as output:
            # Out of the reach of a terminal's Ctrl-C: with the signal of `_stop` it would be the
            # second, which ends a run without a checkpoint.
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,
                pass_fds=self._held,
            )
            self._running.add(process)
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            self._running.discard(process)
        if status not in (0, _DIVERGED):
            told = f"; its output is in {log}" if log else ""
            raise UserError(f"{script} ended with status {status}{told}.")

    def _stop(self) -> None:
        """Ends the runs, which write a checkpoint first."""
        self._stopping = True
        for process in list(self._running):
            process.terminate()


def run_study(driver: Driver) -> list[Result]:
    """All results: of the grids, extended where the best is at an end, and of the seeds."""
    study = driver.study
    driver.prepare()
    grids = {optimizer: list(study.lrs[optimizer]) for optimizer in OPTIMIZERS}

    def grid_results() -> list[Result]:
        # Optimizer by optimizer inside an lr, so that a stopped study is a fair one as well.
        rows = max(map(len, grids.values()))
        jobs = [
            Job(optimizer, grids[optimizer][row], study.seeds[0])
            for row in range(rows)
            for optimizer in OPTIMIZERS
            if row < len(grids[optimizer])
        ]
        return driver.results(jobs)

    for _ in range(study.extensions):
        results = grid_results()
        for optimizer, lrs in grids.items():
            best = comparison.best_lr(results, optimizer)
            if best == max(lrs):
                lrs.append(2 * best)
            elif best == min(lrs):
                lrs.append(best / 2)
    results = grid_results()
    best = {optimizer: comparison.best_lr(results, optimizer) for optimizer in OPTIMIZERS}
    seeds = [Job(o, lr, seed) for seed in study.seeds[1:] for o, lr in best.items() if lr]
    return results + driver.results(seeds)


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = cpu_info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def _refuse_foreign(out: Path) -> None:
    """Raises a UserError if `out` is a folder of something else."""
    study = (out / STUDY).is_file()
    if not study and not files.is_free(out):
        raise UserError(f"--out: {out} is not empty and holds no study; give another folder.")


def _open(out: Path, study: Study, overwrite: bool) -> dict[str, Any]:
    """The record of the study in `out`, a new one where there is none."""
    path = out / STUDY
    wanted = json.loads(json.dumps(asdict(study)))
    if overwrite and path.is_file():
        for folder in (RESULTS, RUNS, SHARDS):
            shutil.rmtree(out / folder, ignore_errors=True)
        path.unlink()
    if path.is_file():
        record = json.loads(path.read_bytes())
        if record["study"] != wanted:
            raise UserError(
                f"--out: {out} holds another study; give --overwrite to delete it, or another "
                "folder."
            )
        return record
    record = {"study": wanted, "seconds": 0.0, "machine": _machine()}
    _write_record(out, record)
    return record


def _write_record(out: Path, record: dict[str, Any]) -> None:
    files.write_atomically(out / STUDY, json.dumps(record, indent=1).encode())


@contextmanager
def opened(out: Path, study: Study, overwrite: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """Keeps a study's folder for the block: its record, which gets the time, and its lock."""
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out) as lock:
        record = _open(out, study, overwrite)
        started = time.perf_counter()
        try:
            yield record, lock
        finally:
            record["seconds"] += time.perf_counter() - started
            _write_record(out, record)


def end_as_by_ctrl_c() -> None:
    """Makes other signals that ask the process to end what Ctrl-C is, unless they are ignored."""
    for ends in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ends) != signal.SIG_IGN:  # as nohup has it
            signal.signal(ends, signal.default_int_handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares AdamW, LAMB, MAdam and LaMAdam at pretraining a small BERT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", choices=STUDIES, default="cpu", help="small: for a GPU")
    parser.add_argument("--out", type=Path, help="folder; None: runs/compare-CONFIG")
    parser.add_argument("--overwrite", action="store_true", help="delete the study in --out")
    parser.add_argument(
        "--at-once", type=number(int, 1), help="runs side by side; None: the config's"
    )
    parser.add_argument(
        "--quick", action="store_true", help="check the wiring: six steps a run; says nothing else"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="FOLDER",
        help="also put table, figure and numbers into this folder's comparison.md",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    study = STUDIES[options.config]
    if options.quick:
        study = quick(study)
    out: Path = options.out or Path("runs") / f"compare-{options.config}{'-quick' * options.quick}"
    with opened(out, study, options.overwrite) as (record, lock):
        if options.at_once:
            study = replace(study, at_once=options.at_once)
        results = run_study(Driver(study, out, lock))
    print(comparison.report(results, record, out, options.docs))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    end_as_by_ctrl_c()
    return exit_status(lambda: _run(options), "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
