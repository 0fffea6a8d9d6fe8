"""The MaxVA update of one coordinate: csrc/maxva_math.h line by line, in the same order.

Symbols are the paper's, tilde dropped; equation numbers are those of Zhu et al.

Note [Rounding]
Launched with enable_fp_fusion=False, so that nothing is contracted but what is written as tl.fma,
and with correctly rounded division and root: the bits are those of the C++ kernels on hardware with
fused multiply-add. Triton's interpreter rounds tl.fma once from 3.9 on, twice before; its results
then differ in the last bits, within the rule for exactness.

Compact states, whose codes keep few digits and whose step is bound by instructions, take the
hardware's own reciprocal and root (FAST), a bit or two off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# How divisions and roots are made. FAST counts divisors below 2^-126 as 0. NONZERO: FAST, and
# normalize() is known to find none.
EXACT = tl.constexpr(0)
FAST = tl.constexpr(1)
NONZERO = tl.constexpr(2)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)

MADAM = tl.constexpr(0)
LAMADAM = tl.constexpr(1)


class Normalizer(NamedTuple):
    """x / (sqrt(vhat + eps_inside) + eps) as numerator_scale * x / denominator."""

    numerator_scale: tl.tensor
    denominator: tl.tensor


@triton.jit
def square_root(x, OPS: tl.constexpr = EXACT):
    """EXACT: tl.sqrt is approximate in float32, for which alone sqrt_rn exists."""
    if x.dtype == tl.float64 or OPS != EXACT:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


# whether kernels become PTX: neither interpreted nor for ROCm
PTX = tl.constexpr(
    isinstance(square_root, triton.runtime.JITFunction) and torch.version.hip is None
)


@triton.jit
def reciprocal(x):
    """Approximate, of float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def divide(x, y, OPS: tl.constexpr = EXACT):
    """EXACT: `/` is approximate in float32, for which alone div_rn exists."""
    if OPS != EXACT:
        return x * reciprocal(y)
    elif x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def is_zero(divisor, OPS: tl.constexpr):
    """Whether nothing can be divided by it."""
    return divisor == 0 if OPS == EXACT else divisor < SMALLEST_NORMAL


@triton.jit
def observed_gradient(g, theta, s):
    """The gradient that MaxVA observes: clipped, negated to maximize, with L2 decay."""
    clipped = s.g_factor * g
    return tl.where(s.l2 == 0, clipped, tl.fma(s.l2, theta, clipped))


@triton.jit
def clipped_complement(c, w, s):
    """1 - beta_t between its bounds, from the unclipped one."""
    c = tl.where(c < s.c_max, c, s.c_max)  # 0/0 compares false and becomes beta_low
    c = tl.where(c > s.c_min, c, s.c_min)
    # the first observation of this coordinate, whatever the step
    return tl.where(w == 0, s.c_init, c)


@triton.jit
def observe(g, u, v, w, s):
    """Chooses beta_t by Eq. 6, clips it, and moves u, v, w by Eq. 2-4.

    Works with c = 1 - beta_t, and returns it too; see Note [Multiplied through by w] in
    csrc/maxva_math.h.
    """
    us = u * s.range
    deviation = tl.fma(g, w * s.range, -us)
    d = deviation * deviation
    excess = tl.fma(v, w * s.range_squared, -(us * us))
    var = tl.where(excess > 0, excess, 0.0)
    numerator = w * tl.fma(s.delta, w, d - var)
    c = clipped_complement(divide(numerator, numerator + (d + var)), w, s)
    u = tl.fma(c, g - u, u)
    v = tl.fma(c, tl.fma(g, g, -v), v)
    w = tl.fma(c, 1.0 - w, w)
    return u, v, w, c


@triton.jit
def observe_centered(g, mean, var, w, s):
    """`observe` of states kept as mean = u/w and var = v/w - mean^2, for compact states.

    s has range 1. With lambda = (1 - beta_t) / w of the moved w, Eq. 2-4 move the mean by lambda
    times the deviation, and no difference of large numbers is taken.
    """
    deviation = g - mean
    d = deviation * deviation
    numerator = tl.fma(w, d - var, s.delta)
    c = clipped_complement(divide(numerator, numerator + (d + var), FAST), w, s)
    w = tl.fma(c, 1.0 - w, w)
    inverse = reciprocal(w)
    share = c * inverse
    # corrected, it is 1 where c is w, and never more: var would turn negative
    share = tl.fma(tl.fma(-w, share, c), inverse, share)
    mean = tl.fma(share, deviation, mean)
    var = (1.0 - share) * tl.fma(share, d, var)
    return mean, var, w, c


@triton.jit
def normalize(normalizer, x, OPS: tl.constexpr = EXACT):
    """One division per use."""
    ratio = divide(x * normalizer.numerator_scale, normalizer.denominator, OPS)
    if OPS == NONZERO:
        return ratio
    else:
        # eps = 0: v is 0, so is x, and so is the update
        return tl.where(is_zero(normalizer.denominator, OPS), 0.0, ratio)


@triton.jit
def make_normalizer(v, w, vmax, s, AMSGRAD: tl.constexpr, OPS: tl.constexpr = EXACT):
    """See Note [Multiplied through by w] for ws = w * range."""
    if AMSGRAD:
        root = square_root(vmax + s.eps_inside, OPS)
        return Normalizer(tl.full(v.shape, 1.0, v.dtype), root + s.eps)
    else:
        ws = w * s.range
        radicand = tl.where(s.eps_inside == 0, v, tl.fma(s.eps_inside, w, v))
        root = square_root(radicand * (w * s.range_squared), OPS)
        return Normalizer(ws, tl.fma(s.eps, ws, root))


@triton.jit
def track_maximum(vhat, vmax):
    """amsgrad: the maximum of the bias-corrected second moment v/w."""
    return tl.where(vmax > vhat, vmax, vhat)


@triton.jit
def accumulate_momentum(g, m, normalizer, s, ALGORITHM: tl.constexpr, OPS: tl.constexpr = EXACT):
    """m: of the gradient in MAdam (Alg. 1), of the normalised one in LaMAdam (Alg. 2)."""
    x = g if ALGORITHM == MADAM else normalize(normalizer, g, OPS)
    return tl.fma(s.one_minus_alpha, x - m, m)


@triton.jit
def direction(g, m, normalizer, s, ALGORITHM: tl.constexpr, OPS: tl.constexpr = EXACT):
    """The update direction before bias correction, from states that have been moved."""
    x = g if ALGORITHM == MADAM else normalize(normalizer, g, OPS)
    looked_ahead = tl.where(s.nesterov_x == 0, m, tl.fma(s.nesterov_x, x, s.nesterov_m * m))
    return normalize(normalizer, looked_ahead, OPS) if ALGORITHM == MADAM else looked_ahead


@triton.jit
def layer_update(theta, direction, s):
    """The update whose norm the trust ratio compares with that of theta."""
    return tl.fma(s.decoupled, theta, s.bias_correction * direction)


@triton.jit
def step_length(direction, s):
    """How far the update moves a parameter, without decoupled decay."""
    return tl.abs(s.step_size * direction)


@triton.jit
def negated(x):
    """-x where a zero's sign counts: Triton 3.6 takes a negation for 0 - x, which has no -0.0."""
    return -1.0 * x


@triton.jit
def moved_parameter(theta, direction, s):
    """Not to be stored where s.eta is 0: that keeps the bits, whatever the update is."""
    decayed = tl.fma(negated(s.decay), theta, theta)
    return tl.fma(negated(s.step_size), direction, decayed)
