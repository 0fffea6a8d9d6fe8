"""Every check of the operators' arguments, as csrc/bindings.cpp makes it, and its Note [Layouts].

All of it before a kernel runs: nothing has been changed when one of these raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maxva_kernels.layouts import is_dense, rows_are_dense, same_layout

from .compact import BLOCK
from .statistics import NUM_STATISTICS
from .step_scalars import CONTROL_FIELDS, HYPER_FIELDS
from .stochastic_rounding import ROUNDING_FIELDS, Rounding, rows_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Names in messages.
NAMES = {
    "m": "exp_avg (m)",
    "u": "maxva_avg (u)",
    "v": "exp_avg_sq (v)",
    "w": "maxva_weight (w)",
    "vmax": "max_exp_avg_sq (vmax)",
    "packed": "maxva_packed",
    "scale": "maxva_scale",
    "maximum": "maxva_packed_max",
    "master": "master_param",
}
#: The dtype of `maxva_packed_max` by the dtype of `maxva_packed`.
MAXIMUM_DTYPES = {torch.int32: torch.uint8, torch.int64: torch.bfloat16}


@dataclass(slots=True)
class TensorLists:
    """One step's tensors: element i of every list belongs to parameter i.

    states holds the lists that are written, by their names in NAMES: m, u, v, w, vmax and master,
    the last two of which may be empty, or packed, scale, maximum and master, of which all but the
    first may be. Row i of rounding (stochastic_rounding.py), flat, belongs to parameter i, too.
    """

    theta: Sequence[Tensor]
    g: Sequence[Tensor]
    states: dict[str, Sequence[Tensor]]
    step: Sequence[Tensor]
    group_step: Sequence[Tensor]
    group_sizes: Sequence[int]
    rounding: Sequence[int]

    @property
    def is_packed(self) -> bool:
        """Whether these are compact states."""
        return "packed" in self.states

    def like_parameter(self) -> list[str]:
        """The lists of states that are there and have a parameter's shape."""
        return [name for name, tensors in self.states.items() if tensors and name != "scale"]

    def may_be_empty(self, name: str) -> bool:
        """Whether a list of states may have no tensors."""
        if name == "scale":  # of bfloat16 states there are none
            return bool(self.states["packed"]) and self.states["packed"][0].dtype == torch.int64
        return name in ("vmax", "maximum", "master")


def row_length(theta: Tensor) -> int:
    """Elements per index of dimension 0."""
    return math.prod(theta.shape[1:])


