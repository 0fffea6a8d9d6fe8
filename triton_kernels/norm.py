"""The gradient norm and the control block: one read of the gradients, nothing read by the host."""

from __future__ import annotations

import triton
import triton.language as tl

from .low_precision import to_compute
from .multi_tensor_apply import pointer_to
from .step_scalars import make_control

# Elements per program. Only one stream is read, so a program takes more of it than the update's.
NORM_CHUNK = tl.constexpr(16384)
NORM_BLOCK = tl.constexpr(2048)
NUM_WARPS = 4

# A row per tensor, int64.
NORM_NUMEL = tl.constexpr(0)
NORM_FIRST_CHUNK = tl.constexpr(1)
NORM_INDEX = tl.constexpr(2)  # position of the gradient's address
NORM_ROW = tl.constexpr(3)


@triton.jit
def sum_of_squares_chunk(address, begin, n, G_DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Elements [begin, begin + n) of one tensor; FULL: n is NORM_CHUNK and g is aligned."""
    g_ptr = pointer_to(address, G_DTYPE, FULL) + begin
    total = tl.zeros((NORM_BLOCK,), tl.float64)
    for start in range(0, NORM_CHUNK if FULL else n, NORM_BLOCK):
        i = start + tl.arange(0, NORM_BLOCK)
        mask = None if FULL else i < n
        other = None if FULL else 0.0
        g = to_compute(tl.load(g_ptr + i, mask=mask, other=other), tl.float64)
        total = tl.fma(g, g, total)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize_on_alignment=["rows", "g_addresses", "chunk_tensor", "partial"])
def sum_of_squares_kernel(rows, g_addresses, chunk_tensor, partial, G_DTYPE: tl.constexpr):
    """partial[chunk]: the sum of squares of one chunk, float64."""
    chunk = tl.program_id(0)
    row = rows + tl.load(chunk_tensor + chunk).to(tl.int64) * NORM_ROW
    begin = (chunk - tl.load(row + NORM_FIRST_CHUNK)) * NORM_CHUNK
    n = tl.minimum(tl.load(row + NORM_NUMEL) - begin, NORM_CHUNK).to(tl.int32)
    g = tl.load(g_addresses + tl.load(row + NORM_INDEX))
    if (n == NORM_CHUNK) & ((g & 15) == 0):
        total = sum_of_squares_chunk(g, begin, n, G_DTYPE, FULL=True)
    else:
        total = sum_of_squares_chunk(g, begin, n, G_DTYPE, FULL=False)
    tl.store(partial + chunk, total)


@triton.jit(
    do_not_specialize=["num_partial"],
    do_not_specialize_on_alignment=["partial", "result"],
)
def add_partial_sums_kernel(partial, result, num_partial):
    """result[0] = the sum of partial, in a fixed order: the same bits in every run."""
    total = tl.zeros((NORM_BLOCK,), tl.float64)
    for start in range(0, num_partial, NORM_BLOCK):
        i = start + tl.arange(0, NORM_BLOCK)
        total += tl.load(partial + i, mask=i < num_partial, other=0.0)
    tl.store(result, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=["max_grad_norm_bits"],
    do_not_specialize_on_alignment=["control", "sum_of_squares", "grad_scale", "found_inf"],
)
def write_control_kernel(
    control,
    sum_of_squares,
    grad_scale,
    found_inf,
    max_grad_norm_bits: tl.int64,
    SKIP_NONFINITE: tl.constexpr,
):
    """Fills the control block; a Python float would arrive in float32, so its bits do."""
    max_grad_norm = max_grad_norm_bits.to(tl.int64).to(tl.float64, bitcast=True)
    norm = tl.full((), 0.0, tl.float64)
    if sum_of_squares is not None:
        norm = tl.sqrt(tl.load(sum_of_squares))
    if grad_scale is not None:
        norm = norm / tl.load(grad_scale).to(tl.float64)
    found = tl.full((), 0, tl.int1)
    if found_inf is not None:
        found = tl.load(found_inf) != 0
    make_control(norm, max_grad_norm, SKIP_NONFINITE, found, control)
