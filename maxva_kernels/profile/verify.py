"""One step of an optimizer of ours against the float64 reference, before it is timed.

On the very tensors that are measured afterwards, in the midst of a run: elements at both ends and
in between of every parameter (whole parameters where norms of tensors matter). Bounds are those of
docs/algorithm.md's float32 rule in outline; tests/exactness.py has the strict one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maxva_kernels.optimizers import LaMAdam, MAdam, MaxVA
from maxva_kernels.profile.contenders import LR, MAX_GRAD_NORM, Contender
from maxva_kernels.profile.measure import Step
from maxva_kernels.profile.traffic import DtypeMode

_REFERENCE = {"madam": MAdam, "lamadam": LaMAdam}
_KEYS = {"m": "exp_avg", "u": "maxva_avg", "v": "exp_avg_sq", "w": "maxva_weight"}
_SAMPLED = 512
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
    chosen = _small(params) if whole else list(range(len(params)))
    positions = {k: _positions(params[k], whole) for k in chosen}
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


def _positions(p: Tensor, whole: bool) -> Tensor:
    n = p.numel()
    if whole or n <= 4 * _SAMPLED:
        return torch.arange(n, device=p.device)
    inner = torch.linspace(_SAMPLED, n - _SAMPLED - 1, _SAMPLED, dtype=torch.float64).long()
    ends = torch.arange(_SAMPLED)
    return torch.cat([ends, inner, n - 1 - ends]).to(p.device)


def _at(tensor: Tensor | None, positions: Tensor) -> Tensor:
    assert tensor is not None
    return tensor.detach().reshape(-1)[positions].double()


def _sample(optimizer: MaxVA, p: Tensor, positions: Tensor) -> _Sample:
    state = optimizer.state[p]
    keys = [key for key in (*_KEYS.values(), "max_exp_avg_sq") if key in state]
    return _Sample(
        theta=_at(state.get("master_param", p), positions),
        stored=_at(p, positions),
        states={key: _at(state[key], positions) for key in keys},
        step=state["step"].clone(),
    )


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
    m, v, w = (want.states[_KEYS[symbol]] for symbol in "mvw")
    bounds = {
        "exp_avg": 3e-5 * m.abs().max().expand_as(m),
        "maxva_avg": 1e-4 * (v * w).sqrt(),
        "exp_avg_sq": 2e-4 * v,
        "maxva_weight": torch.full_like(w, 3e-5),
        "max_exp_avg_sq": 2e-4 * v / w,
    }
    checks = {key: (got.states[key], x, bounds[key] * unit) for key, x in want.states.items()}
    kept = got.theta if mode.master or mode.theta.itemsize > 2 else None
    if kept is not None:
        checks["the parameter"] = kept, want.theta, update
    checks["the stored parameter"] = got.stored, want.theta, update + rounding
    for what, (is_, should, bound) in checks.items():
        wrong = ~((is_ - should).abs() <= bound)  # a NaN is wrong, too
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise WrongResultError(
                f"{contender.label} computes {what} of parameter {k} wrong: {is_[i].item():.9g} "
                f"where the float64 reference has {should[i].item():.9g} "
                f"({int(wrong.sum())} of {wrong.numel()} compared elements are out of bounds)"
            )
