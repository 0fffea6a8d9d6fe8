"""Compact states of the Triton backend on CPU tensors, interpreted: codes, the step, checks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from compact_exactness import check_compact_step, compact_problem
from exactness import in_layout, outside, same_bits
from interpreted import interpreted
from torch import Tensor

from maxva_kernels.batch import Batch, Phase
from maxva_kernels.compact import Moments, Packed, pack, unpack
from maxva_kernels.reference import EagerBackend

ALGORITHMS = {"madam": 0, "lamadam": 1}
WORDS = {"int8": torch.int32, "bfloat16": torch.int64}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def kernels() -> Any:
    """The package under test."""
    from maxva_kernels import triton_kernels

    return triton_kernels


# --- codes ---------------------------------------------------------------------------------------


def random_words(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """int64 words, with the smallest and the largest among them."""
    words = torch.randint(0, 2**32, shape, generator=generator)
    words.view(-1)[::17] = 0
    words.view(-1)[5::17] = 2**32 - 1
    return words


def wide_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 of both signs over the whole range of a code and below it, zeros among them."""
    values = torch.randn(shape, generator=generator)
    values *= 10 ** (8 * torch.rand(shape, generator=generator) - 6)
    values.view(-1)[3::13] = 0.0
    values.view(-1)[4::29] = -0.0
    return values


def moments_of_blocks(generator: torch.Generator) -> list[Tensor]:
    """m, mean, var, w and vmax [16, 128]: blocks of all sizes, zeros, and what is not finite."""
    shape = (16, 128)
    m, mean, sd, root = (wide_values(shape, generator) for _ in range(4))
    var, vmax = sd.square(), root.square()
    w = torch.rand(shape, generator=generator) ** 3
    w[:, ::5] = 1 - w[:, ::5]
    w[:, 2] = 1.0
    w[:, 3] = 2.0**-30
    w[:, 4] = 0.5
    for k, power in enumerate((-60, -20, 20, 60)):
        m[k] *= 2.0**power
        mean[k] *= 2.0**power
        var[k] *= 4.0**power
        vmax[k] *= 4.0**power
    for x in (m, mean, var, vmax):
        x[4] = 0.0
    for k, bad in enumerate((math.nan, math.inf, -math.inf)):
        m[5 + k, k::7] = bad
        mean[6 + k, k::9] = bad
        var[7 + k, k::11] = abs(bad)
        vmax[8 + k, k::13] = abs(bad)
    m[11] = math.nan
    mean[12, 0] = 3.4e38
    var[13], mean[13] = 0.0, 0.0  # MAdam's unit is 0
    return [m, mean, var, w, vmax]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("word", WORDS)
@interpreted
def test_encoding_is_the_definition(word: str, algorithm: str) -> None:
    from triton_codes import encoded

    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        moments = moments_of_blocks(generator)
        words = random_words((16, 128), generator)
        found = encoded(moments, words, WORDS[word], ALGORITHMS[algorithm])
        m, mean, var, w, vmax = moments
        like = torch.empty(16, 128, dtype=WORDS[word])
        expected = pack(Moments(m, mean, var, w, vmax), algorithm, like, words.flatten())
        assert same_bits(found[0], expected.packed)
        if expected.scale is not None:
            assert same_bits(found[1], expected.scale)
        assert same_bits(found[2], expected.maximum)


@interpreted
def test_a_unit_below_the_normal_numbers_is_none() -> None:
    """Its reciprocal need not be finite, and the element would be taken for lost."""
    from triton_codes import encoded

    tiny, zero = torch.full((16, 128), 2.0**-140), torch.zeros(16, 128)
    moments = [tiny, tiny, zero, torch.full((16, 128), 0.25), zero]
    words = torch.zeros(16, 128, dtype=torch.int64)
    packed = encoded(moments, words, torch.int32, ALGORITHMS["madam"])[0]
    assert bool((packed & 0xFF == 0).all())
    assert bool((packed >> 16 & 0xFF == 0).all())


