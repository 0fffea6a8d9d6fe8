"""The BERT pretraining example: data, checkpoints, and runs from end to end, all tiny."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from bert_runs import (
    READING,
    SCRIPT,
    STEPS,
    arguments,
    assert_same_training,
    example,
    newest_state,
)
from torch import nn

# Runs set the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run from start to end, by the command line as a user has it."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(corpus_file, out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, stdout=done.stdout)


# Runs.


def test_run_leaves_plot_metrics_log_and_checkpoints(undisturbed: SimpleNamespace) -> None:
    out = undisturbed.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == STEPS
    assert metrics["train_mlm_last"] < metrics["train_mlm_first"] - 0.2
    assert metrics["held_out_mlm_end"] < metrics["held_out_mlm_start"] - 0.3
    assert [step for step, _ in metrics["history"]["held_out"]] == [0, 3, 6]
    assert 0 < metrics["optimizer_share"] < 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    steps = [example.checkpoint._step(p) for p in example.checkpoint.checkpoints(out)]
    assert steps == [6, 4]
    for path in (metrics["plot"], metrics["checkpoint"], metrics["metrics"]):
        assert path in undisturbed.stdout
        assert Path(path).is_file()


def test_same_seed_same_run_other_seed_other_run(
    undisturbed: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    assert example.pretrain.main(arguments(corpus_file, tmp_path / "same")) == 0
    assert_same_training(newest_state(undisturbed.out), newest_state(tmp_path / "same"))
    assert example.pretrain.main(arguments(corpus_file, tmp_path / "other", "--seed", "1")) == 0
    same, other = newest_state(tmp_path / "same"), newest_state(tmp_path / "other")
    assert same["history"]["train"] != other["history"]["train"]


@pytest.mark.parametrize("optimizer", ["adamw", "madam", "lamadam", "lamb"])
def test_resume_after_damage_is_bit_exact(
    optimizer: str, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The newest checkpoint is cut short; the one before it leads to the same end."""
    if optimizer != "adamw":
        pytest.importorskip("maxva_kernels")
    out = tmp_path / "run"
    assert example.pretrain.main(arguments(corpus_file, out, "--optimizer", optimizer)) == 0
    expected = newest_state(out)
    newest = example.checkpoint.checkpoints(out)[0]
    newest.write_bytes(newest.read_bytes()[:-1000])
    torch.manual_seed(123)  # Resuming must not lean on the RNG state that it finds.
    capsys.readouterr()
    assert example.pretrain.main(["--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr()
    assert "damaged" in printed.err
    assert "at step 4" in printed.out
    assert_same_training(expected, newest_state(out))


def test_sigterm_then_resume_is_bit_exact(
    undisturbed: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # Evaluating takes no random numbers, so evaluating often costs time and changes nothing.
    slow = ("--eval-every", "1", "--checkpoint-every", "1")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(corpus_file, out, *slow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not example.checkpoint.checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in stdout
    assert not (out / "metrics.json").exists()
    stopped_at = newest_state(out)["step"]
    assert 1 <= stopped_at < STEPS
    assert f"after step {stopped_at}" in stdout
    assert example.pretrain.main(["--out", str(out), "--resume", "--eval-every", "3"]) == 0
    resumed, expected = newest_state(out), newest_state(undisturbed.out)
    # How often it was evaluated differs on purpose.
    resumed["history"].pop("held_out"), expected["history"].pop("held_out")
    assert_same_training(expected, resumed)


def error_of(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    capsys.readouterr()
    assert example.pretrain.main(argv) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_refusals(
    undisturbed: SimpleNamespace, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = undisturbed.out
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    resume = ["--out", str(out), "--resume"]
    assert "--lr 0.005, not 0.5" in error_of(capsys, [*resume, "--lr", "0.5"])
    assert "--optimizer adamw, not madam" in error_of(capsys, [*resume, "--optimizer", "madam"])
    other = tmp_path / "other.txt"
    other.write_text(corpus_file.read_text().replace("Line 7 ", "Line 7000 "))
    assert "--corpus" in error_of(capsys, [*resume, "--corpus", str(other)])
    assert "--overwrite" in error_of(capsys, arguments(corpus_file, out))
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    fresh = tmp_path / "fresh"
    assert "no checkpoint" in error_of(capsys, ["--out", str(fresh), "--resume"])
    assert "--batch-size" in error_of(capsys, [*arguments(corpus_file, fresh, "--batch-size", "7")])
    assert "--sequence-length" in error_of(
        capsys, arguments(corpus_file, fresh, "--sequence-length", "513")
    )
    assert "--vocab-size" in error_of(capsys, arguments(corpus_file, fresh, "--vocab-size", "9"))
    half = arguments(corpus_file, fresh, "--optimizer", "adamw", "--state-dtype", "bfloat16")
    assert "--state-dtype: adamw" in error_of(capsys, half)
    assert not fresh.exists()


def test_other_formats_are_the_same_corpus(
    undisturbed: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    rows = [{"body": text} for text in corpus_file.read_text().split("\n\n")]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = arguments(path, tmp_path / "run", "--text-field", "body")
    assert example.pretrain.main(argv) == 0
    assert_same_training(newest_state(undisturbed.out), newest_state(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no file found"),
        (b"", "no text"),
        (b" \n\n \n", "no text"),
        (b"One document only. It has two sentences.", "at least 2"),
        (b"text \xff\xfe more", "byte 5"),
        (b"PK\x03\x04\x00\x00", "binary"),
        (b"<html>\nOne. Two.\n\nThree. Four.\n", "looks like"),
    ],
    ids=["missing", "empty", "blank", "one document", "undecodable", "binary", "markup"],
)
def test_corpus_errors(
    content: bytes | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    message = error_of(capsys, arguments(path, tmp_path / "run"))
    assert message.startswith("error: --corpus: ")
    assert expected in message


def test_overwrite_deletes_the_run_and_nothing_else(
    undisturbed: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for path in undisturbed.out.iterdir():
        (out / path.name).mkdir() if path.is_dir() else (out / path.name).touch()
    # What a killed run was writing.
    for name in ("checkpoint.tmp", ".writing-1-metrics.json"):
        (out / name).touch()
    (out / "notes.txt").write_text("keep me")
    example.pretrain._delete_run(out)
    # the lock is the new run's by then
    assert sorted(p.name for p in out.iterdir()) == [".lock", "notes.txt"]


def test_one_process_at_a_time_works_in_a_folder(
    undisturbed: SimpleNamespace, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed.out, out)
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import files, pathlib\n"
        "with files.owned(pathlib.Path(sys.argv[1])):\n"
        "    print('owned', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "owned\n"
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        for argv in (["--out", str(out), "--resume"], arguments(corpus_file, out, "--overwrite")):
            assert "another process is at work" in error_of(capsys, argv)
        assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    finally:
        other.kill()
        other.communicate()
    # a killed process keeps nobody out, nor does its lock alone make a folder one of a run
    assert example.pretrain.main(arguments(corpus_file, out, "--overwrite")) == 0
    left = tmp_path / "left"
    left.mkdir()
    (left / ".lock").touch()
    assert example.pretrain.main(arguments(corpus_file, left)) == 0
    assert_same_training(newest_state(left), newest_state(out))


# Checkpoints and other files.


def test_metrics_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    example.report.write_metrics(path, {"value": 1})

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            example.report.write_metrics(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    example.report.write_metrics(path, {"value": 3})
    assert json.loads(path.read_text()) == {"value": 3}


def test_interrupted_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example.checkpoint.save(tmp_path, 1, {"value": 1})

    def fail(state: object, file: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            example.checkpoint.save(tmp_path, 2, {"value": 2})
    state, path, damaged = example.checkpoint.load_latest(tmp_path)
    assert state == {"value": 1}
    assert damaged == []
    for step in (2, 3, 3):
        example.checkpoint.save(tmp_path, step, {"value": os.urandom(4).hex()})
    assert [example.checkpoint._step(p) for p in example.checkpoint.checkpoints(tmp_path)] == [3, 2]
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_another_versions_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(example.checkpoint, "FORMAT", 3)
        path = example.checkpoint.save(tmp_path, 1, {"step": 1})
    message = error_of(capsys, ["--out", str(tmp_path), "--resume"])
    assert message == f"error: --resume: {path} was written by another version of this example."


def test_flipped_bit_is_recognised(tmp_path: Path) -> None:
    example.checkpoint.save(tmp_path, 1, {"value": 1})
    path = example.checkpoint.save(tmp_path, 2, {"weights": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    state, _, damaged = example.checkpoint.load_latest(tmp_path)
    assert state == {"value": 1}
    assert len(damaged) == 1
    assert damaged[0].is_file()


# Data.


@pytest.fixture(scope="module")
def tokenized(corpus_file: Path) -> SimpleNamespace:
    train, held_out = example.texts.load_corpus([str(corpus_file)], READING, 0.2)
    tokenizer = example.corpus.train_tokenizer(train, 256)
    store = example.store.tokenize(train, tokenizer, 14)
    examples = example.data.PretrainingExamples([store], 32, tokenizer.get_vocab_size(), seed=0)
    return SimpleNamespace(
        train=train, held_out=held_out, tokenizer=tokenizer, store=store, examples=examples
    )


def test_example_is_a_function_of_seed_epoch_and_index(tokenized: SimpleNamespace) -> None:
    def build(seed: int) -> ModuleType:
        vocab = tokenized.tokenizer.get_vocab_size()
        return example.data.PretrainingExamples([tokenized.store], 32, vocab, seed)

    size = len(tokenized.examples)
    # Jumping between epochs in any order gives what a walk from the start gives.
    walked = tokenized.examples.batch(0, 2 * size + 3)
    jumped = build(0)
    for index in (2 * size + 1, 5, size, 0, size - 1):
        for name, tensor in jumped.batch(index, 1).items():
            assert torch.equal(tensor[0], walked[name][index]), (name, index)
    assert not torch.equal(build(1).batch(0, 4)["input_ids"], walked["input_ids"][:4])
    epochs = walked["input_ids"][:size], walked["input_ids"][size : 2 * size]
    assert not torch.equal(*epochs)


def test_every_epoch_visits_every_chunk_once(tokenized: SimpleNamespace) -> None:
    examples = tokenized.examples
    expected = example.store.cut_chunks(tokenized.store, 32).tolist()
    for epoch in (0, 1):
        chunks = [examples.chunk(epoch, i) for i in range(len(examples))]
        firsts = [examples.example(epoch, i).a_sentences[1] for i in range(len(examples))]
        assert firsts == [first for _, first, _ in chunks]
        assert firsts != sorted(firsts) == expected
    covered = {s for _, first, last in chunks for s in range(first, last)}
    assert covered == set(range(tokenized.store.sentences))


def test_masking_statistics(tokenized: SimpleNamespace) -> None:
    data = example.data
    batch = tokenized.examples.batch(0, 4000)
    ids, labels = batch["input_ids"], batch["labels"]
    chosen = labels != data.IGNORED_LABEL
    special = (ids == data.CLS) | (ids == data.SEP) | (ids == data.PAD)
    assert not (chosen & special).any()
    assert not (chosen & ((labels == data.CLS) | (labels == data.SEP))).any()
    ordinary = (batch["attention_mask"] == 1) & ~special
    expected = [max(1, round(0.15 * n)) for n in ordinary.sum(1).tolist()]
    assert chosen.sum(1).tolist() == expected
    count = sum(expected)
    masked = (ids[chosen] == data.MASK).float().mean().item()
    kept = (ids[chosen] == labels[chosen]).float().mean().item()
    # Four standard deviations of the 80/10/10 draw; a random token is sometimes the same one.
    assert masked == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / count) ** 0.5)
    assert kept == pytest.approx(0.1 + 0.1 / 250, abs=4 * (0.1 * 0.9 / count) ** 0.5)
    assert not (ids[~chosen] == data.MASK).any()
    assert ids.max() < tokenized.tokenizer.get_vocab_size()


def test_next_sentence_pairs(tokenized: SimpleNamespace) -> None:
    data, store = example.data, tokenized.store
    document_of = np.searchsorted(
        store.document_starts, np.arange(len(store.sentence_starts) - 1), side="right"
    )
    answers = []
    for index in range(2000):
        item = tokenized.examples.example(*divmod(index, len(tokenized.examples)))
        answers.append(item.next_sentence_label)
        ids = np.where(item.labels == data.IGNORED_LABEL, item.input_ids, item.labels)
        seam, end = np.flatnonzero(ids == data.SEP)
        a, b = ids[1:seam], ids[seam + 1 : end]
        assert ids[0] == data.CLS
        assert end == len(ids) - 1
        assert len(a)
        assert len(b)
        assert (item.token_type_ids == (np.arange(len(ids)) > seam)).all()
        # A is the end of its sentences and B the beginning of its own.
        a_sentences, b_sentences = item.a_sentences[1:], item.b_sentences[1:]
        assert (a == store.span(*a_sentences)[-len(a) :]).all()
        assert (b == store.span(*b_sentences)[: len(b)]).all()
        documents = [document_of[s[0]] for s in (a_sentences, b_sentences)]
        if item.next_sentence_label == data.IS_NEXT:
            assert b_sentences[0] == a_sentences[1]
            assert documents[0] == documents[1] == document_of[b_sentences[1] - 1]
        else:
            assert documents[0] != documents[1]
    share = answers.count(data.IS_NEXT) / len(answers)
    assert share == pytest.approx(0.5, abs=4 * 0.5 / len(answers) ** 0.5)


def test_tokenizer_is_reproducible(tokenized: SimpleNamespace) -> None:
    again = example.corpus.train_tokenizer(tokenized.train, 256)
    assert again.to_str() == tokenized.tokenizer.to_str()
    # Only the five special tokens are special: the piece ##a is not matched in raw text.
    assert again.encode("[MASK] ##a").tokens[:2] == ["[MASK]", "[UNK]"]


def test_split_depends_on_the_text_only(corpus_file: Path, tmp_path: Path) -> None:
    _, held_out = example.texts.load_corpus([str(corpus_file)], READING, 0.2)
    blocks = corpus_file.read_text().split("\n\n")
    shuffled = tmp_path / "shuffled.txt"
    shuffled.write_text("\n\n".join([*reversed(blocks), "Something new. It is added."]))
    _, held_out_again = example.texts.load_corpus([str(shuffled)], READING, 0.2)
    texts = {tuple(d) for d in held_out}
    assert len(texts) > 5
    assert texts == {tuple(d) for d in held_out_again} - {("Something new.", "It is added.")}


@pytest.mark.parametrize(
    ("block", "sentences"),
    [
        ("It is wrapped\nhere. And goes on.", ["It is wrapped here.", "And goes on."]),
        ("one per line .\nlower case too .", ["one per line .", "lower case too ."]),
        ("x = 1\ny = 2", ["x = 1", "y = 2"]),
        ('See e.g. Smith. "Quoted?" Yes!', ["See e.g. Smith.", '"Quoted?"', "Yes!"]),
    ],
)
def test_sentence_splitting(block: str, sentences: list[str]) -> None:
    assert example.corpus.split_sentences(block) == sentences


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Text.")
    found = example.corpus.corpus_files([str(tmp_path), str(tmp_path / "*.txt")])
    assert [p.name for p in found] == ["a.txt", "b.txt", "c.md"]


def test_python_documentation_is_split_without_overlap() -> None:
    train, held_out = example.texts.load_corpus([], READING, 0.1)
    assert sum(len(s) for d in train for s in d) > 100_000
    long = {s for d in train for s in d if len(s) > 100}
    shared = [s for d in held_out for s in d if s in long]
    assert len(shared) <= 3


# Model, optimizer, schedule.


def tiny_model() -> nn.Module:
    shape = example.model.Shape(layers=1, hidden=16, heads=2, vocab_size=64, positions=32)
    torch.manual_seed(0)
    return example.pretrain.BertForPreTraining(shape.config(64))


def test_undecayed_group_is_biases_and_layer_norm() -> None:
    model = tiny_model()
    decayed, undecayed = example.model.decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert undecayed["weight_decay"] == 0.0
    without = {names[id(p)] for p in undecayed["params"]}
    assert without == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - without
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)


def test_losses_agree_with_the_models_own(tokenized: SimpleNamespace) -> None:
    batch = tokenized.examples.batch(0, 6)
    shape = example.model.Shape(layers=1, hidden=16, heads=2, vocab_size=256, positions=32)
    model = example.pretrain.BertForPreTraining(shape.config(256)).eval()
    mlm, nsp, correct = example.model.pretraining_losses(model, batch)
    expected = model(**batch)
    masked = (batch["labels"] != example.data.IGNORED_LABEL).sum()
    torch.testing.assert_close(mlm / masked + nsp / 6, expected.loss)
    answers = expected.seq_relationship_logits.argmax(-1)
    assert correct == (answers == batch["next_sentence_label"]).sum()


def test_schedule() -> None:
    def lrs(whole: bool) -> list[float]:
        phases = [
            example.recipes.Phase(0, 0, 32, 10, 8, 8, lr=2.0, warmup=0.2),
            example.recipes.Phase(1, 10, 64, 4, 8, 8, lr=1.0, warmup=0.5),
        ]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = example.optimizers.schedule(optimizer, phases, power=2.0, whole=whole)
        found = []
        for _ in range(14):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    decay = [2.0 * ((10 - step) / 8) ** 2 for step in range(2, 10)]
    assert lrs(whole=False) == pytest.approx([1.0, 2.0, *decay, 0.5, 1.0, 1.0, 0.25])
    decay = [2.0 * ((10 - step) / 10) ** 2 for step in range(2, 10)]
    assert lrs(whole=True) == pytest.approx([1.0, 2.0, *decay, 0.5, 1.0, 0.25, 0.0625])


@pytest.mark.parametrize("name", ["madam", "lamadam"])
def test_maxva_optimizers_tell_what_they_do(name: str, corpus_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("maxva_kernels")
    out = tmp_path / "run"
    assert example.pretrain.main(arguments(corpus_file, out, "--optimizer", name)) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    told = metrics["history"]["telemetry"]
    assert len(told) == STEPS
    for weights, others in told:
        assert 0.5 <= weights["mean_beta"] <= 0.999
        assert weights["skipped_steps"] == others["skipped_steps"] == 0
        assert weights["grad_norm"] > 0
    # the first observation of every coordinate has beta_t = betas[1], later ones may not
    assert told[0][0]["share_at_beta_max"] == 1 > told[-1][0]["share_at_beta_max"]
    assert Path(metrics["telemetry"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["madam", "lamadam"])
def test_maxva_optimizers_get_their_arguments(name: str) -> None:
    pytest.importorskip("maxva_kernels")
    settings = {
        "optimizer": name,
        "betas": [0.9, 0.99],
        "beta_min": 0.25,
        "max_grad_norm": 0.5,
        "state_dtype": "int8",
    }
    model = tiny_model()
    optimizer, step = example.optimizers.build_optimizer(
        example.model.decay_groups(model, 0.1), settings, 1e-3
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3
        assert group["betas"] == (0.9, 0.99)
        assert group["beta_min"] == 0.25
        assert group["max_grad_norm"] == 0.5
        assert group["state_dtype"] == "int8"
    model.cls.seq_relationship.bias.grad = torch.ones(2)
    before = model.cls.seq_relationship.bias.detach().clone()
    step()
    assert (model.cls.seq_relationship.bias < before).all()


def test_adamws_8_bit_states_are_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        pass

    settings = {"optimizer": "adamw", "betas": [0.9, 0.99], "max_grad_norm": 0.5}
    groups = example.model.decay_groups(tiny_model(), 0.1)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(example.errors.UserError, match="pip install bitsandbytes"):
        example.optimizers.build_optimizer(groups, {**settings, "state_dtype": "int8"}, 1e-3)
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(AdamW8bit=AdamW8bit))
    for state_dtype, cls in (("int8", AdamW8bit), ("float32", torch.optim.AdamW)):
        optimizer, _ = example.optimizers.build_optimizer(
            groups, {**settings, "state_dtype": state_dtype}, 1e-3
        )
        assert type(optimizer) is cls
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_runs_without_a_folder_get_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def out(*argv: str) -> str:
        return str(example.settings.parse_settings(argv)[0]["out"])

    assert out() == "runs/bert-1"
    for name in ("bert-2", "bert-10", "bert-base"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert out() == "runs/bert-11"
    assert out("--resume") == "runs/bert-10"
    assert out("--overwrite") == "runs/bert-10"
    assert out("--out", "elsewhere") == "elsewhere"
