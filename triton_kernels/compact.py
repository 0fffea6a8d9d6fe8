"""Compact states: the codes that maxva_kernels/compact.py defines, on tiles [blocks, 128].

A row of a tile is a block, whose largest values are found inside it. An element's states are one
word, an integer of 32 bits (four codes of 8 bits) or of 64 (four bfloat16).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .low_precision import to_compute, upper_half, upper_half_bits
from .maxva_math import FAST, MADAM, divide, is_zero, square_root

# Elements, consecutive in memory inside a row of dimension 0, that share their block scales.
BLOCK = tl.constexpr(128)

# A slot: its byte or 16 bits of an element's word, its byte of a block's word of exponents.
M = tl.constexpr(0)  # of int8: in units of what MAdam divides it by, r
MEAN = tl.constexpr(1)
VAR = tl.constexpr(2)  # of int8: its root, sd
X = tl.constexpr(3)  # w folded at 1/2; has no block scale
VMAX = tl.constexpr(3)  # in the exponents' word; its root

# Which of a random word's four windows a slot is rounded with; theta's own rounding has the first.
M_WINDOW = tl.constexpr(1)
MEAN_WINDOW = tl.constexpr(2)
VAR_WINDOW = tl.constexpr(3)
X_WINDOW = tl.constexpr(0)

# The unsigned code that means "not finite".
NAN_CODE = tl.constexpr(255)

# The bits of a float32 are a piecewise linear logarithm; with this added they start at an exact 0.
BIAS = tl.constexpr(2.0**-16)
BIAS_BITS = tl.constexpr(111 << 23)
DOUBLED_BIAS_BITS = tl.constexpr(112 << 23)
SIGNED_SHIFT = tl.constexpr(20)  # 3 bits of mantissa are kept
UNSIGNED_SHIFT = tl.constexpr(19)  # 4 bits
# Makes a block's largest value 0.40625 to 0.8125 of its scale: rounded up it is code 126 at most.
HEADROOM = tl.constexpr(0xB00000)
MAX_EXPONENT = tl.constexpr(254)
INFINITY_BITS = tl.constexpr(0x7F800000)


class Moments(NamedTuple):
    """Decoded states, float32."""

    m: tl.tensor
    mean: tl.tensor
    var: tl.tensor  # v/w - mean^2
    w: tl.tensor


@triton.jit
def bits_of(x):
    """The bits of float32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_from_bits(bits):
    """The float32 of uint32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def window(words, k: tl.constexpr):
    """16 bits of each random word, as uint32."""
    if k == 3:
        return ((words >> 24) | (words << 8)) & 0xFFFF
    else:
        return (words >> (8 * k)) & 0xFFFF


@triton.jit
def largest_bits(x):
    """[blocks]: the bits of each block's largest |x|; x is finite.

    Of integers a warp finds the largest in one instruction.
    """
    return tl.max((bits_of(x) & 0x7FFFFFFF).to(tl.int32, bitcast=True), axis=1)


@triton.jit
def block_exponent(x):
    """uint32 [blocks]: the biased exponent of each block's scale; x is finite."""
    exponent = (largest_bits(x) + HEADROOM).to(tl.uint32, bitcast=True) >> 23
    return tl.minimum(exponent, MAX_EXPONENT)


@triton.jit
def scale_of(exponent):
    """2^(e - 127), a column; 0.0 of a state that has never been moved."""
    return float_from_bits(exponent << 23)[:, None]


@triton.jit
def inverse_of(exponent):
    """2^(127 - e), a column."""
    return float_from_bits((254 - exponent) << 23)[:, None]


@triton.jit
def rounded_code(y, random, SHIFT: tl.constexpr):
    """The upper bits of y, which is biased; half of a window's last place makes it unbiased."""
    added = ((random << 1) | 1) << (SHIFT - 17)
    return (bits_of(y) + added - BIAS_BITS) >> SHIFT


