"""The BERT pretraining example in 2 and 4 processes: the curve of one, resume, signals, errors."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bert_runs import (
    SCRIPT,
    STEPS,
    arguments,
    assert_same_training,
    example,
    finish,
    newest_state,
    run_bert,
    torchrun,
)

# Runs set the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

HALFWAY = 4
OPTIMIZERS = ("adamw", "madam")


def options(corpus: object, out: Path, optimizer: str, *more: str) -> list[str]:
    """Two micro-batches in each of two processes, a held-out remainder, clipping at some steps.

    Clipping at all of them would hide gradients that are wrong by a factor.
    """
    special = ("--micro-batch-size", "2", "--eval-examples", "6", "--max-grad-norm", "3.2")
    return arguments(corpus, out, *special, "--optimizer", optimizer, *more)


def resumed(out: Path, source: Path, *more: str, step: int = HALFWAY) -> dict:
    return {"argv": ["--out", str(out), "--resume", *more], "resume": [str(source), step]}


@pytest.fixture(scope="module")
def alone(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs of one process, by optimizer."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    for optimizer in OPTIMIZERS:
        assert example.pretrain.main(options(corpus_file, folder / optimizer, optimizer)) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def pair(
    alone: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Runs of two processes: complete ones, resumed ones, refused ones."""
    folder = tmp_path_factory.mktemp("pair")
    runs: dict[str, dict] = {}
    for mode in ("ddp", "fsdp2"):
        parallel = ("--parallel", mode)
        for optimizer in OPTIMIZERS:
            out = folder / f"{mode}-{optimizer}"
            runs[out.name] = {"argv": options(corpus_file, out, optimizer, *parallel)}
            runs[f"{out.name}-resumed"] = resumed(folder / f"{out.name}-resumed", out, *parallel)
    runs["ddp-from-alone"] = resumed(
        folder / "ddp-from-alone", alone / "madam", "--parallel", "ddp"
    )
    runs["fsdp2-from-ddp"] = resumed(
        folder / "fsdp2-from-ddp", folder / "ddp-madam", "--parallel", "fsdp2"
    )
    for place, text in (("", corpus_file.read_text()), ("empty", None), ("other", "A. B.\n\n" * 9)):
        (folder / place).mkdir(exist_ok=True)
        if text:
            (folder / place / "corpus.txt").write_text(corpus_file.read_text() + text)
    refused = {
        "usage": (corpus_file, "--parallel", "ddp", "--steps", "many"),
        "batch": (corpus_file, "--parallel", "ddp", "--batch-size", "6"),
        "mode": (corpus_file,),
        "empty": ("corpus.txt", "--parallel", "ddp"),
        "other": ("corpus.txt", "--parallel", "fsdp2"),
    }
    for name, (corpus, *more) in refused.items():
        runs[name] = {"argv": options(corpus, folder / f"refused-{name}", "adamw", *more)}
        runs[name]["status"] = 2
    runs["empty"]["away"], runs["other"]["away"] = str(folder / "empty"), str(folder / "other")
    printed = run_bert(2, list(runs.values()), folder, timeout=300)
    return SimpleNamespace(folder=folder, printed=dict(zip(runs, printed, strict=True)))


