"""Fine-tuning a pretrained checkpoint on a set that is made here, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_runs import arguments, example

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    threads = torch.get_num_threads()
    assert example.pretrain.main(arguments(corpus_file, out)) == 0
    torch.set_num_threads(threads)
    return out


def write_task(path: Path, rows: int, seed: int) -> Path:
    """Pairs of sentences; the label says with which of two words the second begins."""
    rng = np.random.default_rng(seed)
    lines = ["index\tsentence1\tsentence2\tlabel"]
    for number in range(rows):
        words = ["".join(rng.choice(list("abcdefgh"), 2)) for _ in range(4)]
        yes = bool(rng.random() < 0.4)
        marker = "aa" if yes else "hh"
        lines.append(
            f'{number}\t"{words[0]} {words[1]}\t{marker} {words[3]}.\t{"yes" if yes else "no"}'
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def finetune(run: Path, *more: str) -> int:
    small = "--threads 1 --device cpu --sequence-length 24 --batch-size 16 --lr 3e-3 --epochs 6"
    return example.finetune.main(["--checkpoint", str(run), *small.split(), *more])


def test_learns_what_the_text_tells(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train, dev = write_task(tmp_path / "train.tsv", 200, 0), write_task(tmp_path / "dev.tsv", 60, 1)
    argv = ["--task-file", str(train), "--task-dev", str(dev)]
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert finetune(run, *argv, "--out", str(tmp_path / "out"), "--seeds", "2") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["labels"] == ["no", "yes"]
    assert (metrics["train_rows"], metrics["dev_rows"]) == (200, 60)
    assert 0.5 < metrics["majority"] < 0.75
    first, second = metrics["runs"]
    assert first["losses"] != second["losses"]
    for scores in metrics["runs"]:
        assert scores["accuracy"] > 0.95
        assert scores["matthews"] > 0.9
    assert "median of 2" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    again = tmp_path / "again"
    assert finetune(run, *argv, "--out", str(again)) == 0
    assert json.loads((again / "metrics.json").read_text())["runs"] == [first]


@pytest.mark.parametrize(
    ("optimizer", "more", "lr", "eps"),
    [
        ("madam", (), 4e-5, 1e-6),
        ("lamadam", (), 4e-5, 1e-15),
        ("adamw", (), 1e-5, 1e-6),
        ("lamb", ("--lr", "1e-3"), 1e-3, 1e-6),
        ("lamadam", ("--lr", "2e-5", "--eps", "1e-4"), 2e-5, 1e-4),
        ("adamw", ("--eps", "0"), 1e-5, 0.0),
    ],
)
def test_lr_and_eps_are_the_papers_unless_given(
    optimizer: str, more: tuple[str, ...], lr: float, eps: float, run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Fig. 4 and App. I of the paper."""
    built = []
    build = example.finetune.build_optimizer

    def build_and_keep(*arguments: object) -> tuple:
        made = build(*arguments)
        built.append(made[0])
        return made

    monkeypatch.setattr(example.finetune, "build_optimizer", build_and_keep)
    train = write_task(tmp_path / "train.tsv", 20, 0)
    argv = f"--checkpoint {run} --task-file {train} --optimizer {optimizer} --epochs 1 --device cpu"
    argv += f" --threads 1 --sequence-length 24 --out {tmp_path / 'out'}"
    assert example.finetune.main([*argv.split(), *more]) == 0
    (made,) = built
    for group in made.param_groups:
        assert group["initial_lr"] == lr
        assert group["eps"] == eps
        assert group["betas"] == (0.9, 0.98)
    options = json.loads((tmp_path / "out" / "metrics.json").read_text())["options"]
    assert float(options["lr"]) == lr


def test_starts_from_the_pretrained_weights(run: Path) -> None:
    state, _ = example.checkpoint.newest_sound(run, "--checkpoint")
    model = example.finetune._model(state, labels=3, sequence_length=24, seed=0)
    found = model.state_dict()
    for name, tensor in state["model"].items():
        if name.startswith("bert."):
            assert torch.equal(found[name], tensor), name
    other = example.finetune._model(state, labels=3, sequence_length=24, seed=1)
    assert not torch.equal(found["classifier.weight"], other.state_dict()["classifier.weight"])


def test_scores() -> None:
    truth, answers = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 0, 1, 1])
    found = example.finetune.scores(answers, truth, 2)
    # 3 true positives, 3 true negatives, 1 and 1 false.
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.75, "matthews": 0.5})
    constant = example.finetune.scores(np.zeros(8, dtype=int), truth, 2)
    assert constant == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}


def test_rows_are_encoded_as_in_pretraining(run: Path) -> None:
    state, _ = example.checkpoint.newest_sound(run, "--checkpoint")
    tokenizer = example.finetune.Tokenizer.from_str(state["tokenizer"])
    rows = [example.task.Row(("abcd " * 9, "efgh"), "x"), example.task.Row(("ab", "cd"), "y")]
    batch = example.task.EncodedRows(rows, ["x", "y"], tokenizer, 12).batch([0, 1])
    ids, kinds = batch["input_ids"], batch["token_type_ids"]
    assert ids.shape == (2, 12)
    assert batch["labels"].tolist() == [0, 1]
    assert ids[:, 0].tolist() == [example.data.CLS] * 2
    assert (ids == example.data.SEP).sum(1).tolist() == [2, 2]
    b = tokenizer.encode("efgh", add_special_tokens=False).ids
    assert ids[0, -len(b) - 1 : -1].tolist() == b
    assert kinds[0].tolist() == [0] * (11 - len(b)) + [1] * (len(b) + 1)
    length = int(batch["attention_mask"][1].sum())
    assert ids[1, length:].eq(example.data.PAD).all()
    assert ids[1, length - 1] == example.data.SEP


