"""Compact states: codes and their rounding, the step, state dicts and conversions, memory."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from compact_exactness import (
    SIGNED,
    UNSIGNED,
    check_compact_step,
    compact_problem,
    decoded,
    twin,
)
from exactness import FUSED, in_layout, params_of, same_bits, set_grad, snapshot
from torch import Tensor, nn
from torch.nn import Parameter

from maxva_kernels import FusedMAdam, MAdam, load_reference_state, state
from maxva_kernels.compact import (
    BLOCK,
    Moments,
    fold,
    pack,
    signed_code,
    signed_value,
    unfold,
    unpack,
    unsigned_code,
    unsigned_value,
    window,
)
from maxva_kernels.reference import EagerBackend
from maxva_kernels.rounding import random_words

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("int8", "bfloat16")
WORDS = {"int8": torch.int32, "bfloat16": torch.int64}
KEYS = {"int8": {"maxva_packed", "maxva_scale", "step"}, "bfloat16": {"maxva_packed", "step"}}
FLOAT32_KEYS = {"exp_avg", "exp_avg_sq", "maxva_avg", "maxva_weight", "step"}


def words_of(n: int, step: int = 1, parameter: int = 0) -> Tensor:
    return random_words(n, torch.tensor(step), (5, parameter, 0, n, n, 0))


# --- codes ---------------------------------------------------------------------------------------


def test_codes_stand_for_what_their_description_says() -> None:
    codes = torch.arange(256)
    values = signed_value(codes, 1.0).double()
    assert values[:128].tolist() == SIGNED.tolist()
    assert same_bits(values[128:], -values[:128])
    assert torch.signbit(values[128])  # -0
    assert unsigned_value(codes[:255], 1.0).double().tolist() == UNSIGNED.tolist()
    assert unsigned_value(codes[255:], 1.0).isnan().all()


@pytest.mark.parametrize("random", [None, 0, 0x8000, 0xFFFF])
def test_what_is_on_the_grid_keeps_its_code(random: int | None) -> None:
    codes = torch.arange(256)
    window_of = None if random is None else torch.full((256,), random)
    for scale in (1.0, 2.0**-30, 2.0**40):
        found = signed_code(signed_value(codes, scale), 1 / scale, window_of)
        assert torch.equal(found, codes)
        values = unsigned_value(codes[:255], scale)
        found = unsigned_code(values, 1 / scale, None if random is None else window_of[:255])
        assert torch.equal(found, codes[:255])


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_every_code_is_a_neighbour_and_right_on_average(kind: str) -> None:
    """z-tests over 2^16 random words each, for values over all 16 binades."""
    encode, decode = (signed_code, signed_value) if kind == "signed" else (
        unsigned_code, unsigned_value)  # fmt: skip
    grid = torch.from_numpy(SIGNED if kind == "signed" else UNSIGNED)
    n = 2**16
    generator = torch.Generator().manual_seed(0)
    magnitudes = 0.8 * 2.0 ** (-20 * torch.rand(40, generator=generator))
    largest = 0.0
    for i, x in enumerate(magnitudes.tolist()):
        true = torch.tensor(x).double()
        above = int(torch.searchsorted(grid, true, right=True))
        low, high = grid[above - 1], grid[above]
        found = decode(
            encode(torch.full((n,), x), 1.0, window(words_of(n, 1 + i), 1)), 1.0
        ).double()
        assert ((found == low) | (found == high)).all(), x
        up = (true - low) / (high - low)
        sigma = (high - low) * (up * (1 - up) / n).sqrt()
        # a window has 16 bits: the mean is right to 2^-17 of a step
        error = (found.mean() - true).abs() - (high - low) * 2.0**-17
        largest = max(largest, float(error / sigma.clamp(min=1e-30)))
    assert largest < 4.5, largest


def test_slots_are_rounded_independently() -> None:
    """Correlation of two windows' high bits, which decide, 5 sigma."""
    n = 2**16
    words = words_of(n)
    windows = [window(words, k).double() - 32767.5 for k in range(4)]
    variance = (2.0**32 - 1) / 12
    for i in range(4):
        assert abs(windows[i].mean()) < 5 * (variance / n) ** 0.5
        for j in range(i):
            # neighbouring windows share 8 bits, high in one and low in the other: 2^-8
            expected = variance * 2.0**-8 if (i - j) % 4 in (1, 3) else 0.0
            deviation = (windows[i] * windows[j]).mean() - expected
            assert abs(deviation) < 5 * variance / n**0.5, (i, j)


def test_w_is_exact_at_both_ends_and_never_returns_to_0() -> None:
    w = torch.cat([torch.tensor([0.0, 1.0]), 2.0 ** -torch.arange(1.0, 60.0)])
    w = torch.cat([w, 1 - w[2:26]])
    assert same_bits(unfold(fold(w)), w)
    n = w.numel()
    zero = torch.zeros(200, n)
    moments = Moments(zero, zero, zero, w.expand(200, n).contiguous())
    for word in WORDS.values():
        for words in (None, words_of(200 * n)):
            like = torch.zeros(200, n, dtype=word)
            stored = pack(moments, "madam", like, words)
            found = unpack(stored, "madam").w
            assert (found[:, 0] == 0).all()
            assert (found[:, 1] == 1).all()
            assert (found[:, 2:] > 0).all()
            assert ((found[:, 61:] <= 1) & (found[:, 61:] >= 0.43)).all()
            again = pack(unpack(stored, "madam"), "madam", like, words)
            assert torch.equal(again.packed, stored.packed)


