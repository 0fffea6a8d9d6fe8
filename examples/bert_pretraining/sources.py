"""Files of text in several formats, cut into stretches that workers read independently.

A stretch is a range of bytes (of row groups in parquet). It has the documents whose beginning is in
the range: the separator line before it, for all but the first document of a file.
"""

from __future__ import annotations

import argparse
import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from corpus import (
    BLANK_LINES,
    Document,
    docstring_documents,
    python_documents,
    split_sentences,
)
from errors import UserError
from files import decode_utf8

FORMATS = ("auto", "text", "wiki", "jsonl", "parquet")
#: Stretches that are no files.
PYTHON, DOCSTRINGS = "python documentation", "docstrings"
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_DOC_TAG = re.compile(rb"</?doc\b[^>]*>\s*$")
_TABLES = {".csv", ".tsv"}
# How XML, HTML, and JSON that is not a document a line begin.
_MARKUP = re.compile(rb"""<[?!A-Za-z] | \{\s*("|$) | \[\s*([{"]|$)""", re.VERBOSE)


def add_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options that say what text is read, and how."""
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders or globs; without it, the documentation that Python carries",
    )
    parser.add_argument(
        "--docstrings",
        action="store_true",
        help="add the docstrings of Python's standard library, a module a document",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="text: blank lines between documents; wiki: <doc ...> ... </doc>; jsonl and parquet: "
        "a document per row; auto: by the file's name, else its first line",
    )
    parser.add_argument(
        "--text-field", default="text", help="field or column of the text, in jsonl and parquet"
    )
    parser.add_argument(
        "--undecodable",
        choices=("error", "replace"),
        default="error",
        help="bytes that are no UTF-8: refuse the file, or put U+FFFD in their place",
    )


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        format: One of `FORMATS`.
        text_field: Field or column that has the text of a document, in jsonl and parquet.
        undecodable: "error" or "replace", for bytes that are no UTF-8.
    """

    format: str
    text_field: str
    undecodable: str


@dataclass(frozen=True)
class Stretch:
    """A part of a source.

    Attributes:
        path: The file, or `PYTHON` or `DOCSTRINGS`.
        format: One of `FORMATS` but auto.
        begin: First byte, or first row group.
        end: End of the range.
        size: Bytes of it.
    """

    path: str
    format: str
    begin: int
    end: int
    size: int


