"""MaxVA in plain torch operations: the ground truth, and the "eager" backend.

Written as the equations stand, in the parameter's precision (float32 for lower ones), on any
device. Symbols are the paper's with the tilde dropped; see docs/algorithm.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maxva_kernels.batch import (
    CLIP_FACTOR,
    GRAD_NORM,
    SKIP,
    Batch,
    Phase,
    Statistic,
    check_tensors,
    skips_on_host,
)
from maxva_kernels.compact import Moments, Packed, pack, unpack
from maxva_kernels.hyper import ROW
from maxva_kernels.rounding import FIELDS, random_words, rounded, row_of


def complement_of_beta(g: Tensor, u: Tensor, v: Tensor, w: Tensor, h: dict[str, float]) -> Tensor:
    """1 - beta_t, clipped: Eq. 6 with the authors' delta, Eq. 7 where w is 0."""
    divisor = torch.where(w == 0, 1.0, w)
    mean = u / divisor
    var = torch.clamp(v / divisor - mean**2, min=0)
    return centered_complement(g, mean, var, w, h)


def centered_complement(
    g: Tensor, mean: Tensor, var: Tensor, w: Tensor, h: dict[str, float]
) -> Tensor:
    """`complement_of_beta` from mean = u/w and var = v/w - mean^2."""
    first = w == 0
    d = (g - mean) ** 2
    numerator = w * (d - var) + h["delta"]
    denominator = numerator + d + var
    c_min, c_max = 1 - h["beta_high"], 1 - h["beta_low"]
    # 0/0 is beta_low; a NaN gradient stays NaN through u, v and w themselves
    c = torch.nan_to_num(numerator / denominator, nan=c_max, posinf=c_max, neginf=c_min)
    return torch.where(first, 1 - h["beta_init"], c.clamp(c_min, c_max))