def all_codes(largest_signed: int, largest_unsigned: int) -> Tensor:
    """int64 [4, 16, 128]: every code up to these magnitudes in every slot."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randperm(256, generator=generator) for _ in range(4 * 8)])
    codes = codes.view(4, 16, 128)
    magnitude = (codes & 0x7F).clamp(max=largest_signed)
    signed = codes & 0x80 | magnitude
    x = codes[3] & 0x80 | magnitude[3].clamp(max=120)  # |x| <= 1/2
    return torch.stack([*signed[:2], codes[2].clamp(max=largest_unsigned), x])


def word_of(codes: Tensor) -> Tensor:
    return sum(codes[k] << 8 * k for k in range(4)).to(torch.int32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@interpreted
def test_every_code_is_decoded(algorithm: str) -> None:
    """Of all slots, under scales of all sizes."""
    from triton_codes import decoded

    codes = all_codes(127, 255)
    exponents = torch.tensor([0, 1, 2, 60, 100, 127, 128, 150, 190, 253, 254, 0, 127, 90, 80, 70])
    scale = (exponents * 0x01010101).to(torch.int32).view(16, 1)
    packed, maximum = word_of(codes), codes[2].to(torch.uint8)
    expected = unpack(Packed(packed, scale, maximum), algorithm)
    found = decoded(packed, scale, maximum, ALGORITHMS[algorithm])
    check_same(found, expected)


def check_same(found: list[Tensor], expected: Moments) -> None:
    """To the bit but for those of NaN."""
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert same_bits(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@interpreted
def test_codes_of_grid_points_stay() -> None:
    """Whatever the random word, while a block keeps its scale; only w = 0 never comes back."""
    from triton_codes import decoded, encoded

    codes = all_codes(125, 250)
    codes[:2, :, 0], codes[2, :, 0] = 125, 250  # decides on the scale of its block
    scale = (torch.arange(80, 144, 4) * 0x01010101).to(torch.int32).view(16, 1)
    packed, maximum = word_of(codes), codes[2].to(torch.uint8)
    generator = torch.Generator().manual_seed(2)
    lamadam = ALGORITHMS["lamadam"]  # whose r is m itself
    for _ in range(3):
        words = random_words((16, 128), generator)
        moments = decoded(packed, scale, maximum, lamadam)
        found = encoded(moments, words, torch.int32, lamadam)
        codes[3] = codes[3].clamp(min=1)
        assert same_bits(found, (word_of(codes), scale, maximum))


@interpreted
def test_bfloat16_states_are_decoded() -> None:
    from triton_codes import decoded

    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(-(2**63), 2**63 - 1, (16, 128), generator=generator)
    maximum = wide_values((16, 128), generator).abs().bfloat16()
    scale = torch.zeros(16, 1, dtype=torch.int32)
    for algorithm, number in ALGORITHMS.items():
        found = decoded(packed, scale, maximum, number)
        expected = unpack(Packed(packed, None, maximum), algorithm)
        check_same(found, expected)


# --- the step ------------------------------------------------------------------------------------


def hyper(**changes: float) -> list[float]:
    """A group's row: lr, then `Hyper` of step_scalars.py."""
    row = {
        "lr": 0.1, "alpha": 0.9, "beta_low": 0.5, "beta_high": 0.999, "beta_init": 0.999,
        "eps": 1e-8, "weight_decay": 0.0, "delta": 1e-16, "bias_correction": 1.0,
        "adam_w_mode": 1.0, "nesterov": 0.0, "maximize": 0.0, "eps_inside_sqrt": 0.0,
        "trust_ratio": 0.0,
    }  # fmt: skip
    assert changes.keys() <= row.keys()
    return list({**row, **changes}.values())


