"""Turns text into memory-mapped token shards for `pretrain.py --shards`, once, in parallel.

python examples/bert_pretraining/prepare.py --corpus texts/ --out shards

Stopped at any moment, the same command goes on: what has its name is whole, and the shards do not
depend on the number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import files
import shards
import sources
import workers
from corpus import SPECIAL_TOKENS, Document, corpus_files, is_held_out, train_tokenizer
from errors import UserError, exit_status
from options import number
from sources import Reading, Stretch
from store import StoreBuilder, max_sentence_tokens
from tokenizers import Tokenizer
from tqdm import tqdm

PLAN = "plan.json"
_MEBI = 1 << 20
# Mapped files count against the open files of a process.
_MOST_SHARDS = 256
_SMALLEST_SHARD = 64 * _MEBI
_VOCAB_SIZE, _VOCAB_TEXT = 30522, 100


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turns text into memory-mapped token shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    sources.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the shards that are in --out"
    )
    parser.add_argument(
        "--sequence-lengths",
        nargs="+",
        type=number(int, 8, 512),
        default=[128, 512],
        metavar="N",
        help="lengths that the shards can be trained with",
    )
    parser.add_argument(
        "--held-out-share",
        type=number(float, 0.0, 0.9),
        default=0.02,
        help="share of documents to hold out",
    )
    parser.add_argument(
        "--vocab-size", type=number(int, 1), help=f"WordPiece vocabulary; None: {_VOCAB_SIZE}"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json of other shards or of a run, in place of a new vocabulary",
    )
    parser.add_argument(
        "--vocab-text",
        type=number(int, 1),
        metavar="MB",
        help="how much of the text, from all over, the vocabulary is made from; None: "
        f"{_VOCAB_TEXT}",
    )
    parser.add_argument(
        "--shard-text",
        type=number(float, 0.0, open_low=True),
        metavar="MB",
        help=f"text of a shard; None: {_SMALLEST_SHARD // _MEBI}, or as much as it takes for "
        f"{_MOST_SHARDS} shards at most",
    )
    parser.add_argument(
        "--processes",
        type=number(int, 1),
        default=os.cpu_count() or 1,
        help="worker processes; the result does not depend on it",
    )
    return parser


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the shards depend on; the same plan gives the same shards.

    Attributes:
        reading: How files are read.
        sequence_lengths: Lengths that chunks are cut for.
        held_out_share: Share of documents to hold out.
        vocabulary: Size and text of a new one, or the digest of a given one.
        sources: Path, size and time of change of every file.
        units: The stretches of every shard.
    """

    reading: Reading
    sequence_lengths: list[int]
    held_out_share: float
    vocabulary: list[Any]
    sources: list[list[Any]]
    units: list[list[Stretch]]

    def as_json(self) -> dict[str, Any]:
        """As a file gives it back."""
        return json.loads(json.dumps({"format": shards.FORMAT, **dataclasses.asdict(self)}))

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(stretch.size for unit in self.units for stretch in unit)


