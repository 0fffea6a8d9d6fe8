"""Classification sets in GLUE's form: tab-separated columns, one or two of text and one label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import CLS, PAD, SEP, pair_lengths
from errors import UserError
from files import read_utf8
from tokenizers import Tokenizer

# Column names of GLUE's tasks, in the order in which they are looked for.
_LABELS = ("gold_label", "label", "quality", "is_duplicate")
_TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 string", "#2 string"),
    ("sentence",),
    ("text",),
)


@dataclass(frozen=True)
class Columns:
    """Where a row has what: numbers of the text columns and of the label column, from 0."""

    texts: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Row:
    """One or two texts and their label."""

    texts: tuple[str, ...]
    label: str


def read_rows(
    path: Path,
    option: str,
    text_columns: Sequence[str],
    label_column: str | None,
    damaged: str = "error",
) -> tuple[list[Row], int]:
    """Reads a TSV file.

    Args:
        path: The file.
        option: That named it, for errors.
        text_columns: Names of one or two columns, or their numbers from 1 on, which say that there
            is no header; empty for the names that GLUE uses.
        label_column: The same for the label.
        damaged: "error" or "skip", for rows with more or fewer columns than the first line.

    Returns:
        The rows, and how many were left out.
    """
    text = read_utf8(path, option)
    # Quotes are characters like others, a text may hold one alone, and so are the line separators
    # of Unicode, at which splitlines() would cut.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    table = [line.split("\t") for line in lines]
    if not table:
        raise UserError(f"{option}: {path} is empty.")
    given = [*text_columns, *([label_column] if label_column else [])]
    if given and all(name.isdecimal() for name in given):
        first_row, names = 0, [str(i + 1) for i in range(len(table[0]))]
    else:
        first_row, names = 1, [name.strip().lower() for name in table[0]]
    columns = _columns(path, option, names, [n.lower() for n in text_columns], label_column)
    rows, left_out = [], 0
    for number, cells in enumerate(table[first_row:], first_row + 1):
        if len(cells) == len(names):
            rows.append(Row(tuple(cells[i] for i in columns.texts), cells[columns.label].strip()))
        elif damaged == "skip":
            left_out += 1
        else:
            raise UserError(
                f"{option}: line {number} of {path} has {len(cells)} columns, the first line has "
                f"{len(names)}; mend it, or give --damaged-rows skip."
            )
    if not rows:
        kind = "undamaged rows" if left_out else "rows"
        raise UserError(f"{option}: {path} has a header and no {kind}.")
    return rows, left_out


def _columns(
    path: Path, option: str, names: list[str], texts: list[str], label: str | None
) -> Columns:
    def place(name: str, asked_by: str) -> int:
        if name not in names:
            raise UserError(f"{asked_by}: {path} has no column {name!r}, there are: {listed}.")
        return names.index(name)

    listed = ", ".join(names)
    found_texts = texts or next((t for t in _TEXTS if all(n in names for n in t)), None)
    if not found_texts:
        raise UserError(f"{option}: name the text columns of {path} by --text-columns: {listed}.")
    found_label = label.lower() if label else next((n for n in _LABELS if n in names), None)
    if found_label is None:
        raise UserError(f"{option}: name the label column of {path} by --label-column: {listed}.")
    return Columns(
        tuple(place(name, "--text-columns") for name in found_texts),
        place(found_label, "--label-column"),
    )


def split(rows: Sequence[Row], dev_share: float) -> tuple[list[Row], list[Row]]:
    """Training rows and the `dev_share` that a hash of their text chooses."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256("\t".join(row.texts).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") / 2**64 < dev_share].append(row)
    return parts


class EncodedRows:
    """Rows as token ids.

    Args:
        rows: The rows.
        labels: All labels; a row's answer is its label's place.
        tokenizer: The tokenizer of the pretraining.
        sequence_length: The longer of two texts is shortened until both fit.
    """

    def __init__(
        self, rows: Sequence[Row], labels: list[str], tokenizer: Tokenizer, sequence_length: int
    ) -> None:
        self.answers = np.array([labels.index(row.label) for row in rows], dtype=np.int64)
        self._texts = [
            self._fit(
                [e.ids for e in tokenizer.encode_batch(list(row.texts), add_special_tokens=False)],
                sequence_length,
            )
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self._texts)

    @staticmethod
    def _fit(texts: list[list[int]], sequence_length: int) -> list[list[int]]:
        room = sequence_length - 1 - len(texts)
        if len(texts) == 1:
            return [texts[0][:room]]
        a, b = texts
        keep_a, keep_b = pair_lengths(len(a), len(b), room)
        return [a[:keep_a], b[:keep_b]]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """int64 tensors of shape (rows, longest), and `labels` of shape (rows,)."""
        rows = [self._texts[i] for i in indices]
        longest = max(1 + sum(len(text) + 1 for text in texts) for texts in rows)
        arrays = {
            name: np.full((len(rows), longest), fill, dtype=np.int64)
            for name, fill in (("input_ids", PAD), ("token_type_ids", 0), ("attention_mask", 0))
        }
        for place, texts in enumerate(rows):
            end = 1
            arrays["input_ids"][place, 0] = CLS
            for kind, text in enumerate(texts):
                arrays["input_ids"][place, end : end + len(text) + 1] = [*text, SEP]
                arrays["token_type_ids"][place, end : end + len(text) + 1] = kind
                end += len(text) + 1
            arrays["attention_mask"][place, :end] = 1
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**tensors, "labels": torch.from_numpy(self.answers[list(indices)])}
