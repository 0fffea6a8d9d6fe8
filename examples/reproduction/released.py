"""MAdam as the authors' noisy quadratic script has it, to see what its difference does.

synthetic_data/nqm.py of github.com/zhuchen03/MaxVA at 2424193 keeps no average u of the gradients
weighted by beta_t: it puts the momentum in its place, so beta_t maximises another variance than
Eq. 5. It is written here from the equations, with that one change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class MAdamWithMomentumForMean(Optimizer):
    """MAdam (Alg. 1) with m / w in the place of u / w in Eq. 6."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        betas: tuple[float, float],
        beta_min: float,
        eps: float,
        delta: float = 1e-16,
    ) -> None:
        super().__init__(params, {"betas": betas, "beta_min": beta_min, "eps": eps, "delta": delta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alpha, beta_high = group["betas"]
            for p in group["params"]:
                g, state = p.grad, self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    state["w"] = torch.zeros_like(p)
                m, v, w = state["m"], state["v"], state["w"]
                m.lerp_(g, 1 - alpha)
                if state["t"] == 0:
                    beta = torch.full_like(p, beta_high)
                else:
                    # the script's momentum has seen g_t already, and its variance may be negative
                    mean = m / w
                    variance, deviation = v / w - mean**2, (g - mean) ** 2
                    beta = (deviation + variance) / (
                        w * (deviation - variance) + deviation + variance + group["delta"]
                    )
                    beta.clamp_(group["beta_min"], beta_high)
                v.mul_(beta).add_((1 - beta) * g**2)
                w.mul_(beta).add_(1 - beta)
                state["t"] += 1
                step_size = group["lr"] / (1 - alpha ** state["t"])
                p.sub_(step_size * m / ((v / w).sqrt() + group["eps"]))
