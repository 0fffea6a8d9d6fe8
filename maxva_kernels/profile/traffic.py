"""Bytes that a step must move per parameter: the floor that a kernel is measured by.

A step streams far more than any cache holds, so every tensor that it needs is read from memory
once and every tensor that it changes is written once (docs/algorithm.md, "Memory floor").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from maxva_kernels.compact import BLOCK, MAXIMUM_DTYPE, WORD_DTYPE, num_blocks
from maxva_kernels.state import FP32_STATE_BELOW, word_dtype

#: The extras that ask for compact states, by the state_dtype that they set.
COMPACT = frozenset(WORD_DTYPE)
_NO_EXTRAS: frozenset[str] = frozenset()


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


def compact_word(
    mode: DtypeMode, extras: frozenset[str], shape: tuple[int, ...]
) -> torch.dtype | None:
    """The word of a parameter's compact states; None where it keeps float32 ones."""
    kinds = extras & COMPACT
    if not kinds:
        return None
    group: dict[str, Any] = {"state_dtype": min(kinds), "fp32_state_below": FP32_STATE_BELOW}
    return word_dtype(torch.empty(shape, dtype=mode.theta, device="meta"), group)


def least_shape(mode: DtypeMode, extras: frozenset[str], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the smallest parameter whose states have the form that those of `shape` have."""
    if compact_word(mode, extras, shape) is None:
        return (1,)
    return FP32_STATE_BELOW // BLOCK, BLOCK


def maxva_state_bytes(
    mode: DtypeMode, extras: frozenset[str] = _NO_EXTRAS, shape: tuple[int, ...] = ()
) -> float:
    """Bytes of MaxVA's states per element of a parameter, the scales of its blocks included."""
    word, amsgrad = compact_word(mode, extras, shape), "amsgrad" in extras
    if word is None:
        return (4 + amsgrad) * mode.state.itemsize
    row = math.prod(shape[1:])
    scales = torch.int32.itemsize * num_blocks(row) / row if word == torch.int32 else 0
    return word.itemsize + amsgrad * MAXIMUM_DTYPE[word].itemsize + scales


def maxva_bytes(
    algorithm: str,
    mode: DtypeMode,
    extras: frozenset[str] = _NO_EXTRAS,
    shape: tuple[int, ...] = (),
) -> float:
    """Bytes of a MaxVA step per element of a parameter.

    Args:
        algorithm: "madam" or "lamadam".
        mode: dtypes.
        extras: of "clip" or "skip" (the gradients are read once more), "amsgrad" (vmax is read and
            written), "trust" (a pass before the last reads theta and m, and in MAdam what divides
            m), "int8" and "bfloat16" (compact states; "trust" then reads them and the gradients
            twice, to write them once); others move nothing.
        shape: the parameter's, as that decides whether its states are compact.
    """
    g, states = mode.grad.itemsize, maxva_state_bytes(mode, extras, shape)
    read, written = _parameter_bytes(mode)
    total = read + g + 2 * states + written
    if extras & {"clip", "skip"}:
        total += g
    if "trust" in extras:
        total += read
        if compact_word(mode, extras, shape) is None:
            divisors = 0 if algorithm == "lamadam" else 1 if "amsgrad" in extras else 2
            total += (1 + divisors) * mode.state.itemsize
        else:
            total += g + states
    return total


def adam_bytes(
    mode: DtypeMode, extras: frozenset[str] = _NO_EXTRAS, state: float | None = None
) -> float:
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
