"""What a step asks of all its tensors: dtypes, shapes, strides, addresses.

The extension answers for a whole list, at some tens of nanoseconds a tensor; where it is not
there, plain Python does, at some hundreds or a thousand.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from maxva_kernels import _extension

SHAPE: Callable[[Tensor], Any] = operator.attrgetter("shape")
_DTYPE: Callable[[Tensor], Any] = operator.attrgetter("dtype")
_STRIDE: Callable[[Tensor], Any] = Tensor.stride
_DEVICE: Callable[[Tensor], Any] = operator.attrgetter("device")

#: The extension, or None where plain Python has to answer.
native: Any = _extension.operators


def is_fake(tensor: Tensor) -> bool:
    """Whether its elements cannot be read, as where somebody estimates how much a step needs."""
    # detach: under FakeTensorMode those of a tensor from outside cannot be, either
    return tensor.is_meta or isinstance(tensor.detach(), FakeTensor)


def facts_of(tensors: Sequence[Tensor]) -> Any:
    """Device, dtype, shape and strides of strided tensors, to be compared by ==."""
    if native is not None:
        return native.facts_of(tensors, False)
    return [list(map(fact, tensors)) for fact in (_DEVICE, _DTYPE, SHAPE, _STRIDE)]


def fit(tensors: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether all tensors have this dtype, and the shapes and layouts of those of `like`."""
    if native is not None:
        fits: bool = native.fit(tensors, like, dtype)
        return fits
    return (
        agree(map(_DTYPE, tensors), repeat(dtype))
        and agree(map(SHAPE, tensors), map(SHAPE, like))
        and (
            agree(map(_STRIDE, tensors), map(_STRIDE, like)) or all(map(same_layout, tensors, like))
        )
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same places."""
    if a.stride() == b.stride() or not a.numel():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(x == y for size, x, y in strides if size > 1)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor's elements fill a piece of memory, each once."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((y, x) for x, y in zip(shape, stride, strict=True) if x > 1):
        if step != expected:
            return False
        expected *= size
    return True


def rows_are_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor fills its memory, and its rows of dimension 0 lie one after the other."""
    if not is_dense(shape, stride):
        return False
    return 0 in shape or shape[0] == 1 or stride[0] == math.prod(shape[1:])


def agree(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether both elements of every pair are equal.

    With `map` over tensors: lists of shapes instead would keep the garbage collector busy.
    """
    return all(map(operator.eq, first, second))