def observe(
    g: Tensor, u: Tensor, v: Tensor, w: Tensor, h: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns u, v, w after observing g (Eq. 2-4), and the 1 - beta_t they moved by."""
    c = complement_of_beta(g, u, v, w, h)
    return u + c * (g - u), v + c * (g * g - v), w + c * (1 - w), c


def observe_centered(
    g: Tensor, mean: Tensor, var: Tensor, w: Tensor, h: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`observe` of mean = u/w and var = v/w - mean^2, which survive that states are rounded.

    Returns mean, var, w after observing g, and the 1 - beta_t they moved by.
    """
    c = centered_complement(g, mean, var, w, h)
    w_new = w + c * (1 - w)
    share = c / w_new
    deviation = g - mean
    # 1 - share, without the cancellation that could make it negative
    var_new = w * (1 - c) / w_new * (var + share * deviation**2)
    return mean + share * deviation, var_new, w_new, c


def normalized(x: Tensor, v: Tensor, w: Tensor, vmax: Tensor | None, h: dict[str, float]) -> Tensor:
    """Divides x by sqrt(vhat) + eps; 0 where that is 0."""
    vhat = v / w if vmax is None else vmax
    if h["eps_inside_sqrt"]:
        denominator = torch.sqrt(vhat + h["eps"])
    else:
        denominator = torch.sqrt(vhat) + h["eps"]
    return torch.where(denominator == 0, 0.0, x / denominator)


def momentum_input(
    algorithm: str, g: Tensor, v: Tensor, w: Tensor, vmax: Tensor | None, h: dict[str, float]
) -> Tensor:
    """What enters the momentum: g in MAdam (Alg. 1), g normalised in LaMAdam (Alg. 2)."""
    return g if algorithm == "madam" else normalized(g, v, w, vmax, h)


def direction(
    algorithm: str,
    x: Tensor,
    m: Tensor,
    v: Tensor,
    w: Tensor,
    vmax: Tensor | None,
    h: dict[str, float],
) -> Tensor:
    """The update before bias correction, from the momentum m that x has entered already."""
    ahead = h["alpha"] * m + (1 - h["alpha"]) * x if h["nesterov"] else m
    return normalized(ahead, v, w, vmax, h) if algorithm == "madam" else ahead


def _packed(batch: Batch, i: int) -> Packed | None:
    """Parameter i's compact state, None where it has another."""
    if not batch.packed:
        return None
    return Packed(
        batch.packed[i],
        batch.scale[i] if batch.scale else None,
        batch.maximum[i] if batch.maximum else None,
    )


class EagerBackend:
    """`Backend` (maxva_kernels/batch.py) in plain torch operations."""

    def check(self, batch: Batch, algorithm: str, grad_scale: Tensor | None) -> None:
        check_tensors(batch, grad_scale is not None)

    def update(
        self,
        batch: Batch,
        algorithm: str,
        phase: Phase,
        control: Tensor | None,
        grad_scale: Tensor | None,
        norms: Tensor | None,
    ) -> None:
        self.check(batch, algorithm, grad_scale)
        keep = None
        if control is not None:
            if skips_on_host(control):
                return
            keep = control[SKIP] != 0
        index = 0
        for group, size in enumerate(batch.group_sizes):
            row = batch.hyper[group * (len(ROW) + 1) : (group + 1) * (len(ROW) + 1)]
            h = dict(zip(ROW, row[1:], strict=True))
            on_device = batch.lr[group]
            lr = row[0] if on_device is None else on_device.reshape(()).double()
            for i in range(index, index + size):
                self._update_one(
                    batch, i, algorithm, phase, h, lr, control, keep, grad_scale, norms
                )  # fmt: skip
            index += size
        if phase != Phase.STATES:
            for step in (*batch.step, *batch.group_step):
                step.add_(1 if keep is None else (~keep).to(step.dtype))

    def _update_one(
        self,
        batch: Batch,
        i: int,
        algorithm: str,
        phase: Phase,
        h: dict[str, float],
        lr: float | Tensor,
        control: Tensor | None,
        keep: Tensor | None,
        grad_scale: Tensor | None,
        norms: Tensor | None,
    ) -> None:
        packed = _packed(batch, i)
        if packed is None:
            m, u, v, w = batch.m[i], batch.u[i], batch.v[i], batch.w[i]
            vmax = batch.vmax[i] if batch.vmax else None
        else:
            moments = unpack(packed, algorithm)
            m, mean, var, w, vmax = moments
        master = batch.master[i] if batch.master else None
        stored = batch.theta[i] if master is None else master
        theta = stored.to(m.dtype)
        g = batch.g[i].to(m.dtype)

        def write(tensor: Tensor, value: Tensor) -> None:
            tensor.copy_(value if keep is None else torch.where(keep, tensor, value))

        def record(statistic: Statistic, values: Tensor) -> None:
            if batch.statistics is not None:
                write(batch.statistics[i, statistic], values.double().sum())

        if grad_scale is not None:
            g = g / grad_scale.reshape(())
            if phase != Phase.STATES:
                write(batch.g[i], g.to(batch.g[i].dtype))
        if phase != Phase.PARAMETERS:
            record(Statistic.GRADIENT_SQUARES, g.double().square())
        if control is not None:
            g = g * control[CLIP_FACTOR]
        if h["maximize"]:
            g = -g
        if not h["adam_w_mode"] and h["weight_decay"]:  # as in the kernels, whatever theta is
            g = g + h["weight_decay"] * theta

        # compact states move in the last phase only: they are rounded once
        moves = packed is not None or phase != Phase.PARAMETERS
        if packed is not None:
            mean_new, var_new, w_new, c = observe_centered(g, mean, var, w, h)
            v_new, weight = mean_new**2 + var_new, torch.ones_like(w_new)
        elif moves:
            u_new, v_new, w_new, c = observe(g, u, v, w, h)
            weight = w_new
        else:
            v_new, weight = v, w
        if phase != Phase.PARAMETERS:
            record(Statistic.ONE_MINUS_BETA, c)
            record(Statistic.AT_BETA_MIN, c == 1 - h["beta_low"])
            record(Statistic.AT_BETA_MAX, c == 1 - h["beta_high"])
        vmax_new = torch.maximum(vmax, v_new / weight) if moves and vmax is not None else vmax
        x = momentum_input(algorithm, g, v_new, weight, vmax_new, h)
        m_new = m + (1 - h["alpha"]) * (x - m) if moves else m
        update = direction(algorithm, x, m_new, v_new, weight, vmax_new, h)
        t = batch.step[i].double() + 1
        if h["bias_correction"]:
            update = update / (1 - torch.pow(h["alpha"], t))
        decay = h["weight_decay"] if h["adam_w_mode"] else 0.0

        if phase == Phase.STATES:
            assert norms is not None
            norms[i, 0] = theta.double().square().sum()
            norms[i, 1] = (update + decay * theta).double().square().sum()
        if packed is None and moves:
            for tensor, value in ((m, m_new), (u, u_new), (v, v_new), (w, w_new)):
                write(tensor, value)
            if vmax is not None and vmax_new is not None:
                write(vmax, vmax_new)
        if phase != Phase.STATES:
            step_size = lr
            if norms is not None and h["trust_ratio"] and h["weight_decay"]:
                r = torch.where((norms[i] == 0).any(), 1.0, torch.sqrt(norms[i, 0] / norms[i, 1]))
                step_size = lr * r
            record(Statistic.STEP_SIZE, (step_size * update).abs())
            moved = theta - step_size * decay * theta - step_size * update
            # lr = 0 keeps the bits, whatever the update is
            frozen = torch.as_tensor(lr == 0, device=theta.device)
            for tensor in (batch.theta[i],) if master is None else (master, batch.theta[i]):
                write(tensor, torch.where(frozen, tensor, self._stored(batch, i, moved, tensor, t)))
            if packed is not None:
                row = row_of(batch.rounding, i)
                assert row is not None
                moved_states = Moments(m_new, mean_new, var_new, w_new, vmax_new)
                words = random_words(theta.numel(), t, row)
                coded = pack(moved_states, algorithm, packed.packed, words)
                for old, new in zip(packed, coded, strict=True):
                    if old is not None and new is not None:
                        write(old, new)

    @staticmethod
    def _stored(batch: Batch, i: int, moved: Tensor, tensor: Tensor, t: Tensor) -> Tensor:
        """`moved` in the dtype of the tensor it becomes."""
        row = row_of(batch.rounding, i)
        if row is None or not row[FIELDS.index("theta")]:
            return moved.to(tensor.dtype)
        # a 0-dim parameter has taken the scalars' float64
        return rounded(moved.float(), tensor, t, row)

    def sum_of_squares(self, g: list[Tensor]) -> Tensor:
        return torch.stack([x.double().square().sum() for x in g]).sum().reshape(1)

    def write_control(
        self,
        control: Tensor,
        sum_of_squares: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        norm = control.new_zeros(())
        if sum_of_squares is not None:
            norm = sum_of_squares.reshape(()).sqrt()
        if grad_scale is not None:
            norm = norm / grad_scale.reshape(())
        skip = torch.zeros_like(norm, dtype=torch.bool)
        if found_inf is not None:
            skip = skip | (found_inf.reshape(()) != 0)
        if skip_nonfinite:
            skip = skip | ~(norm <= torch.finfo(torch.float32).max)
        factor = max_grad_norm / norm
        control[SKIP] = skip
        control[CLIP_FACTOR] = torch.where((factor >= 1) | (norm == 0), 1.0, factor)
        control[GRAD_NORM] = norm