def make_plan(options: argparse.Namespace) -> Plan:
    """Looks at the files and divides them among shards."""
    reading = Reading(options.format, options.text_field, options.undecodable)
    paths = corpus_files(options.corpus)
    about = [(path, path.stat()) for path in paths]
    total = sum(stat.st_size for _, stat in about)
    target = (
        round(options.shard_text * _MEBI)
        if options.shard_text
        else max(_SMALLEST_SHARD, -(-total // _MOST_SHARDS))
    )
    parts = sources.all_stretches(paths, options.docstrings, reading, max(1, target))
    if not parts:
        raise UserError("--corpus: all files are empty.")
    units = sources.grouped(parts, target)
    # Files fill shards unevenly, and the rows of parquet are larger than its files.
    while len(units) > _MOST_SHARDS and not options.shard_text:
        target += -(-target // 4)
        units = sources.grouped(parts, target)
    if options.tokenizer:
        if options.vocab_size or options.vocab_text:
            raise UserError(
                "--tokenizer: it has its vocabulary; leave out --vocab-size and --vocab-text."
            )
        vocabulary = ["given", hashlib.sha256(_given_tokenizer(options.tokenizer)).hexdigest()]
    else:
        size, text = options.vocab_size or _VOCAB_SIZE, options.vocab_text or _VOCAB_TEXT
        vocabulary = ["new", size, text]
    # The documentation and docstrings are those of a Python version.
    described = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in about]
    named = (sources.PYTHON, sources.DOCSTRINGS)
    described += [[part.path, sys.version, 0] for part in parts if part.path in named]
    return Plan(
        reading,
        sorted(set(options.sequence_lengths)),
        options.held_out_share,
        vocabulary,
        described,
        units,
    )


def _given_tokenizer(path: Path) -> bytes:
    try:
        text = path.read_bytes()
        known = Tokenizer.from_str(text.decode())
    except OSError as error:
        raise UserError(f"--tokenizer: cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # the tokenizers package raises no narrower one
        raise UserError(f"--tokenizer: {path} is no tokenizer.json ({error}).") from error
    ids = [known.token_to_id(token) for token in SPECIAL_TOKENS]
    if ids != list(range(len(SPECIAL_TOKENS))):
        raise UserError(
            f"--tokenizer: {path} must have {', '.join(SPECIAL_TOKENS)} as ids 0 to "
            f"{len(SPECIAL_TOKENS) - 1}, as those of this example have."
        )
    return text


def refuse_other(out: Path, plan: Plan) -> None:
    """Raises a UserError unless `out` is empty or has shards of the same plan."""
    if not out.is_dir():
        raise UserError(f"--out: {out} is a file, not a folder.")
    plan_file = out / PLAN
    if not plan_file.is_file():
        if not all(map(files.is_leftover, out.iterdir())):
            raise UserError(f"--out: {out} is not empty; give --overwrite or another folder.")
        return
    if not _is_begun(out):
        # Nothing has been made by that plan, an error ended it.
        return
    found, wanted = json.loads(plan_file.read_bytes()), plan.as_json()
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise UserError(
            f"--out: {out} has shards that were made otherwise ({', '.join(changed)} differ); "
            "give the same options and unchanged files to go on, --overwrite to delete them, "
            "or another folder."
        )


def _is_begun(out: Path) -> bool:
    """Whether there is a vocabulary or a shard."""
    return (out / shards.TOKENIZER).is_file() or any(out.glob("shard-*.safetensors"))


def begin(out: Path, plan: Plan, overwrite: bool) -> None:
    """Deletes what an earlier call began to write, with `overwrite` all that it wrote."""
    # The plan goes last: without it nothing tells what the rest was made by.
    for path in sorted(out.iterdir(), key=lambda path: path.name == PLAN):
        unfinished = path.name.startswith(files.TEMPORARY)
        if unfinished or (overwrite and _is_ours(path)):
            path.unlink()
    if not _is_begun(out):
        files.write_atomically(out / PLAN, json.dumps(plan.as_json()).encode())


def _is_ours(path: Path) -> bool:
    names = (PLAN, shards.MANIFEST, shards.TOKENIZER)
    return path.name in names or path.match("shard-*.safetensors")


def make_tokenizer(plan: Plan, options: argparse.Namespace) -> None:
    """Writes the vocabulary, unless it is there."""
    path = options.out / shards.TOKENIZER
    if path.is_file():
        return
    if options.tokenizer:
        text = _given_tokenizer(options.tokenizer)
    else:
        _, vocab_size, vocab_text = plan.vocabulary
        sample = list(_sample(plan, vocab_text * _MEBI))
        if not sample:
            raise UserError("--corpus: the corpus has no text in it.")
        text = train_tokenizer(sample, vocab_size).to_str().encode()
    files.write_atomically(path, text)


def _sample(plan: Plan, size: int) -> Iterator[Document]:
    """Training documents of about `size` bytes: an even share from the front of every shard."""
    share = -(-size // len(plan.units))
    for unit in plan.units:
        left = share
        for stretch in unit:
            for document in sources.documents(stretch, plan.reading):
                if document and not is_held_out(document, plan.held_out_share):
                    yield document
                    left -= sum(map(len, document))
                if left <= 0:
                    break
            if left <= 0:
                break


# What a worker process knows.
_worker: dict[str, Any] = {}


def _prepare_worker(plan: Plan, out: Path, counter: Any) -> None:
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str((out / shards.TOKENIZER).read_text(encoding="utf-8"))
    _worker.update(plan=plan, out=out, counter=counter, tokenizer=tokenizer)


def _make_shard(number_: int, tell: Callable[[], object] = lambda: None) -> None:
    plan: Plan = _worker["plan"]
    tokenizer: Tokenizer = _worker["tokenizer"]
    counter = _worker["counter"]

    def read(count: int) -> None:
        with counter.get_lock():
            counter.value += count
        tell()

    longest = max_sentence_tokens(plan.sequence_lengths[0])
    builders = {part: StoreBuilder(tokenizer, longest) for part in shards.PARTS}
    for stretch in plan.units[number_]:
        for document in sources.documents(stretch, plan.reading, read):
            held_out = is_held_out(document, plan.held_out_share)
            builders["held_out" if held_out else "train"].add(document)
    shards.write_shard(
        _worker["out"] / shards.shard_name(number_),
        {part: builder.store() for part, builder in builders.items()},
        plan.sequence_lengths,
        tokenizer.get_vocab_size(),
    )


def make_shards(plan: Plan, out: Path, processes: int) -> None:
    """Makes the shards that are missing or damaged; one process is this one."""
    missing = [n for n in range(len(plan.units)) if not _is_sound(out / shards.shard_name(n))]
    todo = sum(stretch.size for n in missing for stretch in plan.units[n])
    counter = get_context("spawn").Value("q", plan.size - todo)
    bar = tqdm(
        total=plan.size, initial=plan.size - todo, unit="B", unit_scale=True, dynamic_ncols=True
    )
    count = min(processes, len(missing))
    with bar:
        if count <= 1:
            _prepare_worker(plan, out, counter)
            for n in missing:
                _make_shard(n, lambda: bar.update(counter.value - bar.n))
            return
        with workers.pool(count, _prepare_worker, plan, out, counter) as pool:
            pending = {pool.submit(_make_shard, n) for n in missing}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    bar.update(counter.value - bar.n)
                    for future in done:
                        future.result()
            except BrokenProcessPool as error:
                workers.end(pool)
                raise UserError(
                    "--processes: a worker process was killed, by a lack of memory perhaps; give "
                    "fewer, the same command goes on."
                ) from error
            except BaseException:
                workers.end(pool)
                raise


def _is_sound(path: Path) -> bool:
    try:
        return path.is_file() and bool(shards.read_about(path))
    except UserError:
        return False


def finish(plan: Plan, out: Path) -> dict[str, Any]:
    """Writes the manifest, which says that all is there."""
    about = [shards.read_about(out / shards.shard_name(n)) for n in range(len(plan.units))]
    tokenizer = (out / shards.TOKENIZER).read_bytes()
    known = Tokenizer.from_str(tokenizer.decode()).get_vocab_size()
    for part, advice in (("train", "lower"), ("held_out", "raise")):
        count = sum(shard[f"{part}_documents"] for shard in about)
        if count < 2 or not all(map(sum, zip(*(s[f"{part}_chunks"] for s in about), strict=True))):
            raise UserError(
                f"--corpus: {count} documents with text went to the {part.replace('_', '-')} part, "
                "which needs two, one of them with two sentences; give more documents or "
                f"{advice} --held-out-share."
            )
    digest = hashlib.sha256(tokenizer)
    for shard in about:
        digest.update(shard["digest"].encode())
    manifest = {
        "format": shards.FORMAT,
        "fingerprint": digest.hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "vocab_size": known,
        "sequence_lengths": plan.sequence_lengths,
        "held_out_share": plan.held_out_share,
        "sources": plan.sources,
        "shards": about,
    }
    files.write_atomically(out / shards.MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _summary(manifest: dict[str, Any], out: Path, seconds: float, size: int) -> str:
    def total(name: str) -> int:
        return sum(shard[name] for shard in manifest["shards"])

    rows = {
        "documents": f"{total('train_documents'):,} for training, {total('held_out_documents'):,} "
        "held out",
        "tokens": f"{total('train_tokens'):,} and {total('held_out_tokens'):,}",
        "vocabulary": f"{manifest['vocab_size']:,} word pieces",
        "shards": f"{len(manifest['shards'])} in {out}, "
        f"{sum(p.stat().st_size for p in out.glob('shard-*')) / _MEBI:.1f} MB",
        "fingerprint": manifest["fingerprint"][:16],
        "time": f"{seconds:.1f} s, {size / _MEBI:.1f} MB of files",
    }
    return "\n".join(f"{name + ':':<13}{text}" for name, text in rows.items())


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    out: Path = options.out
    plan = make_plan(options)
    if not out.exists():
        out.mkdir(parents=True)
    if not options.overwrite:
        refuse_other(out, plan)
    with files.locked(out):
        begin(out, plan, options.overwrite)
        if (out / shards.MANIFEST).is_file():
            shards.open_shards(out, plan.sequence_lengths)
            print(f"all shards are in {out} already")
            return
        make_tokenizer(plan, options)
        make_shards(plan, out, options.processes)
        manifest = finish(plan, out)
    print(_summary(manifest, out, time.perf_counter() - started, plan.size))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    return exit_status(lambda: _run(options), "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