@triton.jit
def code_value(code, scale, SHIFT: tl.constexpr):
    """(y - 2^-16) scale, exact: of 2 y, because the bits of 2^-15 have none of the code's."""
    doubled = float_from_bits((code << SHIFT) | DOUBLED_BIAS_BITS)
    return tl.fma(doubled, scale * 0.5, scale * -BIAS)


@triton.jit
def signed_code(x, inverse, random):
    """uint32 in [0, 255]: sign, 4 bits of exponent, 3 of mantissa of a finite x / scale."""
    code = rounded_code(tl.fma(tl.abs(x), inverse, BIAS), random, SIGNED_SHIFT)
    return code | ((bits_of(x) >> 31) << 7)


@triton.jit
def signed_value(code, scale):
    """float32: what a signed code stands for; code 128 is -0.0."""
    magnitude = code_value(code & 0x7F, scale, SIGNED_SHIFT)
    return float_from_bits(bits_of(magnitude) | ((code << 24) & 0x80000000))


@triton.jit
def unsigned_code(x, inverse, random):
    """uint32 in [0, 251]: 4 bits of exponent, 4 of mantissa of a finite x / scale, x >= 0."""
    return rounded_code(tl.fma(x, inverse, BIAS), random, UNSIGNED_SHIFT)


@triton.jit
def unsigned_value(code, scale):
    """float32: what an unsigned code stands for; code 255 is NaN."""
    return tl.where(code == NAN_CODE, float("nan"), code_value(code, scale, UNSIGNED_SHIFT))


@triton.jit
def fold(w):
    """x: w up to 1/2, -(1 - w) above, so that both ends are exact and dense; -0.0 is w = 1.

    By the sign's bit, as Triton 3.6 takes a negation for 0 - x, which has no -0.0.
    """
    return tl.where(w <= 0.5, w, float_from_bits(bits_of(1.0 - w) | 0x80000000))


@triton.jit
def unfold(x):
    """The w of an x."""
    return tl.where((bits_of(x) >> 31) != 0, 1.0 - tl.abs(x), tl.abs(x))


@triton.jit
def field(word, k: tl.constexpr, WIDTH: tl.constexpr):
    """uint32: bits WIDTH k .. WIDTH k + WIDTH - 1 of an unsigned word."""
    return ((word >> (WIDTH * k)) & ((1 << WIDTH) - 1)).to(tl.uint32)


@triton.jit
def is_finite(x):
    """Of float32."""
    return (bits_of(x) & 0x7FFFFFFF) < INFINITY_BITS


@triton.jit
def unit(mean, sd, ALGORITHM: tl.constexpr):
    """What int8 stores m in units of; LaMAdam has it in m."""
    return tl.abs(mean) + sd if ALGORITHM == MADAM else tl.full(mean.shape, 1.0, tl.float32)


@triton.jit
def decode(packed, exponents, ALGORITHM: tl.constexpr):
    """Moments of a tile of int32 or int64 words; exponents: int32 [blocks], or None for int64."""
    if packed.dtype == tl.int32:
        word = packed.to(tl.uint32, bitcast=True)
        exponent = exponents.to(tl.uint32, bitcast=True)
        r = signed_value(field(word, M, 8), scale_of(field(exponent, M, 8)))
        mean = signed_value(field(word, MEAN, 8), scale_of(field(exponent, MEAN, 8)))
        sd = unsigned_value(field(word, VAR, 8), scale_of(field(exponent, VAR, 8)))
        x = signed_value(field(word, X, 8), 1.0)
        return Moments(r * unit(mean, sd, ALGORITHM), mean, sd * sd, unfold(x))
    else:
        word = packed.to(tl.uint64, bitcast=True)
        low = (word & 0xFFFFFFFF).to(tl.uint32)
        high = (word >> 32).to(tl.uint32)
        m = float_from_bits(low << 16)
        mean = float_from_bits(low & 0xFFFF0000)
        var = float_from_bits(high << 16)
        x = float_from_bits(high & 0xFFFF0000)
        return Moments(m, mean, var, unfold(x))