@pytest.mark.parametrize(
    ("header", "row", "where"),
    [
        ("sentence\tlabel", "A b.\t1", ()),
        ("pairID\tpremise\thypothesis\tgold_label", "7\tA b.\tC.\t1", ()),
        ("x\ty", "A b.\t1", ("--text-columns", "X", "--label-column", "y")),
        ("gj04\t1\t*\tA b.", "gj04\t1\t*\tA b.", ("--text-columns", "4", "--label-column", "2")),
    ],
    ids=["sst-2", "snli", "names", "cola"],
)
def test_column_forms(header: str, row: str, where: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(f"{header}\n{row}\n")
    text, label = (where[1:2], where[3]) if where else ((), None)
    rows, _ = example.task.read_rows(path, "--task-file", text, label)
    assert rows[-1].texts[0] == "A b."
    assert rows[-1].label == "1"
    assert len(rows) == (2 if header == row else 1)


def test_only_line_ends_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes('sentence\tlabel\r\nA\u2028b\x85c "d.\t1\r\nE\x0b.\t0'.encode())
    rows, _ = example.task.read_rows(path, "--task-file", (), None)
    assert [(row.texts[0], row.label) for row in rows] == [
        ('A\u2028b\x85c "d.', "1"),
        ("E\x0b.", "0"),
    ]


def test_damaged_rows_are_left_out_when_that_is_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, damaged = write_task(tmp_path / "whole.tsv", 20, 0), tmp_path / "damaged.tsv"
    lines = whole.read_text().splitlines()
    # A line end in a text, and a column too many.
    lines[3:3] = ["7\tA text that", "goes on.\tB.\tno", "8\tA.\tB.\tC.\tno"]
    damaged.write_text("\n".join(lines) + "\n")
    losses = []
    for path, more in ((whole, ()), (damaged, ("--damaged-rows", "skip"))):
        out = tmp_path / path.stem
        argv = ["--task-file", str(path), "--task-dev", str(whole), "--out", str(out), *more]
        assert finetune(run, *argv, "--epochs", "1") == 0
        printed = capsys.readouterr().err
        assert (f"left out 3 of 23 rows of {damaged}" in printed) == bool(more)
        losses.append(json.loads((out / "metrics.json").read_text())["runs"][0]["losses"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("content", "more", "complaint"),
    [
        (None, (), "--task-file: cannot read"),
        (b"", (), "is empty"),
        (b"sentence\tlabel\n", (), "a header and no rows"),
        (b"sentence\tlabel\nA.\t1\nB.\n", (), "line 3 of .* has 1 columns.* --damaged-rows skip"),
        (b"sentence\tlabel\nB.\n", ("--damaged-rows", "skip"), "no undamaged rows"),
        (b"a\tb\nA.\t1\n", (), "name the text columns of .*: a, b"),
        (b"sentence\tb\nA.\t1\n", (), "name the label column"),
        (b"sentence\tlabel\nA.\t1\n", ("--text-columns", "body"), "no column 'body'"),
        (b"sentence\tlabel\nA.\t1\nB.\t1\n", (), "has 1 labels"),
        (b"sentence\tlabel\nA.\t1.0\nB.\t2.5\nC.\t0.3\nD.\t4", (), "has 4 labels in 4"),
        (b"sentence\tlabel\nA\xff.\t1\n", (), "byte 16 cannot be decoded"),
        (b"sentence\tlabel\nA.\t1\nB.\t2\n" * 1, ("--sequence-length", "600"), "512 positions"),
    ],
)
def test_bad_task_files(
    content: bytes | None, more: tuple[str, ...], complaint: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "a.tsv"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    argv = ["--task-file", str(path), "--task-dev", str(path), "--out", str(out), *more]
    assert finetune(run, *argv) == 2
    capture = capsys.readouterr().err.splitlines()[-1]
    assert capture.startswith("error: --")
    assert re.search(complaint, capture), capture
    assert not out.exists()


def test_refuses_unknown_labels_results_and_folders(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = write_task(tmp_path / "train.tsv", 20, 0)
    dev = tmp_path / "dev.tsv"
    dev.write_text(train.read_text().replace("\tyes", "\tmaybe"))

    def error(*argv: str) -> str:
        assert finetune(run, "--task-file", str(train), *argv) == 2
        return capsys.readouterr().err

    assert "training rows have not: maybe" in error("--task-dev", str(dev))
    assert "--checkpoint" in error("--checkpoint", str(tmp_path / "none"))
    lamb = ["--checkpoint", str(run), "--task-file", str(train), "--optimizer", "lamb"]
    assert example.finetune.main(lamb) == 2
    assert "error: --lr: the paper fine-tunes nothing with lamb" in capsys.readouterr().err
    assert "no sound checkpoint" in error("--checkpoint", str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.checkpoint, "FORMAT", 3)
        example.checkpoint.save(tmp_path, 1, {"step": 1})
    message = error("--checkpoint", str(tmp_path))
    assert "error: --checkpoint: " in message
    assert "was written by another version" in message
    (tmp_path / "metrics.json").write_text("mine")
    assert "give --overwrite" in error("--out", str(tmp_path))
    assert (tmp_path / "metrics.json").read_text() == "mine"
