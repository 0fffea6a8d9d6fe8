"""The update of many tensors in one launch: programs over chunks of tensors found by address.

    make_scalars_kernel (a lane per tensor) -> update_kernel (a program per chunk), or
    update_packed_kernel of packed_update.py -> add_sums_kernel (norms, statistics: a program per
    tensor and field) -> count_kernel (a lane per counter)

Knows where tensors lie (tables.py), not what is computed (maxva_math.py). Nothing here depends on
a value that changes from step to step at compile time, and nothing is autotuned: the update
cannot be run twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .low_precision import from_compute, to_compute
from .maxva_math import (
    accumulate_momentum,
    direction,
    divide,
    layer_update,
    make_normalizer,
    moved_parameter,
    observe,
    observed_gradient,
    track_maximum,
)
from .statistics import (
    NUM_STATISTICS,
    add_observations,
    add_step_sizes,
    no_statistics,
    store_statistics,
)
from .step_scalars import (
    CLIP_FACTOR,
    HYPER_FIELDS,
    NUM_SCALARS,
    PARAMETERS,
    SKIP,
    STATES,
    load_hyper,
    load_scalars,
    make_scalars,
    store_scalars,
    trust_ratio,
)
from .stochastic_rounding import (
    ROUNDING_FIELDS,
    load_random_bits,
    random_words,
    round_stochastically,
)

# Note [Chunk and block]
# 128 threads with 32 bytes of each state keep 24 KB of float32 reads in flight per program; at
# the three programs that the registers allow, a multiprocessor then has several times the 20 KB
# that its share of bandwidth times latency asks for. A chunk of four blocks spreads the look-up of
# addresses and scalars, and four bytes of chunk map, over 176 KB of traffic. Statistics and random
# words take registers of their own: blocks are half as large there, so that nothing is spilled.
CHUNK = tl.constexpr(4096)
BLOCK_BITS = tl.constexpr(32768)
NUM_WARPS = 4
# tensors per program of the kernels that have a lane per tensor, and sums per turn of add_sums
LANES = tl.constexpr(128)

# A row per tensor, int64: addresses, then what the traversal needs.
THETA = tl.constexpr(0)
VMAX = tl.constexpr(1)  # or its codes
MASTER = tl.constexpr(2)
STEP = tl.constexpr(3)
NUMEL = tl.constexpr(4)
FIRST_CHUNK = tl.constexpr(5)
END_CHUNK = tl.constexpr(6)
GROUP = tl.constexpr(7)
INDEX = tl.constexpr(8)  # position in the caller's lists, and of the gradient's address
# float32 and float64 states
M = tl.constexpr(9)
U = tl.constexpr(10)
V = tl.constexpr(11)
W = tl.constexpr(12)
# packed states
PACKED = tl.constexpr(9)
SCALE = tl.constexpr(10)
ROW_LENGTH = tl.constexpr(11)  # elements per index of dimension 0
NUM_BLOCKS = tl.constexpr(12)
ROW = tl.constexpr(13)

# How a group's lr is given: in its row of hyper-parameters, or at an address.
LR_ON_HOST = tl.constexpr(0)
LR_FLOAT32 = tl.constexpr(1)
LR_FLOAT64 = tl.constexpr(2)


@triton.jit
def load_lr(lr_kinds, lr_words, group, h, mask):
    """float64 lr of each tensor's group."""
    kind = tl.load(lr_kinds + group, mask=mask, other=LR_ON_HOST)
    word = tl.load(lr_words + group, mask=mask, other=0)
    is_single = kind == LR_FLOAT32
    single = tl.load(word.to(tl.pointer_type(tl.float32)), mask=mask & is_single, other=0.0)
    is_double = kind == LR_FLOAT64
    double = tl.load(word.to(tl.pointer_type(tl.float64)), mask=mask & is_double, other=0.0)
    return tl.where(is_single, single.to(tl.float64), tl.where(is_double, double, h.lr))


@triton.jit
def load_skip(control):
    """Whether the control block says to skip the step; without a block, no."""
    if control is None:
        return tl.full((), 0, tl.int1)
    else:
        return tl.load(control + SKIP) != 0


