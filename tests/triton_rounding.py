"""Functions of triton_kernels/stochastic_rounding.py, each in a kernel of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from maxva_kernels.triton_kernels.stochastic_rounding import (
    load_random_bits,
    round_stochastically,
    words_of_call,
)

#: {counter, key} and words: the vectors of Random123's kat_vectors for philox4x32 with 7 rounds.
KNOWN_ANSWERS = [
    ([0] * 6, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 6, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]
#: Bits of a float32, a random word, and the upper half of what it is rounded to.
ROUNDED = [
    (0x3F800000, 0x0000FFFF, 0x3F80),  # exact values stay
    (0x80000000, 0x0000FFFF, 0x8000),
    (0x3F800001, 0x0000FFFE, 0x3F80),  # an n-th of 2^16 goes up with n words of 2^16
    (0x3F800001, 0x0000FFFF, 0x3F81),
    (0xBF80FFFF, 0x00000000, 0xBF80),
    (0xBF80FFFF, 0x00000001, 0xBF81),
    (0x3F808000, 0xFFFF7FFF, 0x3F80),  # the upper half of a word does not matter
    (0x00007FFF, 0x00008001, 0x0001),  # subnormal
    (0x7F7FFFFF, 0x00000001, 0x7F80),
    (0x7F800000, 0x0000FFFF, 0x7F80),
    (0xFF800000, 0x0000FFFF, 0xFF80),
    (0x7FFFFFFF, 0x0000FFFF, 0x7FC0),  # NaN
    (0xFF800001, 0x0000FFFF, 0x7FC0),
]


@triton.jit
def _words_kernel(row, t, call, words):
    random = load_random_bits(row, 1, tl.load(t))
    x0, x1, x2, x3 = words_of_call(random, tl.load(call + tl.arange(0, 1)))
    tl.store(words + tl.arange(0, 1), x0)
    tl.store(words + 1 + tl.arange(0, 1), x1)
    tl.store(words + 2 + tl.arange(0, 1), x2)
    tl.store(words + 3 + tl.arange(0, 1), x3)


def _signed(low: int, high: int) -> int:
    word = high << 32 | low
    return word - (word >> 63 << 64)


def random_words(counter_and_key: list[int], device: str) -> list[int]:
    """The four words of a counter of four words and a key of two."""
    low, high, parameter, t, key_low, key_high = counter_and_key
    row = torch.tensor([_signed(key_low, key_high), parameter, 0, 1, 1], device=device)
    words = torch.empty(4, dtype=torch.int64, device=device)
    _words_kernel[(1,)](
        row,
        torch.tensor([t], dtype=torch.float64, device=device),
        torch.tensor([_signed(low, high)], device=device),
        words,
    )
    return words.tolist()


@triton.jit
def _round_kernel(x, words, rounded):
    i = tl.arange(0, 1)
    bits = tl.load(x + i).to(tl.uint32).to(tl.float32, bitcast=True)
    half = round_stochastically(bits, tl.load(words + i).to(tl.uint32))
    tl.store(rounded + i, half.to(tl.uint16, bitcast=True))


def rounded_bits(x: int, word: int, device: str) -> int:
    """The bits of the bfloat16 that a float32 with bits x becomes."""
    bits, words, rounded = (torch.tensor([value], device=device) for value in (x, word, 0))
    _round_kernel[(1,)](bits, words, rounded)
    return int(rounded)
