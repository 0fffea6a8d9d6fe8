"""What a run trains on, whether read from text or mapped from prepared shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shards
import sources
from corpus import Document, corpus_files, is_held_out, train_tokenizer
from errors import UserError
from sources import Reading
from store import TokenStore, max_sentence_tokens, tokenize
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Texts:
    """Tokens of the training and the held-out part, and the tokenizer they were made with."""

    train: Sequence[TokenStore]
    held_out: Sequence[TokenStore]
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def word_pieces(self) -> int:
        """Size of the vocabulary."""
        return self.tokenizer.get_vocab_size()

    @property
    def counts(self) -> np.ndarray:
        """How often each id occurs in the training part."""
        return sum(store.counts for store in self.train)

    def describe(self) -> str:
        """Sizes, in a sentence."""
        parts = (self.train, self.held_out)
        documents = [sum(store.documents for store in part) for part in parts]
        tokens = [sum(len(store.tokens) for store in part) for part in parts]
        return (
            f"{documents[0]} training and {documents[1]} held-out documents, "
            f"{tokens[0]:,} and {tokens[1]:,} tokens, {self.word_pieces} word pieces"
        )


def load_corpus(
    patterns: Sequence[str], reading: Reading, held_out_share: float, docstrings: bool = False
) -> tuple[list[Document], list[Document]]:
    """Reads the corpus and splits it.

    Args:
        patterns: Files, folders or globs; empty for the Python documentation.
        reading: How files are read.
        held_out_share: Expected share of documents to hold out, in (0, 1).
        docstrings: Add those of the standard library.

    Returns:
        Training documents and held-out documents, none of them empty.
    """
    parts = sources.all_stretches(corpus_files(patterns), docstrings, reading, sys.maxsize)
    found = (document for part in parts for document in sources.documents(part, reading))
    documents = [document for document in found if document]
    if not documents:
        raise UserError("--corpus: the corpus has no text in it.")
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document, held_out_share) else train).append(document)
    for name, part, advice in (
        ("training", train, "lower"),
        ("held-out", held_out, "raise"),
    ):
        # The other document is needed for the negatives of next-sentence prediction.
        if len(part) < 2:
            raise UserError(
                f"--corpus: of {len(documents)} documents (blank lines separate them in plain "
                f"text) only {len(part)} went to the {name} part, which needs at least 2; give "
                f"more documents or {advice} --held-out-share."
            )
    return train, held_out


def load(settings: dict[str, Any], lengths: Sequence[int], tokenizer: str | None) -> Texts:
    """The texts of a run.

    Args:
        settings: `shards`, or `corpus`, `docstrings`, `format`, `text_field`, `undecodable`,
            `held_out_share` and `vocab_size`.
        lengths: Sequence lengths that it will use.
        tokenizer: JSON of the tokenizer of the run that is resumed.
    """
    if settings["shards"]:
        texts = Texts(*shards.open_shards(Path(settings["shards"]), lengths))
        if settings["vocab_size"] is not None and settings["vocab_size"] < texts.word_pieces:
            raise UserError(
                f"--vocab-size: {settings['vocab_size']} is less than the {texts.word_pieces} word "
                f"pieces of the shards in {settings['shards']}; leave the option out."
            )
        return texts
    reading = Reading(settings["format"], settings["text_field"], settings["undecodable"])
    train, held_out = load_corpus(
        settings["corpus"], reading, settings["held_out_share"], settings["docstrings"]
    )
    known = (
        Tokenizer.from_str(tokenizer)
        if tokenizer
        else train_tokenizer(train, settings["vocab_size"])
    )
    longest = max_sentence_tokens(min(lengths))
    stores = [tokenize(part, known, longest) for part in (train, held_out)]
    fingerprint = "-".join(store.fingerprint() for store in stores)
    return Texts(stores[:1], stores[1:], known, fingerprint)
