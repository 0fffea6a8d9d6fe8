"""The scalars of one parameter tensor's step and the control block: csrc/step_scalars.h, control.h.

In float64 throughout, rounded once to the compute type. Works on blocks of parameter tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Hyper(NamedTuple):
    """One row per parameter group, in this order, as maxva_kernels/hyper.py packs it."""

    lr: tl.tensor
    alpha: tl.tensor
    beta_low: tl.tensor
    beta_high: tl.tensor
    beta_init: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    delta: tl.tensor
    bias_correction: tl.tensor
    adam_w_mode: tl.tensor
    nesterov: tl.tensor
    maximize: tl.tensor
    eps_inside_sqrt: tl.tensor
    trust_ratio: tl.tensor


class Scalars(NamedTuple):
    """What the update of one tensor needs; csrc/step_scalars.h says what each is."""

    g_factor: tl.tensor
    l2: tl.tensor
    decoupled: tl.tensor
    one_minus_alpha: tl.tensor
    nesterov_m: tl.tensor
    nesterov_x: tl.tensor
    c_init: tl.tensor
    c_min: tl.tensor
    c_max: tl.tensor
    range: tl.tensor
    range_squared: tl.tensor
    delta: tl.tensor
    eps: tl.tensor
    eps_inside: tl.tensor
    bias_correction: tl.tensor
    step_size: tl.tensor
    decay: tl.tensor
    eta: tl.tensor


HYPER_FIELDS = tl.constexpr(len(Hyper._fields))
NUM_SCALARS = tl.constexpr(len(Scalars._fields))

# `Phase` of csrc/step_scalars.h
WHOLE = tl.constexpr(0)
STATES = tl.constexpr(1)
PARAMETERS = tl.constexpr(2)

# fields of the control block
SKIP = tl.constexpr(0)
CLIP_FACTOR = tl.constexpr(1)
GRAD_NORM = tl.constexpr(2)
CONTROL_FIELDS = tl.constexpr(3)


@triton.jit
def load_hyper(row, mask):
    """Rows of float64 stored as int64 words, which is what the step's table is made of."""
    return Hyper(
        lr=tl.load(row + 0, mask=mask, other=0).to(tl.float64, bitcast=True),
        alpha=tl.load(row + 1, mask=mask, other=0).to(tl.float64, bitcast=True),
        beta_low=tl.load(row + 2, mask=mask, other=0).to(tl.float64, bitcast=True),
        beta_high=tl.load(row + 3, mask=mask, other=0).to(tl.float64, bitcast=True),
        beta_init=tl.load(row + 4, mask=mask, other=0).to(tl.float64, bitcast=True),
        eps=tl.load(row + 5, mask=mask, other=0).to(tl.float64, bitcast=True),
        weight_decay=tl.load(row + 6, mask=mask, other=0).to(tl.float64, bitcast=True),
        delta=tl.load(row + 7, mask=mask, other=0).to(tl.float64, bitcast=True),
        bias_correction=tl.load(row + 8, mask=mask, other=0).to(tl.float64, bitcast=True),
        adam_w_mode=tl.load(row + 9, mask=mask, other=0).to(tl.float64, bitcast=True),
        nesterov=tl.load(row + 10, mask=mask, other=0).to(tl.float64, bitcast=True),
        maximize=tl.load(row + 11, mask=mask, other=0).to(tl.float64, bitcast=True),
        eps_inside_sqrt=tl.load(row + 12, mask=mask, other=0).to(tl.float64, bitcast=True),
        trust_ratio=tl.load(row + 13, mask=mask, other=0).to(tl.float64, bitcast=True),
    )


