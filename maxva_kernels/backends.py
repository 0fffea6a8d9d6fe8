"""The table of backends: which devices each serves, whether it is available here, and why not."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maxva_kernels import _extension
from maxva_kernels.batch import Backend, Batch, Phase
from maxva_kernels.reference import EagerBackend

#: Overrides backend="auto".
VARIABLE = "MAXVA_BACKEND"


class OperatorBackend:
    """`Backend` over a namespace with the operators of csrc/bindings.cpp.

    Args:
        operators: the extension, where torch's dispatcher picks CPU or CUDA by the tensors (or
            torch.ops.maxva: the same operators, reached through autograd and at more cost per
            tensor), or the package triton_kernels.
    """

    def __init__(self, operators: Any) -> None:
        self._operators = operators

    def check(self, batch: Batch, algorithm: str, grad_scale: Tensor | None) -> None:
        self.update(batch, algorithm, Phase.WHOLE, None, grad_scale, None, check_only=True)

    def update(
        self,
        batch: Batch,
        algorithm: str,
        phase: Phase,
        control: Tensor | None,
        grad_scale: Tensor | None,
        norms: Tensor | None,
        check_only: bool = False,
    ) -> None:
        b = batch
        if b.packed:
            self._operators.update_packed_(
                b.theta, b.g, b.packed, b.scale, b.maximum, b.master, b.step, b.group_step,
                b.group_sizes, b.hyper, b.lr, control, grad_scale, norms, b.statistics, b.rounding,
                algorithm, int(phase), check_only,
            )  # fmt: skip
            return
        self._operators.update_(
            b.theta, b.g, b.m, b.u, b.v, b.w, b.vmax, b.master, b.step, b.group_step,
            b.group_sizes, b.hyper, b.lr, control, grad_scale, norms, b.statistics, b.rounding,
            algorithm, int(phase), check_only,
        )  # fmt: skip

    def sum_of_squares(self, g: list[Tensor]) -> Tensor:
        total: Tensor = self._operators.sum_of_squares(g)
        return total

    def write_control(
        self,
        control: Tensor,
        sum_of_squares: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        self._operators.write_control_(
            control, sum_of_squares, grad_scale, found_inf, max_grad_norm, skip_nonfinite
        )


@dataclass(frozen=True)
class BackendInfo:
    """One row of the table.

    Attributes:
        device_types: the torch device types it serves; empty means all.
        why_not: why it is not available here, with what would make it so, or None.
        make: makes the backend.
        in_auto: whether "auto" considers it for a device type; asked first.
    """

    device_types: Callable[[], tuple[str, ...]]
    why_not: Callable[[], str | None]
    make: Callable[[], Backend]
    in_auto: Callable[[str], bool] = lambda device_type: True


def _extension_backend() -> Backend:
    return OperatorBackend(_extension.operators)


def _import_triton_kernels() -> Any:
    return importlib.import_module("maxva_kernels.triton_kernels")


@functools.cache
def _no_triton_kernels() -> str | None:
    try:
        # not find_spec: any folder called triton would pass for the package
        importlib.import_module("triton.language")
        _import_triton_kernels()
    except Exception as error:  # a broken installation may raise anything
        if str(getattr(error, "name", "")).startswith("maxva_kernels"):
            return f"{error}; {_extension.SOURCE_TREE}"
        return (
            f"Triton does not load ({type(error).__name__}: {error}); install one that this "
            f"torch works with: pip install triton"
        )
    return None


def _interpreted() -> bool:
    return _no_triton_kernels() is None and bool(_import_triton_kernels().INTERPRETED)


def _triton_devices() -> tuple[str, ...]:
    return ("cpu",) if _interpreted() else ("cuda",)  # "cuda" is torch's name for ROCm, too


def _no_triton() -> str | None:
    if reason := _no_triton_kernels():
        return reason
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device; TRITON_INTERPRET=1 runs it slowly on the CPU"
    return _no_triton_driver()


@functools.cache
def _no_triton_driver() -> str | None:
    try:
        # compiles Triton's launcher, which needs a C compiler
        importlib.import_module("triton.runtime.driver").driver.active  # noqa: B018
    except Exception as error:
        return f"Triton has no usable driver here: {type(error).__name__}: {error}"
    return None


#: In order of preference for "auto".
BACKENDS: dict[str, BackendInfo] = {
    "cuda": BackendInfo(lambda: ("cuda",), _extension.why_not_cuda, _extension_backend),
    "triton": BackendInfo(
        _triton_devices,
        _no_triton,
        lambda: OperatorBackend(_import_triton_kernels()),
        in_auto=lambda device_type: device_type == "cuda",  # the interpreter is for tests
    ),
    "cpu": BackendInfo(lambda: ("cpu",), _extension.why_not, _extension_backend),
    "eager": BackendInfo(lambda: (), lambda: None, EagerBackend),
}


def backends() -> dict[str, str]:
    """What is available: a dict from backend to "available" or the reason why it is not."""
    return {name: info.why_not() or "available" for name, info in BACKENDS.items()}


def _serves(name: str, device_type: str) -> bool:
    served = BACKENDS[name].device_types()
    return not served or device_type in served


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a backend; RuntimeError if not available."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, is {name!r}")
    if reason := BACKENDS[name].why_not():
        raise RuntimeError(f"backend {name!r} is not available: {reason}")


@functools.cache
def _made(name: str) -> Backend:
    return BACKENDS[name].make()


@functools.cache  # once per process
def _warn_of_fallback(device_type: str, instead: str, reason: str) -> None:
    where = "a GPU" if device_type == "cuda" else "the CPU"
    warnings.warn(
        f"parameters on {where} are updated by the {instead!r} backend, because the C++ kernels "
        f"for it are not available: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def find_backend(name: str, device_type: str) -> Backend:
    """The backend called `name` for parameters on a device; "auto" takes the best that is there.

    Raises:
        ValueError: no such backend, or it does not serve this device.
        RuntimeError: it is not available here; the message says what would make it so.
    """
    if name == "auto":
        name = os.environ.get(VARIABLE) or "auto"
    check_name(name)
    if name == "auto":
        name = next(
            candidate
            for candidate, info in BACKENDS.items()
            if info.in_auto(device_type)
            and _serves(candidate, device_type)
            and info.why_not() is None
        )
        if name != device_type and device_type in BACKENDS:  # "cuda" and "cpu" are both
            _warn_of_fallback(device_type, name, BACKENDS[device_type].why_not() or "")
    elif not _serves(name, device_type):
        raise ValueError(
            f"backend {name!r} does not serve parameters on {device_type!r}; "
            f"use backend='auto' or move the parameters"
        )
    return _made(name)
