"""Processes killed at random moments: nothing hangs, and nothing is lost but unsaved steps.

MAXVA_FAILURE_TRIALS sets how many are killed, `make test-failure` does it 20 times;
MAXVA_FAILURE_SEED repeats the draws of a run, as far as a machine repeats its timing.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bert_runs import (
    SCRIPT,
    arguments,
    assert_same,
    assert_same_training,
    example,
    finish,
    newest_state,
    run_bert,
    start,
    torchrun,
)
from failure_worker import CHECKPOINT_EVERY, STEPS

WORKER = Path(__file__).with_name("failure_worker.py")
TRIALS = int(os.environ.get("MAXVA_FAILURE_TRIALS", "4"))
# One more is the pretraining example.
KILLS = {"ddp": TRIALS // 2 - 1, "fsdp2": TRIALS - TRIALS // 2}
PROCESSES = 2


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    seed = os.environ.get("MAXVA_FAILURE_SEED", str(secrets.randbits(32)))
    print(f"MAXVA_FAILURE_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.001)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def sound_steps(out: Path) -> list[int]:
    """Steps of the checkpoints whose content has the hash in their name, newest first."""
    module = example.checkpoint
    paths = module.checkpoints(out)
    return [module._step(path) for path in paths if module._digest(path) in path.name]


class Job:
    """Training under a launcher that starts the processes anew when one has died."""

    def __init__(self, folder: Path, mode: str, restarts: int) -> None:
        self.folder = folder
        self.out = folder / "run"
        for path in (folder / "undisturbed", self.out):
            path.mkdir()
        self.restart = 0
        argv = [str(folder), mode, str(PROCESSES), str(restarts)]
        self.launched = start([sys.executable, str(WORKER), *argv])

    def events(self, name: str) -> list[int]:
        """Steps of all events of this name since the processes were started."""
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        starts = [index for index, line in enumerate(lines) if line.startswith("start")]
        since = lines[starts[self.restart] :] if len(starts) > self.restart else []
        return [int(line.split()[1]) for line in since if line.split()[0] == name]

    def temporary(self) -> int | None:
        """When the file that is being written, or was left half-written, changed; None without."""
        try:
            return (self.out / "checkpoint.tmp").stat().st_ctime_ns
        except FileNotFoundError:
            return None

    def go(self) -> list[int]:
        """Lets the processes train; returns their ids."""
        files = [self.folder / f"process-{self.restart}-{rank}" for rank in range(PROCESSES)]
        wait_until(lambda: all(f.exists() and f.read_text() for f in files), 90, "start")
        (self.folder / f"go-{self.restart}").touch()
        wait_until(lambda: bool(self.events("start")), 120, "first event")
        return [int(file.read_text()) for file in files]


def damage(path: Path, dice: random.Random) -> str:
    """Flips a bit of a file or cuts it short; returns what was done."""
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content))
    if dice.random() < 0.5:
        path.write_bytes(content[:place])
        return f"{path.name} cut after {place} bytes"
    content[place] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {place} of {path.name} flipped"


@pytest.mark.parametrize("mode", KILLS)
def test_killed_processes_lose_unsaved_steps_only(
    mode: str, tmp_path: Path, dice: random.Random
) -> None:
    """Kills fall into steps and into saves; after every second one the newest file is damaged."""
    job = Job(tmp_path, mode, restarts=KILLS[mode])
    try:
        processes = job.go()
        for trial in range(KILLS[mode]):
            began = job.events("start")[0]
            aim = min(began + dice.randint(1, 2 * CHECKPOINT_EVERY), STEPS - 1)
            if not trial:
                # Two checkpoints, so that one may be damaged.
                aim += 2 * CHECKPOINT_EVERY
            wait_until(
                lambda aim=aim: max(job.events("step"), default=0) >= aim, 120, f"step {aim}"
            )
            in_save = dice.random() < 0.5
            if in_save and aim < STEPS - CHECKPOINT_EVERY:
                before = job.temporary()
                wait_until(lambda b=before: job.temporary() not in (None, b), 120, "save")
            # Process 0 is the one that writes.
            victim = 0 if in_save else dice.randrange(PROCESSES)
            delay = dice.uniform(0, 0.015 if in_save else 0.03)
            time.sleep(delay)
            os.kill(processes[victim], signal.SIGKILL)
            for process in processes:
                wait_until(lambda p=process: not is_alive(p), 120, f"end of process {process}")
            reached = max(job.events("step"))
            saved = max([began, *job.events("saved")])
            print(
                f"trial {trial}: process {victim} killed {1e3 * delay:.1f} ms after step {aim}"
                f"{' and the start of a save' if in_save else ''}; it reached step {reached}, "
                f"saved step {saved}, {'left' if job.temporary() else 'left no'} half a file"
            )
            steps = sound_steps(job.out)
            assert saved in steps
            assert steps[0] >= saved
            assert reached - steps[0] <= CHECKPOINT_EVERY
            if trial % 2 and len(steps) > 1:
                print(damage(example.checkpoint.checkpoints(job.out)[0], dice))
                del steps[0]
            job.restart += 1
            processes = job.go()
            assert job.events("start") == [steps[0]]
        (tmp_path / "finish").touch()
    except BaseException:
        job.launched.terminate()
        raise
    finally:
        output = finish(job.launched, timeout=120)
        print(output)
    assert job.launched.returncode == 0
    expected, state = newest_state(tmp_path / "undisturbed"), newest_state(job.out)
    assert expected["step"] == STEPS
    assert_same(expected, state)


def test_killed_pretraining_goes_on_from_its_last_checkpoint(
    corpus_file: Path, tmp_path: Path, dice: random.Random
) -> None:
    more = ("--optimizer", "madam", "--steps", "20", "--parallel", "ddp")
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    launched = torchrun(PROCESSES, SCRIPT, *arguments(corpus_file, out, *more))
    try:
        wait_until(lambda: bool(example.checkpoint.checkpoints(out)), 90, "first checkpoint")
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        victim, delay = dice.randrange(PROCESSES), dice.uniform(0, 0.5)
        time.sleep(delay)
        os.kill(int(children[victim]), signal.SIGKILL)
        print(f"process {victim} killed {1e3 * delay:.0f} ms after the first checkpoint")
    except BaseException:
        launched.terminate()
        raise
    finally:
        output = finish(launched, timeout=120)
        print(output)
    assert launched.returncode != 0
    assert not (out / "metrics.json").exists()
    saved = sound_steps(out)[0]
    resumed = run_bert(
        PROCESSES,
        [
            {"argv": arguments(corpus_file, undisturbed, *more)},
            {"argv": ["--out", str(out), "--resume", "--parallel", "ddp"]},
        ],
        tmp_path,
        timeout=300,
    )[1]
    assert f"at step {saved}" in resumed
    assert_same_training(newest_state(undisturbed), newest_state(out))