@triton.jit
def power_of_two_near_inverse_root(c):
    """scalbn(1, -ilogb(c) / 2) of a normal c in (0, 1], from the exponent's bits."""
    exponent = (c.to(tl.int64, bitcast=True) >> 52) - 1023
    return ((1023 + ((-exponent) >> 1)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def make_scalars(h, lr, t, clip_factor, trust, UNIT_RANGE: tl.constexpr):
    """t: the number of updates including this one; trust: r of LAMB, 1 without.

    UNIT_RANGE: range is 1, for `observe_centered`, which multiplies nothing by w.
    """
    # alpha^t by exp and log: its error, t |log alpha| alpha^t 2^-53, is below half a unit of 1
    corrected = (h.bias_correction != 0) & (h.alpha != 0)
    power = tl.exp(t * tl.log(tl.where(corrected, h.alpha, 0.5)))
    bias = tl.where(corrected, 1.0 / (1.0 - power), 1.0)
    c_init = 1.0 - h.beta_init
    lambda_decoupled = tl.where(h.adam_w_mode != 0, h.weight_decay, 0.0)
    nesterov = h.nesterov != 0
    if UNIT_RANGE:
        range_ = tl.full(c_init.shape, 1.0, tl.float64)
    else:
        range_ = power_of_two_near_inverse_root(c_init)
    return Scalars(
        g_factor=tl.where(h.maximize != 0, -clip_factor, clip_factor),
        l2=tl.where(h.adam_w_mode != 0, 0.0, h.weight_decay),
        decoupled=lambda_decoupled,
        one_minus_alpha=1.0 - h.alpha,
        nesterov_m=tl.where(nesterov, h.alpha, 1.0),
        nesterov_x=tl.where(nesterov, 1.0 - h.alpha, 0.0),
        c_init=c_init,
        c_min=1.0 - h.beta_high,
        c_max=1.0 - h.beta_low,
        range=range_,
        range_squared=range_ * range_,
        delta=h.delta * range_ * range_,
        eps=tl.where(h.eps_inside_sqrt != 0, 0.0, h.eps),
        eps_inside=tl.where(h.eps_inside_sqrt != 0, h.eps, 0.0),
        bias_correction=bias,
        step_size=lr * trust * bias,
        decay=lr * trust * lambda_decoupled,
        eta=lr,
    )


@triton.jit
def store_scalars(row, s, mask):
    """Rounds once, to the type of the table."""
    for k in tl.static_range(NUM_SCALARS):
        tl.store(row + k, s[k].to(row.dtype.element_ty), mask=mask)


@triton.jit
def load_scalars(row, UNIT_RANGE: tl.constexpr = False):
    """One tensor's scalars, in the compute type; UNIT_RANGE as they were made."""
    return Scalars(
        g_factor=tl.load(row + 0),
        l2=tl.load(row + 1),
        decoupled=tl.load(row + 2),
        one_minus_alpha=tl.load(row + 3),
        nesterov_m=tl.load(row + 4),
        nesterov_x=tl.load(row + 5),
        c_init=tl.load(row + 6),
        c_min=tl.load(row + 7),
        c_max=tl.load(row + 8),
        range=1.0 if UNIT_RANGE else tl.load(row + 9),
        range_squared=1.0 if UNIT_RANGE else tl.load(row + 10),
        delta=tl.load(row + 11),
        eps=tl.load(row + 12),
        eps_inside=tl.load(row + 13),
        bias_correction=tl.load(row + 14),
        step_size=tl.load(row + 15),
        decay=tl.load(row + 16),
        eta=tl.load(row + 17),
    )


# a root at least so large needs no test for 0
SAFE_EPS = tl.constexpr(2.0**-100)


@triton.jit
def are_plain(s):
    """Whether the options that few use are off, and no divisor is 0."""
    return (s.l2 == 0) & (s.nesterov_x == 0) & (s.eps_inside == 0) & (s.eps >= SAFE_EPS)


@triton.jit
def plain_scalars(s):
    """What `are_plain` knows, known to the compiler."""
    return Scalars(
        g_factor=s.g_factor,
        l2=0.0,
        decoupled=s.decoupled,
        one_minus_alpha=s.one_minus_alpha,
        nesterov_m=1.0,
        nesterov_x=0.0,
        c_init=s.c_init,
        c_min=s.c_min,
        c_max=s.c_max,
        range=s.range,
        range_squared=s.range_squared,
        delta=s.delta,
        eps=s.eps,
        eps_inside=0.0,
        bias_correction=s.bias_correction,
        step_size=s.step_size,
        decay=s.decay,
        eta=s.eta,
    )


@triton.jit
def trust_ratio(h, theta_sum_of_squares, update_sum_of_squares):
    """LAMB's r: 1 where it is off, where there is no decay or where a norm is 0."""
    on = (
        (h.trust_ratio != 0)
        & (h.weight_decay != 0)
        & (theta_sum_of_squares != 0)
        & (update_sum_of_squares != 0)
    )
    return tl.where(on, tl.sqrt(theta_sum_of_squares / update_sum_of_squares), 1.0)


@triton.jit
def make_control(norm, max_grad_norm, SKIP_NONFINITE: tl.constexpr, found_inf, control):
    """norm: of the unscaled gradients; beyond float32's range it counts as not finite."""
    finite = norm.to(tl.float64) <= 3.4028234663852886e38
    factor = max_grad_norm / norm
    skip = found_inf
    if SKIP_NONFINITE:
        skip = skip | (finite == 0)
    tl.store(control + SKIP, tl.where(skip, 1.0, 0.0).to(tl.float64))
    # NaN stays NaN
    tl.store(control + CLIP_FACTOR, tl.where((factor >= 1.0) | (norm == 0.0), 1.0, factor))
    tl.store(control + GRAD_NORM, norm)
