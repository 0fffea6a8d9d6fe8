"""Compact states: a parameter's states in one word per element, and the codes they are made of.

What csrc/compact.h and its Triton twin do inside the update, in plain torch operations on
any device; this file defines the codes. docs/algorithm.md, section "Compact states", says why.

    Moments (float32) -> pack -> Packed (what a state holds) -> unpack -> Moments

The slots of an element: the momentum m; the mean u/w; the variance var = v/w - mean^2; and x, the
weight w folded at 1/2; with amsgrad, beside them, vmax. bfloat16 has float32's range and keeps them
so. int8's codes span 16 binades: it keeps r, which is m in units of what MAdam divides it by, the
standard deviation sd = sqrt(var), and the root of vmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maxva_kernels.layouts import same_layout

#: Elements, consecutive in memory inside a row of dimension 0, that share their block scales.
BLOCK = 128

#: The dtype of `maxva_packed` by state_dtype; what is not here keeps float32 states.
WORD_DTYPE = {"int8": torch.int32, "bfloat16": torch.int64}

#: The dtype of `maxva_packed_max` by the dtype of `maxva_packed`.
MAXIMUM_DTYPE = {torch.int32: torch.uint8, torch.int64: torch.bfloat16}

#: A slot is its place in the word (byte or 16 bits) and in the word of block exponents.
M, MEAN, VAR, X = range(4)
#: In the exponents' word; x has no block scale.
VMAX = 3

#: The unsigned code that means "not finite".
NAN_CODE = 255

# The bits of a float32 are a piecewise linear logarithm; with this added they start at an exact 0.
_BIAS = 2.0**-16
_SIGNED_SHIFT, _UNSIGNED_SHIFT = 20, 19  # 3 and 4 bits of mantissa are kept
_BIAS_BITS = 111 << 23
# Makes a block's largest value 0.40625 to 0.8125 of its scale: rounded up it is code 126 at most.
_HEADROOM = 0xB00000
# Scales up to 2^127. Nothing finite needs this bound: a mean above 1.8e19 has no finite variance.
_MAX_EXPONENT = 254


class Moments(NamedTuple):
    """Decoded states, float32, all of one shape.

    Attributes:
        m: the momentum.
        mean: u/w.
        var: v/w - mean^2, >= 0.
        w: the zeroth moment.
        vmax: with amsgrad the maximum of v/w, else None.
    """

    m: Tensor
    mean: Tensor
    var: Tensor
    w: Tensor
    vmax: Tensor | None = None


class Packed(NamedTuple):
    """What a state holds.

    Attributes:
        packed: of the parameter's shape, int32 (int8 codes) or int64 (bfloat16).
        scale: int32 [size(0), blocks]: byte k is the biased exponent of a block's scale in slot k,
            0 where a state has never been moved; None for bfloat16.
        maximum: with amsgrad, of the parameter's shape, uint8 or bfloat16; else None.
    """

    packed: Tensor
    scale: Tensor | None
    maximum: Tensor | None


def num_blocks(row_length: int) -> int:
    """Blocks of a row; the last may be shorter."""
    return -(-row_length // BLOCK)


def window(words: Tensor | None, k: int) -> Tensor | None:
    """16 bits of each random word (int64 in [0, 2^32)) as window k; None rounds to the nearest."""
    if words is None:
        return None
    return (words >> 8 * k | words << 32 - 8 * k) & 0xFFFF


#: Which window a slot takes: theta's own stochastic rounding has the low half, window 0.
_WINDOW = {M: 1, MEAN: 2, VAR: 3, X: 0}


def exponents(x: Tensor) -> Tensor:
    """int64 [rows, blocks]: the biased exponent of each block's scale; x is finite [rows, row]."""
    rows, length = x.shape
    blocks = num_blocks(length)
    padded = torch.nn.functional.pad(x.abs(), (0, blocks * BLOCK - length))
    largest = padded.view(rows, blocks, BLOCK).amax(2)
    bits = largest.view(torch.int32).to(torch.int64)
    return ((bits + _HEADROOM) >> 23).clamp(max=_MAX_EXPONENT)


