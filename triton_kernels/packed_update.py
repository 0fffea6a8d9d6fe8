"""The update of packed states: programs over blocks of tensors found by address, one memory pass.

Between make_scalars_kernel and add_sums_kernel of multi_tensor_apply.py, whose rows and helpers it
shares; compact.py says what is stored. Decodes, updates theta with the states as they are before
they are rounded, encodes. As exponents are found inside a block, so is everything in a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compact import BLOCK, decode, decode_maximum, encode, encode_maximum
from .maxva_math import (
    FAST,
    NONZERO,
    accumulate_momentum,
    direction,
    make_normalizer,
    moved_parameter,
    observe_centered,
    observed_gradient,
    track_maximum,
)
from .multi_tensor_apply import (
    FIRST_CHUNK,
    INDEX,
    MASTER,
    NUM_BLOCKS,
    PACKED,
    ROW,
    ROW_LENGTH,
    SCALE,
    THETA,
    VMAX,
    load_gradient,
    load_parameter,
    load_skip,
    pointer_to,
    random_bits_of,
    store_parameter,
    store_sums,
    sums_of_squares,
)
from .statistics import add_observations, add_step_sizes, no_statistics
from .step_scalars import NUM_SCALARS, PARAMETERS, STATES, are_plain, load_scalars, plain_scalars
from .stochastic_rounding import (
    ROUNDING_FIELDS,
    random_words,
    random_words_by_fours,
    shares_calls,
)

# Note [Tile]
# A thread has four consecutive elements and a warp a block: 128 bits of float32 and of int8's
# words, one call of the random generator, and the largest of a block in one instruction. Pointers
# of two-byte elements are therefore said to be aligned to 8 bytes and no more: eight elements per
# thread would share a block among half a warp.
CHUNK_BLOCKS = tl.constexpr(32)
TILE_BLOCKS = tl.constexpr(4)
THREAD_ELEMENTS = tl.constexpr(4)

# Note [Stages]
# Whole tiles are copied to shared memory two or three tiles ahead. Each program runs one of four
# loops, yet Triton lays two loops' buffers over each other only where their sizes differ: hence
# four stages beside three, and none where rows or chunks end. 18 KB, 28 of bfloat16 states, then
# leave it to registers how many programs an A100's or H100's multiprocessor has; 12 or 16 KB for
# each loop would not.
FAVORABLE_STAGES = tl.constexpr(3)
FULL_STAGES = tl.constexpr(4)
MASKED_STAGES = tl.constexpr(1)


@triton.constexpr_function
def bytes_of_access(dtype):
    """What one access moves of a thread's four elements; allows_vector of csrc/gpu_traversal.h."""
    return min(16, THREAD_ELEMENTS.value * dtype.primitive_bitwidth // 8)


@triton.constexpr_function
def maximum_dtype(word):
    """Of vmax or its codes, by the type of packed states."""
    return tl.uint8 if word.primitive_bitwidth == 32 else tl.bfloat16


@triton.jit
def allows_fours(address, DTYPE: tl.constexpr):
    """Whether it suits Note [Tile]'s accesses; that of a list that is not there, 0, does."""
    return (address & (bytes_of_access(DTYPE) - 1)) == 0


@triton.jit
def pointer_to_fours(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED: `allows_fours`."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, bytes_of_access(DTYPE))
    return pointer


@triton.jit
def update_blocks(
    theta_address,
    g_address,
    packed_address,
    scale_address,
    maximum_address,
    master_address,
    first_block,
    num_blocks,
    row_length,
    s,
    grad_scale,
    random,
    THETA_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ALGORITHM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ROUND_THETA: tl.constexpr,
    COLLECT: tl.constexpr,
    PHASE: tl.constexpr,
    FOURS: tl.constexpr,
    FULL: tl.constexpr,
    FAVORABLE: tl.constexpr,
):
    """Blocks [first_block, first_block + num_blocks) of one tensor.

    FOURS: everything `allows_fours`, row_length is a multiple of four, and `shares_calls`. FULL:
    FOURS but for g, num_blocks is CHUNK_BLOCKS, and rows consist of whole blocks. FAVORABLE: FULL
    and FOURS, and s `are_plain`. Returns what update_chunk of multi_tensor_apply.py does.
    """
    OPS: tl.constexpr = NONZERO if FAVORABLE else FAST
    if FAVORABLE:
        s = plain_scalars(s)
    # FULL counts elements and blocks from the first block, which leaves 32 bits
    origin = first_block * BLOCK if FULL else first_block * 0
    theta_ptr = pointer_to_fours(theta_address, THETA_DTYPE, FOURS) + origin
    g_ptr = pointer_to_fours(g_address, G_DTYPE, FAVORABLE or (FOURS and not FULL)) + origin
    packed_ptr = pointer_to_fours(packed_address, WORD, FOURS) + origin
    maximum_ptr = pointer_to_fours(maximum_address, maximum_dtype(WORD), FOURS) + origin
    master_ptr = pointer_to_fours(master_address, tl.float32, FOURS) + origin
    scale_ptr = pointer_to(scale_address, tl.int32, False) + first_block
    blocks_per_row = tl.cdiv(row_length, BLOCK)
    theta_sum = tl.full((), 0.0, tl.float64)
    update_sum = tl.full((), 0.0, tl.float64)
    statistics = no_statistics()
    STAGES: tl.constexpr = FAVORABLE_STAGES if FAVORABLE else FULL_STAGES if FULL else MASKED_STAGES
    for start in tl.range(0, CHUNK_BLOCKS if FULL else num_blocks, TILE_BLOCKS, num_stages=STAGES):
        block = start + tl.arange(0, TILE_BLOCKS)
        if FULL:
            block_mask = None
            mask = None
            first = block * BLOCK
        else:
            block_mask = block < num_blocks
            row = (first_block + block) // blocks_per_row
            column = (first_block + block - row * blocks_per_row) * BLOCK
            first = row * row_length + column
            mask = column[:, None] + tl.arange(0, BLOCK)[None, :] < row_length
            mask = mask & block_mask[:, None]
            if FOURS:
                first = tl.multiple_of(first, THREAD_ELEMENTS)
                mask = tl.max_constancy(mask, [1, THREAD_ELEMENTS])
        i = first[:, None] + tl.arange(0, BLOCK)[None, :]
        other = None if FULL else 0
        theta = load_parameter(theta_ptr, master_ptr, i, mask, tl.float32, HAS_MASTER)
        g_raw = load_gradient(g_ptr, i, mask, grad_scale, tl.float32, G_DTYPE, PHASE)
        packed = tl.load(packed_ptr + i, mask=mask, other=other)
        if WORD == tl.int32:  # noqa: SIM300
            exponents = tl.load(scale_ptr + block, mask=block_mask, other=other)
        else:
            exponents = None
        before = decode(packed, exponents, ALGORITHM)
        g = observed_gradient(g_raw, theta, s)
        mean, var, w, c = observe_centered(g, before.mean, before.var, before.w, s)
        if COLLECT and PHASE != PARAMETERS:
            statistics = add_observations(statistics, g_raw, c, s, mask)
        vhat = tl.fma(mean, mean, var)
        one = tl.full(vhat.shape, 1.0, tl.float32)
        if AMSGRAD:
            maximum = tl.load(maximum_ptr + i, mask=mask, other=other)
            vmax = track_maximum(vhat, decode_maximum(maximum, exponents))
        else:
            vmax = vhat
        normalizer = make_normalizer(vhat, one, vmax, s, AMSGRAD, OPS)
        m = accumulate_momentum(g, before.m, normalizer, s, ALGORITHM, OPS)
        step = direction(g, m, normalizer, s, ALGORITHM, OPS)
        if PHASE == STATES:
            theta_square, update_square = sums_of_squares(theta, step, s, mask)
            theta_sum += theta_square
            update_sum += update_square
        else:
            if COLLECT:
                statistics = add_step_sizes(statistics, step, s, mask)
            theta = moved_parameter(theta, step, s)
            if FOURS:
                fours = tl.arange(0, BLOCK // THREAD_ELEMENTS) * THREAD_ELEMENTS
                words = random_words_by_fours(random, origin + (first[:, None] + fours[None, :]))
            else:
                words = random_words(random, i)
            store_parameter(
                theta_ptr, master_ptr, i, mask, theta, s, words if ROUND_THETA else None,
                THETA_DTYPE, HAS_MASTER,
            )  # fmt: skip
            # elements outside mask are 0 or not finite, and count as 0 in their block
            packed, exponents = encode(m, mean, var, w, words, WORD, ALGORITHM)
            tl.store(packed_ptr + i, packed, mask=mask)
            if AMSGRAD:
                maximum, exponents = encode_maximum(vmax, words, exponents, WORD)
                tl.store(maximum_ptr + i, maximum, mask=mask)
            if WORD == tl.int32:  # noqa: SIM300
                tl.store(scale_ptr + block, exponents, mask=block_mask)
    return theta_sum, update_sum, statistics


@triton.jit(
    do_not_specialize_on_alignment=[
        "rows", "g_addresses", "chunk_tensor", "scalars", "control", "grad_scale", "sums",
        "statistics", "rounding",
    ],
)  # fmt: skip
def update_packed_kernel(
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
    WORD: tl.constexpr,
    ALGORITHM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ROUND_THETA: tl.constexpr,
    PHASE: tl.constexpr,
):
    """CHUNK_BLOCKS blocks of one tensor, unless control says skip; as update_kernel.

    In the STATES phase no state is changed and PARAMETERS takes the whole step: what is rounded
    once is not decoded again. ROUND_THETA: theta is bfloat16, without masters, and rounded
    stochastically.
    """
    chunk = tl.program_id(0)
    if not load_skip(control):
        tensor = tl.load(chunk_tensor + chunk).to(tl.int64)
        row = rows + tensor * ROW
        first_block = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK_BLOCKS
        num_blocks = tl.minimum(tl.load(row + NUM_BLOCKS) - first_block, CHUNK_BLOCKS).to(tl.int32)
        row_length = tl.load(row + ROW_LENGTH)
        theta = tl.load(row + THETA)
        g = tl.load(g_addresses + tl.load(row + INDEX))
        packed = tl.load(row + PACKED)
        block_scale = tl.load(row + SCALE)
        maximum = tl.load(row + VMAX)
        master = tl.load(row + MASTER)
        s = load_scalars(scalars + tensor * NUM_SCALARS, UNIT_RANGE=True)
        scale = None if grad_scale is None else tl.load(grad_scale).to(tl.float32)
        COLLECT: tl.constexpr = statistics is not None
        random = random_bits_of(row, rounding + tensor * ROUNDING_FIELDS)

        aligned = allows_fours(theta, THETA_DTYPE) & allows_fours(master, tl.float32)
        aligned &= allows_fours(packed, WORD) & allows_fours(maximum, maximum_dtype(WORD))
        fours = aligned & (row_length % THREAD_ELEMENTS == 0) & shares_calls(random)
        if fours & (num_blocks == CHUNK_BLOCKS) & (row_length % BLOCK == 0):
            # its own branch: a gradient that is a view into a bucket may have any address
            if allows_fours(g, G_DTYPE) & are_plain(s):
                theta_sum, update_sum, collected = update_blocks(
                    theta, g, packed, block_scale, maximum, master, first_block, num_blocks,
                    row_length, s, scale, random, THETA_DTYPE, G_DTYPE, WORD, ALGORITHM, AMSGRAD,
                    HAS_MASTER, ROUND_THETA, COLLECT, PHASE, FOURS=True, FULL=True, FAVORABLE=True,
                )  # fmt: skip
            else:
                theta_sum, update_sum, collected = update_blocks(
                    theta, g, packed, block_scale, maximum, master, first_block, num_blocks,
                    row_length, s, scale, random, THETA_DTYPE, G_DTYPE, WORD, ALGORITHM, AMSGRAD,
                    HAS_MASTER, ROUND_THETA, COLLECT, PHASE, FOURS=True, FULL=True, FAVORABLE=False,
                )  # fmt: skip
        elif fours & allows_fours(g, G_DTYPE):
            theta_sum, update_sum, collected = update_blocks(
                theta, g, packed, block_scale, maximum, master, first_block, num_blocks,
                row_length, s, scale, random, THETA_DTYPE, G_DTYPE, WORD, ALGORITHM, AMSGRAD,
                HAS_MASTER, ROUND_THETA, COLLECT, PHASE, FOURS=True, FULL=False, FAVORABLE=False,
            )  # fmt: skip
        else:
            theta_sum, update_sum, collected = update_blocks(
                theta, g, packed, block_scale, maximum, master, first_block, num_blocks,
                row_length, s, scale, random, THETA_DTYPE, G_DTYPE, WORD, ALGORITHM, AMSGRAD,
                HAS_MASTER, ROUND_THETA, COLLECT, PHASE, FOURS=False, FULL=False, FAVORABLE=False,
            )  # fmt: skip
        store_sums(chunk, theta_sum, update_sum, sums, collected, statistics, PHASE)
