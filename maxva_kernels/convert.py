"""Checkpoints of other optimizers, read into ours."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from maxva_kernels.hyper import ROW, hyper_row
from maxva_kernels.optimizers import MaxVA


def load_reference_state(optimizer: MaxVA, state_dict: dict[str, Any]) -> None:
    """Goes on from another optimizer's checkpoint: moments, step counts and learning rates.

    Hyper-parameters other than lr stay those of `optimizer`. Understood are the state dicts of

    * the MaxVA authors' `MAdam` (github.com/zhuchen03/MaxVA): exactly the same algorithm;
    * their `LaMAdam`, whose momentum holds the learning rate: divided out by its running mean,
      which is exact under a constant lr;
    * `torch.optim.Adam(W)` and apex's `FusedAdam`, as a warm start: v as it is with
      w = 1 - beta2^t, and u so that the mean is Adam's bias-corrected first moment. For
      FusedLaMAdam the momentum is divided by the denominator that v gives.

    Args:
        optimizer: one of this package's, over the same parameters in the same groups.
        state_dict: what the other optimizer's `state_dict()` returned.

    Raises:
        ValueError: the dict is of none of these, or does not fit the parameters. Nothing has
            changed then.
    """
    own = optimizer.state_dict()
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in own["param_groups"]]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has groups of {saved_sizes} parameters, the optimizer of {sizes}"
        )
    state: dict[int, dict[str, Tensor]] = {}
    groups = []
    for own_group, saved_group, live in zip(
        own["param_groups"], saved_groups, optimizer.param_groups, strict=True
    ):
        h = dict(zip(ROW, hyper_row(live), strict=True))
        steps = [_group_step(saved_group)]
        for index, key in zip(own_group["params"], saved_group["params"], strict=True):
            saved = state_dict["state"].get(key)
            if saved:
                saved = deepcopy(saved)  # the other optimizer may go on with its own
                state[index] = _converted(saved, saved_group, h, optimizer.algorithm)
                if not live["amsgrad"]:
                    state[index].pop("max_exp_avg_sq", None)
                steps.append(int(state[index]["step"]))
        groups.append({**own_group, "lr": saved_group["lr"], "step": max(steps)})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _group_step(group: dict[str, Any]) -> int:
    return int(group.get("step", 0))


def _converted(
    saved: dict[str, Any], group: dict[str, Any], h: dict[str, float], algorithm: str
) -> dict[str, Tensor]:
    if "exp_avg_grad" in saved:
        return _from_madam(saved, group)
    if "update_est" in saved:
        return _from_lamadam(saved, group)
    if "exp_avg" in saved and "exp_avg_sq" in saved:
        return _from_adam(saved, group, h, algorithm)
    raise ValueError(
        f"state_dict is not of MAdam, LaMAdam, Adam(W) or FusedAdam: a state has the keys "
        f"{', '.join(map(str, saved))}"
    )


def _state(t: int, m: Tensor, u: Tensor, v: Tensor, w: Any) -> dict[str, Tensor]:
    return {
        "step": torch.tensor(float(t), device="cpu"),
        "exp_avg": m,
        "maxva_avg": u,
        "exp_avg_sq": v,
        # a Python number after the first step, and for ever with equal betas
        "maxva_weight": w if isinstance(w, Tensor) else torch.full_like(v, w),
    }


def _from_madam(saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
    t = max(_group_step(group) - int(group.get("moment_warmup", 0)), 0)
    m, u, v = saved["exp_avg_grad"], saved["exp_avg"], saved["exp_avg_sq"]
    state = _state(t, m, u, v, saved["total_w"])
    if "max_exp_avg_sq" in saved:  # there the maximum of sqrt(v/w) + eps
        root = (saved["max_exp_avg_sq"] - group["eps"]).clamp(min=0)
        state["max_exp_avg_sq"] = root.square()
    return state


def _from_lamadam(saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
    t = int(saved["step"])
    running_lr = float(saved.get("update_avg_lr", saved.get("update_lr_bc", 0)))
    m = saved["update_est"]
    if running_lr > 0:
        m = m / running_lr * (1 - group["momentum"] ** t)
    state = _state(t, m, saved["g_est"], saved["g_sq_est"], saved["total_w"])
    if "max_sq_est" in saved:
        state["max_exp_avg_sq"] = saved["max_sq_est"] / state["maxva_weight"]
    return state


def _from_adam(
    saved: dict[str, Any], group: dict[str, Any], h: dict[str, float], algorithm: str
) -> dict[str, Tensor]:
    t = int(saved.get("step", _group_step(group)))
    alpha, beta = group["betas"]
    m, v = _wide(saved["exp_avg"]), _wide(saved["exp_avg_sq"])
    w = 1 - beta**t
    u = m * (w / (1 - alpha**t)) if t else torch.zeros_like(m)
    if algorithm == "lamadam" and t:
        m = torch.where(v == 0, 0.0, m / ((v / w).sqrt() + h["eps"]))
    state = _state(t, m, u, v, w)
    if "max_exp_avg_sq" in saved and t:
        state["max_exp_avg_sq"] = _wide(saved["max_exp_avg_sq"]) / w
    return state


def _wide(x: Tensor) -> Tensor:
    """At least float32, as our states are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
