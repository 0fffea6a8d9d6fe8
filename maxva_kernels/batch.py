"""What one step hands to a backend: lists of tensors that are updated together."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from maxva_kernels.compact import MAXIMUM_DTYPE, num_blocks, same_layout


class Phase(enum.IntEnum):
    """`enum class Phase` of csrc/step_scalars.h: the trust ratio alone needs two phases."""

    WHOLE = 0
    STATES = 1
    PARAMETERS = 2


class Statistic(enum.IntEnum):
    """`enum Statistic` of csrc/statistics.h: what is summed over a parameter's elements."""

    GRADIENT_SQUARES = 0
    ONE_MINUS_BETA = 1
    AT_BETA_MIN = 2
    AT_BETA_MAX = 3
    STEP_SIZE = 4


#: Fields of the control block, float64 on the gradients' device.
SKIP, CLIP_FACTOR, GRAD_NORM, CONTROL_FIELDS = range(4)


@dataclass(slots=True)
class Batch:
    """Parameters on one device that a backend updates in one call.

    Element i of every list belongs to parameter i; `vmax` and `master` are either as long or empty.
    Compact states stand in `packed`, `scale` (of int8 only) and `maximum` (of amsgrad only) instead
    of m, u, v, w and vmax, which are empty then: compact.py. Consecutive parameters belong to one
    group: `group_sizes` says how many, `hyper` holds lr and the row of hyper.ROW per group, `lr` a
    one-element tensor that overrides it or None, and `groups` which of the optimizer's groups it
    is; `parameters` are the parameters' indices in the optimizer, where `statistics` are collected.
    `group_step` holds the int32 counters on the device that this call counts up. `trust_ratio` is
    the same for all groups of a batch: it takes two phases. `rounding` holds a row of
    rounding.FIELDS per parameter, or nothing where nothing is rounded stochastically; `statistics`
    is float64 [parameters, len(Statistic)], of which each phase writes what it knows, or None.
    `rows`, no backend's business, tells of parameters divided over ranks their row in the table of
    norms (sharding.py).
    """

    device: torch.device
    trust_ratio: bool = False
    theta: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    m: list[Tensor] = field(default_factory=list)
    u: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    w: list[Tensor] = field(default_factory=list)
    vmax: list[Tensor] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    maximum: list[Tensor] = field(default_factory=list)
    master: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)
    group_step: list[Tensor] = field(default_factory=list)
    group_sizes: list[int] = field(default_factory=list)
    hyper: list[float] = field(default_factory=list)
    lr: list[Tensor | None] = field(default_factory=list)
    rounding: list[int] = field(default_factory=list)
    statistics: Tensor | None = None
    groups: list[int] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)


def check_states(batch: Batch) -> None:
    """Raises unless every state fits its parameter.

    The operators check for themselves; this is for plain torch code, and for a step of several
    batches, of which none may move before all are known to fit.
    """
    if batch.packed:
        _check_packed(batch)
    lists = {
        "exp_avg": batch.m,
        "maxva_avg": batch.u,
        "exp_avg_sq": batch.v,
        "maxva_weight": batch.w,
        "max_exp_avg_sq": batch.vmax,
        "master_param": batch.master,
    }
    for name, tensors in lists.items():
        for theta, tensor in zip(batch.theta, tensors, strict=False):
            dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
            if (tensor.shape, tensor.dtype, tensor.device) != (theta.shape, dtype, theta.device):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}; "
                    f"its parameter needs {tuple(theta.shape)}, {dtype} on {theta.device}"
                )


def _check_packed(batch: Batch) -> None:
    word_dtype = batch.packed[0].dtype
    for i, theta in enumerate(batch.theta):
        needs = [("maxva_packed", batch.packed[i], tuple(theta.shape), word_dtype)]
        if word_dtype == torch.int32:
            blocks = theta.shape[0], num_blocks(theta.shape[1:].numel())
            needs.append(("maxva_scale", batch.scale[i], blocks, torch.int32))
        if batch.maximum:
            dtype = MAXIMUM_DTYPE[word_dtype]
            needs.append(("maxva_packed_max", batch.maximum[i], tuple(theta.shape), dtype))
        for name, tensor, shape, dtype in needs:
            if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, theta.device):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}; "
                    f"its parameter needs {shape}, {dtype} on {theta.device}"
                )
            if name != "maxva_scale" and not same_layout(tensor, theta):
                raise ValueError(
                    f"{name} has strides {tensor.stride()}, its parameter {theta.stride()}; "
                    f"blocks are of memory, so the layouts must agree"
                )


class Backend(Protocol):
    """What a backend computes. Nothing here may wait for the device."""

    def update(
        self,
        batch: Batch,
        algorithm: str,
        phase: Phase,
        control: Tensor | None,
        grad_scale: Tensor | None,
        norms: Tensor | None,
    ) -> None:
        """One step of `batch`, as csrc/backend.h describes UpdateArgs."""

    def sum_of_squares(self, g: list[Tensor]) -> Tensor:
        """The sum of squares of all elements of tensors on one device: float64 [1] there."""

    def write_control(
        self,
        control: Tensor,
        sum_of_squares: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        """Fills the control block; `sum_of_squares` is of the gradients as they are (scaled)."""