def blocks_per_row(theta: Tensor) -> int:
    """Blocks of compact states; a row's last may be shorter."""
    return -(-row_length(theta) // BLOCK.value)


def check_dtype(tensor: Tensor, name: str, i: int) -> None:
    """Raises TypeError unless it is a dense tensor of a supported dtype."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"maxva: {name}[{i}] is {tensor.dtype}; float32, float64, bfloat16 and float16 are "
            f"supported"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"maxva: {name}[{i}] is {tensor.layout}; only dense (strided) tensors are supported"
        )


def check_like_parameter(tensor: Tensor, theta: Tensor, name: str, i: int) -> None:
    """Raises unless its shape and device are theta's."""
    if tensor.shape != theta.shape:
        raise ValueError(
            f"maxva: {name}[{i}] has shape {list(tensor.shape)}, its parameter has "
            f"{list(theta.shape)}"
        )
    if tensor.device != theta.device:
        raise ValueError(
            f"maxva: {name}[{i}] is on {tensor.device}, its parameter is on {theta.device}"
        )


def check_one_element(
    tensor: Tensor | None, name: str, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Raises unless it is None or has one element of `dtype` (None: any) on the device."""
    if tensor is None:
        return
    if tensor.numel() != 1:
        raise ValueError(f"maxva: {name} must have one element, has {tensor.numel()}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"maxva: {name} must be {dtype}, is {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"maxva: {name} is on {tensor.device}, the parameters are on {device}")


def check_control(control: Tensor | None, device: torch.device) -> None:
    """Raises unless it is None or a control block on the device."""
    if control is not None and not (
        control.numel() == CONTROL_FIELDS.value
        and control.is_contiguous()
        and control.dtype == torch.float64
        and control.device == device
    ):
        raise ValueError(f"maxva: control must be float64 [{CONTROL_FIELDS.value}] on {device}")


def check_table(
    table: Tensor | None, name: str, num_rows: int, width: int, device: torch.device
) -> None:
    """Raises unless it is a float64 table of that size on the device."""
    if not (
        table is not None
        and table.shape == (num_rows, width)
        and table.dtype == torch.float64
        and table.is_contiguous()
        and table.device == device
    ):
        raise ValueError(f"maxva: {name} must be float64 [{num_rows}, {width}] on {device}")


def check_writable(tensor: Tensor, name: str) -> None:
    """Raises if elements share memory, so that they cannot be written one by one."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in dims):
        raise ValueError(
            f"maxva: {name} of shape {list(tensor.shape)} and strides {list(tensor.stride())} has "
            f"elements that share memory (an expanded tensor); clone it first"
        )


def check_gradients(g: Sequence[Tensor]) -> None:
    """What sum_of_squares asks of its tensors."""
    for i, tensor in enumerate(g):
        check_dtype(tensor, "gradient", i)
        if tensor.device != g[0].device:
            raise ValueError(
                f"maxva: gradient {i} is on {tensor.device}, gradient 0 is on {g[0].device}"
            )


def check_arguments(
    lists: TensorLists,
    hyper: Sequence[float],
    lr: Sequence[Tensor | None],
    control: Tensor | None,
    grad_scale: Tensor | None,
    norms: Tensor | None,
    statistics: Tensor | None,
    phase: int,
) -> None:
    """What is not per tensor: cheap enough for every step."""
    n, groups, device = len(lists.theta), len(lists.group_sizes), lists.theta[0].device
    if not 0 <= phase <= 2:
        raise ValueError(f"maxva: phase must be 0, 1 or 2, is {phase}")
    if len(lists.g) != n or len(lists.step) != n:
        raise ValueError(
            f"maxva: {n} parameters, but {len(lists.g)} gradients and {len(lists.step)} step "
            f"counters"
        )
    for name, tensors in lists.states.items():
        if len(tensors) != n and not (lists.may_be_empty(name) and not tensors):
            raise ValueError(f"maxva: {n} parameters, but {len(tensors)} of {NAMES[name]}")
    num_hyper = groups * HYPER_FIELDS.value
    if len(hyper) != num_hyper or len(lr) != groups:
        raise ValueError(
            f"maxva: {groups} groups need {num_hyper} hyper-parameters and {groups} learning "
            f"rates, got {len(hyper)} and {len(lr)}"
        )
    # fewer: a group with parameters in two calls is counted in one of them
    if len(lists.group_step) > groups:
        raise ValueError(f"maxva: {groups} groups, but {len(lists.group_step)} group steps")
    for k, size in enumerate(lists.group_sizes):
        if size < 0:
            raise ValueError(f"maxva: group_sizes[{k}] is negative")
    if sum(lists.group_sizes) != n:
        raise ValueError(
            f"maxva: group_sizes add up to {sum(lists.group_sizes)}, there are {n} parameters"
        )
    for tensor in lr:
        check_one_element(tensor, "lr", None, device)
    check_one_element(grad_scale, "grad_scale", None, device)
    check_control(control, device)
    if phase != 0:
        check_table(norms, "norms", n, 2, device)
    if statistics is not None:
        check_table(statistics, "statistics", n, NUM_STATISTICS.value, device)
    may_be_empty = not lists.is_packed and not lists.rounding
    if len(lists.rounding) != n * ROUNDING_FIELDS.value and not may_be_empty:
        raise ValueError(
            f"maxva: rounding must be {'' if lists.is_packed else 'empty or '}{n} rows of "
            f"{ROUNDING_FIELDS.value}, has {len(lists.rounding)} entries"
        )


def check_tensors(lists: TensorLists) -> None:
    """What is per tensor: needed only where a tensor is not as it was in an earlier step."""
    device = lists.theta[0].device
    for i, theta in enumerate(lists.theta):
        check_dtype(theta, "parameter", i)
        if theta.device != device:
            raise ValueError(
                f"maxva: parameter {i} is on {theta.device}, parameter 0 is on {device}"
            )
        check_writable(theta, f"parameter {i}")
        check_dtype(lists.g[i], "gradient", i)
        check_like_parameter(lists.g[i], theta, "gradient", i)
        if lists.states["master"] and theta.dtype == torch.float64:
            raise TypeError(f"maxva: parameter {i} is float64, which has no master weight")
        check_states = _check_packed_states if lists.is_packed else _check_float_states
        check_states(lists, i)
        check_one_element(lists.step[i], "step", torch.float32, device)
    for i, row in enumerate(rows_of(lists.rounding)):
        _check_rounding(lists, i, row)
    for step in lists.group_step:
        check_one_element(step, "group step", torch.int32, device)


def check_written(lists: TensorLists, gradient_written: bool) -> None:
    """Raises if what is written has elements that share memory; needed where layouts differ."""
    written = dict(lists.states, gradient=lists.g) if gradient_written else lists.states
    for name, tensors in written.items():
        for i, tensor in enumerate(tensors):
            check_writable(tensor, f"{NAMES.get(name, name)}[{i}]")


def _check_float_states(lists: TensorLists, i: int) -> None:
    theta = lists.theta[i]
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    for name, tensors in lists.states.items():
        if not tensors:
            continue
        check_dtype(tensors[i], NAMES[name], i)
        check_like_parameter(tensors[i], theta, NAMES[name], i)
        if tensors[i].dtype != dtype:
            raise TypeError(
                f"maxva: {NAMES[name]}[{i}] is {tensors[i].dtype}, must be {dtype} for a parameter "
                f"of {theta.dtype}"
            )


def _check_packed_states(lists: TensorLists, i: int) -> None:
    theta, states = lists.theta[i], lists.states
    if theta.dtype == torch.float64:
        raise TypeError(f"maxva: parameter {i} is float64, which has no compact states")
    if theta.dim() == 0 or not rows_are_dense(theta.shape, theta.stride()):
        raise ValueError(
            f"maxva: parameter {i} of shape {list(theta.shape)} and strides "
            f"{list(theta.stride())} must be dense with dimension 0 outermost to have compact "
            f"states; make it contiguous first"
        )
    word = states["packed"][0].dtype
    if word not in MAXIMUM_DTYPES:
        raise TypeError(f"maxva: maxva_packed[0] is {word}, must be torch.int32 or torch.int64")
    dtypes = {"packed": word, "maximum": MAXIMUM_DTYPES[word], "master": torch.float32}
    for name, dtype in dtypes.items():
        if not states[name]:
            continue
        tensor = states[name][i]
        if tensor.dtype != dtype or tensor.layout is not torch.strided:
            raise TypeError(
                f"maxva: {NAMES[name]}[{i}] is {tensor.dtype}, {tensor.layout}, must be {dtype}, "
                f"strided"
            )
        check_like_parameter(tensor, theta, NAMES[name], i)
        # of another order of elements blocks would be others
        if name != "master" and not same_layout(theta, tensor):
            raise ValueError(
                f"maxva: {NAMES[name]}[{i}] has strides {list(tensor.stride())}, its parameter has "
                f"{list(theta.stride())}"
            )
    if states["scale"]:
        scale, shape = states["scale"][i], (theta.shape[0], blocks_per_row(theta))
        if word != torch.int32:
            raise ValueError("maxva: int64 maxva_packed has no maxva_scale")
        if scale.dtype != torch.int32 or scale.shape != shape or not scale.is_contiguous():
            raise ValueError(
                f"maxva: maxva_scale[{i}] is {scale.dtype} {list(scale.shape)}, must be contiguous "
                f"torch.int32 {list(shape)}, a word per block of {BLOCK.value} elements"
            )
        if scale.device != theta.device:
            raise ValueError(
                f"maxva: maxva_scale[{i}] is on {scale.device}, its parameter is on {theta.device}"
            )


def _check_rounding(lists: TensorLists, i: int, row: Rounding) -> None:
    if lists.is_packed and not row.has_bits():
        raise ValueError(
            f"maxva: rounding[{i}] has no random bits (parameter {row.parameter}); compact states "
            f"need them"
        )
    counted = row.offset >= 0 and row.inner_local > 0 and row.inner_global >= 0
    if row.has_bits() and not counted:
        raise ValueError(f"maxva: rounding[{i}] needs offset >= 0 and positive inner sizes")
    low = lists.theta[i].dtype == torch.bfloat16 and not lists.states["master"]
    if row.is_stochastic() and not low:
        raise ValueError(f"maxva: rounding[{i}] is for a bfloat16 parameter without master weights")


class LayoutFitter:
    """Note [Layouts] in csrc/bindings.cpp: what is not laid out as its parameter is copied.

    Attributes:
        lists: the tensors a kernel may walk.
    """

    def __init__(self, lists: TensorLists, gradient_written: bool) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        fitted = replace(
            lists,
            theta=list(lists.theta),
            g=list(lists.g),
            states={name: list(tensors) for name, tensors in lists.states.items()},
        )
        for i, theta in enumerate(lists.theta):
            if not is_dense(theta.shape, theta.stride()):
                fitted.theta[i] = self._copied_back(theta, theta.contiguous())
            theta = fitted.theta[i]
            fitted.g[i] = self._like(theta, lists.g[i], gradient_written)
            for name in lists.like_parameter():
                fitted.states[name][i] = self._like(theta, lists.states[name][i], True)
        self.lists = fitted

    def _like(self, theta: Tensor, tensor: Tensor, written: bool) -> Tensor:
        if same_layout(theta, tensor):
            return tensor
        fitted = torch.empty_strided(
            theta.shape, theta.stride(), dtype=tensor.dtype, device=tensor.device
        )
        fitted.copy_(tensor)
        return self._copied_back(tensor, fitted) if written else fitted

    def _copied_back(self, original: Tensor, fitted: Tensor) -> Tensor:
        self._copies.append((original, fitted))
        return fitted

    def copy_back(self) -> None:
        """Brings what was written to the tensors that the caller holds."""
        for original, fitted in self._copies:
            original.copy_(fitted)


def needs_fitting(lists: TensorLists) -> bool:
    """Whether any tensor has to go through a temporary."""
    others = [lists.g, *(lists.states[name] for name in lists.like_parameter())]
    return any(
        not is_dense(theta.shape, theta.stride())
        or any(not same_layout(theta, tensors[i]) for tensors in others)
        for i, theta in enumerate(lists.theta)
    )
