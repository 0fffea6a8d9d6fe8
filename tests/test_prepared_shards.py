"""prepare.py and the data it makes: formats, stretches, kills, determinism, errors."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bert_runs import (
    FOLDER,
    READING,
    STEPS,
    arguments,
    assert_same_training,
    example,
    newest_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

_SMALL = "--vocab-size 256 --sequence-lengths 32 16 --held-out-share 0.2 --shard-text 0.005"
SMALL = [*_SMALL.split(), "--processes", "1"]


def prepare(corpus: Path | str, out: Path, *more: str) -> int:
    return example.prepare.main(["--corpus", str(corpus), "--out", str(out), *SMALL, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def prepared(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("prepared") / "shards"
    assert prepare(corpus_file, out) == 0
    train, held_out, tokenizer, fingerprint = example.shards.open_shards(out, [32])
    return SimpleNamespace(
        out=out, train=train, held_out=held_out, tokenizer=tokenizer, fingerprint=fingerprint
    )


# The permutation.


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 1000, 4097])
def test_permuted_is_a_permutation(size: int) -> None:
    keys = np.random.SeedSequence(size).generate_state(6, np.uint64).tolist()
    assert sorted(example.data.permuted(i, size, keys) for i in range(size)) == list(range(size))


def test_permutations_look_random() -> None:
    """Fixed points, kept neighbours and places are as frequent as in a shuffle."""
    size, trials = 997, 40
    places, fixed, neighbours = [], 0, 0
    for trial in range(trials):
        keys = np.random.SeedSequence([1, trial]).generate_state(6, np.uint64).tolist()
        order = [example.data.permuted(i, size, keys) for i in range(size)]
        places += order[:100]
        fixed += sum(i == image for i, image in enumerate(order))
        neighbours += sum(b - a == 1 for a, b in pairwise(order))
    # Both counts are about Poisson with mean 1 a trial.
    assert abs(fixed - trials) < 5 * trials**0.5
    assert abs(neighbours - trials) < 5 * trials**0.5
    histogram = np.histogram(places, bins=10, range=(0, size))[0]
    expected = len(places) / 10
    assert ((histogram - expected) ** 2 / expected).sum() < 33.7  # chi^2, 9 df, p = 1e-4


def test_a_large_permutation_takes_no_memory() -> None:
    size = 10**12 + 39
    images = {example.data.permuted(i, size, [1, 2, 3, 4, 5, 6]) for i in range(500)}
    assert len(images) == 500
    assert max(images) < size
    assert max(images) > size // 2


# Shards are the corpus.


def test_shards_hold_what_reading_the_text_gives(
    prepared: SimpleNamespace, corpus_file: Path
) -> None:
    parts = example.texts.load_corpus([str(corpus_file)], READING, 0.2)
    assert len(prepared.train) > 3
    assert prepared.tokenizer.to_str() == example.corpus.train_tokenizer(parts[0], 256).to_str()
    for documents, stores in zip(parts, (prepared.train, prepared.held_out), strict=True):
        whole = example.store.tokenize(documents, prepared.tokenizer, 6)
        assert stores[0].tokens.dtype == np.uint16
        assert np.array_equal(np.concatenate([s.tokens for s in stores]), whole.tokens)
        assert sum(s.documents for s in stores) == whole.documents == len(documents)
        assert np.array_equal(sum(s.counts for s in stores), whole.counts)
        lengths = np.concatenate([np.diff(s.sentence_starts) for s in stores])
        assert np.array_equal(lengths, np.diff(whole.sentence_starts))
        chunks = [len(s.chunks[32]) for s in stores]
        assert sum(chunks) == len(example.store.cut_chunks(whole, 32))


def test_a_given_vocabulary_makes_the_same_shards(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    at = SMALL.index("--vocab-size")
    options = [*SMALL[:at], *SMALL[at + 2 :], "--tokenizer", str(prepared.out / "tokenizer.json")]
    argv = ["--corpus", str(corpus_file), "--out", str(tmp_path / "shards"), *options]
    assert example.prepare.main(argv) == 0
    found, expected = contents(tmp_path / "shards"), contents(prepared.out)
    assert found.pop("plan.json") != expected.pop("plan.json")
    assert found == expected


def test_both_parts_of_a_shard_are_one_open_file(prepared: SimpleNamespace) -> None:
    def mapping(array: np.ndarray) -> object:
        while isinstance(array, np.ndarray):
            array = array.base
        return array

    for train, held_out in zip(prepared.train, prepared.held_out, strict=True):
        assert isinstance(mapping(train.tokens), mmap.mmap)
        assert mapping(train.tokens) is mapping(held_out.tokens)


def test_uneven_files_do_not_make_too_many_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.prepare, "_SMALLEST_SHARD", 1)
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("A sentence. " * 8)
    argv = ["--corpus", str(tmp_path), "--out", "unused"]
    plan = example.prepare.make_plan(example.prepare._parser().parse_args(argv))
    assert 100 < len(plan.units) <= 256
    assert sum(len(unit) for unit in plan.units) == 300


def test_examples_cross_shards_and_keep_to_documents(prepared: SimpleNamespace) -> None:
    data, stores = example.data, prepared.train
    examples = data.PretrainingExamples(stores, 32, 256, seed=0)
    shards_of_negatives = set()
    for index in range(3 * len(examples)):
        item = examples.example(*divmod(index, len(examples)))
        a_place, a_first, a_last = item.a_sentences
        b_place, b_first, _ = item.b_sentences
        document = stores[a_place].document_of(a_first)
        assert document[0] <= a_first < a_last <= document[1]
        same = a_place == b_place and document == stores[b_place].document_of(b_first)
        assert same == (item.next_sentence_label == data.IS_NEXT)
        if not same:
            shards_of_negatives.add((a_place, b_place))
    count = len(stores)
    assert len(shards_of_negatives) > 0.9 * count * count
    for epoch in (0, 1):
        visited = {examples.chunk(epoch, i)[:2] for i in range(len(examples))}
        assert len(visited) == len(examples)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets worker processes import the example's modules, which the tests hide from one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name, module in vars(example).items():
        monkeypatch.setitem(sys.modules, name, module)


def whole_text(prepared: SimpleNamespace, corpus_file: Path) -> object:
    documents, _ = example.texts.load_corpus([str(corpus_file)], READING, 0.2)
    store = example.store.tokenize(documents, prepared.tokenizer, 6)
    return example.data.PretrainingExamples([store], 32, 256, seed=3)


@pytest.mark.parametrize(("ranks", "processes"), [(1, 0), (2, 0), (4, 0), (2, 2)])
@pytest.mark.usefixtures("importable")
def test_ranks_and_resumes_divide_the_same_stream(
    ranks: int, processes: int, prepared: SimpleNamespace, corpus_file: Path
) -> None:
    """However many ranks, loader processes and shards, wherever a run starts: the same batches."""
    batch, steps = 8, 5
    expected = whole_text(prepared, corpus_file).batch(0, batch * steps)
    share = batch // ranks
    # Processes take long to start.
    for start in (2,) if processes else (0, 2):
        stores, _, _, _ = example.shards.open_shards(prepared.out, [32])
        examples = example.data.PretrainingExamples(stores, 32, 256, seed=3)
        with example.loader.Loader(examples, processes) as loader:
            for step in range(start, steps):
                pieces = []
                for rank in range(ranks):
                    pieces.append(loader.batch(step * batch + rank * share, share))
                    loader.expect((step + 1) * batch + rank * share, share)
                # What stops a run reaches its workers, too, which still serve its last step.
                for process in multiprocessing.active_children():
                    process.terminate()
                for name, tensor in expected.items():
                    found = torch.cat([piece[name] for piece in pieces])
                    assert found.dtype == tensor.dtype
                    assert torch.equal(found, tensor[step * batch : (step + 1) * batch]), name


def test_run_on_shards_resumes_bit_exactly_from_another_place(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    base = arguments(corpus_file, tmp_path / "text", "--held-out-share", "0.2")
    at = base.index("--vocab-size")
    options = [*base[2:at], *base[at + 2 :], "--shards", str(prepared.out)]
    options.remove("--held-out-share"), options.remove("0.2")
    options[options.index("--out") + 1] = str(tmp_path / "shards")
    assert example.pretrain.main(options) == 0
    expected = newest_state(tmp_path / "shards")
    assert expected["step"] == STEPS
    example.checkpoint.checkpoints(tmp_path / "shards")[0].unlink()
    moved = tmp_path / "moved"
    moved.symlink_to(prepared.out)
    # The options of the run may be said again.
    resume = [*options, "--resume", "--shards", str(moved)]
    assert example.pretrain.main([*resume, "--held-out-share", "0.1"]) == 2
    out = ["--out", str(tmp_path / "shards")]
    assert example.pretrain.main([*out, "--resume", "--held-out-share", "0.1"]) == 2
    assert example.pretrain.main(resume) == 0
    assert_same_training(expected, newest_state(tmp_path / "shards"))


# Stretches: however a file is cut, its documents come once and in order.

WIKI = "".join(
    f'<doc id="{i}" title="T {i}">\nT {i}\n\nFirst of {i}. Second.\n\nThird of {i}.\n</doc>\n'
    for i in range(30)
)
JSONL = "".join(
    json.dumps({"id": i, "text": f"First of {i}. Second.\n\nThird of {i}."}) + "\n\n"[: 1 + i % 2]
    for i in range(30)
)
TEXT = "\ufeff" + "".join(
    f"First of {i}. Second\nof é.{chr(10) * (2 + i % 3)}" for i in range(30)
).replace("\n\n", "\n \r\n", 5)


@pytest.mark.parametrize(
    ("name", "content", "kind", "first"),
    [
        ("a.txt", TEXT, "text", ["First of 0.", "Second of é."]),
        ("wiki_00", WIKI, "wiki", ["T 0", "First of 0.", "Second.", "Third of 0."]),
        ("a.jsonl", JSONL, "jsonl", ["First of 0.", "Second.", "Third of 0."]),
        ("wiki_01", JSONL, "jsonl", ["First of 0.", "Second.", "Third of 0."]),
    ],
)
def test_stretches_of_any_size_give_the_same_documents(
    name: str, content: str, kind: str, first: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())

    def read(size: int) -> list[list[str]]:
        parts = example.sources.stretches(path, READING, size)
        assert sum(part.size for part in parts) == len(content.encode())
        assert {part.format for part in parts} == {kind}
        found = [list(example.sources.documents(part, READING)) for part in parts]
        return [document for documents in found for document in documents if document]

    whole = read(10**9)
    assert whole[0] == first
    assert len(whole) == 30
    for size in (1, 2, 7, 50, 333, 1000):
        assert read(size) == whole, size


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", "[Illustration]\n", "text"),
        ("a.txt", "[[A link]] and more.", "text"),
        ("a", "{curly} words", "text"),
        ("a", "<3 is a heart", "text"),
        ("a", '\n{"title": "A", "body": "B."}\n', "jsonl"),
        ("a", '\ufeff{"title": "A", "body": "B."}\n', "jsonl"),
        ("a.csv", "id,text\n1,A.\n", None),
        ("a.tsv", "id\ttext\n1\tA.\n", None),
        ("a.txt", '\n<?xml version="1.0"?>\n<doc id="1">', None),
        ("a", "\ufeff<!DOCTYPE html>\n", None),
        ("a", "<mediawiki>\n", None),
        ("a.json", '{\n  "text": "A."\n}\n', None),
        ("a.json", '[{"text": "A."},\n', None),
        ("a.json", "[\n", None),
    ],
)
def test_only_text_passes_for_text(
    name: str, content: str, kind: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    if kind:
        assert example.sources.format_of(path, READING) == kind
        return
    with pytest.raises(example.errors.UserError, match=r"--corpus: .* looks like .* --format"):
        example.sources.format_of(path, READING)
    as_text = example.sources.Reading("text", "text", "error")
    assert example.sources.format_of(path, as_text) == "text"


def test_parquet_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [f"First of {i}. Second." for i in range(30)], "id": range(30)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    parts = example.sources.stretches(tmp_path / "a.parquet", READING, 10)
    assert len(parts) == 5
    found = [d for part in parts for d in example.sources.documents(part, READING)]
    assert found == [[f"First of {i}.", "Second."] for i in range(30)]
    numbers = example.sources.Reading("auto", "id", "error")
    with pytest.raises(example.errors.UserError, match=r"'id' of .* has int64, not text"):
        list(example.sources.documents(parts[0], numbers))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert prepare(tmp_path / "a.parquet", tmp_path / "out") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


# Kills.


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finished_folder_is_left_alone_or_made_anew(
    overwrite: bool, prepared: SimpleNamespace, corpus_file: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(prepared.out)
    times = {p: p.stat().st_mtime_ns for p in prepared.out.glob("shard-*")}
    assert prepare(corpus_file, prepared.out, *["--overwrite"] * overwrite) == 0
    assert contents(prepared.out) == before
    unchanged = times == {p: p.stat().st_mtime_ns for p in prepared.out.glob("shard-*")}
    assert unchanged != overwrite
    assert ("already" in capsys.readouterr().out) != overwrite


def test_damaged_and_missing_shards_are_made_again(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "shards"
    out.mkdir()
    expected = contents(prepared.out)
    for name, content in expected.items():
        (out / name).write_bytes(content)
    damaged = out / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(example.checkpoint.UserError, match=r"shard-00001.* is damaged"):
        example.shards.open_shards(out, [32])
    (out / "shard-00000.safetensors").unlink()
    (out / ".writing-1-shard-00000.safetensors").write_bytes(b"half")
    assert prepare(corpus_file, out) == 2
    assert "is damaged; delete it" in capsys.readouterr().err
    damaged.unlink()
    (out / example.shards.MANIFEST).unlink()
    assert prepare(corpus_file, out) == 0
    assert contents(out) == expected
    assert not list(out.glob(".writing*"))


def test_a_call_killed_while_it_wrote_the_plan_goes_on(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".writing-1-plan.json").touch()
    assert prepare(corpus_file, tmp_path) == 0
    assert contents(tmp_path) == contents(prepared.out)


def _in_time(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_killed_at_any_moment_the_same_command_goes_on(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path
) -> None:
    """Interrupted, killed with workers and without; they end, the result has the same bytes."""
    out = tmp_path / "shards"
    # One that reads slowly, so that there is something to kill.
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import store, prepare\n"
        "add = store.StoreBuilder.add\n"
        "def slowly(self, document):\n"
        "    time.sleep(0.01)\n"
        "    add(self, document)\n"
        "store.StoreBuilder.add = slowly\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(prepare.main())\n"
    )
    argv = [sys.executable, str(slow), "--corpus", str(corpus_file), "--out", str(out), *SMALL]
    # Ctrl-C does not wait for the shards that are left.
    for processes, sent in (("2", signal.SIGINT), ("2", signal.SIGKILL), ("1", signal.SIGKILL)):
        done = _shard_count(out)
        process = subprocess.Popen(
            [*argv, "--processes", processes], stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            assert _in_time(lambda before=done: _shard_count(out) > before)
            time.sleep(random.random() * 0.1)
        finally:
            process.send_signal(sent)
            process.wait()
        assert process.returncode == (130 if sent == signal.SIGINT else -sent)
        assert _in_time(lambda group=process.pid: not _group_lives(group))
        assert _shard_count(out) < len(prepared.train)
        assert not (out / "manifest.json").exists()
        with pytest.raises(example.checkpoint.UserError, match="no finished shards"):
            example.shards.open_shards(out, [32])
    first = {p: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert prepare(corpus_file, out) == 0
    assert contents(out) == contents(prepared.out)
    assert first == {p: p.stat().st_mtime_ns for p in first}


def _shard_count(out: Path) -> int:
    return len(list(out.glob("shard-*")))


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # What has ended and waits for init to notice lives no more.
    states = subprocess.run(
        ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False
    ).stdout.split()
    return any(not state.startswith("Z") for state in states)


def test_two_at_a_time_are_refused(
    prepared: SimpleNamespace, corpus_file: Path, capsys: pytest.CaptureFixture
) -> None:
    with example.files.locked(prepared.out):
        assert prepare(corpus_file, prepared.out) == 2
    assert "another process is at work" in capsys.readouterr().err


# Bad input.


@pytest.mark.parametrize(
    ("name", "content", "more", "expected"),
    [
        ("a.txt", None, (), "no file found"),
        ("a.txt", b"", (), "all files are empty"),
        ("a.txt", b" \n\n \n", (), "no text in it"),
        ("a.txt", b"fine.\n\nPK\x03\x00", (), "NUL at byte 10"),
        ("a.txt", b"fine.\n\ntext \xff", (), "byte 12 cannot be decoded"),
        ("a.txt", b"fine.\n\ntext \xff", ("--undecodable", "replace"), "needs two"),
        ("a.txt", b"One. Two.\n\nThree. Four.", (), "training part|train part|held-out part"),
        ("a.txt", b"A. B.", ("--vocab-size", "7"), "--vocab-size: 7 is too small"),
        ("a.jsonl", b'{"text": "A."}\n{"text": ', (), "no JSON, at byte 15"),
        ("a.jsonl", b'{"body": "A."}\n', (), "no text in field 'text', there are: body"),
        ("a", b'{"body": "A."}\n', (), "no text in field 'text', there are: body"),
        ("a.txt", b"A.", ("--tokenizer", "a.txt"), "leave out --vocab-size"),
    ],
)
def test_bad_input(
    name: str,
    content: bytes | None,
    more: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    assert prepare(name, Path("out"), *more) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: --")
    assert re.search(expected, message), message
    assert not list(tmp_path.glob("out/manifest.json"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.txt", "a.txt is no tokenizer.json"), ("none", "--tokenizer: cannot read none")],
)
def test_bad_tokenizer(
    name: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A.")
    assert example.prepare.main(["--corpus", "a.txt", "--out", "out", "--tokenizer", name]) == 2
    assert expected in capsys.readouterr().err


def test_other_options_or_changed_files_are_refused(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(prepared.out)

    def refused(*argv: str) -> str:
        capsys.readouterr()
        assert prepare(*argv) == 2
        assert contents(prepared.out) == before
        return capsys.readouterr().err

    assert "held_out_share differ" in refused(corpus_file, prepared.out, "--held-out-share", "0.3")
    other = tmp_path / "corpus.txt"
    other.write_text(corpus_file.read_text())
    assert "sources, units differ" in refused(other, prepared.out)
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "is not empty" in refused(corpus_file, folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert "is a file" in refused(corpus_file, other)


def test_a_lost_vocabulary_does_not_let_other_options_in(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "shards"
    out.mkdir()
    expected = contents(prepared.out)
    for name in ("plan.json", "shard-00000.safetensors"):
        (out / name).write_bytes(expected[name])
    assert prepare(corpus_file, out, "--vocab-size", "300") == 2
    assert "vocabulary differ" in capsys.readouterr().err
    assert prepare(corpus_file, out) == 0
    assert contents(out) == expected


def test_options_may_change_after_an_early_error(corpus_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(corpus_file, out, "--vocab-size", "7") == 2
    assert prepare(corpus_file, out, "--held-out-share", "0.3") == 0
    assert example.shards.read_manifest(out)["held_out_share"] == 0.3


def test_training_refuses_what_does_not_fit_the_shards(
    prepared: SimpleNamespace, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(shards: Path, *more: str) -> str:
        argv = ["--shards", str(shards), "--out", str(tmp_path / "run"), *more]
        if "--sequence-length" not in more:
            argv += ["--sequence-length", "32"]
        assert example.pretrain.main(argv) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "--vocab-size: 100 is less than" in refused(prepared.out, "--vocab-size", "100")
    assert "were cut for 16, 32, not 64" in refused(prepared.out, "--sequence-length", "64")
    # Shards have their text and held-out part, whatever is asked for, the default included.
    for idle in (
        ["--corpus", str(corpus_file)],
        ["--docstrings"],
        ["--format", "auto"],
        ["--text-field", "text"],
        ["--undecodable", "replace"],
        ["--held-out-share", "0.1"],
    ):
        assert f"leave out {idle[0]}, or give it to prepare.py" in refused(prepared.out, *idle)
    assert "no finished shards" in refused(tmp_path / "nowhere")
    other = tmp_path / "shards"
    other.mkdir()
    for name, content in contents(prepared.out).items():
        (other / name).write_bytes(content)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("[MASK]", "[MUSK]"))
    assert "not the vocabulary that the shards were made with" in refused(other)


def test_interrupt_says_how_to_go_on(
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(example.prepare, "make_shards", interrupt)
    assert prepare(corpus_file, tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err
