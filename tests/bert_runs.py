"""What the tests of the BERT pretraining example share: its modules, tiny runs, equality."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_modules import import_example

for needed in ("transformers", "tokenizers", "tensorboard", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "bert_pretraining"
SCRIPT = FOLDER / "pretrain.py"
MODULES = (
    "pretrain",
    "settings",
    "corpus",
    "data",
    "model",
    "checkpoint",
    "optimizers",
    "report",
    "recipes",
    "shards",
    "sources",
    "loader",
    "prepare",
    "compare",
    "comparison",
    "finetune",
    "task",
    "workers",
    "store",
    "errors",
    "files",
    "texts",
    "devices",
)
RANKS = Path(__file__).with_name("bert_ranks.py")
STEPS = 6


example = import_example(FOLDER, MODULES)
#: How files are read without further options.
READING = example.sources.Reading("auto", "text", "error")


def write_corpus(path: Path) -> Path:
    """120 documents of eight sentences over a small vocabulary, every sentence unique."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    numbers = itertools.count()
    documents = [
        "\n".join(f"Line {next(numbers)} {' '.join(rng.choice(words, 6))}." for _ in range(8))
        for _ in range(120)
    ]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    small = (
        f"--optimizer adamw --steps {STEPS} --batch-size 8 --micro-batch-size 4 "
        "--sequence-length 32 --vocab-size 256 --eval-examples 32 --eval-every 3 "
        "--checkpoint-every 2 --threads 1 --device cpu"
    )
    return ["--corpus", str(corpus), "--out", str(out), *small.split(), *more]


def newest_state(out: Path) -> dict:
    return torch.load(example.checkpoint.checkpoints(out)[0], weights_only=True)


def assert_same(left: object, right: object, where: str = "state") -> None:
    """Recursive equality, tensors bit by bit; a list is as good as a tuple, as it is for DCP."""
    if isinstance(left, (list, tuple)):
        assert isinstance(right, (list, tuple)), where
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
        return
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    else:
        assert left == right, where


def assert_same_training(left: dict, right: dict) -> None:
    for key in ("step", "model", "optimizer", "scheduler", "history"):
        assert_same(left[key], right[key], key)


def start(command: list[str]) -> subprocess.Popen[str]:
    """Starts torchrun, or what is like it; stdout and stderr of all processes are one stream."""
    # In a shared store, processes that are started anew find the addresses of the dead.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def torchrun(processes: int, script: Path, *argv: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return start([sys.executable, *launcher, str(script), *argv])


def finish(launched: subprocess.Popen[str], timeout: float) -> str:
    """The output of what was started; it ends itself and its processes when time is up."""
    try:
        return launched.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        # It kills what does not end within 30 s.
        launched.terminate()
        output = launched.communicate(timeout=60)[0]
        raise AssertionError(f"not finished after {timeout} s:\n{output}") from None


def run_bert(processes: int, runs: list[dict], folder: Path, timeout: float) -> list[str]:
    """What the runs printed, in their order; all of them have to end well."""
    (folder / "runs.json").write_text(json.dumps(runs))
    output = finish(torchrun(processes, RANKS, str(folder / "runs.json")), timeout)
    parts = re.split(r"^run \d+ ended with (\d+)\n", output, flags=re.MULTILINE)
    assert len(parts) == 2 * len(runs) + 1, output
    for text, status, run in zip(parts[::2], parts[1::2], runs, strict=False):
        assert int(status) == run.get("status", 0), text
    return parts[:-1:2]
