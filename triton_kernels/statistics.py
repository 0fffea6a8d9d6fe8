"""What optimizer.stats() is made of, sums over the elements of a tensor: csrc/statistics.h."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .maxva_math import step_length
from .step_scalars import PARAMETERS, STATES


class Statistics(NamedTuple):
    """float64 sums, in this order, as maxva_kernels/statistics.py reads them."""

    gradient_squares: tl.tensor  # of the unscaled gradient, before clipping
    one_minus_beta: tl.tensor
    at_beta_min: tl.tensor  # coordinates whose beta_t is the lower bound
    at_beta_max: tl.tensor  # and the upper one
    step_size: tl.tensor  # |eta update|, with the trust ratio, without decoupled decay


NUM_STATISTICS = tl.constexpr(len(Statistics._fields))
_STEP_SIZE = Statistics._fields.index("step_size")


def range_of_phase(phase: int) -> range:
    """Which of them a phase sets."""
    first = _STEP_SIZE if phase == PARAMETERS.value else 0
    return range(first, _STEP_SIZE if phase == STATES.value else NUM_STATISTICS.value)


@triton.jit
def no_statistics():
    """Before the first block."""
    zero = tl.full((), 0.0, tl.float64)
    return Statistics(zero, zero, zero, zero, zero)


@triton.jit
def block_sum(x, mask):
    """float64, of the elements in mask (None: all), in a fixed order."""
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    return tl.sum(x).to(tl.float64)


@triton.jit
def add_observations(statistics, g, c, s, mask):
    """A block's unscaled gradient and 1 - beta_t."""
    wide = g.to(tl.float64)
    return Statistics(
        statistics.gradient_squares + block_sum(wide * wide, mask),
        statistics.one_minus_beta + block_sum(c, mask),
        statistics.at_beta_min + block_sum(tl.where(c == s.c_max, 1.0, 0.0), mask),
        statistics.at_beta_max + block_sum(tl.where(c == s.c_min, 1.0, 0.0), mask),
        statistics.step_size,
    )


@triton.jit
def add_step_sizes(statistics, direction, s, mask):
    """A block's update directions."""
    return Statistics(
        statistics.gradient_squares,
        statistics.one_minus_beta,
        statistics.at_beta_min,
        statistics.at_beta_max,
        statistics.step_size + block_sum(step_length(direction, s), mask),
    )


@triton.jit
def store_statistics(row, statistics, PHASE: tl.constexpr):
    """Those that the phase sets."""
    if PHASE != PARAMETERS:
        tl.store(row + 0, statistics.gradient_squares)
        tl.store(row + 1, statistics.one_minus_beta)
        tl.store(row + 2, statistics.at_beta_min)
        tl.store(row + 3, statistics.at_beta_max)
    if PHASE != STATES:
        tl.store(row + 4, statistics.step_size)
