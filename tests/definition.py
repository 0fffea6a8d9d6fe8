"""MaxVA a second time, in numpy, from the equations alone: an oracle that shares no code.

Works in any numpy precision: float64 is the truth for float32, longdouble for float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

DEFAULTS: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "beta_min": 0.5,
    "weight_decay": 0.0,
    "bias_correction": True,
    "adam_w_mode": True,
    "amsgrad": False,
    "nesterov": False,
    "trust_ratio": False,
    "maximize": False,
    "max_grad_norm": None,
    "delta": 1e-16,
    "beta_init": None,
    "eps_inside_sqrt": False,
}
EPS = {"madam": 1e-8, "lamadam": 1e-15}


@dataclass
class Coordinates:
    """One parameter tensor with its states; `g` is the gradient that was last observed."""

    theta: np.ndarray
    m: np.ndarray
    u: np.ndarray
    v: np.ndarray
    w: np.ndarray
    vmax: np.ndarray
    t: int = 0
    g: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def start(cls, theta: Any, dtype: Any = np.float64) -> Coordinates:
        theta = np.array(theta, dtype=dtype)
        return cls(theta, *(np.zeros_like(theta) for _ in range(5)))


class Definition:
    """Steps any number of tensors, as docs/algorithm.md defines it."""

    def __init__(self, algorithm: str, **options: Any) -> None:
        self.algorithm = algorithm
        self.o = {**DEFAULTS, "eps": EPS[algorithm], **options}
        self.o.pop("master_weights", None)

    def variance_maximising_beta(
        self, g: np.ndarray, u: np.ndarray, v: np.ndarray, w: np.ndarray
    ) -> np.ndarray:
        """beta_t of observed coordinates (w > 0) by Eq. 6, clipped."""
        mean = u / w
        return self.beta_of((g - mean) ** 2, np.maximum(v / w - mean**2, 0), w)

    def beta_of(self, d: np.ndarray, var: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Eq. 6 in d = (g - mean)^2 and the variance, clipped; 0/0 is beta_low."""
        low, high = self.o["beta_min"], self.o["betas"][1]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            beta = (d + var) / (w * (d - var) + d + var + self.o["delta"])
        return np.where(np.isnan(beta), low, np.clip(beta, low, high))

    def beta(self, g: np.ndarray, c: Coordinates) -> np.ndarray:
        """beta_t: Eq. 7 where a coordinate has not been observed yet, else Eq. 6."""
        init = self.o["beta_init"]
        if init is None:
            init = self.o["betas"][1] if self.o["betas"][1] < 1 else 0.9
        seen = c.w != 0
        w = np.where(seen, c.w, 1)
        return np.where(seen, self.variance_maximising_beta(g, c.u, c.v, w), g.dtype.type(init))

    def clip_factor(self, grads: list[np.ndarray]) -> Any:
        """min(1, max_grad_norm / global norm)."""
        if self.o["max_grad_norm"] is None:
            return 1
        norm = np.sqrt(sum(np.sum(g.astype(np.longdouble) ** 2) for g in grads))
        return 1 if norm == 0 else min(1, self.o["max_grad_norm"] / norm)

    def step(
        self, tensors: list[Coordinates], grads: list[Any], lr: float, grad_scale: float = 1.0
    ) -> None:
        """One step of all tensors; a gradient may be None."""
        pairs = [
            (c, np.asarray(g, dtype=c.theta.dtype) / grad_scale)
            for c, g in zip(tensors, grads, strict=True)
            if g is not None
        ]
        factor = self.clip_factor([g for _, g in pairs])
        with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
            for c, g in pairs:
                self._move(c, g * factor, lr)

    def _move(self, c: Coordinates, g: np.ndarray, lr: float) -> None:
        o = self.o
        alpha, decay = o["betas"][0], o["weight_decay"]
        if o["maximize"]:
            g = -g
        if not o["adam_w_mode"]:
            g = g + decay * c.theta
        c.g, c.t = g, c.t + 1
        beta = self.beta(g, c)
        c.u = beta * c.u + (1 - beta) * g
        c.v = beta * c.v + (1 - beta) * g**2
        c.w = beta * c.w + (1 - beta)
        vhat = c.v / c.w
        if o["amsgrad"]:
            vhat = c.vmax = np.maximum(c.vmax, vhat)
        denom = np.sqrt(vhat + o["eps"]) if o["eps_inside_sqrt"] else np.sqrt(vhat) + o["eps"]
        safe = np.where(denom == 0, 1, denom)
        x = g if self.algorithm == "madam" else g / safe
        c.m = alpha * c.m + (1 - alpha) * x
        update = alpha * c.m + (1 - alpha) * x if o["nesterov"] else c.m
        if o["bias_correction"]:
            update = update / (1 - np.power(c.theta.dtype.type(alpha), c.t))
        if self.algorithm == "madam":
            update = np.where(denom == 0, 0, update / safe)
        if not o["trust_ratio"]:
            c.theta = c.theta - (lr * decay * c.theta if o["adam_w_mode"] else 0) - lr * update
            return
        if o["adam_w_mode"]:
            update = update + decay * c.theta
        norms = np.sqrt(np.sum(c.theta**2)), np.sqrt(np.sum(update**2))
        r = norms[0] / norms[1] if decay and norms[0] and norms[1] else 1
        c.theta = c.theta - lr * r * update
