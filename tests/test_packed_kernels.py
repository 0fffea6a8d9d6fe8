"""Compact states in the kernels: codes as the eager reference's, and independent of the cutting."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_kernels import ISAS
from torch import Tensor

from maxva_kernels import compact
from maxva_kernels.backends import OperatorBackend
from maxva_kernels.batch import Batch, Phase, Statistic
from maxva_kernels.compact import Moments, Packed
from maxva_kernels.hyper import ROW
from maxva_kernels.reference import EagerBackend

pytestmark = pytest.mark.usefixtures("one_thread")

HYPER: dict[str, float] = {
    "alpha": 0.9, "beta_low": 0.5, "beta_high": 0.999, "beta_init": 0.999, "eps": 1e-8,
    "weight_decay": 0.01, "delta": 1e-16, "bias_correction": 1, "adam_w_mode": 1, "nesterov": 0,
    "maximize": 0, "eps_inside_sqrt": 0, "trust_ratio": 0,
}  # fmt: skip
#: Whole blocks, rows that end in a shorter one, several chunks of 32768, and an empty parameter.
SHAPES = [(5, 384), (3, 200), (4, 129), (3, 129, 2), (67, 512), (0, 128), (1, 1)]
STATE_DTYPES = ["int8", "bfloat16"]


#: Number of a parameter's first element: soon after it that of a Philox call, a quarter of an
#: element's, carries into its second word.
FIRST = 2**34 - 1000


def rounding_row(theta: Tensor, index: int, stochastic: int = 0) -> tuple[int, ...]:
    n = max(theta.numel(), 1)
    return (2**40 + 5, index, FIRST + 7 * index, n, n, stochastic)


def make_batch(
    shapes: list[tuple[int, ...]], state_dtype: str, algorithm: str, *, amsgrad: bool = False,
    dtype: torch.dtype = torch.float32, g_dtype: torch.dtype = torch.float32, master: bool = False,
    stochastic: int = 0, t: int = 7, lr: float = 1e-2, g_factor: float = 1.0,
    statistics: bool = False, **options: float,
) -> Batch:  # fmt: skip
    gen = torch.Generator().manual_seed(3)
    batch = Batch(device=torch.device("cpu"))
    for i, shape in enumerate(shapes):

        def normal(shape: tuple[int, ...] = shape) -> Tensor:
            return torch.randn(shape, generator=gen)

        theta = normal()
        moments = Moments(
            0.3 * normal(), 0.2 * normal(), normal().square(), torch.rand(shape, generator=gen),
            normal().square() if amsgrad else None,
        )  # fmt: skip
        like = torch.empty(shape, dtype=compact.WORD_DTYPE[state_dtype])
        coded = compact.pack(moments, algorithm, like, None)
        batch.theta.append(theta.to(dtype))
        batch.g.append((normal() * g_factor).to(g_dtype))
        batch.packed.append(coded.packed if t else torch.zeros_like(coded.packed))
        if coded.scale is not None:
            batch.scale.append(coded.scale if t else torch.zeros_like(coded.scale))
        if coded.maximum is not None:
            batch.maximum.append(coded.maximum if t else torch.zeros_like(coded.maximum))
        if master:
            batch.master.append(theta * 1.0001)
        batch.step.append(torch.tensor(float(t)))
        batch.rounding += rounding_row(theta, i, stochastic)
    batch.group_sizes, batch.lr = [len(shapes)], [None]
    batch.hyper = [lr, *({**HYPER, **options}[name] for name in ROW)]
    if statistics:
        batch.statistics = torch.zeros(len(shapes), len(Statistic), dtype=torch.float64)
    return batch


def copied(batch: Batch) -> Batch:
    lists = {
        name: [x.clone() for x in getattr(batch, name)]
        for name in ("theta", "g", "packed", "scale", "maximum", "master", "step")
    }
    table = None if batch.statistics is None else batch.statistics.clone()
    return replace(batch, statistics=table, **lists)


def take_step(
    backend: Any, batch: Batch, algorithm: str, control: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    if not batch.hyper[1 + ROW.index("trust_ratio")]:
        backend.update(batch, algorithm, Phase.WHOLE, control, grad_scale, None)
        return
    norms = torch.zeros(len(batch.theta), 2, dtype=torch.float64, device=batch.device)
    backend.update(batch, algorithm, Phase.STATES, control, grad_scale, norms)
    backend.update(batch, algorithm, Phase.PARAMETERS, control, grad_scale, norms)


def kernels() -> OperatorBackend:
    return OperatorBackend(torch.ops.maxva)


def code_distance(found: Tensor, expected: Tensor, bits: int) -> Tensor:
    """How many codes apart two words are in each of their slots, of the same sign or through 0."""
    sign = 1 << (bits - 1)
    apart = []
    for k in range(32 // bits if found.dtype == torch.int32 else 4):
        codes = [(x.to(torch.int64) >> bits * k) & (2 * sign - 1) for x in (found, expected)]
        if k != compact.VAR:
            codes = [torch.where(c >= sign, sign - c, c) for c in codes]
        distance = (codes[0] - codes[1]).abs()
        if k == compact.X:  # 1/2 from below is next to 1/2 from above
            around = [torch.minimum(c.abs(), (c - sign).abs()) for c in codes]
            fold = (codes[0] * codes[1] < 0) & ((around[0] - around[1]).abs() <= 1)
            distance = torch.where(fold, distance.clamp(max=1), distance)
        apart.append(distance)
    return torch.stack(apart)


def check_against_eager(
    batch: Batch, algorithm: str, control: Tensor | None = None, grad_scale: Tensor | None = None
) -> Batch:
    """One step: codes equal, or neighbours where float32 differs at a threshold; returns it."""
    found, expected = copied(batch), copied(batch)
    take_step(kernels(), found, algorithm, control, grad_scale)
    take_step(EagerBackend(), expected, algorithm, control, grad_scale)
    slots = differing = 0
    for i, word in enumerate(expected.packed):
        assert torch.equal(found.step[i], expected.step[i])
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
        torch.testing.assert_close(
            found.theta[i], expected.theta[i], rtol=tolerance[expected.theta[i].dtype], atol=1e-6
        )
        torch.testing.assert_close(found.g[i], expected.g[i], rtol=1e-6, atol=0, equal_nan=True)
        if batch.master:
            torch.testing.assert_close(found.master[i], expected.master[i], rtol=1e-6, atol=1e-6)
        if batch.scale:
            assert torch.equal(found.scale[i], expected.scale[i])
        apart = code_distance(found.packed[i], word, 8 if batch.scale else 16)
        if not batch.scale:  # m may be a rounding's rest of terms that cancel
            m, *new = (
                compact.bfloat16_value(x & 0xFFFF) for x in (batch.packed[i], found.packed[i], word)
            )
            rest = (new[0] - new[1]).abs() <= torch.finfo(torch.float32).eps * m.abs()
            apart[compact.M] = torch.where(rest, apart[compact.M].clamp(max=1), apart[compact.M])
        if batch.maximum:
            codes = [
                x.maximum[i].view(torch.uint8 if batch.scale else torch.int16).to(torch.int64)
                for x in (found, expected)
            ]
            apart = torch.cat([apart, (codes[0] - codes[1]).abs().unsqueeze(0)])
        assert apart.max().item() <= 1 if apart.numel() else True
        slots += apart.numel()
        differing += int((apart != 0).sum())
    assert differing <= 2e-4 * slots
    if batch.statistics is not None:
        torch.testing.assert_close(found.statistics, expected.statistics, rtol=5e-5, atol=0)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first_step": {"t": 0},
    "amsgrad": {"amsgrad": True},
    "amsgrad_first_step": {"amsgrad": True, "t": 0},
    "l2": {"adam_w_mode": 0, "weight_decay": 0.125},
    "nesterov": {"nesterov": 1},
    "maximize": {"maximize": 1},
    "eps_inside": {"eps_inside_sqrt": 1, "eps": 1e-6},
    "eps_0": {"eps": 0.0},
    "no_bias_correction": {"bias_correction": 0},
    "beta_high_1": {"beta_high": 1.0, "beta_init": 0.9},
    "delta_0": {"delta": 0.0},
    "lr_0": {"lr": 0.0},
    "statistics": {"statistics": True},
    "trust_ratio": {"trust_ratio": 1, "statistics": True},
    "all": {
        "amsgrad": True, "nesterov": 1, "maximize": 1, "adam_w_mode": 0, "trust_ratio": 1,
        "statistics": True,
    },
    "bf16": {"dtype": torch.bfloat16, "g_dtype": torch.bfloat16},
    "bf16_stochastic": {"dtype": torch.bfloat16, "stochastic": 1},
    "fp16_g64": {"dtype": torch.float16, "g_dtype": torch.float64},
    "master": {"dtype": torch.bfloat16, "g_dtype": torch.float16, "master": True},
    "large_gradients": {"g_factor": 1e12},
    "small_gradients": {"g_factor": 1e-12},
}  # fmt: skip


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_step_as_the_reference(options: str, state_dtype: str, algorithm: str) -> None:
    batch = make_batch(SHAPES, state_dtype, algorithm, **OPTIONS[options])
    found = check_against_eager(batch, algorithm)
    same_theta = all(map(torch.equal, found.theta, batch.theta))
    assert same_theta == (options == "lr_0")
    assert not torch.equal(found.packed[0], batch.packed[0])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_control_and_scaled_gradients(state_dtype: str, algorithm: str) -> None:
    batch = make_batch(SHAPES, state_dtype, algorithm, statistics=True)
    scale = torch.tensor(128.0)
    clip = torch.tensor([0.0, 0.25, 3.0], dtype=torch.float64)
    found = check_against_eager(batch, algorithm, clip, scale)
    assert torch.equal(found.g[0], batch.g[0] / 128)
    check_against_eager(replace(batch, hyper=make_batch(
        SHAPES, state_dtype, algorithm, trust_ratio=1).hyper), algorithm, clip, scale)  # fmt: skip
    skipped = copied(batch)
    take_step(kernels(), skipped, algorithm, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert same_batches(skipped, batch)


def same_batches(a: Batch, b: Batch) -> bool:
    """All lists bit for bit."""
    names = ("theta", "g", "packed", "scale", "maximum", "master", "step")
    pairs = [
        pair for name in names for pair in zip(getattr(a, name), getattr(b, name), strict=True)
    ]
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        if x.dim() else torch.equal(x, y)
        for x, y in pairs
    )  # fmt: skip


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_nonfinite_gradient_stays_in_its_coordinate(state_dtype: str, algorithm: str) -> None:
    batch = make_batch([(4, 256)], state_dtype, algorithm, amsgrad=True)
    clean = copied(batch)
    take_step(kernels(), clean, algorithm)
    places = torch.zeros(4, 256, dtype=torch.bool)
    for k, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        batch.g[0][k, 5 + k] = bad
        places[k, 5 + k] = True
    for _ in range(2):
        take_step(kernels(), batch, algorithm)
    moments = compact.unpack(
        Packed(batch.packed[0], batch.scale[0] if batch.scale else None, batch.maximum[0]),
        algorithm,
    )
    assert torch.equal(moments.var.isnan(), places)
    assert torch.equal(batch.theta[0].isnan(), places)
    if batch.scale:
        assert (moments.mean[places] == 0).all()
        assert (moments.vmax[places].isnan()).all()
    once = copied(clean)
    take_step(kernels(), once, algorithm)
    assert torch.equal(once.theta[0][3], batch.theta[0][3])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_same_bits_from_threads_and_instruction_sets(
    state_dtype: str, algorithm: str, use_isa: Callable[[str], None]
) -> None:
    batch = make_batch([*SHAPES, (700, 131)], state_dtype, algorithm, amsgrad=True, statistics=True)
    expected = copied(batch)
    take_step(kernels(), expected, algorithm)
    torch.set_num_threads(3)
    found = copied(batch)
    take_step(kernels(), found, algorithm)
    assert same_batches(found, expected)
    assert torch.equal(found.statistics, expected.statistics)
    torch.set_num_threads(1)
    for name in ISAS:
        use_isa(name)
        found = copied(batch)
        take_step(kernels(), found, algorithm)
        if name == "baseline":  # without fused multiply-add
            for a, b in zip(found.packed, expected.packed, strict=True):
                assert code_distance(a, b, 8 if batch.scale else 16).ne(0).float().mean() < 1e-3 \
                    if a.numel() else True  # fmt: skip
        else:
            assert same_batches(found, expected)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_shards_round_as_the_whole(state_dtype: str) -> None:
    """Rows, and columns in whole blocks: each shard knows where its elements are."""
    batch = make_batch([(6, 512)], state_dtype, "madam", stochastic=1, dtype=torch.bfloat16)
    whole = copied(batch)
    take_step(kernels(), whole, "madam")

    def shard(rows: slice, columns: slice, row: tuple[int, ...]) -> None:
        part = copied(batch)
        for name in ("theta", "g", "packed"):
            setattr(part, name, [getattr(batch, name)[0][rows, columns].clone()])
        if batch.scale:
            blocks = slice(columns.start // 128, columns.stop // 128)
            part.scale = [batch.scale[0][rows, blocks].clone()]
        part.rounding = [2**40 + 5, 0, *row, 1]
        take_step(kernels(), part, "madam")
        assert torch.equal(part.packed[0], whole.packed[0][rows, columns])
        assert torch.equal(part.theta[0], whole.theta[0][rows, columns])

    shard(slice(2, 5), slice(0, 512), (FIRST + 1024, 512, 512))
    shard(slice(0, 6), slice(128, 384), (FIRST + 128, 256, 512))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_memory_layouts(state_dtype: str, algorithm: str) -> None:
    """channels_last: blocks are of memory; a gradient may lie as it likes, and start anywhere."""
    batch = make_batch([(4, 8, 6, 8)], state_dtype, algorithm)
    last = copied(batch)
    for name in ("theta", "g", "packed"):
        (x,) = getattr(batch, name)
        strided = torch.empty_like(x, memory_format=torch.channels_last)
        rows = strided.as_strided((4, 384), (384, 1))
        rows.copy_(x.view(4, 384))
        setattr(last, name, [strided])
    last.g = [last.g[0].contiguous()]
    shifted = copied(batch)
    for name in ("theta", "g", "packed"):
        (x,) = getattr(batch, name)
        memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
        memory[1:] = x.flatten()
        setattr(shifted, name, [memory[1:].view(x.shape)])
    for each in (batch, last, shifted):
        take_step(kernels(), each, algorithm)
    assert torch.equal(last.packed[0].as_strided((4, 384), (384, 1)), batch.packed[0].view(4, 384))
    assert torch.equal(shifted.packed[0], batch.packed[0])
    assert torch.equal(shifted.theta[0], batch.theta[0])


def _shape_of(change: str, batch: Batch) -> str:
    """Spoils one thing; returns what the error says."""
    p, last = batch.packed, len(batch.theta) - 1
    if change == "float64":
        batch.theta[last] = batch.theta[last].double()
        return "parameter 1 is float64"
    if change == "layout":
        batch.theta[last] = batch.theta[last].t().contiguous().t()
        return "dimension 0 outermost"
    if change == "word_dtype":
        p[last] = p[last].to(torch.int32 if p[last].dtype == torch.int64 else torch.int64)
        return r"maxva_packed\[1\] is"
    if change == "shape":
        p[last] = p[last][:2]
        return r"maxva_packed\[1\] has shape"
    if change in ("strides", "maximum_strides"):
        name = "packed" if change == "strides" else "maximum"
        tensors = getattr(batch, name)
        tensors[last] = tensors[last].t().contiguous().t()
        return rf"{'maxva_packed' if name == 'packed' else 'maxva_packed_max'}\[1\] has strides"
    if change == "missing":
        p.pop()
        return "2 parameters, but 1 of maxva_packed"
    if change == "scale":
        if batch.scale:
            batch.scale[last] = batch.scale[last][:, :1].contiguous()
            return r"maxva_scale\[1\] must be contiguous int32 \[3, 2\]"
        batch.scale.append(torch.zeros(3, 2, dtype=torch.int32))
        return "1 of maxva_scale"
    if change == "maximum":
        batch.maximum[last] = batch.maximum[last].to(torch.float32)
        return r"maxva_packed_max\[1\] is"
    if change == "rounding_empty":
        batch.rounding = []
        return "rounding is empty"
    if change == "rounding_off":
        batch.rounding[-5] = -1
        return r"rounding\[1\] has no parameter"
    if change == "rounding_theta":
        batch.rounding[-1] = 1
        return r"rounding\[1\] is for a bfloat16 parameter"
    batch.step[last] = torch.zeros(2)
    return "step must have one element"


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize(
    "change",
    ["float64", "layout", "word_dtype", "shape", "strides", "maximum_strides", "missing", "scale",
     "maximum", "rounding_empty", "rounding_off", "rounding_theta", "step"],
)  # fmt: skip
def test_bad_input_changes_nothing(change: str, state_dtype: str) -> None:
    batch = make_batch([(2, 128), (3, 200)], state_dtype, "madam", amsgrad=True)
    message = _shape_of(change, batch)
    before = copied(batch)
    with pytest.raises((ValueError, TypeError), match=message):
        take_step(kernels(), batch, "madam")
    with pytest.raises((ValueError, TypeError), match=message):
        kernels().check(batch, "madam", None)
    assert same_batches(batch, before)


@pytest.mark.parametrize(
    ("state_dtype", "name"),
    [
        ("int8", "scale"),
        *itertools.product(STATE_DTYPES, ["theta", "g", "packed", "maximum", "step"]),
    ],
)
def test_a_tensor_on_another_device_changes_nothing(state_dtype: str, name: str) -> None:
    batch = make_batch([(2, 128), (3, 200)], state_dtype, "madam", amsgrad=True)
    tensors = getattr(batch, name)
    tensors[1] = tensors[1].to("meta")
    before = [tensors_of[0].clone() for tensors_of in (batch.theta, batch.packed, batch.step)]
    for run in (
        lambda: take_step(kernels(), batch, "madam"),
        lambda: kernels().check(batch, "madam", None),
    ):
        with pytest.raises(ValueError, match="is on meta"):
            run()
    after = [tensors_of[0] for tensors_of in (batch.theta, batch.packed, batch.step)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("kind", ["dtype", "strides"])
def test_scales_of_another_kind_are_refused(kind: str) -> None:
    batch = make_batch([(2, 128), (3, 200)], "int8", "madam")
    scale = batch.scale[1]
    batch.scale[1] = scale.long() if kind == "dtype" else scale.t().contiguous().t()
    before = copied(batch)
    with pytest.raises(ValueError, match=r"maxva_scale\[1\] must be contiguous int32 \[3, 2\]"):
        take_step(kernels(), batch, "madam")
    assert same_batches(batch, before)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_one_row_with_gaps_is_refused(state_dtype: str) -> None:
    batch = make_batch([(1, 256)], state_dtype, "madam")
    batch.theta[0] = torch.ones(1, 512)[:, ::2]
    before = copied(batch)
    with pytest.raises(ValueError, match="dimension 0 outermost"):
        take_step(kernels(), batch, "madam")
    assert same_batches(batch, before)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_eager_refuses_scales_that_do_not_belong_to_the_words(state_dtype: str) -> None:
    batch = make_batch([(2, 128), (3, 200)], state_dtype, "madam")
    blocks = [torch.zeros(2, 1, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)]
    batch.scale = [] if state_dtype == "int8" else blocks
    before = copied(batch)
    with pytest.raises(ValueError, match=r"maxva_packed is torch.int.*, maxva_scale"):
        take_step(EagerBackend(), batch, "madam")
    assert same_batches(batch, before)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_schema_and_versions(state_dtype: str) -> None:
    batch = make_batch([(2, 128), (3, 200)], state_dtype, "madam", amsgrad=True)
    written = [*batch.theta, *batch.packed, *batch.scale, *batch.maximum, *batch.step]
    versions = [x._version for x in written]
    before = copied(batch)
    kernels().check(batch, "madam", None)
    assert same_batches(batch, before)
    assert [x._version for x in written] == versions
    kernels().update(batch, "madam", Phase.WHOLE, None, None, None)
    assert [x._version for x in written] == [version + 1 for version in versions]
    b = make_batch([(2, 128), (3, 200)], state_dtype, "madam", amsgrad=True)
    torch.library.opcheck(
        torch.ops.maxva.update_packed_.default,
        (b.theta, b.g, b.packed, b.scale, b.maximum, b.master, b.step, b.group_step,
         b.group_sizes, b.hyper, b.lr, None, None, None, None, b.rounding, "madam", 0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
