"""Our optimizers as entries of torch's own table of optimizers under test.

`torch.testing._internal.common_optimizers` is in the wheel; the tests that go with it are not (see
tests/external).
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
)

import maxva_kernels


def with_fused_keyword(cls: Any) -> Any:
    """A subclass with torch's `fused` switch: False is the eager reference, True the kernel."""

    class Switchable(cls):
        def __init__(self, *args: Any, fused: bool | None = None, **options: Any) -> None:
            super().__init__(*args, backend="eager" if fused is False else "auto", **options)

    Switchable.__name__ = Switchable.__qualname__ = cls.__name__
    return Switchable


def clipping(cls: Any) -> Any:
    """A subclass that clips and skips by default, as all groups of one optimizer have to."""

    class Clipping(cls):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, max_grad_norm=0.1, skip_nonfinite=True, **options)

    Clipping.__name__ = Clipping.__qualname__ = f"Clipping{cls.__name__}"
    return Clipping


def inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Configurations, among them each option that changes what is computed.

    torch gives the dtype where it compares `fused` with its opposite over seven steps. Its model
    has the same gradient in each but for rounding, where beta_t is whatever rounding makes it
    (docs/algorithm.md); in float64 that is below the tolerance, elsewhere a delta above the noise
    keeps beta_t in place.
    """
    configurations: list[dict[str, Any]] = [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"lr": torch.tensor([0.001], device=device)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "adam_w_mode": False},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
        {"weight_decay": 0.1, "trust_ratio": True},
        {"nesterov": True, "bias_correction": False},
        {"betas": (0.5, 1.0), "beta_min": 0.25, "eps": 1e-3},
        {"master_weights": True, "maximize": True},
        {"capturable": True, "weight_decay": 0.1},
    ]
    noisy = {"delta": 1e-4} if dtype not in (None, torch.float64) else {}
    return [OptimizerInput(None, kwargs | noisy, ", ".join(kwargs)) for kwargs in configurations]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """What torch asks every optimizer to refuse, in torch's words, and a range of our own."""
    bad: list[ErrorOptimizerInput] = common_optimizers.get_error_inputs_for_all_optims(
        device, dtype
    )
    if bad:
        kwargs = {"betas": (0.9, 0.99), "beta_min": 0.999}
        bad.append(
            ErrorOptimizerInput(
                OptimizerInput(None, kwargs), error_type=ValueError, error_regex="beta_min"
            )
        )
    return bad


def skipped(test: str, reason: str) -> DecorateInfo:
    return DecorateInfo(unittest.skip(reason), "TestOptimRenewed", test)


def info(cls: Any, **options: Any) -> OptimizerInfo:
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        not_og_supported_flags=("maximize", "capturable", "differentiable"),
        supports_complex=False,
        has_capturable_arg=True,
        **options,
    )


FUSED_CLASSES = (maxva_kernels.FusedMAdam, maxva_kernels.FusedLaMAdam)
FUSED = [
    info(
        with_fused_keyword(cls),
        supported_impls=("fused",),
        supports_fused_on=("cpu", "cuda"),
        skips=(
            skipped(
                "test_fused_error_on_params_on_meta",
                "asks for the wording of torch's kernel; test_torch_suite.py has our own",
            ),
        ),
    )
    for cls in (*FUSED_CLASSES, *map(clipping, FUSED_CLASSES))
]
REFERENCE = [info(cls, supported_impls=()) for cls in (maxva_kernels.MAdam, maxva_kernels.LaMAdam)]