def make_batch(
    shapes: list[tuple[int, ...]],
    word: str = "int8",
    algorithm: str = "madam",
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    amsgrad: bool = False,
    master: bool = False,
    fresh: bool = False,
    rows: list[tuple[int, ...]] | None = None,
    seed: int = 0,
    **changes: float,
) -> Batch:
    """Parameters with compact states in the midst of training, or fresh ones.

    A tenth has w = 1, where all end: the sign of a zero tells it from w = 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for_full = torch.Generator().manual_seed(seed + 1)
    batch = Batch(torch.device("cpu"), group_sizes=[len(shapes)], lr=[None], hyper=hyper(**changes))
    for k, shape in enumerate(shapes):
        scale = 10 ** (3 * torch.rand(shape, generator=generator) - 3)
        mean = scale * torch.randn(shape, generator=generator)
        sd = scale * torch.rand(shape, generator=generator).clamp(min=0.1)
        g = mean + 2 * sd * torch.randn(shape, generator=generator)
        w = torch.rand(shape, generator=generator)
        w.masked_fill_(torch.rand(shape, generator=for_full) < 0.1, 1.0)
        unit = mean.abs() + sd if algorithm == "madam" else 1.0
        m = unit * torch.randn(shape, generator=generator)
        vmax = (mean.square() + sd.square()) * (0.5 + w).square()
        unseen = torch.rand(shape, generator=generator) < (1.0 if fresh else 0.05)
        moments = [x.masked_fill(unseen, 0.0) for x in (m, mean, sd.square(), w, vmax)]
        theta = in_layout(torch.randn(shape, generator=generator).to(dtype), layout)
        like = torch.empty_like(theta, dtype=WORDS[word])
        stored = pack(Moments(*moments), algorithm, like, None)
        packed, exponents, maximum = stored
        if fresh and exponents is not None:
            exponents = torch.zeros_like(exponents)
        batch.theta.append(theta)
        batch.g.append(in_layout(g.to(dtype if grad_dtype is None else grad_dtype), grad_layout))
        # as misaligned as theta is
        batch.packed.append(in_layout(packed, layout))
        if exponents is not None:
            batch.scale.append(exponents)
        if amsgrad:
            # a sentinel would not fit uint8
            odd = torch.empty(maximum.numel() + 1, dtype=maximum.dtype)[1:].view(maximum.shape)
            batch.maximum.append(odd.copy_(maximum) if layout == "misaligned" else maximum)
        if master:
            batch.master.append(in_layout(theta.float(), layout))
        batch.step.append(torch.tensor(0.0 if fresh else 7.0 + k))
        row = (3, k, 0, 2**40, 2**40) if rows is None else rows[k]
        rounds_theta = dtype == torch.bfloat16 and not master
        batch.rounding += [*row, int(rounds_theta)]
    return batch


def steps(
    batch: Batch,
    algorithm: str = "madam",
    control: Tensor | None = None,
    grad_scale: Tensor | None = None,
    reference: bool = False,
) -> Batch:
    """A copy of the batch after a step of the kernels or of the reference."""
    after = copy.deepcopy(batch)
    norms = None
    phases = [Phase.WHOLE]
    if after.hyper[-1]:
        norms = torch.empty(len(after.theta), 2, dtype=torch.float64)
        phases = [Phase.STATES, Phase.PARAMETERS]
    for phase in phases:
        if reference:
            EagerBackend().update(after, algorithm, phase, control, grad_scale, norms)
        else:
            call(
                after, control=control, grad_scale=grad_scale, norms=norms, algorithm=algorithm,
                phase=int(phase),
            )  # fmt: skip
        if phase == Phase.STATES:
            for name in ("theta", "packed", "scale", "maximum", "master", "step", "g"):
                assert same_bits(getattr(after, name), getattr(batch, name)), name
    return after


def arguments(batch: Batch) -> dict[str, Any]:
    """A batch's arguments of update_packed_."""
    names = ("theta", "g", "packed", "scale", "maximum", "master", "step", "group_step",
             "group_sizes", "hyper", "lr", "statistics", "rounding")  # fmt: skip
    return {name: getattr(batch, name) for name in names}


def largest_scales(*stored: Packed) -> dict[str, Tensor]:
    """float64 in the parameter's layout: the larger one of each element's block scales, by slot."""
    packed = stored[0].packed
    length = math.prod(packed.shape[1:])
    found = {}
    for slot, name in enumerate(("m", "mean", "var", "vmax")):
        exponent = torch.maximum(*(x.scale >> 8 * slot & 0xFF for x in stored)).double()
        each = torch.pow(2.0, exponent - 127).repeat_interleave(128, 1)[:, :length].contiguous()
        found[name] = each.as_strided(packed.shape, packed.stride())
    return found


def cancelled(before: Packed, after: Packed, algorithm: str) -> dict[str, Tensor]:
    """What float32 roundings of the terms of m or r and mean can change in sums close to 0.

    As compact_exactness.py's ranges: 16 ulps of the old momentum, 8 of the old mean.
    """
    old, new = unpack(before, algorithm), unpack(after, algorithm)
    unit = torch.ones_like(new.mean)
    if algorithm == "madam" and after.scale is not None:
        unit = new.mean.abs() + new.var.sqrt()
    eps = torch.finfo(torch.float32).eps
    r = torch.where(unit == 0, 0.0, 16 * eps * old.m.abs() / unit)
    return {"m": r.double(), "mean": 8 * eps * old.mean.abs().double()}


def slots_of(stored: Packed) -> Moments:
    """What is rounded: of int8 r and roots, which are exact of a square."""
    slots = unpack(stored, "lamadam")  # which has no unit
    if stored.scale is None:
        return slots
    vmax = slots.vmax
    return slots._replace(var=slots.var.sqrt(), vmax=None if vmax is None else vmax.sqrt())


