"""Index-addressable BERT examples: example i of epoch e is a pure function of (seed, e, i).

There is no iterator state. The position in the data is one integer, the number of examples
consumed so far, so resuming or sharding needs nothing but arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from corpus import SPECIAL_TOKENS, Document
from errors import UserError
from tokenizers import Tokenizer

IGNORED_LABEL = -100
MASKED_SHARE = 0.15
MASK_TOKEN_SHARE = 0.8
RANDOM_TOKEN_SHARE = 0.1
# The next_sentence_label of BertForPreTraining.
IS_NEXT, NOT_NEXT = 0, 1
PAD, CLS, SEP, MASK = (SPECIAL_TOKENS.index(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))


@dataclass(frozen=True)
class TokenStore:
    """Token ids of a corpus in flat arrays.

    Attributes:
        tokens: int32, all ids one after another.
        sentence_starts: int64, sentence s is `tokens[sentence_starts[s]:sentence_starts[s + 1]]`.
        document_starts: int64, the same for the sentences of a document.
    """

    tokens: np.ndarray
    sentence_starts: np.ndarray
    document_starts: np.ndarray

    def span(self, first: int, last: int) -> np.ndarray:
        """Tokens of the sentences first..last-1."""
        return self.tokens[self.sentence_starts[first] : self.sentence_starts[last]]

    def fingerprint(self) -> str:
        """SHA-256 over the content."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.sentence_starts, self.document_starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, max_sentence_tokens: int
) -> TokenStore:
    """Encodes documents; a longer sentence is cut into pieces of `max_sentence_tokens`."""
    pieces: list[list[int]] = []
    document_starts = [0]
    for document in documents:
        for encoding in tokenizer.encode_batch(document, add_special_tokens=False):
            ids = encoding.ids
            cuts = range(0, len(ids), max_sentence_tokens)
            pieces += [ids[cut : cut + max_sentence_tokens] for cut in cuts]
        if len(pieces) > document_starts[-1]:
            document_starts.append(len(pieces))
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    return TokenStore(
        tokens=np.fromiter((t for p in pieces for t in p), dtype=np.int32, count=lengths.sum()),
        sentence_starts=np.concatenate([[0], np.cumsum(lengths)]),
        document_starts=np.array(document_starts, dtype=np.int64),
    )


