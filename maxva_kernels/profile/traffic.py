"""Bytes that a step must move per parameter: the floor that a kernel is measured by.

A step streams far more than any cache holds, so every tensor that it needs is read from memory
once and every tensor that it changes is written once (docs/algorithm.md, "Memory floor").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DtypeMode:
    """The dtypes of parameters and gradients, and whether a float32 master copy is kept."""

    theta: torch.dtype
    grad: torch.dtype
    master: bool = False

    @property
    def state(self) -> torch.dtype:
        """The precision in which MaxVA updates, and keeps its states."""
        return torch.float64 if self.theta == torch.float64 else torch.float32

    @property
    def without_master(self) -> DtypeMode:
        """For optimizers that keep none: the float32 parameters that autocast trains."""
        return DtypeMode(torch.float32, torch.float32) if self.master else self


DTYPE_MODES: dict[str, DtypeMode] = {
    "float32": DtypeMode(torch.float32, torch.float32),
    "bfloat16": DtypeMode(torch.bfloat16, torch.bfloat16),
    "float16": DtypeMode(torch.float16, torch.float16),
    "float64": DtypeMode(torch.float64, torch.float64),
    "bf16-master": DtypeMode(torch.bfloat16, torch.bfloat16, master=True),
    "fp16-master": DtypeMode(torch.float16, torch.float16, master=True),
}


def _parameter_bytes(mode: DtypeMode) -> tuple[int, int]:
    """Bytes read and written of the parameter: a master copy is read instead of it."""
    theta = mode.theta.itemsize
    return (4, 4 + theta) if mode.master else (theta, theta)


def maxva_bytes(algorithm: str, mode: DtypeMode, extras: frozenset[str] = frozenset()) -> int:
    """Bytes per parameter of a MaxVA step.

    Args:
        algorithm: "madam" or "lamadam".
        mode: dtypes.
        extras: of "clip" or "skip" (the gradients are read once more), "amsgrad" (vmax is read and
            written), "trust" (a second pass reads theta and m, and in MAdam what divides m); others
            move nothing.
    """
    g, state = mode.grad.itemsize, mode.state.itemsize
    read, written = _parameter_bytes(mode)
    states = 5 if "amsgrad" in extras else 4
    total = read + g + 2 * states * state + written
    if extras & {"clip", "skip"}:
        total += g
    if "trust" in extras:
        divisors = 0 if algorithm == "lamadam" else 1 if "amsgrad" in extras else 2
        total += read + (1 + divisors) * state
    return total


def adam_bytes(
    mode: DtypeMode, extras: frozenset[str] = frozenset(), state: int | None = None
) -> int:
    """Bytes per parameter of a step of Adam(W).

    Args:
        mode: dtypes, as the optimizer is given them.
        extras: of "clip" (`clip_grad_norm_` reads the gradients, then reads and writes them) and
            "amsgrad".
        state: bytes of an element of a state; None for the parameter's own dtype.
    """
    state = mode.theta.itemsize if state is None else state
    read, written = _parameter_bytes(mode)
    states = 3 if "amsgrad" in extras else 2
    total = read + mode.grad.itemsize + 2 * states * state + written
    return total + (3 * mode.grad.itemsize if "clip" in extras else 0)