def check_neighbours(
    ours: Packed, theirs: Packed, label: str, slack: dict[str, Tensor] | None = None
) -> None:
    """Every code is the reference's or beside it; words and random bits make nearly all equal.

    slack: by slot, what a value may be further away, as `cancelled` finds it.
    """
    equal = (ours.packed == theirs.packed).double().mean()
    assert equal > 0.98, f"{label}: {equal:.4f} of the words are equal"
    mine, other = slots_of(ours), slots_of(theirs)
    scales = {} if ours.scale is None else largest_scales(ours, theirs)
    for name in ("m", "mean", "var", "vmax", "w"):
        a, b = getattr(mine, name), getattr(other, name)
        if a is None:
            continue
        a, b = a.double(), b.double()
        assert torch.equal(a.isnan(), b.isnan()), f"{label}: {name}"
        largest = torch.maximum(a.abs(), b.abs())
        if name == "w":  # is kept as x
            largest = torch.minimum(largest, 1 - torch.minimum(a, b))
        if ours.scale is None:
            step = 2.0**-7 * largest + 2.0**-30 * (name == "w")
        else:
            step = (largest + 2.0**-16 * scales.get(name, 1.0)) / (
                16 if name in ("var", "vmax") else 8
            )
        if slack and name in slack:
            step = step + slack[name]
        worst = ((a - b).abs() - step).nan_to_num(0.0).max()
        assert worst <= 0, f"{label}: {name} is {worst} further than a neighbour"


def packed_of(batch: Batch, i: int) -> Packed:
    return Packed(
        batch.packed[i],
        batch.scale[i] if batch.scale else None,
        batch.maximum[i] if batch.maximum else None,
    )


