"""MAdam in torch._foreach operations: what one gets without writing a kernel.

A baseline for timing only: decoupled decay, no options. The same equations as
maxva_kernels/reference.py; tests/test_profile.py holds the two against each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ForeachMAdam(torch.optim.Optimizer):
    """MAdam (Zhu et al., Alg. 1) over tensor lists, about 30 passes over memory."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 1e-16,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "beta_min": beta_min, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "delta": delta})
        self._t = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._t += 1
        for group in self.param_groups:
            theta = [p for p in group["params"] if p.grad is not None]
            g = [p.grad for p in theta]
            for p in theta:
                if not self.state[p]:
                    self.state[p] = {key: torch.zeros_like(p) for key in "muvw"}
            m, u, v, w = ([self.state[p][key] for p in theta] for key in "muvw")
            self._update(group, theta, g, m, u, v, w)

    def _update(
        self,
        group: dict[str, Any],
        theta: list[Tensor],
        g: list[Tensor],
        m: list[Tensor],
        u: list[Tensor],
        v: list[Tensor],
        w: list[Tensor],
    ) -> None:
        f: Any = torch  # whose foreach operations take and return more than they are declared with
        alpha, beta_high = group["betas"]
        if self._t == 1:
            c: Any = 1 - beta_high
        else:
            mean = f._foreach_div(u, w)
            d = f._foreach_sub(g, mean)
            f._foreach_mul_(d, d)
            var = f._foreach_div(v, w)
            f._foreach_mul_(mean, mean)
            f._foreach_sub_(var, mean)
            f._foreach_clamp_min_(var, 0)
            numerator = f._foreach_sub(d, var)
            f._foreach_mul_(numerator, w)
            f._foreach_add_(numerator, group["delta"])
            f._foreach_add_(d, var)
            f._foreach_add_(d, numerator)
            f._foreach_div_(numerator, d)
            c = numerator
            f._foreach_clamp_max_(c, 1 - group["beta_min"])
            f._foreach_clamp_min_(c, 1 - beta_high)
        ones = f._foreach_sub(w, 1)
        f._foreach_neg_(ones)
        for state, target in ((u, g), (v, f._foreach_mul(g, g)), (w, f._foreach_add(w, ones))):
            f._foreach_lerp_(state, target, c)
        f._foreach_lerp_(m, g, 1 - alpha)
        denominator = f._foreach_div(v, w)
        f._foreach_sqrt_(denominator)
        f._foreach_add_(denominator, group["eps"])
        f._foreach_mul_(theta, 1 - group["lr"] * group["weight_decay"])
        f._foreach_addcdiv_(theta, m, denominator, -group["lr"] / (1 - alpha**self._t))
