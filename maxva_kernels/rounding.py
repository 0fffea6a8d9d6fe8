"""Stochastic rounding of bfloat16 parameters: the rows that kernels read, and the rule in torch.

Compact states take their random words from here, too; their codes are compact.py's.

What csrc/stochastic_rounding.h states for the kernels, in plain torch operations on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maxva_kernels.hyper import describe
from maxva_kernels.sharding import linear_index

#: Fields of a row, in the order of `struct Rounding` in csrc/stochastic_rounding.h.
#: `theta` is 1 where the parameter itself is rounded so, 0 where only its compact state is.
FIELDS = ("seed", "parameter", "offset", "inner_local", "inner_global", "theta")
#: The row of a parameter that is rounded to the nearest.
NEAREST = (0, -1, 0, 1, 1, 0)

#: The fewest that the generator's authors found to pass BigCrush (Salmon et al., SC 2011).
PHILOX_ROUNDS = 7

_WORD = 0xFFFFFFFF


def row(group: dict[str, Any], p: Tensor, parameter: int, is_packed: bool) -> tuple[int, ...]:
    """How the kernels are to round p.

    Args:
        group: p's, with the options stochastic_rounding and rounding_seed.
        p: a parameter, also a DTensor.
        parameter: its index among all parameters of the optimizer.
        is_packed: whether its state is compact.
    """
    theta = group["stochastic_rounding"] and p.dtype == torch.bfloat16
    if not theta and not is_packed:
        return NEAREST
    return (group["rounding_seed"], parameter, *linear_index(p), int(theta))


def row_of(rounding: list[int], i: int) -> tuple[int, ...] | None:
    """Parameter i's row in Batch.rounding; None where everything is rounded to the nearest."""
    row = tuple(rounding[i * len(FIELDS) : (i + 1) * len(FIELDS)]) or NEAREST
    return None if row[1] < 0 else row


def check(group: dict[str, Any]) -> None:
    """Raises ValueError if stochastic_rounding is asked for where it cannot be done."""
    for index, p in enumerate(group["params"]):
        if p.dtype == torch.float16:
            raise ValueError(
                f"{describe(group, index, p)}: stochastic_rounding is for bfloat16 parameters, "
                f"this one is float16; use master_weights=True for it"
            )


def philox(counter: tuple[Tensor, Tensor, int, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-7 (Salmon et al., SC 2011) over int64 tensors that hold 32-bit words."""
    x = [torch.as_tensor(word, device=counter[0].device) for word in counter]
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57  # wraps, the bits are those of the product
        x = [(b >> 32) & _WORD ^ x[1] ^ k0, b & _WORD, (a >> 32) & _WORD ^ x[3] ^ k1, a & _WORD]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return x


def random_words(numel: int, t: Tensor, row: tuple[int, ...]) -> Tensor:
    """int64 [numel]: the random word of every element; Note [Random bits] in the C++ header.

    Args:
        numel: elements of this rank's part of the parameter.
        t: 0-dim, the number of this update.
        row: FIELDS.
    """
    seed, parameter, offset, inner_local, inner_global, _ = row
    i = torch.arange(numel, device=t.device)
    e = i // inner_local * inner_global + offset + i % inner_local
    call = e // 4
    counter = (call & _WORD, call >> 32, parameter, t.to(torch.int64))
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32)))
    return words.gather(0, (e % 4).unsqueeze(0)).squeeze(0)


def rounded(x: Tensor, theta: Tensor, t: Tensor, row: tuple[int, ...]) -> Tensor:
    """Returns x (float32) in bfloat16, up or down so that it is unbiased; exact values stay.

    Args:
        x: what becomes theta.
        theta: the parameter; its elements are counted in memory order where it is dense, else row
            by row.
        t: 0-dim, the number of this update.
        row: FIELDS.
    """
    words = torch.empty_like(theta, dtype=torch.int64)
    if words.stride() != theta.stride():
        words = torch.empty_like(words, memory_format=torch.contiguous_format)
    words.as_strided((theta.numel(),), (1,)).copy_(random_words(theta.numel(), t, row))
    bits = x.view(torch.int32) + (words & 0xFFFF)
    return torch.where(x.isnan(), x.bfloat16(), (bits >> 16).to(torch.int16).view(torch.bfloat16))