def check_step(
    batch: Batch,
    algorithm: str,
    control: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Batch:
    """A step of the kernels beside one of the reference; returns what the kernels made."""
    gaps = [outside(theta) for theta in batch.theta]
    ours = steps(batch, algorithm, control, grad_scale)
    theirs = steps(batch, algorithm, control, grad_scale, reference=True)
    for i, before in enumerate(batch.theta):
        label = f"{algorithm} tensor {i} {tuple(before.shape)} {before.dtype}"
        if before.numel() == 0:
            continue
        check_neighbours(packed_of(ours, i), packed_of(theirs, i), label)
        assert same_bits(outside(ours.theta[i]), gaps[i]), label
        kept, expected = ((x.master or x.theta)[i] for x in (ours, theirs))
        moved = (expected.double() - before.double()).abs()
        ulp = torch.finfo(kept.dtype).eps * expected.double().abs()
        error = (kept.double() - expected.double()).abs().nan_to_num(0.0)
        assert torch.equal(kept.isnan(), expected.isnan()), label
        assert (error <= (1e-4 * moved + ulp).nan_to_num(0.0)).all(), f"{label}: {error.max()}"
        if ours.master:
            assert same_bits(ours.theta[i], ours.master[i].to(before.dtype)), label
        torch.testing.assert_close(ours.g[i], theirs.g[i], rtol=0, atol=0, msg=label)
        assert ours.step[i] == theirs.step[i]
    if batch.statistics is not None:
        torch.testing.assert_close(ours.statistics, theirs.statistics, rtol=1e-4, atol=1e-4)
    return ours


#: Options of optimizers.
JUDGED: dict[str, dict[str, Any]] = {
    "default": {},
    "clipped_amsgrad_nesterov": {
        "max_grad_norm": 0.5, "amsgrad": True, "nesterov": True, "weight_decay": 0.1,
    },
    "lamb_bf16_stochastic": {
        "trust_ratio": True, "weight_decay": 0.01, "dtype": torch.bfloat16,
        "stochastic_rounding": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("options", JUDGED.values(), ids=JUDGED)
@interpreted
def test_step_by_the_rule(options: dict[str, Any], word: str, algorithm: str) -> None:
    """Through the optimizer."""
    for history in (0, 3):
        problem = compact_problem(algorithm, word, [(3, 130)], history=history, **options)
        check_compact_step(problem, "triton")


#: Options of hyper() and make_batch().
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "first_step": {"fresh": True},
    "first_step_amsgrad": {"fresh": True, "amsgrad": True},
    "decoupled_nesterov": {"weight_decay": 0.1, "nesterov": 1.0},
    "l2_amsgrad": {"weight_decay": 0.125, "adam_w_mode": 0.0, "amsgrad": True},
    "maximize_inside": {"maximize": 1.0, "eps_inside_sqrt": 1.0, "bias_correction": 0.0},
    "alpha_0_beta_high_1": {"alpha": 0.0, "beta_high": 1.0, "eps": 0.0},
    "lamb": {"trust_ratio": 1.0, "weight_decay": 0.01},
    "lamb_amsgrad_l2": {
        "trust_ratio": 1.0, "weight_decay": 0.125, "adam_w_mode": 0.0, "amsgrad": True,
    },
    "bf16": {"dtype": torch.bfloat16},
    "fp16_master": {"dtype": torch.float16, "master": True, "weight_decay": 0.1},
    "bf16_master_amsgrad": {"dtype": torch.bfloat16, "master": True, "amsgrad": True},
    "bf16_gradients": {"grad_dtype": torch.bfloat16},
    "fp64_gradients": {"grad_dtype": torch.float64},
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@interpreted
def test_step_beside_the_reference(options: dict[str, Any], word: str, algorithm: str) -> None:
    """With a scaled gradient, a clip factor and statistics."""
    batch = make_batch([(2, 200), (0, 130)], word, algorithm, **options)
    batch.statistics = torch.full((2, 5), math.nan, dtype=torch.float64)
    control = torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64)
    check_step(batch, algorithm, control, torch.tensor(0.5))


# --- traversal -----------------------------------------------------------------------------------

#: Rows of rounding: seed, parameter, offset, inner_local, inner_global.
ROWS: dict[str, tuple[int, ...]] = {
    "whole": (0, 0, 0, 2**40, 2**40),
    "far": (2**63 - 5, 2**31 - 1, 2**34 + 1, 2**40, 2**40),
    "columns": (2**32, 1, 128, 256, 1024),
    "odd_columns": (2**32 - 1, 3, 2**35 + 2, 100, 2**33 + 3),
}


@pytest.mark.parametrize(
    ("shape", "layout", "grad_layout"),
    [
        ((40, 128), "contiguous", "contiguous"),
        ((9, 2, 261), "misaligned", "contiguous"),
        ((9, 2, 130), "contiguous", "contiguous"),
        ((3, 3, 5, 11), "channels_last", "contiguous"),
        ((3, 150), "contiguous", "transposed"),
        ((3, 150), "contiguous", "gappy"),
        ((1, 129), "transposed", "expanded"),
    ],
)
@pytest.mark.parametrize("word", WORDS)
@interpreted
def test_rows_and_layouts(shape: Any, layout: str, grad_layout: str, word: str) -> None:
    """Whole chunks and tails, whole blocks and parts, strides; everything of every element."""
    batch = make_batch([shape], word, layout=layout, grad_layout=grad_layout, amsgrad=True)
    check_step(batch, "madam", grad_scale=None if grad_layout == "expanded" else torch.tensor(2.0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "name", ["decoupled_nesterov", "l2_amsgrad", "maximize_inside", "alpha_0_beta_high_1"]
)
@interpreted
def test_options_of_whole_chunks(name: str, algorithm: str) -> None:
    """Where the options that few use would be left out."""
    check_step(make_batch([(32, 128)], algorithm=algorithm, **OPTIONS[name]), algorithm)


@pytest.mark.parametrize("shape", [(33, 128), (3, 132)])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@interpreted
def test_random_words_of_shards(rows: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """A chunk and rows whose threads make a call's four words, or one word at a time."""
    check_step(make_batch([shape], rows=[rows], dtype=torch.bfloat16), "madam")


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(32, 128), (2, 200)])
@interpreted
def test_eps_0_leaves_what_has_seen_no_gradient(
    shape: tuple[int, ...], algorithm: str, amsgrad: bool
) -> None:
    batch = make_batch([shape], algorithm=algorithm, fresh=True, amsgrad=amsgrad, eps=0.0)
    batch.g[0][:, ::3] = 0.0
    after = check_step(batch, algorithm)
    assert same_bits(after.theta[0][:, ::3], batch.theta[0][:, ::3])


@interpreted
def test_without_variance_beta_is_the_lower_bound() -> None:
    """Of 0 / 0, which delta = 0 permits."""
    batch = make_batch([(2, 200)], fresh=True, delta=0.0)
    batch.g[0].zero_()
    for _ in range(2):
        batch = check_step(batch, "madam")


@interpreted
def test_random_words_of_rows_that_begin_inside_a_call() -> None:
    """Whose offset and length here are whole calls."""
    row = 5, 2, 8, 132, 135
    check_step(make_batch([(3, 132)], rows=[row], dtype=torch.bfloat16), "madam")


@interpreted
def test_master_weights_may_be_laid_out_otherwise() -> None:
    """They have no blocks."""
    batch = make_batch([(3, 150)], dtype=torch.bfloat16, master=True)
    expected = steps(batch)
    batch.master[0] = batch.master[0].t().contiguous().t()
    found = steps(batch)
    for name in ("theta", "packed", "scale", "master"):
        assert same_bits(getattr(found, name), getattr(expected, name)), name


@interpreted
def test_random_words_of_later_chunks() -> None:
    """Of whole ones, which count their elements from their own first block."""
    check_step(make_batch([(65, 128)], dtype=torch.bfloat16), "madam")


@pytest.mark.parametrize("options", [
    {"word": "int8"},
    {"word": "int8", "dtype": torch.bfloat16, "rows": [ROWS["columns"]], "amsgrad": True},
    {"word": "bfloat16", "dtype": torch.float16, "master": True, "amsgrad": True},
], ids=["int8", "int8_bf16", "bfloat16_fp16"])  # fmt: skip
@pytest.mark.parametrize("shape", [(32, 128), (9, 132)])
@interpreted
def test_alignment_does_not_matter(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    aligned = steps(make_batch([shape], **options))
    for layouts in ({"layout": "misaligned"}, {"grad_layout": "misaligned"}):
        batch = make_batch([shape], **options, **layouts)
        moved = batch.g if "grad_layout" in layouts else batch.packed
        assert all(tensor.data_ptr() % 16 for tensor in moved)
        misaligned = steps(batch)
        for name in ("theta", "packed", "scale", "maximum", "master"):
            assert same_bits(getattr(aligned, name), getattr(misaligned, name)), name


@pytest.mark.parametrize(
    ("dtype", "row", "of_theta", "of_g", "path"),
    [
        (torch.float32, 128, 4, 4, "favorable"), (torch.float32, 128, 4, 2, "full"),
        (torch.float32, 128, 2, 4, "single"), (torch.bfloat16, 128, 4, 4, "favorable"),
        (torch.bfloat16, 128, 4, 2, "full"), (torch.bfloat16, 128, 2, 4, "single"),
        (torch.float32, 124, 4, 4, "fours"), (torch.float32, 124, 4, 2, "single"),
        (torch.float32, 124, 2, 4, "single"), (torch.float32, 126, 4, 4, "single"),
        (torch.bfloat16, 124, 4, 4, "fours"), (torch.bfloat16, 124, 4, 2, "single"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)  # fmt: skip
@interpreted
def test_four_elements_are_asked_to_be_aligned_and_no_more(
    dtype: torch.dtype,
    row: int,
    of_theta: int,
    of_g: int,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of lists that begin so many elements after an aligned address, by the path they take."""
    from maxva_kernels.triton_kernels import packed_update

    taken = []
    update_blocks = packed_update.update_blocks

    def recorded(*args: Any, FOURS: bool, FULL: bool, FAVORABLE: bool) -> Any:
        kinds = {"favorable": FAVORABLE, "full": FULL, "fours": FOURS, "single": True}
        taken.append(next(kind for kind, applies in kinds.items() if applies))
        return update_blocks(*args, FOURS=FOURS, FULL=FULL, FAVORABLE=FAVORABLE)

    def moved(tensor: Tensor, elements: int) -> Tensor:
        there = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:]
        return there.view(tensor.shape).copy_(tensor)

    monkeypatch.setattr(packed_update, "update_blocks", recorded)
    batch = make_batch([(32, row)], dtype=dtype)
    batch.theta, batch.g = [moved(batch.theta[0], of_theta)], [moved(batch.g[0], of_g)]
    call(batch)
    assert taken == [path]


@pytest.mark.parametrize("name", ["packed", "maximum", "master"])
@interpreted
def test_states_are_asked_to_be_aligned_as_theta_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maxva_kernels.triton_kernels import packed_update

    taken = []
    update_blocks = packed_update.update_blocks

    def recorded(*args: Any, FOURS: bool, **paths: bool) -> Any:
        taken.append(FOURS)
        return update_blocks(*args, FOURS=FOURS, **paths)

    monkeypatch.setattr(packed_update, "update_blocks", recorded)
    for elements in (4, 2):
        batch = make_batch([(32, 128)], dtype=torch.bfloat16, master=True, amsgrad=True)
        [tensor] = getattr(batch, name)
        there = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:]
        setattr(batch, name, [there.view(tensor.shape).copy_(tensor)])
        call(batch)
    assert taken == [True, False]


@interpreted
def test_several_groups_and_dtypes() -> None:
    """A launch per pair of dtypes, each tensor with its own group's scalars and random words."""
    batch = make_batch([(2, 130), (1, 300)], weight_decay=0.1)
    other = make_batch([(3, 128), (2, 190)], dtype=torch.bfloat16, seed=1, lr=0.01)
    for name in ("theta", "g", "packed", "scale", "step", "rounding", "hyper", "group_sizes", "lr"):
        getattr(batch, name).extend(getattr(other, name))
    batch.g[3] = batch.g[3].float()
    batch.group_step = [torch.zeros(1, dtype=torch.int32) for _ in "ab"]
    ours = check_step(batch, "madam")
    assert [int(step) for step in ours.group_step] == [1, 1]
    # the second group is counted in another call
    batch.group_step = batch.group_step[:1]
    assert [int(step) for step in check_step(batch, "madam").group_step] == [1]


@interpreted
def test_skipped_step_changes_nothing() -> None:
    batch = make_batch([(2, 200)], amsgrad=True, master=True, dtype=torch.bfloat16)
    batch.statistics = torch.full((1, 5), 7.0, dtype=torch.float64)
    for trust_ratio in (0.0, 1.0):
        batch.hyper = hyper(trust_ratio=trust_ratio, weight_decay=0.1)
        control = torch.tensor([1.0, 1.0, math.inf], dtype=torch.float64)
        after = steps(batch, control=control, grad_scale=torch.tensor(2.0))
        for name in ("theta", "g", "packed", "scale", "maximum", "master", "step", "statistics"):
            assert same_bits(getattr(after, name), getattr(batch, name)), name


@interpreted
def test_lr_0_keeps_theta_and_moves_the_states() -> None:
    batch = make_batch([(2, 200)], dtype=torch.bfloat16, lr=0.0, weight_decay=0.1)
    after = check_step(batch, "madam")
    assert same_bits(after.theta, batch.theta)
    assert (after.packed[0] != batch.packed[0]).double().mean() > 0.9


@pytest.mark.parametrize("shape", [(32, 128), (2, 200)])
@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@interpreted
def test_lr_0_keeps_theta_under_updates_that_are_no_numbers(
    shape: tuple[int, ...], master: bool
) -> None:
    batch = make_batch([shape], dtype=torch.bfloat16, master=master, lr=0.0, weight_decay=0.1)
    batch.g[0].fill_(math.inf)
    after = steps(batch)
    assert same_bits(after.theta, batch.theta)
    assert same_bits(after.master, batch.master)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("word", WORDS)
@interpreted
def test_nonfinite_gradients_stay_where_they_are(word: str, algorithm: str) -> None:
    """For good, and without a share in their block's scales."""
    batch = make_batch([(2, 200)], word, algorithm, amsgrad=True)
    bad = torch.zeros(2, 200, dtype=torch.bool)
    bad[0, 3], bad[0, 130:], bad[1, 7] = True, True, True
    bad[0, 131] = False
    batch.g[0][bad] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(30)[: bad.sum()]
    after = steps(batch, algorithm)
    assert torch.equal(~after.theta[0].isfinite(), bad)
    after.g[0] = torch.ones(2, 200)
    again = check_step(after, algorithm)
    assert torch.equal(~again.theta[0].isfinite(), bad)


@interpreted
def test_each_phase_sets_its_own_statistics() -> None:
    for phase, columns in ((1, [0, 1, 2, 3]), (2, [4]), (0, [0, 1, 2, 3, 4])):
        batch = make_batch([(2, 130)])
        batch.statistics = torch.full((1, 5), math.nan, dtype=torch.float64)
        norms = torch.ones(1, 2, dtype=torch.float64)
        call(batch, norms=norms, phase=phase)
        assert [k for k in range(5) if not batch.statistics[0, k].isnan()] == columns


@interpreted
def test_rows_of_another_shape_are_found() -> None:
    """At the same address: a table is found by sizes, too."""
    batch = make_batch([(2, 256)])
    call(batch)
    for shape in ((4, 128), (1, 512)):
        for name in ("theta", "g", "packed"):
            tensors = getattr(batch, name)
            tensors[0] = tensors[0].view(shape)
        batch.scale[0] = batch.scale[0].view(shape[0], -1)
        elsewhere = copy.deepcopy(batch)
        call(batch)
        call(elsewhere)
        assert same_bits(batch.packed, elsewhere.packed)
        assert same_bits(batch.scale, elsewhere.scale)


# --- checks --------------------------------------------------------------------------------------


def call(batch: Batch, **changes: Any) -> None:
    """update_packed_ of a batch."""
    others = {"control": None, "grad_scale": None, "norms": None, "algorithm": "madam", "phase": 0}
    kernels().update_packed_(**{**arguments(batch), **others, **changes})


WORD = torch.zeros(3, 150, dtype=torch.int32)
SCALE = torch.zeros(3, 2, dtype=torch.int32)
ROW = [0, 0, 0, 2**40, 2**40, 0]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"packed": [WORD]}, ValueError, "2 parameters, but 1 of maxva_packed"),
        ({"packed": [WORD, WORD.long()]}, TypeError, r"maxva_packed\[1\] is torch.int64"),
        ({"packed": [WORD.short(), WORD.short()]}, TypeError, "int32 or torch.int64"),
        ({"packed": [WORD, WORD[:, :149]]}, ValueError, r"maxva_packed\[1\] has shape \[3, 149\]"),
        (
            {"packed": [WORD, WORD.t().contiguous().t()]},
            ValueError,
            r"maxva_packed\[1\] has strides",
        ),
        ({"packed": [WORD, WORD.to("meta")]}, ValueError, "is on meta"),
        ({"packed": [WORD, WORD.to_sparse()]}, TypeError, r"maxva_packed\[1\]"),
        ({"scale": []}, ValueError, "2 parameters, but 0 of maxva_scale"),
        (
            {"packed": [WORD.long(), WORD.long()]},
            ValueError,
            "int64 maxva_packed has no maxva_scale",
        ),
        ({"scale": [SCALE, SCALE[:, :1]]}, ValueError, r"maxva_scale\[1\] .* \[3, 2\]"),
        ({"scale": [SCALE, SCALE.float()]}, ValueError, r"maxva_scale\[1\]"),
        ({"scale": [SCALE, SCALE.t().contiguous().t()]}, ValueError, "must be contiguous"),
        ({"scale": [SCALE, SCALE.to("meta")]}, ValueError, r"maxva_scale\[1\] is on meta"),
        ({"maximum": [WORD.byte()]}, ValueError, "2 parameters, but 1 of maxva_packed_max"),
        (
            {"maximum": [WORD.byte(), WORD.bfloat16()]},
            TypeError,
            r"maxva_packed_max\[1\] is torch.b",
        ),
        ({"master": [WORD.float(), WORD.half()]}, TypeError, r"master_param\[1\] is torch.float16"),
        ({"theta": [torch.ones(3, 150), torch.ones(3, 150).double()]}, TypeError, "float64"),
        (
            {"theta": [torch.ones(3, 150), torch.ones(150, 3).t()]},
            ValueError,
            "dimension 0 outermost",
        ),
        ({"theta": [torch.ones(3, 150), torch.ones(3, 151)[:, :150]]}, ValueError, "must be dense"),
        (
            {"theta": [torch.ones(3, 150), torch.ones(1, 150).expand(3, 150)]},
            ValueError,
            "clone it",
        ),
        ({"g": [torch.ones(3, 150), torch.ones(3, 151)]}, ValueError, r"gradient\[1\] has shape"),
        ({"rounding": []}, ValueError, "must be 2 rows of 6, has 0 entries"),
        ({"rounding": [*ROW, 0, -1, 0, 1, 1, 0]}, ValueError, r"rounding\[1\] has no random bits"),
        ({"rounding": [*ROW, 0, 0, -1, 1, 1, 0]}, ValueError, "offset >= 0"),
        ({"rounding": [*ROW, *ROW[:5], 1]}, ValueError, r"rounding\[1\] is for a bfloat16"),
        ({"algorithm": "adam"}, ValueError, "algorithm"),
        ({"phase": 2}, ValueError, r"norms must be float64 \[2, 2\]"),
        ({"step": [torch.zeros(()), torch.zeros(2)]}, ValueError, "step must have one element"),
    ],
)
@interpreted
def test_refusal_changes_nothing(changes: dict[str, Any], error: type, words: str) -> None:
    batch = make_batch([(3, 150), (3, 150)])
    before = copy.deepcopy(batch)
    for check_only in (False, True):
        with pytest.raises(error, match=words):
            call(batch, grad_scale=torch.tensor(2.0), check_only=check_only, **changes)
    call(batch, check_only=True)  # which changes nothing either
    for name in ("theta", "g", "packed", "scale", "step"):
        assert same_bits(getattr(before, name), getattr(batch, name)), name


@interpreted
def test_version_counters() -> None:
    batch = make_batch([(1, 130)])
    before = [tensor._version for tensor in (*batch.theta, *batch.g)]
    call(batch, grad_scale=torch.tensor(2.0))
    after = [tensor._version for tensor in (*batch.theta, *batch.g)]
    assert all(b > a for a, b in zip(before, after, strict=True))


@interpreted
def test_a_parameter_without_dimensions_is_refused() -> None:
    batch = make_batch([(1, 130)])
    for name in ("theta", "g", "packed"):
        setattr(batch, name, [getattr(batch, name)[0][0, 0]])
    with pytest.raises(ValueError, match="dimension 0 outermost"):
        call(batch)
