"""What one step hands to a backend: lists of tensors that are updated together."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from maxva_kernels.compact import MAXIMUM_DTYPE, num_blocks
from maxva_kernels.layouts import is_fake, same_layout


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


#: Of parameters and gradients.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Fields of the control block, float64 on the gradients' device.
SKIP, CLIP_FACTOR, GRAD_NORM, CONTROL_FIELDS = range(4)


def skips_on_host(control: Tensor) -> bool:
    """Whether a control block says skip, as far as the host can know without waiting."""
    return control.device.type == "cpu" and not is_fake(control) and bool(control[SKIP])


#: The fields of a Batch that hold states, beside `step`: their keys in a parameter's state.
STATE_KEYS = {
    "m": "exp_avg",
    "u": "maxva_avg",
    "v": "exp_avg_sq",
    "w": "maxva_weight",
    "vmax": "max_exp_avg_sq",
    "packed": "maxva_packed",
    "scale": "maxva_scale",
    "maximum": "maxva_packed_max",
    "master": "master_param",
}


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


def check_tensors(batch: Batch, unscales: bool) -> None:
    """Raises unless all tensors fit their parameters and those to be written can be.

    For plain torch code; the operators check for themselves.
    """
    for theta, g in zip(batch.theta, batch.g, strict=True):
        if theta.dtype not in DTYPES or g.dtype not in DTYPES:
            raise TypeError(
                f"a parameter is {theta.dtype}, its gradient {g.dtype}; float32, float64, bfloat16 "
                f"and float16 are supported"
            )
        _check_writable(theta, "a parameter")
        if g.shape != theta.shape or g.device != theta.device or g.layout is not torch.strided:
            raise ValueError(
                f"a gradient has shape {tuple(g.shape)}, {g.layout} on {g.device}; its parameter "
                f"needs {tuple(theta.shape)}, dense on {theta.device}"
            )
        if unscales:
            _check_writable(g, "a gradient")
    shapes = [theta.shape for theta in batch.theta]
    dtypes = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in batch.theta]
    if batch.master and torch.float64 in dtypes:
        raise TypeError("a parameter is float64, which has no master weight")
    for step in batch.step:
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != batch.device:
            raise ValueError(
                f"step has shape {tuple(step.shape)}, {step.dtype} on {step.device}; it must be "
                f"one torch.float32 on {batch.device}"
            )
    for name in ("m", "u", "v", "w", "vmax", "master"):
        _check_list(batch, name, shapes, dtypes)
    if not batch.packed:
        return
    word = batch.packed[0].dtype
    if word not in MAXIMUM_DTYPE or (word == torch.int32) != bool(batch.scale):
        raise ValueError(
            f"maxva_packed is {word}, maxva_scale {'there' if batch.scale else 'missing'}; int32 "
            f"words have one each, int64 words none"
        )
    _check_list(batch, "packed", shapes, [word] * len(shapes))
    _check_list(batch, "scale", list(map(_blocks, shapes)), [torch.int32] * len(shapes))
    _check_list(batch, "maximum", shapes, [MAXIMUM_DTYPE[word]] * len(shapes))
    for name in ("packed", "maximum"):
        for theta, tensor in zip(batch.theta, getattr(batch, name), strict=False):
            if not same_layout(tensor, theta):
                raise ValueError(
                    f"{STATE_KEYS[name]} has strides {tensor.stride()}, its parameter "
                    f"{theta.stride()}; blocks are of memory, so the layouts must agree"
                )


@functools.lru_cache(maxsize=65536)  # asked for in every step
def _blocks(shape: torch.Size) -> tuple[int, int]:
    return shape[0], num_blocks(shape[1:].numel())


def _check_list(
    batch: Batch, name: str, shapes: Sequence[tuple[int, ...]], dtypes: list[torch.dtype]
) -> None:
    device = batch.device
    for tensor, shape, dtype in zip(getattr(batch, name), shapes, dtypes, strict=False):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{STATE_KEYS[name]} has shape {tuple(tensor.shape)}, {tensor.dtype} on "
                f"{tensor.device}; its parameter needs {tuple(shape)}, {dtype} on {device}"
            )
        _check_writable(tensor, STATE_KEYS[name])


def _check_writable(tensor: Tensor, name: str) -> None:
    if not tensor.is_contiguous() and is_expanded(tensor):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is written, but "
            f"has elements that share memory (an expanded tensor); clone it first"
        )


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, because a dimension has no stride."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in dims)


class Backend(Protocol):
    """What a backend computes. Nothing here may wait for the device."""

    def check(self, batch: Batch, algorithm: str, grad_scale: Tensor | None) -> None:
        """Raises what `update` would raise for this batch; changes nothing."""

    def update(
        self,
        batch: Batch,
        algorithm: str,
        phase: Phase,
        control: Tensor | None,
        grad_scale: Tensor | None,
        norms: Tensor | None,
    ) -> None:
        """One step of `batch`, as csrc/backend.h describes UpdateArgs; checks all of it first."""

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
