"""Where the states of large parameters lie in a CPU's memory.

Note [Streams apart]
A step moves through up to eight lists side by side, in blocks of 512 bytes of each (kBlock of
csrc/cpu_blocks.h). An allocator gives large lists the same place within a page, or nearly, so that
the blocks compete for the same few sets of the first-level cache, and, where a core guesses the way
by a hash of the address, now and then push each other out at every turn: by luck a step takes up to
1.3 times as long. So a state begins at a place within its page that no other state of its parameter
has, a block and a cache line after the one before. The parameter and its gradient are the caller's,
and so are the copies that deepcopy and pickle make; DTensors are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PAGE = 4096
_DISTANCE = 512 + 64
#: Elements, so that all lists of a parameter count or none, whatever their dtypes are; below, they
#: stay in the second-level cache anyway.
_LARGE = 1 << 18


def empty_apart(like: Tensor, p: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """torch.empty_like(like, dtype=dtype), placed as the `stream`-th list of a step of p.

    Args:
        like: of p's shape.
        p: the parameter, list 0.
        stream: 1 to 6; 0 is the usual place of the parameter and of its gradient.
        dtype: of the new tensor.
    """
    if not _matters(like, p):
        return torch.empty_like(like, dtype=dtype)
    size = like.numel() * dtype.itemsize
    strides = torch.empty_like(like, dtype=dtype, device="meta").stride()
    room = torch.empty(size + _PAGE, dtype=torch.uint8, device=like.device)
    skipped = (_place(p, stream) - room.data_ptr()) % _PAGE // 64 * 64
    # no view: a state has no base
    return torch.empty(0, dtype=dtype, device=like.device).set_(
        room.untyped_storage(), skipped // dtype.itemsize, like.shape, strides
    )


def moved_apart(value: Tensor, p: Tensor, stream: int) -> Tensor:
    """`value` where empty_apart would place it: itself, or a copy if it is large and elsewhere."""
    if not _matters(value, p) or _place(value, 0) // 64 == _place(p, stream) // 64:
        return value
    return empty_apart(value, p, stream, value.dtype).copy_(value)


def _place(tensor: Tensor, stream: int) -> int:
    """Where the stream-th list beside `tensor` begins in its page."""
    return (tensor.data_ptr() + stream * _DISTANCE) % _PAGE


def _matters(like: Tensor, p: Tensor) -> bool:
    # no DTensor, no fake tensor
    plain = type(like.detach()) is Tensor and type(p.detach()) is Tensor
    on_cpu = like.device.type == "cpu" and p.device.type == "cpu"
    return plain and on_cpu and like.numel() >= _LARGE
