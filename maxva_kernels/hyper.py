"""Hyper-parameters of one group: the defaults, their ranges, and the row that the kernels read."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch

from maxva_kernels.compact import WORD_DTYPE
from maxva_kernels.layouts import is_fake

#: How states may be stored.
STATE_DTYPES = ("float32", *WORD_DTYPE)

#: Options that concern the whole optimizer: groups must agree on them.
SHARED = ("max_grad_norm", "skip_nonfinite")

#: A scheduler that ends at 0 may land this far below it, by rounding; that counts as 0.
_LR_ROUNDING = 1e-12

#: beta_min below this is a hint that it was meant as eps, AdamW's and FusedAdam's next argument.
_IMPLAUSIBLE_BETA_MIN = 1e-4

#: Fields of a row after lr, in the order of `struct Hyper` in csrc/step_scalars.h.
ROW = (
    "alpha",
    "beta_low",
    "beta_high",
    "beta_init",
    "eps",
    "weight_decay",
    "delta",
    "bias_correction",
    "adam_w_mode",
    "nesterov",
    "maximize",
    "eps_inside_sqrt",
    "trust_ratio",
)


def describe(group: dict[str, Any], index: int, p: torch.Tensor) -> str:
    """Names a group's parameter in an error message."""
    names = group.get("param_names")
    name = f"{names[index]!r}" if names else f"{index} of its group"
    return f"parameter {name} (shape {tuple(p.shape)})"


def default_beta_init(beta_high: float) -> float:
    """The weight of the first observation is 1 - this: beta_high, and 0.9 where that is 1."""
    return beta_high if beta_high < 1 else 0.9


def _require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, is {value!r}")


def check_lr(lr: Any) -> None:
    """Raises ValueError unless lr is a finite number >= 0 (or rounded to below it) or a tensor."""
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:  # torch's words
            raise ValueError(f"lr: Tensor lr must be 1-element, has shape {tuple(lr.shape)}")
    else:
        _require(-_LR_ROUNDING <= lr < math.inf, "lr", lr, "finite and >= 0")


def check_given_lr(lr: Any) -> None:
    """As check_lr, and the value of a tensor, which may wait for its device."""
    check_lr(lr)
    if isinstance(lr, torch.Tensor) and not is_fake(lr):
        check_lr(lr.item())


def warn_of_eps(beta_min: float, beta_high: float, stacklevel: int) -> None:
    """Warns where beta_min looks like an eps that was passed by position."""
    if beta_min < _IMPLAUSIBLE_BETA_MIN <= beta_high:
        warnings.warn(
            f"beta_min={beta_min!r} hardly bounds beta_t; if it was meant as eps, pass eps by "
            f"keyword: the argument after betas is beta_min",
            UserWarning,
            stacklevel=stacklevel,
        )


def hyper_row(group: dict[str, Any]) -> tuple[float, ...]:
    """Checks a group's hyper-parameters other than lr and packs them in the order of ROW.

    Raises:
        ValueError: a value is NaN or outside its range; the message names it.
        TypeError: a tensor where only lr may be one.
    """
    betas = group["betas"]
    betas = tuple(betas) if isinstance(betas, (tuple, list)) else (betas,)
    return _checked_row(*(group[name] for name in _CHECKED[1:]), betas=betas)


#: What a row is made of and checked with; betas first.
_CHECKED = (
    "betas",
    "beta_min",
    "beta_init",
    "eps",
    "weight_decay",
    "delta",
    "max_grad_norm",
    *ROW[ROW.index("bias_correction") :],
    "master_weights",
    "stochastic_rounding",
    "rounding_seed",
    "state_dtype",
    "fp32_state_below",
)


# keyed by the values and their types, so never stale: 1 == 1.0, but a seed must be an int
@functools.lru_cache(maxsize=4096, typed=True)
def _checked_row(*values: Any, betas: tuple[Any, ...]) -> tuple[float, ...]:
    group = dict(zip(_CHECKED, (betas, *values), strict=True))
    for name, value in (*group.items(), *(("betas", beta) for beta in betas)):
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Python number; of the hyper-parameters only lr may "
                            f"be a tensor")  # fmt: skip
    _require(len(betas) == 2, "betas", betas, "two numbers (alpha, beta_high)")
    alpha, beta_high = betas
    beta_low, beta_init = group["beta_min"], group["beta_init"]
    _require(0 <= alpha < 1, "betas[0]", alpha, "in [0, 1)")
    _require(0 < beta_high <= 1, "betas[1]", beta_high, "in (0, 1]")
    _require(0 < beta_low <= beta_high, "beta_min", beta_low, f"in (0, betas[1] = {beta_high}]")
    if beta_init is None:
        beta_init = default_beta_init(beta_high)
    _require(0 <= beta_init < 1, "beta_init", beta_init, "None or in [0, 1)")
    for name in ("eps", "weight_decay", "delta"):
        _require(0 <= group[name] < math.inf, name, group[name], "finite and >= 0")
    max_grad_norm = group["max_grad_norm"]
    _require(
        max_grad_norm is None or 0 < max_grad_norm < math.inf,
        "max_grad_norm",
        max_grad_norm,
        "None or finite and > 0",
    )
    seed = group["rounding_seed"]
    _require(
        isinstance(seed, int) and 0 <= seed < 2**63, "rounding_seed", seed, "an int in [0, 2^63)"
    )
    state_dtype, below = group["state_dtype"], group["fp32_state_below"]
    _require(state_dtype in STATE_DTYPES, "state_dtype", state_dtype, f"one of {STATE_DTYPES}")
    _require(
        isinstance(below, int) and not isinstance(below, bool) and below >= 0,
        "fp32_state_below",
        below,
        "an int >= 0, of elements",
    )
    if group["stochastic_rounding"] and group["master_weights"]:
        raise ValueError(
            "stochastic_rounding and master_weights exclude each other: a float32 master weight "
            "loses nothing that rounding could save; turn one of them off"
        )
    group |= {
        "alpha": alpha,
        "beta_low": beta_low,
        "beta_high": beta_high,
        "beta_init": beta_init,
    }
    return tuple(float(group[name]) for name in ROW)