def moments_of(shape: Any, seed: int = 0, amsgrad: bool = True) -> Moments:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        size = 10 ** (3 * torch.rand(shape, generator=generator) - 5)
        return torch.randn(shape, generator=generator) * size

    sd = normal().abs()
    mean = normal()
    w = torch.rand(shape, generator=generator) * 0.9 + 0.01
    vmax = (sd.square() + mean.square()) * 2.25
    return Moments(normal(), mean, sd.square(), w, vmax if amsgrad else None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocks_have_their_own_scales_also_the_short_ones(layout: str) -> None:
    """One block made a million times larger changes no other block."""
    shape = (3, 131, 1, 2) if layout == "channels_last" else (3, 262)
    moments = Moments(*(in_layout(x, layout) for x in moments_of(shape)))
    like = in_layout(torch.zeros(shape, dtype=torch.int32), layout)
    stored = pack(moments, "lamadam", like, None)
    assert stored.packed.stride() == like.stride()
    assert stored.maximum.stride() == like.stride()
    assert stored.scale.shape == (3, 3)
    in_memory = (3, 262)
    for row, block in ((0, 0), (1, 2), (2, 1)):
        bigger = [torch.empty_like(x).copy_(x) for x in moments]
        for k, x in enumerate(bigger):
            factor = (2.0**20, 2.0**20, 2.0**40, 1.0, 2.0**40)[k]
            x.as_strided(in_memory, (262, 1))[row, block * BLOCK : (block + 1) * BLOCK] *= factor
        other = pack(Moments(*bigger), "lamadam", like, None)
        changed = other.scale != stored.scale
        assert changed[row, block]
        assert changed.sum() == 1
        assert other.scale[row, block] - stored.scale[row, block] == 20 * 0x01010101
        assert torch.equal(other.packed, stored.packed)


def test_a_nonfinite_element_is_nan_and_leaves_its_block_alone() -> None:
    moments = moments_of((4, 200))
    like = torch.zeros(4, 200, dtype=torch.int32)
    clean = [x.clone() for x in moments]
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        moments.m[0, i] = value
        moments.mean[1, i] = value
        moments.var[2, i] = abs(value)
        moments.vmax[3, i] = abs(value)
    for x in clean[:3]:
        x[0, :3] = x[1, :3] = x[2, :3] = 0
    clean[4][3, :3] = 0
    for words in (None, words_of(800)):
        stored = pack(moments, "lamadam", like, words)
        expected = pack(Moments(*clean), "lamadam", like, words)
        assert torch.equal(stored.scale, expected.scale)
        damaged = torch.zeros(4, 200, dtype=torch.bool)
        damaged[:3, :3] = True
        assert torch.equal(stored.packed[~damaged], expected.packed[~damaged])
        assert torch.equal(stored.packed[damaged] & 0xFFFFFF, torch.full((9,), 0xFF0000))
        assert torch.equal(stored.maximum != expected.maximum, damaged.roll(3, 0) & (
            torch.arange(4).unsqueeze(1) == 3) | (stored.maximum == 255))  # fmt: skip
        found = unpack(stored, "madam")
        assert torch.equal(found.var.isnan(), damaged)
        assert torch.equal(found.m.isnan(), damaged)
        assert found.mean.isfinite().all()
        assert found.vmax[3, :3].isnan().all()
        assert found.vmax.isnan().sum() == 3


# --- which parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_which_parameters_are_compact(kind: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
        return Parameter(torch.randn(shape, generator=generator).to(dtype))

    compact = [
        parameter(32, 128), parameter(2, 3000), parameter(2, 64, 8, 9), parameter(1, 5000),
        parameter(32, 200, dtype=torch.bfloat16), parameter(32, 200, dtype=torch.float16),
        Parameter(in_layout(torch.randn(4, 128, 3, 3), "channels_last")),
    ]  # fmt: skip
    full = [
        parameter(8192), parameter(31, 132), parameter(100, 127), parameter(),
        parameter(32, 200, dtype=torch.float64),
        Parameter(in_layout(torch.randn(64, 200), "transposed")),
        Parameter(in_layout(torch.randn(64, 200), "rows")),
    ]  # fmt: skip
    asked = [parameter(32, 128)]
    groups = [{"params": compact + full}, {"params": asked, "state_dtype": "float32"}]
    opt = FusedMAdam(groups, backend=backend, state_dtype=kind)
    for p in params_of(opt):
        p.grad = torch.ones_like(p)
    opt.step()
    for p in compact:
        assert opt.state[p].keys() == KEYS[kind]
        assert opt.state[p]["maxva_packed"].dtype == WORDS[kind]
        assert opt.state[p]["maxva_packed"].stride() == p.stride()
    for p in (*full, *asked):
        assert opt.state[p].keys() == FLOAT32_KEYS, p.shape
    assert [group["step"] for group in opt.param_groups] == [1, 1]


@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_memory_of_a_transformer(kind: str) -> None:
    """BERT's tensors, the large ones narrower: biases and norms stay float32."""
    width = 256
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    layer += [(width,)] * 9 + [(4 * width,)]
    shapes = [(8000, width), (512, width), (2, width), *layer * 4]
    params = [Parameter(torch.zeros(shape)) for shape in shapes]
    n = sum(p.numel() for p in params)
    opt = MAdam(params, state_dtype=kind, lr=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()  # only makes the states
    found = opt.state_memory()
    assert found["total"] == sum(found[k] for k in ("states", "scales", "master_weights", "other"))
    assert found["other"] == 4 * len(params)
    per_parameter = (found["states"] + found["scales"]) / n
    bounds = {"float32": (16, 16), "bfloat16": (8, 8.1), "int8": (4, 4.2)}[kind]
    assert bounds[0] <= per_parameter <= bounds[1], per_parameter
    small = 8 * sum(p.numel() for p in params if p.numel() < 4096 or p.dim() < 2)
    if kind == "bfloat16":
        assert found["states"] == 8 * n + small
    half = [Parameter(torch.zeros(64, 128).bfloat16())]
    opt = FusedMAdam(half, state_dtype=kind, master_weights=True)
    opt.setup_fp32_params()
    assert opt.state_memory()["master_weights"] == 4 * 64 * 128
    assert ("maxva_packed" in opt.state[half[0]]) == (kind != "float32")


# --- the step ------------------------------------------------------------------------------------

SHAPES = [(6, 128), (3, 200), (1, 131), (2, 5, 77), (0, 256), (20, 128)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "eps_inside_sqrt": True},
    "l2": {"adam_w_mode": False, "weight_decay": 0.1, "maximize": True, "nesterov": True},
    "trust": {"trust_ratio": True, "weight_decay": 0.1, "amsgrad": True},
    "clip": {"max_grad_norm": 0.5, "betas": (0.5, 1.0), "bias_correction": False},
    "first": {"history": 0},
    "later": {"history": 12},
    "channels_last": {"layout": "channels_last"},
    "masters": {"dtype": torch.bfloat16, "master_weights": True, "history": 1},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_a_step(kind: str, options: str, algorithm: str, backend: str) -> None:
    shapes = [(4, 32, 3, 3), (3, 43, 1, 3)] if options == "channels_last" else SHAPES
    problem = compact_problem(algorithm, kind, shapes, **OPTIONS[options])
    check_compact_step(problem, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_gradients_and_other_dtypes(kind: str, algorithm: str, backend: str) -> None:
    options = {"trust_ratio": True, "weight_decay": 0.1, "max_grad_norm": 1.0}
    for chosen in ({}, options):
        problem = compact_problem(algorithm, kind, SHAPES, **chosen)
        for p in params_of(problem):
            set_grad(p, (8 * p.grad).bfloat16())
        opt = check_compact_step(problem, backend, grad_scale=8.0)
        for p, q in zip(params_of(opt), params_of(problem), strict=True):
            assert same_bits(p.grad, q.grad / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_share_the_random_bits(kind: str, algorithm: str, kernel: str) -> None:
    """At a first step mean, sd and w are the same float32 numbers everywhere."""
    options = {"history": 0, "rounding_seed": 2**40 + 7}
    problem = compact_problem(algorithm, kind, [(2, 130), (9, 128), (40, 300)], **options)
    opt, eager = twin(problem, kernel), twin(problem, None)
    opt.step()
    eager.step()
    for p, e in zip(params_of(opt), params_of(eager), strict=True):
        a, b = opt.state[p], eager.state[e]
        slot = 0xFF if kind == "int8" else 0xFFFF
        assert torch.equal(a["maxva_packed"] & ~slot, b["maxva_packed"] & ~slot)
        if kind == "int8":
            assert torch.equal(a["maxva_scale"] & ~0xFF, b["maxva_scale"] & ~0xFF)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_neighbours_do_not_change_the_bits(kind: str, kernel: str) -> None:
    problem = compact_problem("madam", kind, [(300, 150), (70, 128), (3, 20001)])
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        opt = twin(problem, kernel)
        opt.step()
        found.append(snapshot(opt))
    assert same_bits(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_steps_and_lr_0(kind: str, backend: str) -> None:
    for options in ({}, {"trust_ratio": True, "weight_decay": 0.1}, {"amsgrad": True}):
        opt = twin(compact_problem("madam", kind, SHAPES, **options), backend)
        opt.param_groups[0]["skip_nonfinite"] = True
        params_of(opt)[1].grad[2, 5] = torch.inf
        before = snapshot(opt)
        opt.step()
        assert same_bits(before, snapshot(opt))
        params_of(opt)[1].grad[2, 5] = 1.0
        opt.param_groups[0]["lr"] = 0.0
        before = snapshot(opt)
        opt.step()
        after = snapshot(opt)
        assert same_bits(before["params"], after["params"])
        assert not same_bits(before["states"], after["states"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_stays_in_its_coordinate(
    kind: str, value: float, algorithm: str, backend: str
) -> None:
    """Beside the damage all is as in an optimizer whose gradient there is 0: scales included."""
    problem = compact_problem(algorithm, kind, [(3, 150)])
    opt, other = twin(problem, backend), twin(problem, backend)
    params_of(opt)[0].grad[1, 7] = value
    params_of(other)[0].grad[1, 7] = 0.0
    for t in range(3):
        opt.step()
        other.step()
        for optimizer in (opt, other):
            g = torch.randn(3, 150, generator=torch.Generator().manual_seed(t))
            params_of(optimizer)[0].grad = g
    p, q = params_of(opt)[0], params_of(other)[0]
    hit = torch.zeros(3, 150, dtype=torch.bool)
    hit[1, 7] = True
    assert p[~hit].isfinite().all()
    # 1e30: the variance alone overflows, and then the update may be 0
    assert not p[hit].isfinite() or value == 1e30
    assert torch.equal(~decoded(opt, p).var.isfinite(), hit)
    if kind == "bfloat16":
        assert same_bits(p[~hit], q[~hit])
    else:  # of int8 the block's scales may differ
        far = torch.ones(3, 150, dtype=torch.bool)
        far[1, :128] = False
        assert same_bits(p[far], q[far])


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_scaler(kind: str, algorithm: str, backend: str) -> None:
    options = {"weight_decay": 0.1, "max_grad_norm": 1.0, "collect_stats": True}
    for trust_ratio in (False, True):
        problem = compact_problem(algorithm, kind, SHAPES, trust_ratio=trust_ratio, **options)
        opt, eager = twin(problem, backend), twin(problem, None)
        opt.step()
        eager.step()
        (found,), (expected,) = opt.stats(), eager.stats()
        assert found == pytest.approx(expected, rel=1e-4)
        assert 0.5 < found["mean_beta"] < 1
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        scaler.scale(torch.ones(()))
        scaled, plain = twin(problem, backend), twin(problem, backend)
        for p in params_of(scaled):
            p.grad.mul_(4)
        scaler.step(scaled)
        plain.step()
        assert same_bits(snapshot(scaled), snapshot(plain))


# --- going on ------------------------------------------------------------------------------------


def train(opt: Any, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(1000 + t)
        for p in params_of(opt):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()


def new_params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 140), (3,), (2, 4, 64)]
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_copied_and_pickled_go_on_with_the_same_bits(
    kind: str, dtype: torch.dtype, algorithm: str, backend: str
) -> None:
    options = {"state_dtype": kind, "fp32_state_below": 0, "backend": backend, "amsgrad": True}
    if dtype == torch.bfloat16:
        options |= {"stochastic_rounding": True, "rounding_seed": 3}
    opt = FUSED[algorithm](new_params(dtype), **options)
    train(opt, range(3))
    saved = through_a_file({"p": [p.data for p in params_of(opt)], "opt": opt.state_dict()})
    resumed = FUSED[algorithm]([Parameter(p) for p in saved["p"]], **options, lr=7.0)
    resumed.load_state_dict(saved["opt"])
    others = [resumed, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    assert all(same_bits(snapshot(opt)["states"], snapshot(other)["states"]) for other in others)
    for each in (opt, *others):
        train(each, range(3, 6))
    for other in others:
        ours, theirs = snapshot(opt), snapshot(other)
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_dict_does_not_change_the_form(kind: str, algorithm: str, backend: str) -> None:
    """float32 to codes and back: to the nearest code, and what has its form already stays."""
    source = FUSED[algorithm](new_params(), backend=backend, amsgrad=True, weight_decay=0.25)
    train(source, range(4))
    saved = through_a_file(source.state_dict())
    options = {"state_dtype": kind, "fp32_state_below": 0, "backend": backend}
    compact = FUSED[algorithm](new_params(), **options)
    compact.load_state_dict(saved)
    group = compact.param_groups[0]
    assert (group["state_dtype"], group["fp32_state_below"]) == (kind, 0)
    assert (group["weight_decay"], group["amsgrad"]) == (0.25, True)
    back = FUSED[algorithm](new_params(), backend=backend)
    back.load_state_dict(through_a_file(compact.state_dict()))
    assert back.param_groups[0]["state_dtype"] == "float32"
    # half a step of the code, relative to the value and, near 0, to its block's largest
    relative, of_largest = (1 / 16, 2.0**-19) if kind == "int8" else (2.0**-8, 0)
    for p, q, r in zip(*map(params_of, (source, compact, back)), strict=True):
        old, middle, new = source.state[p], compact.state[q], back.state[r]
        assert new.keys() == old.keys()
        assert float(new["step"]) == 4
        if p.dim() < 2:
            assert same_bits(middle, old)
            continue
        assert middle.keys() == KEYS[kind] | {"maxva_packed_max"}
        found = decoded(compact, q)
        w = old["maxva_weight"].double()
        mean = old["maxva_avg"] / w
        var = (old["exp_avg_sq"] / w - mean.square()).clamp(min=0)
        m, vmax, (m_new, _, var_new, _, vmax_new) = old["exp_avg"], old["max_exp_avg_sq"], found
        if kind == "int8":  # which stores roots, and of MAdam r
            if algorithm == "madam":
                m = m / (mean.abs() + var.sqrt())
                m_new = m_new / (found.mean.abs() + var_new.sqrt())
            var, var_new, vmax, vmax_new = (x.sqrt() for x in (var, var_new, vmax, vmax_new))
        for true, value in ((m, m_new), (mean, found.mean), (var, var_new),
                            (fold(w), fold(found.w)), (vmax, vmax_new)):  # fmt: skip
            allowed = relative * 1.01 * true.abs() + of_largest * 2.5 * true.abs().max() + 1e-9
            assert ((value.double() - true).abs() <= allowed).all()
        for key, value in (("exp_avg", found.m), ("maxva_weight", found.w),
                           ("maxva_avg", found.mean * found.w),
                           ("max_exp_avg_sq", found.vmax)):  # fmt: skip
            torch.testing.assert_close(new[key], value, rtol=1e-6, atol=0)
        second = (found.mean.double().square() + found.var.double()) * found.w.double()
        torch.testing.assert_close(new["exp_avg_sq"].double(), second, rtol=1e-6, atol=0)
    train(compact, range(4, 6))
    train(back, range(4, 6))
    assert all(p.isfinite().all() for p in (*params_of(compact), *params_of(back)))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dtype_may_change_between_steps(kind: str, backend: str) -> None:
    options = {"fp32_state_below": 0, "backend": backend}
    opt = FusedMAdam(new_params(), state_dtype=kind, **options)
    train(opt, range(3))
    matrix, vector, _ = params_of(opt)
    for other in ("float32", "int8", "bfloat16", "float32", kind):
        loaded = FusedMAdam(new_params(), state_dtype=other, **options)
        loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
        with torch.no_grad():
            for p, q in zip(params_of(loaded), params_of(opt), strict=True):
                p.copy_(q)
        opt.param_groups[0]["state_dtype"] = other
        train(opt, range(3, 5))
        train(loaded, range(3, 5))
        assert opt.state[matrix].keys() == KEYS.get(other, FLOAT32_KEYS)
        assert opt.state[vector].keys() == FLOAT32_KEYS
        assert same_bits(snapshot(opt), snapshot(loaded))
    opt.param_groups[0]["fp32_state_below"] = 10**6
    train(opt, range(5, 6))
    assert opt.state[matrix].keys() == FLOAT32_KEYS


def remembering_params() -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = (8, 128), (40,), (6, 200), (3, 64, 2, 2)
    return [Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]


def _new_layout(opt: torch.optim.Optimizer) -> None:
    p = params_of(opt)[2]
    p.data = p.data.t().contiguous().t()  # dimension 0 is not outermost any more


def _new_dtype(opt: torch.optim.Optimizer) -> None:
    p = params_of(opt)[0]
    p.grad = None
    p.data = p.data.double()


def _new_shape(opt: torch.optim.Optimizer) -> None:
    p = params_of(opt)[2]
    p.grad = None
    p.data = p.data[:, :100]  # the strides stay; rows do not hold a block any more
    del opt.state[p]


#: What a step's row of rounding or its form depends on.
REMEMBERED: dict[str, Any] = {
    "seed": lambda opt: opt.param_groups[1].update(rounding_seed=9),
    "rounding": lambda opt: opt.param_groups[1].update(stochastic_rounding=False),
    "state_dtype": lambda opt: opt.param_groups[1].update(state_dtype="bfloat16"),
    "float32": lambda opt: opt.param_groups[1].update(state_dtype="float32"),
    "below": lambda opt: opt.param_groups[1].update(fp32_state_below=1000),
    "layout": _new_layout,
    "dtype": _new_dtype,
    "shape": _new_shape,
    "fewer parameters": lambda opt: opt.param_groups[1]["params"].pop(),
    "more in the group before": lambda opt: opt.param_groups[0]["params"].append(
        Parameter(torch.ones(5, dtype=torch.bfloat16))
    ),
    "nothing": lambda opt: None,
}


@pytest.mark.parametrize("change", REMEMBERED)
def test_what_a_step_remembers_is_what_a_new_optimizer_finds(
    change: str, kernel: str, asked: str
) -> None:
    options = {"state_dtype": "int8", "fp32_state_below": 0, "stochastic_rounding": True}
    params = remembering_params()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = FusedMAdam(groups, backend=kernel, **options)

    def train_two(opt: torch.optim.Optimizer, steps: range) -> None:
        generator = torch.Generator().manual_seed(5)
        for _ in steps:
            for p in params_of(opt):
                set_grad(p, torch.randn(p.shape, generator=generator).to(p.dtype))
            opt.step()

    train_two(opt, range(2))
    REMEMBERED[change](opt)
    other = copy.deepcopy(opt)  # which remembers nothing
    for one in (opt, other):
        train_two(one, range(2))
    assert same_bits(snapshot(opt), snapshot(other))


def test_forms_are_found_once(kernel: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found_for: list[Parameter] = []
    found = state.word_dtype

    def counted(p: Parameter, group: dict[str, Any]) -> Any:
        found_for.append(p)
        return found(p, group)

    monkeypatch.setattr(state, "word_dtype", counted)
    params = remembering_params()
    opt = FusedMAdam(params, state_dtype="int8", fp32_state_below=0, backend=kernel)
    train(opt, range(1))
    assert len(found_for) == len(params)
    params[1].grad = None
    opt.step()
    train(opt, range(2, 4))
    assert len(found_for) == len(params)
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)
    params[3].grad = None
    train(opt, range(4, 6))
    assert len(found_for) == 2 * len(params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_exchanged_for_one_of_another_form_is_converted(
    kind: str, backend: str, asked: str
) -> None:
    p = Parameter(torch.ones(4, 256))
    opt, other = (
        FusedMAdam([p], state_dtype=each, fp32_state_below=0, backend=backend)
        for each in (kind, next(one for one in KINDS if one != kind))
    )
    for one in (opt, other):
        train(one, range(2))
    words = opt.state[p]["maxva_packed"].dtype
    states = [dict(one.state[p]) for one in (opt, other)]
    for t in range(4):
        opt.state[p] = {key: value.clone() for key, value in states[t % 2].items()}
        train(opt, range(2, 4))
        assert opt.state[p]["maxva_packed"].dtype == words
        assert p.isfinite().all()


def test_scales_of_another_layout_are_laid_out_anew(backend: str) -> None:
    opt = FusedMAdam(new_params()[:1], state_dtype="int8", fp32_state_below=0, backend=backend)
    train(opt, range(1))
    saved = copy.deepcopy(opt.state_dict())
    scale = saved["state"][0]["maxva_scale"]
    saved["state"][0]["maxva_scale"] = scale.t().contiguous().t()
    assert not saved["state"][0]["maxva_scale"].is_contiguous()
    opt.load_state_dict(saved)
    train(opt, range(1, 2))
    assert opt.state[params_of(opt)[0]]["step"] == 2


def test_compact_states_of_a_vector_are_refused() -> None:
    for shape in ((), (300,)):
        p = Parameter(torch.ones(shape))
        opt = FusedMAdam([p], state_dtype="bfloat16", fp32_state_below=0)
        saved = opt.state_dict()
        words = torch.zeros(shape, dtype=torch.int64)
        saved["state"][0] = {"step": torch.ones(()), "maxva_packed": words}
        with pytest.raises(ValueError, match="two dimensions"):
            opt.load_state_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_have_seen_nothing_are_converted(kind: str, backend: str) -> None:
    """Where w = 0, as after skipped steps: no 0 / 0."""
    params = [Parameter(torch.ones(4, 256)) for _ in range(2)]
    for p, state_dtype in zip(params, ("float32", kind), strict=True):
        opt = FusedMAdam([p], state_dtype=state_dtype, fp32_state_below=0, backend=backend)
        opt.found_inf = torch.ones(())
        train(opt, range(1))
        del opt.found_inf
        opt.param_groups[0]["state_dtype"] = kind
        train(opt, range(1, 3))
        assert "maxva_packed" in opt.state[p]
        assert p.isfinite().all()
    assert same_bits(params[0].detach(), params[1].detach())


def test_conversions_subtract_and_multiply_in_double() -> None:
    """v/w - (u/w)^2 cancels; back again, nothing but the results is rounded."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.zeros(8, 256))
    mean, w = (torch.rand(p.shape, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    w = w / 2.5
    u = (mean * w).float()
    v = ((mean.square() * (1 + 2.0**-22)) * w).float()
    exact = (v.double() / w.float() - (u.double() / w.float()).square()).clamp(min=0)
    held = {"step": torch.ones(()), "exp_avg": u.clone(), "maxva_avg": u, "exp_avg_sq": v,
            "maxva_weight": w.float()}  # fmt: skip
    for kind in KINDS:
        opt = FusedMAdam([p], state_dtype=kind, fp32_state_below=0)
        opt.state[p] = state.in_form(p, held, WORDS[kind], "madam")
        found = decoded(opt, p)
        if kind == "bfloat16":
            torch.testing.assert_close(found.var.double(), exact, rtol=2.0**-8, atol=0)
        full = state.in_form(p, opt.state[p], None, "madam")
        second = (found.mean.double().square() + found.var.double()) * found.w.double()
        assert same_bits(full["exp_avg_sq"], second.float())


@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_states_are_completed_once(kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every step, which takes time, and raises while a graph is being captured."""
    from maxva_kernels import optimizers

    made: list[Any] = []
    completed = optimizers.completed
    monkeypatch.setattr(
        optimizers, "completed", lambda p, *args: made.append(p) or completed(p, *args)
    )
    params = [Parameter(torch.ones(4, 256).bfloat16()), Parameter(torch.ones(4, 256))]
    opt = FusedMAdam(
        params, amsgrad=True, master_weights=True, state_dtype=kind, fp32_state_below=0,
        backend=kernel,
    )  # fmt: skip
    train(opt, range(3))
    assert len(made) == len(params)


@pytest.mark.parametrize("kind", KINDS)
def test_amsgrad_switched_off_forgets_its_maxima(kind: str, backend: str) -> None:
    p = Parameter(torch.ones(40, 200))
    opt = FusedMAdam([p], amsgrad=True, state_dtype=kind, backend=backend)
    for amsgrad in (True, False, True):
        opt.param_groups[0]["amsgrad"] = amsgrad
        set_grad(p, torch.full_like(p, 0.1))
        opt.step()
        assert ("maxva_packed_max" in opt.state[p]) == amsgrad
    vmax = decoded(opt, p).vmax
    assert vmax is not None
    torch.testing.assert_close(vmax.sqrt(), torch.full_like(vmax, 0.1), rtol=0.07, atol=0)


@pytest.mark.parametrize("kind", ["float32", *KINDS])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_copies_on_write_keep_their_values(kind: str, scaled: bool, backend: str) -> None:
    """Whatever shares its memory until it is written: parameters, gradients, states."""
    options = {"state_dtype": kind, "fp32_state_below": 0, "amsgrad": True, "max_grad_norm": 0.5}
    outcomes = []
    for shares in (False, True):
        p = Parameter(torch.linspace(-1, 1, 40 * 256).view(40, 256))
        opt = FusedMAdam([p], backend=backend, **options)
        train(opt, range(2))
        set_grad(p, torch.linspace(-3, 2, 40 * 256).view(40, 256))
        if scaled:
            opt.grad_scale = torch.tensor(8.0)
        assert p.grad is not None
        tensors = [p, p.grad, *opt.state[p].values()]
        values = [t.detach().clone() for t in tensors]
        clones = [torch._lazy_clone(t.detach()) for t in tensors if shares]
        opt.step()
        assert all(same_bits(clone, value) for clone, value in zip(clones, values, strict=False))
        outcomes.append(snapshot(opt))
    assert same_bits(*outcomes)


def test_a_parameter_that_changes_its_layout_keeps_its_states(backend: str, asked: str) -> None:
    p = Parameter(torch.randn(3, 64, 2, 2, generator=torch.Generator().manual_seed(0)))
    opt = FusedMAdam([p], state_dtype="int8", fp32_state_below=0, backend=backend)
    train(opt, range(3))
    before = decoded(opt, p)
    saved = copy.deepcopy(opt.state_dict())
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    opt.load_state_dict(saved)
    assert opt.state[p]["maxva_packed"].stride() == p.stride()
    for a, b in zip(before[:4], decoded(opt, p)[:4], strict=True):
        allowed = 0.15 * a.abs() + 1e-4 * a.abs().max()
        assert ((a - b).abs() <= allowed).all()
    p.data = p.data.contiguous()
    train(opt, range(3, 4))
    assert opt.state[p]["maxva_packed"].stride() == p.stride()


def test_a_step_that_raises_converts_nothing(backend: str) -> None:
    opt = FusedMAdam(new_params(), state_dtype="int8", fp32_state_below=0, backend=backend)
    train(opt, range(2))
    before = snapshot(opt)
    opt.param_groups[0]["state_dtype"] = "bfloat16"
    last = params_of(opt)[2]
    state = opt.state[params_of(opt)[1]]
    good, state["exp_avg"] = state["exp_avg"], torch.zeros(7)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
    state["exp_avg"] = good
    assert same_bits(before, snapshot(opt))
    opt.step()
    assert opt.state[last]["maxva_packed"].dtype == torch.int64


def test_older_dicts_and_other_optimizers_load(algorithm: str, backend: str) -> None:
    options = {"state_dtype": "int8", "fp32_state_below": 0, "backend": backend}
    source = FUSED[algorithm](new_params(), backend=backend)
    train(source, range(2))
    saved = source.state_dict()
    for group in saved["param_groups"]:
        del group["state_dtype"], group["fp32_state_below"]
    opt = FUSED[algorithm](new_params(), **options)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["state_dtype"] == "int8"
    assert "maxva_packed" in opt.state[params_of(opt)[0]]
    adam = torch.optim.AdamW(new_params())
    train(adam, range(3))
    opt = FUSED[algorithm](new_params(), **options)
    load_reference_state(opt, adam.state_dict())
    p, q = params_of(opt)[0], params_of(adam)[0]
    assert opt.state[p].keys() == KEYS["int8"]
    found, state = decoded(opt, p), adam.state[q]
    second = state["exp_avg_sq"] / (1 - 0.999**3)
    stored = found.mean.square() + found.var
    assert ((stored - second).abs() <= 0.2 * second + 1e-6).all()
    train(opt, range(3, 5))
    assert p.isfinite().all()


def test_a_failure_after_the_first_batch_keeps_the_states_of_what_has_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, bias, _ = params = new_params()
    opt = MAdam(params, fp32_state_below=0)
    train(opt, range(2))
    opt.param_groups[0]["state_dtype"] = "int8"  # converted in the step that fails
    update, calls = EagerBackend.update, []

    def fails_at_second(self: EagerBackend, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        update(self, *args)

    monkeypatch.setattr(EagerBackend, "update", fails_at_second)
    before = weight.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        train(opt, range(2, 3))
    assert not torch.equal(weight, before)
    assert "maxva_packed" in opt.state[weight]
    assert opt.state[weight]["step"] == 3
    assert opt.state[bias]["step"] == 2


BAD_STATES: dict[str, tuple[str, Any, str]] = {
    "truncated": ("maxva_packed", lambda x: x[:4], "maxva_packed has shape"),
    "block": ("maxva_scale", lambda x: x.repeat(1, 2), "maxva_scale has shape.*block size"),
    "rows": ("maxva_scale", lambda x: x[:-1], "maxva_scale has shape"),
    "dtype": ("maxva_packed", lambda x: x.to(torch.uint8), "maxva_packed is torch.uint8"),
    "code": ("maxva_packed", lambda x: x.to(torch.int64), "maxva_packed in torch.int64 and a"),
    "scale dtype": ("maxva_scale", lambda x: x.float(), "maxva_scale has shape.*torch.float32"),
    "not finite": ("maxva_scale", lambda x: x | 0xFF00, "maxva_scale holds a scale"),
    "no tensor": ("maxva_scale", lambda x: 3.0, "maxva_scale is no tensor"),
    "lacks": ("step", None, "lacks step"),
    "no scale": ("maxva_scale", None, "no maxva_scale"),
    "both": ("exp_avg", lambda x: torch.zeros(5, 140), "exp_avg; it must have one form"),
    "maximum": ("maxva_packed_max", lambda x: torch.zeros(5, 140), "maxva_packed_max is"),
    "maximum's scale": ("maxva_packed_max", lambda x: torch.zeros(5, 140, dtype=torch.uint8),
                        "maxva_scale holds a scale"),
    "maximum's strides": ("maxva_packed_max", lambda x: torch.zeros(140, 5, dtype=torch.uint8).t(),
                          "maxva_packed_max has strides"),
    "strides": ("maxva_packed", lambda x: x.t().contiguous().t(), "strides"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused_before_anything_has_changed(case: str) -> None:
    key, change, message = BAD_STATES[case]
    opt = FusedMAdam(
        [("first", new_params()[1]), ("weight", new_params()[0])],
        state_dtype="int8", fp32_state_below=0, backend="eager",
    )  # fmt: skip
    train(opt, range(2))
    before = snapshot(opt)
    saved = copy.deepcopy(opt.state_dict())
    state = saved["state"][1]
    if case == "maximum's scale":
        state["maxva_scale"] |= -(2**24)
    if change is None:
        del state[key]
    else:
        state[key] = change(state.get(key))
    saved["param_groups"][0]["lr"] = 5.0
    with pytest.raises(ValueError, match=f"(?s)'weight'.*{message}"):
        opt.load_state_dict(saved)
    assert same_bits(before, snapshot(opt))
    assert opt.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_unused_slot_of_the_scales_is_not_judged_and_nan_codes_warn(kind: str) -> None:
    opt = MAdam(new_params()[:1], state_dtype=kind, fp32_state_below=0)
    train(opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    if kind == "int8":
        saved["state"][0]["maxva_scale"] |= -(2**24)  # amsgrad's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(copy.deepcopy(saved))
    saved["state"][0]["maxva_packed"][2, 3] |= 0xFF0000 if kind == "int8" else 0x7FC0 << 32
    with pytest.warns(UserWarning, match="maxva_packed holds NaN"):
        opt.load_state_dict(saved)


# --- sanity --------------------------------------------------------------------------------------


def classify(opt_class: Any, steps: int = 150, **options: Any) -> float:
    """The mean loss of the last 30 steps of a small classifier of a teacher's labels."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(128, 10, generator=generator)
    net = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    opt = opt_class(net.parameters(), lr=3e-3, fp32_state_below=0, **options)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 128, generator=generator)
        loss = nn.functional.cross_entropy(net(x), (x @ teacher).argmax(1))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


def test_training_goes_as_with_float32_states(algorithm: str, kernel: str) -> None:
    """Within 3 % of the float32 loss, which falls from 2.7 to about 1."""
    full = classify(FUSED[algorithm], backend=kernel)
    assert full < 1.5
    for kind in KINDS:
        found = classify(FUSED[algorithm], state_dtype=kind, backend=kernel)
        assert abs(found / full - 1) < 0.03, (kind, found, full)


@pytest.mark.parametrize("shape", [(8, 256), (16, 128)])
def test_state_of_another_shape_is_refused_and_kept(shape):
    p = torch.nn.Parameter(torch.randn(16, 256))
    optimizer = FusedMAdam([p], state_dtype="int8", fp32_state_below=0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    p.data = torch.randn(shape)
    p.grad = torch.randn(shape)
    data = p.data.clone()
    with pytest.raises(
        ValueError, match=r"parameter 0 .*has shape \(16, 256\).*delete optimizer.state"
    ):
        optimizer.step()
    assert torch.equal(p.data, data)
    assert optimizer.state[p].keys() == before.keys()
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in before.items())
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["maxva_packed"].shape == shape
