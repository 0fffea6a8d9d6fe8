"""Token ids of a corpus in flat arrays, and where they are cut; knows nothing of torch."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from corpus import Document
from tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenStore:
    """Token ids of a corpus, or of a part of it, in flat arrays; in memory or mapped from a file.

    Attributes:
        tokens: int32 or uint16, all ids one after another.
        sentence_starts: int64 or uint32, sentence s is
            `tokens[sentence_starts[s]:sentence_starts[s + 1]]`.
        document_starts: The same for the sentences of a document.
        counts: int64, how often each id occurs.
        chunks: What `cut_chunks` gave, by sequence length, where it is known already.
    """

    tokens: np.ndarray
    sentence_starts: np.ndarray
    document_starts: np.ndarray
    counts: np.ndarray
    chunks: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def sentences(self) -> int:
        """Number of sentences."""
        return len(self.sentence_starts) - 1

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    def span(self, first: int, last: int) -> np.ndarray:
        """Tokens of the sentences first..last-1."""
        return self.tokens[self.sentence_starts[first] : self.sentence_starts[last]]

    def document_of(self, sentence: int) -> tuple[int, int]:
        """Sentence range [begin, end) of the document that has `sentence`."""
        after = int(np.searchsorted(self.document_starts, sentence, side="right"))
        return int(self.document_starts[after - 1]), int(self.document_starts[after])

    def fingerprint(self) -> str:
        """SHA-256 over the content."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.sentence_starts, self.document_starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class StoreBuilder:
    """Encodes documents one after another into a store.

    Args:
        tokenizer: The tokenizer.
        max_sentence_tokens: A longer sentence is cut into pieces of this many.
    """

    def __init__(self, tokenizer: Tokenizer, max_sentence_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._longest = max_sentence_tokens
        self._encoded: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._document_starts = [0]

    def add(self, document: Document) -> None:
        """Adds a document, unless it has no tokens."""
        ids: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(document, add_special_tokens=False):
            found = encoding.ids
            ids += found
            whole, rest = divmod(len(found), self._longest)
            self._lengths += [self._longest] * whole + [rest] * (rest > 0)
        if ids:
            self._encoded.append(np.array(ids, dtype=np.int32))
            self._document_starts.append(len(self._lengths))

    def store(self) -> TokenStore:
        """The documents so far."""
        tokens = np.concatenate([np.empty(0, np.int32), *self._encoded])
        return TokenStore(
            tokens=tokens,
            sentence_starts=np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]),
            document_starts=np.array(self._document_starts, dtype=np.int64),
            counts=np.bincount(tokens, minlength=self._tokenizer.get_vocab_size()),
        )


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, max_sentence_tokens: int
) -> TokenStore:
    """The store of `documents`; see `StoreBuilder`."""
    builder = StoreBuilder(tokenizer, max_sentence_tokens)
    for document in documents:
        builder.add(document)
    return builder.store()


def max_sentence_tokens(sequence_length: int) -> int:
    """A pair always has room for one whole sentence on either side."""
    return (sequence_length - 3) // 2


def cut_chunks(store: TokenStore, sequence_length: int) -> np.ndarray:
    """Cuts documents into chunks of consecutive sentences that fill a sequence.

    Returns:
        int64, the first sentence of every chunk; `chunk_end` gives the last. A document of one
        sentence has no chunk, it serves as a negative only.
    """
    room = sequence_length - 3
    starts = store.sentence_starts.tolist()
    firsts = []
    for begin, end in pairwise(store.document_starts.tolist()):
        first = begin
        while first < end - 1:
            firsts.append(first)
            last = chunk_end(starts, first, end, room)
            # A last sentence that does not fit whole opens the next chunk too.
            first = last - 1 if starts[last] - starts[first] > room else last
            if first == end - 1 and last < end:
                first = end - 2
    return np.array(firsts, dtype=np.int64)


def chunk_end(starts: Sequence[int], first: int, end: int, room: int) -> int:
    """End of the chunk at `first`: two sentences, and as many more as it takes to fill `room`.

    Args:
        starts: Where sentences start.
        first: First sentence of the chunk.
        end: End of its document.
        room: Tokens of a chunk.
    """
    return min(end, max(first + 2, bisect_left(starts, int(starts[first]) + room, first, end)))
