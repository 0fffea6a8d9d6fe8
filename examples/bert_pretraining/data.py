"""Index-addressable BERT examples: example i of epoch e is a pure function of (seed, e, i).

There is no iterator state. The position in the data is one integer, the number of examples
consumed so far, so resuming or sharding needs nothing but arithmetic. Nor is there an array of the
order: an epoch's shuffle is a keyed permutation, computed where it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from corpus import SPECIAL_TOKENS
from errors import UserError
from store import TokenStore, chunk_end, cut_chunks

IGNORED_LABEL = -100
MASKED_SHARE = 0.15
MASK_TOKEN_SHARE = 0.8
RANDOM_TOKEN_SHARE = 0.1
# The next_sentence_label of BertForPreTraining.
IS_NEXT, NOT_NEXT = 0, 1
PAD, CLS, SEP, MASK = (SPECIAL_TOKENS.index(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))


# Rounds of the Feistel network; four make a pseudorandom permutation where the rounds are random.
_ROUNDS = 6
_WORD = 2**64 - 1


def _mixed(x: int) -> int:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of x."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def permuted(index: int, size: int, keys: Sequence[int]) -> int:
    """Where a permutation of range(size) sends `index`; takes no memory whatever the size.

    A Feistel network permutes the numbers of an even count of bits, fewer than 4 size of them;
    where it leaves range(size) it is applied again (cycle walking).

    Args:
        index: In range(size).
        size: At least 1.
        keys: A 64-bit number per round; they choose the permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed((right + key) & _WORD) & mask)
        index = left << half | right
        if index < size:
            return index


def pair_lengths(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of A and of B a sequence with `room` keeps: the longer one is shortened."""
    keep_b = min(b, max(room - a, room // 2))
    return min(a, room - keep_b), keep_b


@dataclass(frozen=True)
class Example:
    """One example before padding.

    Attributes:
        input_ids: int64, `[CLS] A [SEP] B [SEP]` with masks applied.
        token_type_ids: int64, 0 up to the first [SEP], then 1.
        labels: int64, the original token where one was chosen for prediction, else -100.
        next_sentence_label: IS_NEXT or NOT_NEXT.
        a_sentences: Store and its sentence range [first, last) that A was taken from.
        b_sentences: The same of B.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray
    next_sentence_label: int
    a_sentences: tuple[int, int, int]
    b_sentences: tuple[int, int, int]


class PretrainingExamples:
    """Masked-LM and next-sentence examples over token stores.

    An example is a chunk (`cut_chunks`), visited in an order shuffled per epoch, with its own
    split point, negative and masks.

    Args:
        stores: The tokens; sentences and chunks are numbered through all of them.
        sequence_length: Length that every example is padded to.
        vocab_size: Number of ids that random replacement may draw from, special ones excluded.
        seed: Seed of order, pairs and masks.
        stream: Another order, other pairs and masks with the same seed.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        sequence_length: int,
        vocab_size: int,
        seed: int,
        stream: int = 0,
    ) -> None:
        self.stores = stores
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.room = sequence_length - 3
        self._seed = [seed, stream]
        self._chunks = [
            store.chunks[sequence_length]
            if sequence_length in store.chunks
            else cut_chunks(store, sequence_length)
            for store in stores
        ]
        self._first_chunk = np.cumsum([0, *map(len, self._chunks)])
        self._first_sentence = np.cumsum([0, *(store.sentences for store in stores)])
        if sum(store.documents for store in stores) < 2 or not len(self):
            raise UserError(
                "--corpus, --shards: next-sentence prediction needs at least two documents with "
                "text and one with two sentences, in the training and in the held-out part."
            )
        self._epoch = -1
        self._keys: list[int] = []

    def __len__(self) -> int:
        """Number of examples in an epoch."""
        return int(self._first_chunk[-1])

    def chunk(self, epoch: int, index: int) -> tuple[int, int, int]:
        """Store, first sentence and end of the chunk that example `index` of `epoch` is made of."""
        number = permuted(index, len(self), self._order_keys(epoch))
        place = int(np.searchsorted(self._first_chunk, number, side="right")) - 1
        first = int(self._chunks[place][number - self._first_chunk[place]])
        store = self.stores[place]
        end = store.document_of(first)[1]
        return place, first, chunk_end(store.sentence_starts, first, end, self.room)

    def example(self, epoch: int, index: int) -> Example:
        """Builds example `index` of `epoch`."""
        rng = np.random.default_rng([*self._seed, epoch, index])
        place, first, last = self.chunk(epoch, index)
        store = self.stores[place]
        split = int(rng.integers(first + 1, last))
        is_next = bool(rng.random() < 0.5)
        a_range = (first, split)
        a = store.span(*a_range)
        if is_next:
            b_place, b_range = place, (split, last)
        else:
            b_place, b_range = self._other_document(place, first, self.room - len(a), rng)
        b = self.stores[b_place].span(*b_range)
        keep_a, keep_b = pair_lengths(len(a), len(b), self.room)
        # A loses its front and B its end, so that the seam stays.
        a, b = a[len(a) - keep_a :], b[:keep_b]
        ids = np.concatenate([[CLS], a, [SEP], b, [SEP]]).astype(np.int64)
        token_types = np.zeros(len(ids), dtype=np.int64)
        token_types[len(a) + 2 :] = 1
        input_ids, labels = self._mask(ids, rng)
        label = IS_NEXT if is_next else NOT_NEXT
        return Example(
            input_ids, token_types, labels, label, (place, *a_range), (b_place, *b_range)
        )

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

    def _order_keys(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            seeds = np.random.SeedSequence([*self._seed, epoch])
            self._keys = seeds.generate_state(_ROUNDS, np.uint64).tolist()
            self._epoch = epoch
        return self._keys

    def _other_document(
        self, place: int, sentence: int, room: int, rng: np.random.Generator
    ) -> tuple[int, tuple[int, int]]:
        """Sentences of a random document other than the one with `sentence` in store `place`.

        Returns:
            Its store and sentences that fill `room` tokens, where the document has so many.
        """
        begin, end = self.stores[place].document_of(sentence)
        chosen = int(rng.integers(self._first_sentence[-1] - (end - begin)))
        if chosen >= self._first_sentence[place] + begin:
            chosen += end - begin
        place = int(np.searchsorted(self._first_sentence, chosen, side="right")) - 1
        first = chosen - int(self._first_sentence[place])
        starts = self.stores[place].sentence_starts
        _, stop = self.stores[place].document_of(first)
        return place, (
            first,
            max(first + 1, bisect_left(starts, int(starts[first]) + room, first, stop)),
        )

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
