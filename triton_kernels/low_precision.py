"""Storage types to the compute type and back, to the nearest even: csrc/low_precision.h.

bfloat16 goes through its bits, which is exact everywhere; Triton's interpreter truncates instead
of rounding and loses subnormals.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_compute(x, T: tl.constexpr):
    """Exact."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(T)
    else:
        return x.to(T)


@triton.jit
def upper_half_bits(x, bits):
    """uint32: the upper half of bits; a NaN's where x is."""
    return tl.where(x != x, 0x7FC0, bits >> 16)


@triton.jit
def upper_half(x, bits):
    """The bfloat16 of the upper half of bits; NaN where x is."""
    return upper_half_bits(x, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def from_compute(x, STORAGE: tl.constexpr):
    """Rounded once from float32; from float64 through float32, as the C++ kernels do.

    A NaN in float16 has the hardware's bits, not those of the C++ kernels.
    """
    if STORAGE == tl.bfloat16:  # noqa: SIM300
        single = x.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        return upper_half(single, bits + 0x7FFF + ((bits >> 16) & 1))
    elif STORAGE == tl.float16:  # noqa: SIM300
        return x.to(tl.float32).to(tl.float16)
    else:
        return x.to(STORAGE)
