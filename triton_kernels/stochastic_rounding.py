"""Stochastic rounding of bfloat16 parameters and compact states: csrc/stochastic_rounding.h.

Note [Random bits] there says which random word an element gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from .low_precision import upper_half


class Rounding(NamedTuple):
    """One row per tensor, in this order, as maxva_kernels/rounding.py packs it."""

    seed: int
    parameter: int
    offset: int
    inner_local: int
    inner_global: int
    theta: int

    def has_bits(self) -> bool:
        """Whether its elements have random words."""
        return self.parameter >= 0

    def is_stochastic(self) -> bool:
        """Whether theta is not rounded to the nearest."""
        return self.has_bits() and self.theta != 0


NEAREST = Rounding(seed=0, parameter=-1, offset=0, inner_local=1, inner_global=1, theta=0)
ROUNDING_FIELDS = tl.constexpr(len(Rounding._fields))
PHILOX_ROUNDS = tl.constexpr(7)  # kPhiloxRounds of csrc/philox.h


def rows_of(flat: Sequence[int]) -> list[Rounding]:
    """The rows that the operator is given one after the other."""
    width = len(Rounding._fields)
    return [Rounding(*flat[k : k + width]) for k in range(0, len(flat), width)]


class RandomBits(NamedTuple):
    """Where the words of one tensor's step come from."""

    seed: tl.tensor
    parameter: tl.tensor
    t: tl.tensor
    offset: tl.tensor
    inner_local: tl.tensor
    inner_global: tl.tensor
    in_a_row: tl.tensor  # element i of a shard is element i + offset of the whole


@triton.jit
def load_random_bits(row, numel, t):
    """t: float64, the number of updates including this one."""
    inner_local = tl.load(row + 3)
    inner_global = tl.load(row + 4)
    return RandomBits(
        seed=tl.load(row + 0),
        parameter=tl.load(row + 1).to(tl.uint32),
        t=t.to(tl.uint32),
        offset=tl.load(row + 2),
        inner_local=inner_local,
        inner_global=inner_global,
        in_a_row=(inner_local == inner_global) | (numel <= inner_local),
    )


@triton.jit
def words_of_call(random, call):
    """The four uint32 words of int64 `call`."""
    return tl.philox(
        random.seed, call.to(tl.uint32), (call >> 32).to(tl.uint32), random.parameter, random.t,
        n_rounds=PHILOX_ROUNDS,
    )  # fmt: skip


@triton.jit
def element_of_whole(random, i):
    """What elements i (int64) of a shard are of the whole parameter."""
    e = i + random.offset
    if not random.in_a_row:
        e += i // random.inner_local * (random.inner_global - random.inner_local)
    return e


@triton.jit
def random_words(random, i):
    """The uint32 words of elements i (int64) of a shard.

    Of the four words of a call one is taken: elements that share a call may lie in different
    threads, and a kernel that waits for memory has the time.
    """
    e = element_of_whole(random, i)
    x0, x1, x2, x3 = words_of_call(random, e >> 2)
    is_odd = (e & 1) != 0
    return tl.where((e & 2) == 0, tl.where(is_odd, x1, x0), tl.where(is_odd, x3, x2))


@triton.jit
def shares_calls(random):
    """Whether elements 4 k to 4 k + 3 of a shard, inside a row, have the words of one call."""
    inner = tl.where(random.in_a_row, 0, random.inner_local | random.inner_global)
    return ((random.offset | inner) & 3) == 0


@triton.jit
def random_words_by_fours(random, i):
    """The uint32 words [.., 4 n] of elements i to i + 3, for i (int64 [.., n]) divisible by 4.

    Where `shares_calls`: a thread then has the four words of a call, and makes a quarter of them.
    """
    x0, x1, x2, x3 = words_of_call(random, element_of_whole(random, i) >> 2)
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return words.reshape(i.shape[0], 4 * i.shape[1])


@triton.jit
def round_stochastically(x, words):
    """Of float32: up with the probability that is x's distance to the bfloat16 below."""
    return upper_half(x, x.to(tl.uint32, bitcast=True) + (words & 0xFFFF))
