"""One step of an optimizer of ours against the float64 reference, before it is timed.

On the very tensors that are measured afterwards, in the midst of a run: elements at both ends and
in between of every parameter, or of 1,000 where there are more (whole parameters where norms of
tensors matter, whole blocks where states are compact). Bounds are those of docs/algorithm.md's
float32 rule in outline; a slot of a compact state has to be one of the two codes that enclose the
true value, widened by such a bound. tests/exactness.py and tests/compact_exactness.py have the
strict rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maxva_kernels.compact import (
    BLOCK,
    MEAN,
    NAN_CODE,
    VAR,
    VMAX,
    M,
    Packed,
    num_blocks,
    signed_value,
    unpack,
    unsigned_value,
)
from maxva_kernels.optimizers import LaMAdam, MAdam, MaxVA
from maxva_kernels.profile.contenders import LR, MAX_GRAD_NORM, Contender
from maxva_kernels.profile.measure import Step
from maxva_kernels.profile.traffic import DtypeMode
from maxva_kernels.state import COMPACT, PACKED

_REFERENCE = {"madam": MAdam, "lamadam": LaMAdam}
_KEYS = {"m": "exp_avg", "u": "maxva_avg", "v": "exp_avg_sq", "w": "maxva_weight"}
_SAMPLED = 512
#: Parameters that are compared, spread over all of them, and the last.
_COMPARED = 1000
#: Blocks of a compact parameter at each end, and as many again in between.
_SAMPLED_BLOCKS = 4
#: The slots that blocks have scales for, and those that are never negative.
_SCALED = {"r": M, "mean": MEAN, "sd": VAR, "root": VMAX}
_UNSIGNED = ("var", "vmax", "sd", "root")
#: Larger parameters are left out where whole ones are compared.
_WHOLE_NUMEL = 1 << 20


class WrongResultError(AssertionError):
    """A kernel does not compute what the reference computes."""


@dataclass
class _Sample:
    """Elements of one parameter, as float64, and its step count."""

    theta: Tensor
    stored: Tensor
    states: dict[str, Tensor]
    step: Tensor
    codes: _Codes | None = None


@dataclass
class _Codes:
    """What a compact state says of the elements, by slot, as float64.

    Attributes:
        slots: by their names in compact.py.
        exponents: per element the biased exponent of its block's scale; none for bfloat16.
        block: per element which of the parameter's blocks it is in.
    """

    slots: dict[str, Tensor]
    exponents: dict[str, Tensor]
    block: Tensor


def check_step(
    contender: Contender, optimizer: MaxVA, step: Step, negate_gradients: Step, mode: DtypeMode
) -> None:
    """Runs three steps, the gradients' signs changing in between, and compares the last.

    Args:
        contender: what `optimizer` was made as.
        optimizer: without any state yet; all its parameters have gradients.
        step: runs its step.
        negate_gradients: changes all gradients' signs.
        mode: the dtypes that it was made for.

    Raises:
        WrongResultError: an element is out of bounds.
    """
    for _ in range(2):
        step()
        negate_gradients()
    whole = "trust" in contender.extras
    params = [p for group in optimizer.param_groups for p in group["params"]]
    last = len(params) - 1
    spread = range(0, last, math.ceil(len(params) / _COMPARED))
    chosen = _small(params) if whole else [*spread, last]
    positions = {
        k: _positions(params[k], whole, in_blocks=PACKED in optimizer.state[params[k]])
        for k in chosen
    }
    factor = _clip_factor(params) if "clip" in contender.extras else 1.0
    gradients = {k: _at(params[k].grad, positions[k]) * factor for k in chosen}
    before = {k: _sample(optimizer, params[k], positions[k]) for k in chosen}
    step()
    wanted = _reference(contender, optimizer, params, before, gradients)
    for k, want in wanted.items():
        _compare(contender, k, _sample(optimizer, params[k], positions[k]), want, mode)


def _small(params: list[Tensor]) -> list[int]:
    """One parameter of every shape that is not too large to be compared whole."""
    by_shape = {p.shape: k for k, p in enumerate(params) if p.numel() <= _WHOLE_NUMEL}
    return sorted(by_shape.values()) or [min(range(len(params)), key=lambda k: params[k].numel())]


def _positions(p: Tensor, whole: bool, in_blocks: bool) -> Tensor:
    n = p.numel()
    if whole or n <= 4 * _SAMPLED:
        return torch.arange(n, device=p.device)
    if in_blocks:
        return _in_blocks(p).to(p.device)
    inner = torch.linspace(_SAMPLED, n - _SAMPLED - 1, _SAMPLED, dtype=torch.float64).long()
    ends = torch.arange(_SAMPLED)
    return torch.cat([ends, inner, n - 1 - ends]).to(p.device)


def _in_blocks(p: Tensor) -> Tensor:
    """The elements of some blocks of p: of its first, of its last and of others in between."""
    row = p.shape[1:].numel()
    blocks = num_blocks(row)
    last = p.shape[0] * blocks - 1
    ends = range(_SAMPLED_BLOCKS)
    inner = (last * k // (_SAMPLED_BLOCKS + 1) for k in range(1, _SAMPLED_BLOCKS + 1))
    chosen = torch.tensor(sorted({*ends, *inner, *(last - k for k in ends)})).unsqueeze(1)
    place = chosen % blocks * BLOCK + torch.arange(BLOCK)
    found: Tensor = (chosen // blocks * row + place)[place < row]
    return found


def _at(tensor: Tensor | None, positions: Tensor) -> Tensor:
    assert tensor is not None
    return tensor.detach().reshape(-1)[positions].double()


def _sample(optimizer: MaxVA, p: Tensor, positions: Tensor) -> _Sample:
    state = optimizer.state[p]
    keys = [key for key in (*_KEYS.values(), "max_exp_avg_sq") if key in state]
    sample = _Sample(
        theta=_at(state.get("master_param", p), positions),
        stored=_at(p, positions),
        states={key: _at(state[key], positions) for key in keys},
        step=state["step"].clone(),
    )
    if PACKED in state:
        _decode(sample, optimizer.algorithm, state, positions)
    return sample


def _decode(sample: _Sample, algorithm: str, state: dict[str, Any], positions: Tensor) -> None:
    """Fills in what a compact state says: its codes, and the float64 states that they stand for."""
    row = state[PACKED].shape[1:].numel()
    block = positions // row * num_blocks(row) + positions % row // BLOCK
    places = dict(zip(COMPACT, (positions, block, positions), strict=True))

    def gathered(key: str) -> Any:
        """Every element as a row of its own, with the scales of its block."""
        return state[key].reshape(-1)[places[key]].unsqueeze(1) if key in state else None

    def wide(x: Tensor) -> Tensor:
        return x.squeeze(1).double()

    stored = Packed(*map(gathered, COMPACT))
    moments = unpack(stored, algorithm)
    m, mean, var, w = map(wide, moments[:4])
    sample.states = {
        _KEYS["m"]: m,
        _KEYS["u"]: mean * w,
        _KEYS["v"]: (mean.square() + var) * w,
        _KEYS["w"]: w,
    }
    slots = {"m": m, "mean": mean, "var": var, "w": w}
    if moments.vmax is not None:
        slots["vmax"] = sample.states["max_exp_avg_sq"] = wide(moments.vmax)
    exponents = {}
    if stored.scale is not None:
        # LaMAdam's momentum is stored as it is, so r is decoded as that; roots of squares are exact
        slots = {
            "r": wide(unpack(stored, "lamadam").m),
            "mean": mean,
            "sd": wide(moments.var.sqrt()),
            "w": w,
        }
        if moments.vmax is not None:
            slots["root"] = wide(moments.vmax.sqrt())
        words = stored.scale.squeeze(1)
        exponents = {
            name: words >> 8 * slot & 0xFF for name, slot in _SCALED.items() if name in slots
        }
    sample.codes = _Codes(slots, exponents, block)


def _clip_factor(params: list[Tensor]) -> float:
    norm = math.sqrt(
        sum(p.grad.double().square().sum().item() for p in params if p.grad is not None)
    )
    return min(1.0, MAX_GRAD_NORM / norm)


def _reference(
    contender: Contender,
    optimizer: MaxVA,
    params: list[Tensor],
    before: dict[int, _Sample],
    gradients: dict[int, Tensor],
) -> dict[int, _Sample]:
    """The samples after a step of the eager reference in float64."""
    index = {id(p): k for k, p in enumerate(params)}
    copies, groups = {}, []
    for group in optimizer.param_groups:
        own = [index[id(p)] for p in group["params"] if index[id(p)] in before]
        for k in own:
            copies[k] = torch.nn.Parameter(before[k].theta.clone())
            copies[k].grad = gradients[k]
        if own:
            decay = group["weight_decay"]
            groups.append({"params": [copies[k] for k in own], "weight_decay": decay})
    assert contender.algorithm is not None
    reference = _REFERENCE[contender.algorithm](
        groups,
        lr=LR,
        eps=optimizer.param_groups[0]["eps"],
        amsgrad="amsgrad" in contender.extras,
        trust_ratio="trust" in contender.extras,
    )
    for k, p in copies.items():
        states = {key: x.clone() for key, x in before[k].states.items()}
        reference.state[p] = {"step": before[k].step.clone(), **states}
    reference.step()
    return {
        k: _sample(reference, p, torch.arange(p.numel(), device=p.device))
        for k, p in copies.items()
    }


def _compare(contender: Contender, k: int, got: _Sample, want: _Sample, mode: DtypeMode) -> None:
    wide = mode.state == torch.float64
    unit = 1e-7 if wide else 1.0  # float64 must be that much closer
    update = torch.finfo(mode.state).eps * 4 * want.theta.abs() + 1e-3 * unit * LR
    rounding = torch.finfo(mode.theta).eps * want.theta.abs()
    if got.codes is None:
        checks = _state_checks(got.states, want.states, unit)
    else:
        checks = _code_checks(contender, got.codes, want.states)
    kept = got.theta if mode.master or mode.theta.itemsize > 2 else None
    if kept is not None:
        checks["the parameter"] = _around(kept, want.theta, update)
    checks["the stored parameter"] = _around(got.stored, want.theta, update + rounding)
    for what, (is_, low, high) in checks.items():
        wrong = ~((is_ >= low) & (is_ <= high))  # a NaN is wrong, too
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise WrongResultError(
                f"{contender.label} computes {what} of parameter {k} wrong: {is_[i].item():.9g} "
                f"where the float64 reference allows {low[i].item():.9g} to {high[i].item():.9g} "
                f"({int(wrong.sum())} of {wrong.numel()} compared elements are out of bounds)"
            )


#: What is compared: a value, and the lowest and the highest that it may have.
_Check = tuple[Tensor, Tensor, Tensor]


def _around(value: Tensor, middle: Tensor, bound: Tensor) -> _Check:
    return value, middle - bound, middle + bound


def _state_checks(
    got: dict[str, Tensor], want: dict[str, Tensor], unit: float
) -> dict[str, _Check]:
    m, v, w = (want[_KEYS[symbol]] for symbol in "mvw")
    bounds = {
        "exp_avg": 3e-5 * m.abs().max().expand_as(m),
        "maxva_avg": 1e-4 * (v * w).sqrt(),
        "exp_avg_sq": 2e-4 * v,
        "maxva_weight": torch.full_like(w, 3e-5),
        "max_exp_avg_sq": 2e-4 * v / w,
    }
    return {key: _around(got[key], x, bounds[key] * unit) for key, x in want.items()}


def _code_checks(contender: Contender, codes: _Codes, want: dict[str, Tensor]) -> dict[str, _Check]:
    m, u, v, w = (want[_KEYS[symbol]] for symbol in "muvw")
    mean, size = u / w, (v / w).sqrt()
    var = (v / w - mean.square()).clamp(min=0)
    sd = var.sqrt()
    r = m
    if contender.algorithm == "madam":
        unit = mean.abs() + sd
        r = torch.where(unit == 0, 0, m / unit)  # a gradient may be 0
    true = {"m": m, "r": r, "mean": mean, "var": var, "sd": sd}
    bounds = {
        "m": 3e-5 * m.abs().max().expand_as(m),
        "r": 3e-5 * r.abs().max().expand_as(r),
        "mean": 1e-4 * size,
        "var": 2e-4 * size * sd + 1e-8 * size.square(),  # as sd's
        "sd": 1e-4 * size,
    }
    if "max_exp_avg_sq" in want:
        true["vmax"] = want["max_exp_avg_sq"]
        true["root"] = true["vmax"].sqrt()
        bounds |= {"vmax": 2e-4 * true["vmax"], "root": 1e-4 * true["root"]}
    checks = {}
    for name in codes.slots:
        if name == "w":
            continue
        middle = true[name]
        low, high = middle - bounds[name], middle + bounds[name]
        if name in _UNSIGNED:
            low = low.clamp(min=0)
        grid, scale = None, torch.ones_like(middle)
        if name in codes.exponents:
            exponent = codes.exponents[name].double()
            grid = _grid(name in _UNSIGNED).to(middle)
            scale = torch.exp2(exponent - 127)
            checks[f"the scale of {name}"] = exponent, *_exponents(low, high, codes.block)
        below, above = _enclosing(low / scale, high / scale, grid)
        checks[name] = codes.slots[name], below * scale, above * scale
    grid = _grid(unsigned=False).to(w) if codes.exponents else None
    bound = 1e-4 * torch.minimum(w, 1 - w) + 4 * torch.finfo(torch.float32).eps
    checks["w"] = codes.slots["w"], *_enclosing_weight(w - bound, w + bound, grid)
    return checks


def _grid(unsigned: bool) -> Tensor:
    """The numbers that codes of int8 stand for, in units of their scale, rising."""
    if unsigned:
        return unsigned_value(torch.arange(NAN_CODE), 1.0)
    return signed_value(torch.cat([torch.arange(255, 128, -1), torch.arange(128)]), 1.0)


def _exponents(low: Tensor, high: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Per element the least and the greatest exponent of its block's scale.

    It puts the block's largest magnitude into [0.40625, 0.8125).
    """
    least = torch.where(low * high < 0, 0, torch.minimum(low.abs(), high.abs()))
    most = torch.maximum(low.abs(), high.abs())

    def exponent(magnitude: Tensor) -> Tensor:
        zeros = magnitude.new_zeros(int(block.max()) + 1)
        largest = zeros.scatter_reduce(0, block, magnitude, "amax")[block]
        mantissa, exponent = torch.frexp(largest)
        found = exponent + 127 + (mantissa >= 0.8125)
        return torch.where(largest == 0, 1, found).clamp(min=1).double()

    return exponent(least), exponent(most)