@dataclass(frozen=True)
class Example:
    """One example before padding.

    Attributes:
        input_ids: int64, `[CLS] A [SEP] B [SEP]` with masks applied.
        token_type_ids: int64, 0 up to the first [SEP], then 1.
        labels: int64, the original token where one was chosen for prediction, else -100.
        next_sentence_label: IS_NEXT or NOT_NEXT.
        a_sentences: Sentence range [first, last) that A was taken from.
        b_sentences: The same of B.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray
    next_sentence_label: int
    a_sentences: tuple[int, int]
    b_sentences: tuple[int, int]


class PretrainingExamples:
    """Masked-LM and next-sentence examples over a token store.

    Documents are cut once into chunks of consecutive sentences that fill a sequence. An example
    is a chunk, visited in an order shuffled per epoch, with its own split point, negative and
    masks.

    Args:
        store: The tokens.
        sequence_length: Length that every example is padded to.
        vocab_size: Number of ids that random replacement may draw from, special ones excluded.
        seed: Seed of order, pairs and masks.
    """

    def __init__(self, store: TokenStore, sequence_length: int, vocab_size: int, seed: int) -> None:
        self.store = store
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.seed = seed
        self.room = sequence_length - 3
        self._chunks, self._chunk_documents = self._cut_chunks()
        if len(store.document_starts) < 3 or not len(self._chunks):
            raise UserError(
                "--corpus: next-sentence prediction needs at least two documents with text and "
                "one with two sentences, in the training and in the held-out part."
            )
        self._order_epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Number of examples in an epoch."""
        return len(self._chunks)

    def _cut_chunks(self) -> tuple[np.ndarray, np.ndarray]:
        starts = self.store.sentence_starts
        chunks, documents = [], []
        bounds = zip(self.store.document_starts, self.store.document_starts[1:], strict=False)
        for document, (begin, end) in enumerate(bounds):
            first = begin
            while first < end - 1:
                last = first + 2
                while last < end and starts[last] - starts[first] < self.room:
                    last += 1
                chunks.append((first, last))
                documents.append(document)
                # A last sentence that does not fit whole opens the next chunk too.
                first = last - 1 if starts[last] - starts[first] > self.room else last
                if first == end - 1 and last < end:
                    first = end - 2
        return np.array(chunks, dtype=np.int64).reshape(-1, 2), np.array(documents, np.int64)

    def example(self, epoch: int, index: int) -> Example:
        """Builds example `index` of `epoch`."""
        chunk = self._epoch_order(epoch)[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        first, last = (int(bound) for bound in self._chunks[chunk])
        split = int(rng.integers(first + 1, last))
        is_next = bool(rng.random() < 0.5)
        a_range = (first, split)
        if is_next:
            b_range = (split, last)
        else:
            room = self.room - len(self.store.span(*a_range))
            b_range = self._other_document(int(self._chunk_documents[chunk]), room, rng)
        a, b = self._truncate(self.store.span(*a_range), self.store.span(*b_range))
        ids = np.concatenate([[CLS], a, [SEP], b, [SEP]]).astype(np.int64)
        token_types = np.zeros(len(ids), dtype=np.int64)
        token_types[len(a) + 2 :] = 1
        input_ids, labels = self._mask(ids, rng)
        label = IS_NEXT if is_next else NOT_NEXT
        return Example(input_ids, token_types, labels, label, a_range, b_range)

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Builds the examples `first`..`first + count - 1`, counted on through all epochs.

        Returns:
            int64 tensors `input_ids`, `token_type_ids`, `attention_mask` and `labels` of shape
            (count, sequence_length), and `next_sentence_label` of shape (count,).
        """
        shape = (count, self.sequence_length)
        input_ids = np.full(shape, PAD, dtype=np.int64)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        next_sentence_label = np.empty(count, dtype=np.int64)
        for row in range(count):
            example = self.example(*divmod(first + row, len(self)))
            length = len(example.input_ids)
            input_ids[row, :length] = example.input_ids
            token_type_ids[row, :length] = example.token_type_ids
            attention_mask[row, :length] = 1
            labels[row, :length] = example.labels
            next_sentence_label[row] = example.next_sentence_label
        arrays = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "next_sentence_label": next_sentence_label,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._order_epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = rng.permutation(len(self._chunks))
            self._order_epoch = epoch
        return self._order

    def _other_document(
        self, document: int, room: int, rng: np.random.Generator
    ) -> tuple[int, int]:
        """Sentences of a random other document, enough for `room` tokens where there are."""
        begin, end = self.store.document_starts[document : document + 2]
        total = len(self.store.sentence_starts) - 1
        first = int(rng.integers(total - (end - begin)))
        if first >= begin:
            first += int(end - begin)
        starts, documents = self.store.sentence_starts, self.store.document_starts
        stop = documents[np.searchsorted(documents, first, side="right")]
        last = first + 1
        while last < stop and starts[last] - starts[first] < room:
            last += 1
        return first, last

    def _truncate(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shortens the longer one: A at its front, B at its end, so that the seam stays."""
        keep_b = min(len(b), max(self.room - len(a), self.room // 2))
        keep_a = min(len(a), self.room - keep_b)
        return a[len(a) - keep_a :], b[:keep_b]

    def _mask(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        maskable = np.flatnonzero((ids != CLS) & (ids != SEP))
        count = max(1, round(MASKED_SHARE * len(maskable)))
        chosen = rng.choice(maskable, count, replace=False)
        labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
        labels[chosen] = ids[chosen]
        masked = ids.copy()
        roll = rng.random(count)
        masked[chosen[roll < MASK_TOKEN_SHARE]] = MASK
        replaced = chosen[
            (roll >= MASK_TOKEN_SHARE) & (roll < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)
        ]
        masked[replaced] = rng.integers(len(SPECIAL_TOKENS), self.vocab_size, len(replaced))
        return masked, labels