def assert_same_curve(out: Path, expected: Path) -> None:
    """The same run but for the order in which numbers were added up.

    The first moment is proportional to the clipped gradients, which the losses hardly show.
    """
    left, right = newest_state(out), newest_state(expected)
    assert left["step"] == right["step"] == STEPS
    for key in ("train", "held_out"):
        losses = [
            torch.tensor(state["history"][key], dtype=torch.float64) for state in (left, right)
        ]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    moments = [state["optimizer"]["state"] for state in (left, right)]
    assert moments[0].keys() == moments[1].keys()
    for name in moments[0]:
        # Softmax ignores what a key bias adds to all scores: its gradient is rounding and no more.
        if not name.endswith("key.bias"):
            m, m_expected = (state[name]["exp_avg"] for state in moments)
            assert (m - m_expected).abs().max() <= 1e-3 * m_expected.abs().max(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    mode: str, optimizer: str, pair: SimpleNamespace, alone: Path
) -> None:
    """Dropout is on: it depends on the example, not on the process."""
    assert_same_curve(pair.folder / f"{mode}-{optimizer}", alone / optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_resume_is_bit_exact(mode: str, optimizer: str, pair: SimpleNamespace) -> None:
    run = pair.folder / f"{mode}-{optimizer}"
    again = run.with_name(f"{run.name}-resumed")
    assert "at step 4" in pair.printed[again.name]
    assert "last bits" not in pair.printed[again.name]
    assert_same_training(newest_state(run), newest_state(again))


@pytest.mark.parametrize("name", ["ddp-from-alone", "fsdp2-from-ddp"])
def test_resume_in_another_mode(name: str, pair: SimpleNamespace, alone: Path) -> None:
    assert "at step 4" in pair.printed[name]
    assert "the last bits will differ" in pair.printed[name]
    assert_same_curve(pair.folder / name, alone / "madam")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("usage", "argument --steps: invalid int value: 'many'"),
        ("batch", "--batch-size: 6 is not a multiple of --micro-batch-size 2 times 2 processes"),
        ("mode", "--parallel: torchrun started this; say ddp or fsdp2"),
        ("empty", "--corpus: no file found at corpus.txt"),
        ("other", "--corpus: not all processes read the same text"),
    ],
)
def test_an_error_ends_all_processes_with_one_message(
    name: str, complaint: str, pair: SimpleNamespace
) -> None:
    errors = [line for line in pair.printed[name].splitlines() if "error: " in line]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert not (pair.folder / f"refused-{name}").exists()


def test_one_process_writes(pair: SimpleNamespace) -> None:
    out = pair.folder / "ddp-adamw"
    assert pair.printed["ddp-adamw"].count("corpus: 108 training") == 1
    assert pair.printed["ddp-adamw"].count("step      6: held-out") == 1
    assert len(list((out / "tensorboard").iterdir())) == 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["parallel"] == "ddp"


def test_one_process_goes_on_with_the_run_of_two(
    pair: SimpleNamespace, alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(pair.folder / "fsdp2-madam", tmp_path / "run")
    example.checkpoint.checkpoints(tmp_path / "run")[0].unlink()
    assert example.pretrain.main(["--out", str(tmp_path / "run"), "--resume"]) == 0
    assert_same_curve(tmp_path / "run", alone / "madam")


def test_four_processes(
    pair: SimpleNamespace, alone: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """Some shards are empty, some rounds of the evaluation leave processes without examples."""
    ddp, fsdp2 = ("--parallel", "ddp"), ("--parallel", "fsdp2")
    runs = {
        "ddp": {"argv": options(corpus_file, tmp_path / "ddp", "madam", *ddp)},
        "ddp-resumed": resumed(tmp_path / "ddp-resumed", tmp_path / "ddp", *ddp),
        "fsdp2": resumed(tmp_path / "fsdp2", pair.folder / "fsdp2-madam", *fsdp2),
    }
    run_bert(4, list(runs.values()), tmp_path, timeout=300)
    assert_same_training(newest_state(tmp_path / "ddp"), newest_state(tmp_path / "ddp-resumed"))
    for name in runs:
        assert_same_curve(tmp_path / name, alone / "madam")


def test_sigterm_to_torchrun_then_resume_is_bit_exact(
    pair: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = options(corpus_file, out, "adamw", "--parallel", "ddp")
    # Evaluating often takes time and changes nothing.
    launched = torchrun(2, SCRIPT, *argv, "--eval-every", "1", "--checkpoint-every", "1")
    deadline = time.monotonic() + 90
    while not example.checkpoint.checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    launched.send_signal(signal.SIGTERM)
    output = finish(launched, timeout=120)
    assert launched.returncode != 0
    assert output.count("stopped by SIGTERM after step") == 1
    assert "go on with: torchrun --nproc-per-node 2" in output
    assert not (out / "metrics.json").exists()
    state = newest_state(out)
    assert 1 <= state["step"] < STEPS
    expected = newest_state(pair.folder / "ddp-adamw")["history"]["train"]
    assert state["history"]["train"] == expected[: state["step"]]