def format_of(path: Path, reading: Reading) -> str:
    """The format of a file, by its name, else by its first line.

    Raises:
        UserError: By these it is neither plain text nor anything else that is read.
    """
    if reading.format != "auto":
        return reading.format
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")
    if line.startswith(b"<doc "):
        return "wiki"
    line = line.removeprefix(codecs.BOM_UTF8).strip()
    if line.startswith(b"{") and _is_json(line):
        return "jsonl"
    if path.suffix in _TABLES or _MARKUP.match(line):
        raise UserError(
            f"--corpus: {path} looks like a table, XML, HTML or JSON that is not a document a "
            "line; convert it, leave it out, or give --format to say what it is."
        )
    return "text"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def stretches(path: Path, reading: Reading, size: int) -> list[Stretch]:
    """Cuts a file into stretches of about `size` bytes at most; none of an empty one."""
    kind = format_of(path, reading)
    if kind == "parquet":
        metadata = _parquet(path).metadata
        groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        return [Stretch(str(path), kind, i, i + 1, n) for i, n in enumerate(groups)]
    total = path.stat().st_size
    count = -(-total // size)
    bounds = [total * i // count for i in range(count + 1)] if count else [0]
    return [Stretch(str(path), kind, begin, end, end - begin) for begin, end in pairwise(bounds)]


def all_stretches(
    paths: Sequence[Path], docstrings: bool, reading: Reading, size: int
) -> list[Stretch]:
    """The stretches of a corpus.

    Args:
        paths: Its files; without any it is the documentation that Python carries.
        docstrings: Whether those of the standard library are part of it.
        reading: How files are read.
        size: Most bytes of a stretch, about.
    """
    found = [part for path in paths for part in stretches(path, reading, size)]
    named = [] if paths else [PYTHON]
    named += [DOCSTRINGS] if docstrings else []
    return found + [Stretch(name, "text", 0, 0, 0) for name in named]


def grouped(parts: Sequence[Stretch], size: int) -> list[list[Stretch]]:
    """Joins neighbours into groups of about `size` bytes at most."""
    groups: list[list[Stretch]] = []
    filled = 0
    for part in parts:
        if not groups or filled + part.size > size:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.size
    return groups


def documents(
    stretch: Stretch, reading: Reading, read: Callable[[int], None] = lambda _: None
) -> Iterator[Document]:
    """The documents of a stretch.

    Args:
        stretch: Which.
        reading: How.
        read: Called with numbers of bytes that have been read.
    """
    if stretch.path == PYTHON:
        yield from python_documents()
    elif stretch.path == DOCSTRINGS:
        yield from docstring_documents()
    elif stretch.format == "parquet":
        for text in _parquet_texts(stretch, reading):
            yield _document(text)
        read(stretch.size)
    else:
        for offset, block in _blocks(stretch):
            read(len(block))
            yield from _BLOCKS[stretch.format](stretch.path, offset, block, reading)


def _document(text: str) -> Document:
    """Sentences of a text whose blank lines separate paragraphs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [s for block in BLANK_LINES.split(text) for s in split_sentences(block)]


def _blocks(stretch: Stretch) -> Iterator[tuple[int, bytes]]:
    """The bytes of each document of a text stretch, with their place in the file."""
    separates = _SEPARATORS[stretch.format]
    with Path(stretch.path).open("rb") as file:
        # From the line that begins at or after `begin` on.
        file.seek(max(0, stretch.begin - 1))
        if stretch.begin:
            file.readline()
        place = start = file.tell()
        lines: list[bytes] = []
        inside = not stretch.begin
        for line in file:
            if separates(line):
                if inside and lines:
                    yield start, b"".join(lines)
                if place >= stretch.end:
                    return
                inside, lines, start = True, [], place
            if inside:
                lines.append(line)
            elif place >= stretch.end:
                return
            place += len(line)
        if inside and lines:
            yield start, b"".join(lines)


def _decoded(path: str, offset: int, block: bytes, reading: Reading) -> str:
    return decode_utf8(
        block,
        path,
        "--corpus",
        offset=offset,
        replace=reading.undecodable == "replace",
        advice="convert it, or give --undecodable replace",
    )


def _text_block(path: str, offset: int, block: bytes, reading: Reading) -> Iterator[Document]:
    text = _decoded(path, offset, block, reading).replace("\r\n", "\n").replace("\r", "\n")
    # Blank lines of other than ASCII blanks are seen only here.
    yield from map(split_sentences, BLANK_LINES.split(text))


def _wiki_block(path: str, offset: int, block: bytes, reading: Reading) -> Iterator[Document]:
    lines = [line for line in block.splitlines(keepends=True) if not _DOC_TAG.match(line)]
    yield _document(_decoded(path, offset, b"".join(lines), reading))


def _json_block(path: str, offset: int, block: bytes, reading: Reading) -> Iterator[Document]:
    line = _decoded(path, offset, block, reading)
    if not line.strip():
        return
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"--corpus: {path} has a line that is no JSON, at byte {offset} ({error})."
        ) from error
    text = found.get(reading.text_field) if isinstance(found, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(found) if isinstance(found, dict) else "no fields"
        raise UserError(
            f"--text-field: {path}, byte {offset}: no text in field {reading.text_field!r}, there "
            f"are: {fields}."
        )
    yield _document(text)


_BLOCKS = {"text": _text_block, "wiki": _wiki_block, "jsonl": _json_block}
_SEPARATORS: dict[str, Callable[[bytes], bool]] = {
    "text": lambda line: not line.strip(),
    "wiki": lambda line: line.startswith(b"<doc "),
    "jsonl": lambda _: True,
}


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"--corpus: {path} needs pyarrow to be read: pip install pyarrow, or "
            "'.[bert,parquet]' from the repository root."
        ) from error
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"--corpus: {path} is no parquet file ({error}).") from error


def _parquet_texts(stretch: Stretch, reading: Reading) -> Iterator[str]:
    file = _parquet(Path(stretch.path))
    names = file.schema_arrow.names
    if reading.text_field not in names:
        raise UserError(
            f"--text-field: {stretch.path} has no column {reading.text_field!r}, there are: "
            f"{', '.join(names)}."
        )
    kind = str(file.schema_arrow.field(reading.text_field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise UserError(
            f"--text-field: column {reading.text_field!r} of {stretch.path} has {kind}, not text."
        )
    groups = list(range(stretch.begin, stretch.end))
    for batch in file.iter_batches(row_groups=groups, columns=[reading.text_field]):
        yield from (text for text in batch.column(0).to_pylist() if text)