def scales(exponent: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Per element the block scale 2^(e - 127), 0.0 for e = 0, and its inverse; [rows, length]."""
    each = exponent.repeat_interleave(BLOCK, dim=1)[:, :length]
    return _float_from_bits(each << 23), _float_from_bits((254 - each) << 23)


def signed_code(x: Tensor, inverse: Tensor | float, random: Tensor | None) -> Tensor:
    """int64 in [0, 255]: sign, 4 bits of exponent, 3 of mantissa of a finite x / scale."""
    code = _rounded(x.abs() * inverse + _BIAS, _SIGNED_SHIFT, random)
    return code | torch.signbit(x).to(torch.int64) << 7


def signed_value(code: Tensor, scale: Tensor | float) -> Tensor:
    """float32: what a signed code stands for; code 128 is -0.0."""
    magnitude = _value(code & 0x7F, _SIGNED_SHIFT) * scale
    return torch.where(code >= 128, -magnitude, magnitude)


def unsigned_code(x: Tensor, inverse: Tensor | float, random: Tensor | None) -> Tensor:
    """int64 in [0, 251]: 4 bits of exponent, 4 of mantissa of a finite x / scale, x >= 0."""
    return _rounded(x * inverse + _BIAS, _UNSIGNED_SHIFT, random)


def unsigned_value(code: Tensor, scale: Tensor | float) -> Tensor:
    """float32: what an unsigned code stands for; code 255 is NaN."""
    return torch.where(code == NAN_CODE, torch.nan, _value(code, _UNSIGNED_SHIFT) * scale)


def _rounded(y: Tensor, shift: int, random: Tensor | None) -> Tensor:
    bits = y.view(torch.int32).to(torch.int64)
    # half of a random window's last place: the mean of what is added is half a step
    added = 1 << shift - 1 if random is None else random << shift - 16 | 1 << shift - 17
    return ((bits + added) >> shift) - (_BIAS_BITS >> shift)


def _value(code: Tensor, shift: int) -> Tensor:
    return _float_from_bits((code << shift) + _BIAS_BITS) - _BIAS


def bfloat16_code(x: Tensor, random: Tensor | None) -> Tensor:
    """int64 in [0, 2^16): the bits of x in bfloat16; inf and NaN stay."""
    nearest = x.bfloat16()
    if random is None:
        code = nearest.view(torch.int16).to(torch.int64)
    else:
        up = (x.view(torch.int32).to(torch.int64) + random) >> 16
        code = torch.where(x.isnan(), 0x7FC0, up)
    return code & 0xFFFF


def bfloat16_value(code: Tensor) -> Tensor:
    """float32: what the bits of a bfloat16 stand for."""
    return _float_from_bits(code << 16)


def _float_from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def fold(w: Tensor) -> Tensor:
    """x: w up to 1/2, -(1 - w) above, so that both ends are exact and dense; -0.0 is w = 1."""
    return torch.where(w <= 0.5, w, -(1 - w))


def unfold(x: Tensor) -> Tensor:
    """The w of an x."""
    return torch.where(torch.signbit(x), 1 - x.abs(), x.abs())


def unit(algorithm: str, mean: Tensor, sd: Tensor) -> Tensor | None:
    """What int8 stores m in units of: about sqrt(v/w) in MAdam; None for LaMAdam: it has it in m.

    So no momentum can be rounded to something large beside its own second moment.
    """
    return mean.abs() + sd if algorithm == "madam" else None


def pack(moments: Moments, algorithm: str, like: Tensor, words: Tensor | None) -> Packed:
    """Encodes states.

    Args:
        moments: of any layout.
        algorithm: "madam" or "lamadam".
        like: dense, dimension 0 outermost: the layout of the result, and by its dtype, one of
            WORD_DTYPE, which codes.
        words: int64 [numel], an element's random word (rounding.random_words), in memory order;
            None rounds to the nearest code.

    Returns:
        Where r, mean or sd are not finite, int8 stores r = mean = 0 and sd's NAN_CODE, and the
        element counts as 0 in its block; bfloat16 stores each as it is.
    """
    rows = _each(moments, lambda x: _in_rows(_laid_out(x, like)))
    if words is not None:
        words = words.view_as(rows.m)
    if like.dtype == torch.int32:
        coded = _encode_int8(rows, algorithm, words)
    else:
        coded = _encode_bfloat16(rows, words)
    packed, scale, maximum = coded
    return Packed(
        _in_layout(packed, like), scale, None if maximum is None else _in_layout(maximum, like)
    )


def unpack(stored: Packed, algorithm: str) -> Moments:
    """Decodes states; the inverse of `pack` but for its rounding. float32, in their layout."""
    like = stored.packed
    packed = _in_rows(like)
    maximum = None if stored.maximum is None else _in_rows(_laid_out(stored.maximum, like))
    if stored.scale is None:
        rows = _decode_bfloat16(packed, maximum)
    else:
        rows = _decode_int8(packed, stored.scale, maximum, algorithm)
    return _each(rows, lambda x: _in_layout(x, like))


def _each(moments: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    m, mean, var, w = map(function, moments[:4])
    return Moments(m, mean, var, w, None if moments.vmax is None else function(moments.vmax))


def holds_nonfinite(stored: Packed) -> bool:
    """Whether any code of a state stands for NaN or inf."""
    packed, maximum = stored.packed, stored.maximum
    if stored.scale is not None:
        codes = [packed >> 8 * VAR & 0xFF, *([] if maximum is None else [maximum])]
        return any(bool((code == NAN_CODE).any()) for code in codes)
    slots = [packed >> 16 * k & 0x7F80 for k in range(4)]
    found = any(bool((slot == 0x7F80).any()) for slot in slots)
    return found or (maximum is not None and not maximum.isfinite().all())


def used_exponents(scale: Tensor, has_maximum: bool) -> Tensor:
    """[slots, size(0), blocks]: the biased exponents that decoding reads."""
    used = (M, MEAN, VAR, *((VMAX,) if has_maximum else ()))
    return torch.stack([scale >> 8 * k & 0xFF for k in used])


def _encode_int8(rows: Moments, algorithm: str, words: Tensor | None) -> Packed:
    mean, sd, x = rows.mean, rows.var.sqrt(), fold(rows.w)
    divisor = unit(algorithm, mean, sd)
    r = rows.m if divisor is None else torch.where(divisor == 0, 0.0, rows.m / divisor)
    finite = r.isfinite() & mean.isfinite() & sd.isfinite()

    def scaled(
        code: Callable[..., Tensor], value: Tensor, finite: Tensor, slot: int
    ) -> tuple[Tensor, Tensor]:
        value = torch.where(finite, value, 0.0)
        exponent = exponents(value)
        _, inverse = scales(exponent, value.shape[1])
        return code(value, inverse, window(words, _WINDOW[slot])), exponent

    r_code, r_exponent = scaled(signed_code, r, finite, M)
    mean_code, mean_exponent = scaled(signed_code, mean, finite, MEAN)
    sd_code, sd_exponent = scaled(unsigned_code, sd, finite, VAR)
    sd_code = torch.where(finite, sd_code, NAN_CODE)
    x_code = signed_code(x, 1.0, window(words, _WINDOW[X]))
    # a coordinate that has started must not take a first step again
    started = (x != 0) | torch.signbit(x)
    x_code = torch.where(started, x_code.clamp(min=1), 0)
    of_blocks = [r_exponent, mean_exponent, sd_exponent]
    maximum = None
    if rows.vmax is not None:
        root = rows.vmax.sqrt()
        code, exponent = scaled(unsigned_code, root, root.isfinite(), VAR)
        maximum = torch.where(root.isfinite(), code, NAN_CODE).to(torch.uint8)
        of_blocks.append(exponent)
    packed = _word([r_code, mean_code, sd_code, x_code], 8)
    return Packed(packed.to(torch.int32), _word(of_blocks, 8).to(torch.int32), maximum)


def _decode_int8(packed: Tensor, scale: Tensor, maximum: Tensor | None, algorithm: str) -> Moments:
    length = packed.shape[1]
    codes = [packed >> 8 * k & 0xFF for k in range(4)]
    by_slot = [scales(scale >> 8 * k & 0xFF, length)[0] for k in range(4)]
    r = signed_value(codes[M], by_slot[M])
    mean = signed_value(codes[MEAN], by_slot[MEAN])
    sd = unsigned_value(codes[VAR], by_slot[VAR])
    w = unfold(signed_value(codes[X], 1.0))
    divisor = unit(algorithm, mean, sd)
    m = r if divisor is None else r * divisor
    vmax = None
    if maximum is not None:
        vmax = unsigned_value(maximum.to(torch.int32), by_slot[VMAX]).square()
    return Moments(m, mean, sd.square(), w, vmax)


def _encode_bfloat16(rows: Moments, words: Tensor | None) -> Packed:
    slots = {M: rows.m, MEAN: rows.mean, VAR: rows.var, X: fold(rows.w)}
    codes = [bfloat16_code(slots[k], window(words, _WINDOW[k])) for k in range(4)]
    maximum = None
    if rows.vmax is not None:
        code = bfloat16_code(rows.vmax, window(words, _WINDOW[VAR]))
        maximum = code.to(torch.int16).view(torch.bfloat16)
    return Packed(_word(codes, 16), None, maximum)


def _decode_bfloat16(packed: Tensor, maximum: Tensor | None) -> Moments:
    m, mean, var, x = (bfloat16_value(packed >> 16 * k & 0xFFFF) for k in range(4))
    return Moments(m, mean, var, unfold(x), None if maximum is None else maximum.to(torch.float32))


def _word(codes: list[Tensor], bits: int) -> Tensor:
    word = codes[0]
    for k, code in enumerate(codes[1:], 1):
        word = word | code << bits * k
    return word


def _in_rows(x: Tensor) -> Tensor:
    """[size(0), row]: the elements of a dense tensor in memory order, sharing its memory."""
    row = x.shape[1:].numel()
    return x.as_strided((x.shape[0], row), (row, 1))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    return x if same_layout(x, like) else torch.empty_like(like, dtype=x.dtype).copy_(x)


def _in_layout(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_in_rows`, for a contiguous result of it."""
    return rows.as_strided(like.shape, like.stride())
