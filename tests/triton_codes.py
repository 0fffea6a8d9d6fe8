"""Functions of triton_kernels/compact.py on one tile, each in a kernel of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from maxva_kernels.triton_kernels.compact import (
    decode,
    decode_maximum,
    encode,
    encode_maximum,
)
from torch import Tensor

_WORDS = {torch.int32: tl.int32, torch.int64: tl.int64}
_MAXIMA = {torch.int32: torch.uint8, torch.int64: torch.bfloat16}


@triton.jit
def _encode_kernel(
    m, mean, var, w, vmax, words, packed, scale, maximum,
    BLOCKS: tl.constexpr, WORD: tl.constexpr, ALGORITHM: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, BLOCKS)
    i = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    random = tl.load(words + i).to(tl.uint32)
    code, exponents = encode(
        tl.load(m + i), tl.load(mean + i), tl.load(var + i), tl.load(w + i), random, WORD, ALGORITHM
    )
    maximum_code, exponents = encode_maximum(tl.load(vmax + i), random, exponents, WORD)
    tl.store(packed + i, code)
    tl.store(maximum + i, maximum_code)
    if WORD == tl.int32:  # noqa: SIM300
        tl.store(scale + block, exponents)


@triton.jit
def _decode_kernel(
    packed, scale, maximum, m, mean, var, w, vmax,
    BLOCKS: tl.constexpr, WORD: tl.constexpr, ALGORITHM: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, BLOCKS)
    i = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    exponents = tl.load(scale + block) if WORD == tl.int32 else None  # noqa: SIM300
    moments = decode(tl.load(packed + i), exponents, ALGORITHM)
    tl.store(m + i, moments.m)
    tl.store(mean + i, moments.mean)
    tl.store(var + i, moments.var)
    tl.store(w + i, moments.w)
    tl.store(vmax + i, decode_maximum(tl.load(maximum + i), exponents))


def encoded(
    moments: list[Tensor], words: Tensor, dtype: torch.dtype, algorithm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Words, exponents and maxima of m, mean, var, w, vmax [blocks, 128] with int64 random words.

    The number of blocks is a power of two.
    """
    blocks = words.shape[0]
    packed = torch.empty_like(words, dtype=dtype)
    scale = torch.zeros(blocks, 1, dtype=torch.int32, device=words.device)
    maximum = torch.empty_like(words, dtype=_MAXIMA[dtype])
    _encode_kernel[(1,)](
        *moments, words, packed, scale, maximum,
        BLOCKS=blocks, WORD=_WORDS[dtype], ALGORITHM=algorithm, enable_fp_fusion=False,
    )  # fmt: skip
    return packed, scale, maximum


def decoded(packed: Tensor, scale: Tensor, maximum: Tensor, algorithm: int) -> list[Tensor]:
    """m, mean, var, w and vmax of words [blocks, 128]."""
    moments = [torch.empty_like(packed, dtype=torch.float32) for _ in range(5)]
    _decode_kernel[(1,)](
        packed, scale, maximum, *moments,
        BLOCKS=packed.shape[0], WORD=_WORDS[packed.dtype], ALGORITHM=algorithm,
        enable_fp_fusion=False,
    )  # fmt: skip
    return moments