@triton.jit
def decode_maximum(code, exponents):
    """The vmax of a tile: of uint8 codes, which stand for its root, or of bfloat16."""
    if code.dtype == tl.uint8:
        exponent = exponents.to(tl.uint32, bitcast=True)
        root = unsigned_value(code.to(tl.uint32), scale_of(field(exponent, VMAX, 8)))
        return root * root
    else:
        return to_compute(code, tl.float32)


@triton.jit
def encode(m, mean, var, w, words, WORD: tl.constexpr, ALGORITHM: tl.constexpr):
    """Packed states of a tile and int32 [blocks] exponents of slots 0 to 2 (0 for int64).

    Where r, mean or sd are not finite, int8 stores r = mean = 0 and sd's NAN_CODE, and the element
    counts as 0 in its block; bfloat16 stores each as it is.
    """
    x = fold(w)
    if WORD == tl.int32:  # noqa: SIM300
        sd = square_root(var, FAST)
        if ALGORITHM == MADAM:
            divisor = unit(mean, sd, ALGORITHM)
            r = tl.where(is_zero(divisor, FAST), 0.0, divide(m, divisor, FAST))
        else:
            r = m
        finite = is_finite(r) & is_finite(mean) & is_finite(sd)
        r = tl.where(finite, r, 0.0)
        mean = tl.where(finite, mean, 0.0)
        sd = tl.where(finite, sd, 0.0)
        r_exponent = block_exponent(r)
        mean_exponent = block_exponent(mean)
        sd_exponent = block_exponent(sd)
        r_code = signed_code(r, inverse_of(r_exponent), window(words, M_WINDOW))
        mean_code = signed_code(mean, inverse_of(mean_exponent), window(words, MEAN_WINDOW))
        sd_code = unsigned_code(sd, inverse_of(sd_exponent), window(words, VAR_WINDOW))
        sd_code = tl.where(finite, sd_code, NAN_CODE)
        # a started coordinate must not take a first step again
        x_code = tl.maximum(signed_code(x, 1.0, window(words, X_WINDOW)), 1)
        packed = r_code | (mean_code << 8) | (sd_code << 16) | (x_code << 24)
        exponents = r_exponent | (mean_exponent << 8) | (sd_exponent << 16)
        return packed.to(tl.int32, bitcast=True), exponents.to(tl.int32, bitcast=True)
    else:
        m_half = upper_half_bits(m, bits_of(m) + window(words, M_WINDOW))
        mean_half = upper_half_bits(mean, bits_of(mean) + window(words, MEAN_WINDOW))
        var_half = upper_half_bits(var, bits_of(var) + window(words, VAR_WINDOW))
        # not asked for NaN: only a loaded w can be, and it has made mean and var NaN
        x_half = (bits_of(x) + window(words, X_WINDOW)) >> 16
        low = (m_half | (mean_half << 16)).to(tl.uint64)
        high = (var_half | (x_half << 16)).to(tl.uint64)
        # a None in a tuple is nothing that Triton 3.6 returns
        no_exponents = tl.zeros([m.shape[0]], tl.int32)
        return (low | (high << 32)).to(tl.int64, bitcast=True), no_exponents


@triton.jit
def encode_maximum(vmax, words, exponents, WORD: tl.constexpr):
    """Codes of vmax (bfloat16) or of its root (uint8), and the exponents with slot 3 in them.

    exponents: as `encode` returns them.
    """
    random = window(words, VAR_WINDOW)
    if WORD == tl.int64:  # noqa: SIM300
        return upper_half(vmax, bits_of(vmax) + random), exponents
    else:
        root = square_root(vmax, FAST)
        finite = is_finite(root)
        root = tl.where(finite, root, 0.0)
        exponent = block_exponent(root)
        code = tl.where(finite, unsigned_code(root, inverse_of(exponent), random), NAN_CODE)
        with_root = exponents.to(tl.uint32, bitcast=True) | (exponent << (8 * VMAX))
        return code.to(tl.uint8), with_root.to(tl.int32, bitcast=True)