def _enclosing(low: Tensor, high: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two numbers of a grid that enclose [low, high]; None: of bfloat16."""
    if grid is not None:
        below = torch.searchsorted(grid, low, right=True) - 1
        above = torch.searchsorted(grid, high)
        return grid[below.clamp(min=0)], grid[above.clamp(max=len(grid) - 1)]

    def spacing(x: Tensor) -> Tensor:
        return torch.exp2((torch.frexp(x).exponent - 8).clamp(min=-133).double())

    below, above = spacing(low), spacing(high)
    return (low / below).floor() * below, (high / above).ceil() * above


def _enclosing_weight(low: Tensor, high: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for w, of which a code holds w up to 1/2 and 1 - w above."""
    eps = torch.finfo(torch.float32).eps  # the rounding of 1 - w
    low, high = low.clamp(0, 1), high.clamp(0, 1)
    up_to_half = _enclosing(low.clamp(max=0.5), high.clamp(max=0.5), grid)
    above_half = _enclosing(1 - high.clamp(min=0.5), 1 - low.clamp(min=0.5), grid)
    if grid is not None:  # a started coordinate never returns to w = 0
        up_to_half = up_to_half[0], up_to_half[1].clamp(min=float(grid[grid > 0][0]))
    is_low, is_high = low <= 0.5, high > 0.5  # both, where rounding decides which
    lowest = torch.minimum(
        torch.where(is_low, up_to_half[0], 1), torch.where(is_high, 1 - above_half[1] - eps, 1)
    )
    highest = torch.maximum(
        torch.where(is_low, up_to_half[1], 0), torch.where(is_high, 1 - above_half[0] + eps, 0)
    )
    return lowest, highest