@triton.jit(
    do_not_specialize=["num_tensors"],
    do_not_specialize_on_alignment=[
        "rows", "hyper", "lr_kinds", "lr_words", "control", "norms", "scalars",
    ],
)  # fmt: skip
def make_scalars_kernel(
    rows, hyper, lr_kinds, lr_words, control, norms, scalars, num_tensors, UNIT_RANGE: tl.constexpr
):
    """Scalars of every tensor into the table [num_tensors, NUM_SCALARS] of the compute type.

    norms: float64 [n, 2] where the trust ratio is to be applied, else None.
    """
    tensor = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = tensor < num_tensors
    row = rows + tensor * ROW
    group = tl.load(row + GROUP, mask=mask, other=0)
    h = load_hyper(hyper + group * HYPER_FIELDS, mask)
    lr = load_lr(lr_kinds, lr_words, group, h, mask)
    step_address = tl.load(row + STEP, mask=mask, other=0)
    step = tl.load(step_address.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
    if control is None:
        clip_factor = tl.full((), 1.0, tl.float64)
    else:
        clip_factor = tl.load(control + CLIP_FACTOR)
    if norms is None:
        trust = tl.full((), 1.0, tl.float64)
    else:
        norm = norms + 2 * tl.load(row + INDEX, mask=mask, other=0)
        theta_sum = tl.load(norm, mask=mask, other=0.0)
        update_sum = tl.load(norm + 1, mask=mask, other=0.0)
        trust = trust_ratio(h, theta_sum, update_sum)
    s = make_scalars(h, lr, step.to(tl.float64) + 1.0, clip_factor, trust, UNIT_RANGE)
    store_scalars(scalars + tensor * NUM_SCALARS, s, mask)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED: to 16 bytes, which the compiler cannot know of an address from a table."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_parameter(theta_ptr, master_ptr, i, mask, T: tl.constexpr, HAS_MASTER: tl.constexpr):
    """Elements i in the compute type; 0 outside mask (None: all are inside)."""
    other = None if mask is None else 0.0
    if HAS_MASTER:
        return tl.load(master_ptr + i, mask=mask, other=other)
    else:
        return to_compute(tl.load(theta_ptr + i, mask=mask, other=other), T)


@triton.jit
def load_gradient(
    g_ptr, i, mask, scale, T: tl.constexpr, G_DTYPE: tl.constexpr, PHASE: tl.constexpr
):
    """Elements i in the compute type, divided by scale unless that is None, and written back."""
    other = None if mask is None else 0.0
    g = to_compute(tl.load(g_ptr + i, mask=mask, other=other), T)
    if scale is not None:
        g = divide(g, scale)
        # STATES leaves the scaled gradient for PARAMETERS, which writes it back
        if PHASE != STATES:
            tl.store(g_ptr + i, from_compute(g, G_DTYPE), mask=mask)
    return g


@triton.jit
def sums_of_squares(theta, step, s, mask):
    """float64 sums of a block's theta, which is 0 outside mask, and of its update."""
    update = layer_update(theta, step, s).to(tl.float64)
    if mask is not None:
        update = tl.where(mask, update, 0.0)
    return tl.sum(theta.to(tl.float64) * theta.to(tl.float64)), tl.sum(update * update)


@triton.jit
def store_parameter(
    theta_ptr, master_ptr, i, mask, theta, s, words, THETA_DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
):  # fmt: skip
    """Elements i; words: random ones, or None to round to the nearest."""
    # lr = 0 keeps the bits; a NaN's would not survive the conversion
    moves = tl.broadcast_to(s.eta, theta.shape) != 0
    if mask is not None:
        moves = moves & mask
    if HAS_MASTER:
        tl.store(master_ptr + i, theta, mask=moves)
    if words is None:
        stored = from_compute(theta, THETA_DTYPE)
    else:
        stored = round_stochastically(theta, words)
    tl.store(theta_ptr + i, stored, mask=moves)


@triton.jit
def update_chunk(
    theta_address,
    g_address,
    m_address,
    u_address,
    v_address,
    w_address,
    vmax_address,
    master_address,
    begin,
    n,
    s,
    scale,
    random,
    THETA_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    T: tl.constexpr,
    ALGORITHM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    COLLECT: tl.constexpr,
    PHASE: tl.constexpr,
    FULL: tl.constexpr,
    G_ALIGNED: tl.constexpr,
):
    """Elements [begin, begin + n) of one tensor; FULL: n is CHUNK and all but g are aligned.

    scale: of the gradient, or None. random: RandomBits, or None to round to the nearest. Returns
    the sums of squares of theta and of the update, which the STATES phase needs, and with COLLECT
    the statistics that the phase sets.
    """
    theta_ptr = pointer_to(theta_address, THETA_DTYPE, FULL) + begin
    g_ptr = pointer_to(g_address, G_DTYPE, FULL and G_ALIGNED) + begin
    m_ptr = pointer_to(m_address, T, FULL) + begin
    u_ptr = pointer_to(u_address, T, FULL) + begin
    v_ptr = pointer_to(v_address, T, FULL) + begin
    w_ptr = pointer_to(w_address, T, FULL) + begin
    vmax_ptr = pointer_to(vmax_address, T, FULL) + begin
    master_ptr = pointer_to(master_address, tl.float32, FULL) + begin
    theta_sum = tl.full((), 0.0, tl.float64)
    update_sum = tl.full((), 0.0, tl.float64)
    statistics = no_statistics()
    HALVED: tl.constexpr = COLLECT or random is not None
    BLOCK: tl.constexpr = BLOCK_BITS // T.primitive_bitwidth // (2 if HALVED else 1)
    for start in range(0, CHUNK if FULL else n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = None if FULL else i < n
        other = None if FULL else 0.0
        theta = load_parameter(theta_ptr, master_ptr, i, mask, T, HAS_MASTER)
        g_raw = load_gradient(g_ptr, i, mask, scale, T, G_DTYPE, PHASE)
        m = tl.load(m_ptr + i, mask=mask, other=other)
        u = tl.load(u_ptr + i, mask=mask, other=other)
        v = tl.load(v_ptr + i, mask=mask, other=other)
        w = tl.load(w_ptr + i, mask=mask, other=other)
        vmax = tl.load(vmax_ptr + i, mask=mask, other=other) if AMSGRAD else w
        g = observed_gradient(g_raw, theta, s)
        if PHASE != PARAMETERS:
            u, v, w, c = observe(g, u, v, w, s)
            if COLLECT:
                statistics = add_observations(statistics, g_raw, c, s, mask)
            if AMSGRAD:
                vmax = track_maximum(divide(v, w), vmax)
        normalizer = make_normalizer(v, w, vmax, s, AMSGRAD)
        if PHASE != PARAMETERS:
            m = accumulate_momentum(g, m, normalizer, s, ALGORITHM)
            tl.store(m_ptr + i, m, mask=mask)
            tl.store(u_ptr + i, u, mask=mask)
            tl.store(v_ptr + i, v, mask=mask)
            tl.store(w_ptr + i, w, mask=mask)
            if AMSGRAD:
                tl.store(vmax_ptr + i, vmax, mask=mask)
        step = direction(g, m, normalizer, s, ALGORITHM)
        if PHASE == STATES:
            theta_square, update_square = sums_of_squares(theta, step, s, mask)
            theta_sum += theta_square
            update_sum += update_square
        else:
            if COLLECT:
                statistics = add_step_sizes(statistics, step, s, mask)
            theta = moved_parameter(theta, step, s)
            words = None if random is None else random_words(random, begin + i)
            store_parameter(
                theta_ptr, master_ptr, i, mask, theta, s, words, THETA_DTYPE, HAS_MASTER
            )
    return theta_sum, update_sum, statistics


@triton.jit
def random_bits_of(row, rounding_row):
    """RandomBits of the tensor of a row in this step."""
    step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
    return load_random_bits(rounding_row, tl.load(row + NUMEL), step.to(tl.float64) + 1.0)


@triton.jit
def store_sums(chunk, theta_sum, update_sum, sums, collected, statistics, PHASE: tl.constexpr):
    """What a chunk adds to float64 [chunks, 2] and [chunks, NUM_STATISTICS] (or None)."""
    if PHASE == STATES:
        tl.store(sums + 2 * chunk.to(tl.int64), theta_sum)
        tl.store(sums + 2 * chunk.to(tl.int64) + 1, update_sum)
    if statistics is not None:
        store_statistics(statistics + chunk.to(tl.int64) * NUM_STATISTICS, collected, PHASE)


@triton.jit(
    do_not_specialize_on_alignment=[
        "rows", "g_addresses", "chunk_tensor", "scalars", "control", "grad_scale", "sums",
        "statistics", "rounding",
    ],
)  # fmt: skip
def update_kernel(
    rows,
    g_addresses,
    chunk_tensor,
    scalars,
    control,
    grad_scale,
    sums,
    statistics,
    rounding,
    THETA_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    T: tl.constexpr,
    ALGORITHM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    PHASE: tl.constexpr,
):
    """One chunk of one tensor, unless control says skip.

    chunk_tensor: int32, the row of each chunk's tensor. sums, statistics: float64 [chunks, 2] and
    [chunks, NUM_STATISTICS], or None. rounding: rows of `Rounding` for bfloat16 without masters, or
    None to round to the nearest.
    """
    chunk = tl.program_id(0)
    if not load_skip(control):
        tensor = tl.load(chunk_tensor + chunk).to(tl.int64)
        row = rows + tensor * ROW
        begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
        numel = tl.load(row + NUMEL)
        n = tl.minimum(numel - begin, CHUNK).to(tl.int32)
        theta = tl.load(row + THETA)
        g = tl.load(g_addresses + tl.load(row + INDEX))
        m = tl.load(row + M)
        u = tl.load(row + U)
        v = tl.load(row + V)
        w = tl.load(row + W)
        vmax = tl.load(row + VMAX)
        master = tl.load(row + MASTER)
        s = load_scalars(scalars + tensor * NUM_SCALARS)
        scale = None if grad_scale is None else tl.load(grad_scale).to(T)
        COLLECT: tl.constexpr = statistics is not None
        if rounding is None:
            random = None
        else:
            random = random_bits_of(row, rounding + tensor * ROUNDING_FIELDS)

        # a gradient is a view into a bucket more often than not, at any address: its own branch
        aligned = ((theta | m | u | v | w | vmax | master) & 15) == 0
        if (n == CHUNK) & aligned:
            if (g & 15) == 0:
                theta_sum, update_sum, collected = update_chunk(
                    theta, g, m, u, v, w, vmax, master, begin, n, s, scale, random,
                    THETA_DTYPE, G_DTYPE, T, ALGORITHM, AMSGRAD, HAS_MASTER, COLLECT,
                    PHASE, FULL=True, G_ALIGNED=True,
                )  # fmt: skip
            else:
                theta_sum, update_sum, collected = update_chunk(
                    theta, g, m, u, v, w, vmax, master, begin, n, s, scale, random,
                    THETA_DTYPE, G_DTYPE, T, ALGORITHM, AMSGRAD, HAS_MASTER, COLLECT,
                    PHASE, FULL=True, G_ALIGNED=False,
                )  # fmt: skip
        else:
            theta_sum, update_sum, collected = update_chunk(
                theta, g, m, u, v, w, vmax, master, begin, n, s, scale, random,
                THETA_DTYPE, G_DTYPE, T, ALGORITHM, AMSGRAD, HAS_MASTER, COLLECT,
                PHASE, FULL=False, G_ALIGNED=False,
            )  # fmt: skip
        store_sums(chunk, theta_sum, update_sum, sums, collected, statistics, PHASE)


@triton.jit(do_not_specialize_on_alignment=["rows", "of_chunk", "control", "of_tensor"])
def add_sums_kernel(
    rows, of_chunk, control, of_tensor, FIRST_FIELD: tl.constexpr, WIDTH: tl.constexpr
):
    """of_tensor[tensor, field] = the sum of its chunks' of_chunk[chunk, field], in a fixed order.

    Fields from FIRST_FIELD on, as many as the grid is wide. of_chunk, of_tensor: float64, WIDTH
    fields.
    """
    if not load_skip(control):
        row = rows + tl.program_id(0).to(tl.int64) * ROW
        first = tl.load(row + FIRST_CHUNK)
        end = tl.load(row + END_CHUNK)
        field = FIRST_FIELD + tl.program_id(1)
        total = tl.zeros((LANES,), tl.float64)
        for start in range(first, end, LANES):
            i = start + tl.arange(0, LANES)
            total += tl.load(of_chunk + i * WIDTH + field, mask=i < end, other=0.0)
        tl.store(of_tensor + tl.load(row + INDEX) * WIDTH + field, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=["num_steps", "num_group_steps"],
    do_not_specialize_on_alignment=["steps", "group_steps", "control"],
)
def count_kernel(steps, group_steps, control, num_steps, num_group_steps):
    """Adds 1 to every float32 step and int32 group step, given by address, unless skipped."""
    if not load_skip(control):
        i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
        mask = i < num_steps
        step = tl.load(steps + i, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=mask, other=0.0) + 1.0, mask=mask)
        mask = i < num_group_steps
        group_step = tl.load(group_steps + i, mask=mask, other=0).to(tl.pointer_type(tl.int32))
        tl.store(group_step, tl.load(group_step, mask=mask, other=0) + 1, mask=mask)
