"""The table of backends: which devices each serves, whether it is available here, and why not."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maxva_kernels import _extension
from maxva_kernels.batch import Backend, Batch, Phase
from maxva_kernels.reference import EagerBackend

#: Overrides backend="auto".
VARIABLE = "MAXVA_BACKEND"


class ExtensionBackend:
    """The C++ extension's operators; torch's dispatcher picks CPU or CUDA by the tensors."""

    def update(
        self,
        batch: Batch,
        algorithm: str,
        phase: Phase,
        control: Tensor | None,
        grad_scale: Tensor | None,
        norms: Tensor | None,
    ) -> None:
        b = batch
        torch.ops.maxva.update_(
            b.theta, b.g, b.m, b.u, b.v, b.w, b.vmax, b.master, b.step, b.group_step,
            b.group_sizes, b.hyper, b.lr, control, grad_scale, norms, algorithm, int(phase),
        )  # fmt: skip

    def sum_of_squares(self, g: list[Tensor]) -> Tensor:
        total: Tensor = torch.ops.maxva.sum_of_squares(g)
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
        torch.ops.maxva.write_control_(
            control, sum_of_squares, grad_scale, found_inf, max_grad_norm, skip_nonfinite
        )


@dataclass(frozen=True)
class BackendInfo:
    """One row of the table.

    Attributes:
        device_types: the torch device types it serves; empty means all.
        why_not: why it is not available here, with what would make it so, or None.
        make: makes the backend.
    """

    device_types: Callable[[], tuple[str, ...]]
    why_not: Callable[[], str | None]
    make: Callable[[], Backend]


def _no_cuda() -> str | None:
    if reason := _extension.why_not():
        return reason
    if not _extension.WITH_CUDA:
        return (
            "the extension was built without CUDA; with the CUDA toolkit and a CUDA build of "
            "torch installed, build it anew: MAXVA_BUILD_CUDA=1 pip install --no-build-isolation "
            "--force-reinstall --no-deps maxva-kernels"
        )
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


#: In order of preference for "auto".
BACKENDS: dict[str, BackendInfo] = {
    "cuda": BackendInfo(lambda: ("cuda",), _no_cuda, ExtensionBackend),
    "cpu": BackendInfo(lambda: ("cpu",), _extension.why_not, ExtensionBackend),
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
def _warn_without_cuda(instead: str, reason: str) -> None:
    warnings.warn(
        f"parameters on a GPU are updated by the {instead!r} backend, because the CUDA kernels "
        f"are not available: {reason}",
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
            if _serves(candidate, device_type) and info.why_not() is None
        )
        if device_type == "cuda" and (reason := BACKENDS["cuda"].why_not()):
            _warn_without_cuda(name, reason)
    elif not _serves(name, device_type):
        raise ValueError(
            f"backend {name!r} does not serve parameters on {device_type!r}; "
            f"use backend='auto' or move the parameters"
        )
    return _made(name)
