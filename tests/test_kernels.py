"""How it is computed: single steps of the kernels by the rule of exactness.py.

Over sizes, dtypes, memory layouts and instruction sets; and what the operators refuse.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import (
    FUSED,
    KEYS,
    SENTINEL,
    Problem,
    check_step,
    in_layout,
    params_of,
    realistic_problem,
    same_bits,
    set_grad,
    snapshot,
    steady_problem,
    take_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from maxva_kernels import _extension
from maxva_kernels.hyper import ROW

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

SEVERAL = [(128,), (0,), (3, 43), (), (1,), (257, 130)]
SIZES: dict[str, list[tuple[int, ...]]] = {
    **{f"n{n}": [(n,)] for n in (0, 1, 7, 127, 128, 129, 32767, 32768, 32769)},
    "several": SEVERAL,
    "three_chunks_and_a_tail": [(70001,)],
}
FLOATS = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
L2 = {"weight_decay": 0.125, "adam_w_mode": False}
# float32 rounds lambda theta: with a lambda that is a power of two it does not

OPTIONS: dict[str, dict[str, Any]] = {
    "decoupled_decay": {"weight_decay": 0.1},
    "l2_decay": L2,
    "amsgrad": {"amsgrad": True},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True},
    "eps_inside_sqrt": {"eps_inside_sqrt": True, "eps": 1e-6},
    "no_bias_correction": {"bias_correction": False},
    "trust_ratio": {"trust_ratio": True, "weight_decay": 0.01},
    "clipped": {"max_grad_norm": 0.5},
    "clip_not_reached": {"max_grad_norm": 1e9},
    "skip_nonfinite": {"skip_nonfinite": True},
    "beta_high_1": {"betas": (0.9, 1.0)},
    "beta_high_almost_1": {"betas": (0.9, 1 - 1e-9)},
    "equal_betas": {"betas": (0.9, 0.98), "beta_min": 0.98},
    "alpha_0": {"betas": (0.0, 0.999)},
    "beta_init": {"beta_init": 0.25},
    "delta_0": {"delta": 0.0},
    "delta_large": {"delta": 1e-4},
    "eps_0": {"eps": 0.0},
    "amsgrad_nesterov_decay": {"amsgrad": True, "nesterov": True, "weight_decay": 0.1},
    "amsgrad_inside_l2": {"amsgrad": True, "eps_inside_sqrt": True, "eps": 1e-6, **L2},
    "lamb_with_all": {
        "trust_ratio": True, "amsgrad": True, "nesterov": True, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "maximize": True,
    },
    "lamb_l2": {"trust_ratio": True, **L2},
    "maximize_l2": {"maximize": True, **L2},
}  # fmt: skip


def compiled_isas() -> list[str]:
    """The instruction sets this machine has kernels for, by its own flags."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ["baseline"]
    flags = set(re.search(r"^flags\s*:(.*)$", info.read_text(), re.M).group(1).split())
    isas = ["baseline"]
    if {"avx2", "fma", "f16c"} <= flags:
        isas.append("avx2")
        if {"avx512f", "avx512vl", "avx512dq", "avx512bw"} <= flags:
            isas.append("avx512")
    return isas


ISAS = compiled_isas()


# --- single steps by the rule --------------------------------------------------------------------


@pytest.mark.parametrize("history", [0, 6], ids=["first_step", "later_step"])
@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES)
def test_sizes(shapes: list[tuple[int, ...]], history: int, kernel: str, algorithm: str) -> None:
    check_step(realistic_problem(shapes, algorithm, history=history), kernel)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], backend: str, algorithm: str) -> None:
    for history in (0, 5):
        check_step(realistic_problem(SEVERAL, algorithm, history=history, **options), backend)


@pytest.mark.parametrize("grad_dtype", FLOATS.values(), ids=[f"g_{k}" for k in FLOATS])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=[f"p_{k}" for k in FLOATS])
def test_dtypes(dtype: torch.dtype, grad_dtype: torch.dtype, backend: str, algorithm: str) -> None:
    problem = realistic_problem(
        [(129,), (40, 77)], algorithm, dtype=dtype, grad_dtype=grad_dtype, weight_decay=0.1
    )
    opt = check_step(problem, backend)
    for p in params_of(opt):
        states = torch.float64 if dtype == torch.float64 else torch.float32
        assert {opt.state[p][key].dtype for key in KEYS.values() if key in opt.state[p]} == {states}


def test_mixed_dtypes_in_one_group(backend: str, algorithm: str) -> None:
    dtypes = [*FLOATS.values(), torch.float32, torch.float16]
    grads = [torch.float16, *FLOATS.values(), torch.bfloat16]
    problem = realistic_problem(
        [(130,), (5, 7), (), (33,), (0,), (9, 2)], algorithm, dtype=dtypes, grad_dtype=grads
    )
    check_step(problem, backend)


@pytest.mark.parametrize(
    "options",
    [{}, L2, {"trust_ratio": True, "weight_decay": 0.01, "amsgrad": True}, {"max_grad_norm": 0.5}],
    ids=["plain", "l2", "lamb_amsgrad", "clipped"],
)
@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=["g_fp32", "g_same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_master_weights(
    dtype: torch.dtype, grad_dtype: Any, options: dict[str, Any], backend: str, algorithm: str
) -> None:
    problem = realistic_problem(
        SEVERAL, algorithm, dtype=dtype, grad_dtype=grad_dtype, master_weights=True, **options
    )
    opt = check_step(problem, backend)
    assert all("master_param" in opt.state[p] for p in params_of(opt))


def test_master_weights_only_where_they_are_needed(backend: str) -> None:
    problem = realistic_problem([(9,)] * 4, dtype=list(FLOATS.values()), master_weights=True)
    opt = check_step(problem, backend)
    assert ["master_param" in opt.state[p] for p in params_of(opt)] == [False, False, True, True]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5},
        {"skip_nonfinite": True},
        {"trust_ratio": True, "weight_decay": 0.01},
        {"trust_ratio": True, "weight_decay": 0.01, "max_grad_norm": 0.5},
        L2,
    ],
    ids=["plain", "clipped", "skip_nonfinite", "lamb", "lamb_clipped", "l2"],
)
@pytest.mark.parametrize("scale", [65536.0, 3.0], ids=["scale_2_16", "scale_3"])
@pytest.mark.parametrize("grad_dtype", FLOATS.values(), ids=[f"g_{k}" for k in FLOATS])
def test_grad_scale(
    grad_dtype: torch.dtype, scale: float, options: dict[str, Any], backend: str, algorithm: str
) -> None:
    """grad_scale divides, clipping sees unscaled gradients, p.grad is left unscaled."""
    problem = realistic_problem(
        [(129,), (0,), (30, 31)], algorithm, grad_dtype=grad_dtype, history=3, **options
    )
    scaled = [(g.double() * scale).to(g.dtype) for g in problem.g]
    if grad_dtype == torch.float16:
        scaled = [g.clamp(-60000, 60000) for g in scaled]
    check_step(problem.with_gradients(scaled), backend, grad_scale=scale, found_inf=0.0)


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
@pytest.mark.parametrize("grad_scale", [None, 65536.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("history", [0, 4], ids=["first_step", "later_step"])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "max_grad_norm": 1.0}, {"trust_ratio": True, "weight_decay": 0.1}],
    ids=["plain", "clipped_amsgrad", "lamb"],
)
def test_skipped_step_changes_nothing(
    options: dict[str, Any], history: int, grad_scale: Any, found_inf: float, backend: str
) -> None:
    problem = realistic_problem(
        SEVERAL, dtype=torch.bfloat16, history=history, master_weights=True, **options
    )
    g = [x.clone() for x in problem.g]
    g[2].view(-1)[5] = float("inf")
    opt = problem.with_gradients(g).optimizer(backend)
    before = snapshot(opt)
    take_step(opt, grad_scale, found_inf)
    after = snapshot(opt)
    if not history:  # states have been made, and hold nothing yet
        for theta, state in zip(after["params"], after["states"], strict=True):
            assert same_bits(state.pop("master_param"), theta.float())
            assert all(not state.pop(key).any() for key in ("step", *KEYS.values()) if key in state)
    assert same_bits(before, after)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_skip_nonfinite(value: float, options: dict[str, Any], backend: str) -> None:
    """One bad element anywhere skips the step; the next one is as if it had not been."""
    problem = realistic_problem(SEVERAL, skip_nonfinite=True, **options)
    for tensor, index in ((0, 0), (3, 0), (5, 33409)):
        g = [x.clone() for x in problem.g]
        g[tensor].view(-1)[index] = value
        opt = problem.with_gradients(g).optimizer(backend)
        before = snapshot(opt)
        opt.step()
        assert same_bits(before, snapshot(opt))
        for p, x in zip(params_of(opt), problem.g, strict=True):
            p.grad = x.clone()
        undisturbed = problem.optimizer(backend)
        opt.step()
        undisturbed.step()
        assert same_bits(snapshot(opt), snapshot(undisturbed))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "nesterov": True}], ids=["plain", "amsgrad_nesterov"]
)
def test_nonfinite_gradients_stay_in_their_coordinates(
    value: float, options: dict[str, Any], backend: str, algorithm: str
) -> None:
    problem = realistic_problem([(300,), (41, 9)], algorithm, **options)
    g = [x.clone() for x in problem.g]
    g[0][::17] = value
    g[1][3, 3] = value
    opt = check_step(problem.with_gradients(g), backend)
    p, q = params_of(opt)
    assert not torch.isfinite(opt.state[p]["exp_avg_sq"][::17]).any()
    assert torch.isfinite(q).sum() == q.numel() - 1 or algorithm == "madam"
    assert torch.isfinite(p).sum() >= 300 - 18


# --- extreme values ------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [0, 5], ids=["first_step", "later_step"])
@pytest.mark.parametrize(
    ("scale", "delta"),
    [
        (1e-20, 1e-16), (1e-12, 1e-16), (1e-6, 1e-16), (1e6, 1e-16), (1e15, 1e-16), (1e17, 1e-16),
        # without delta, squares below 1e-38 would decide
        (1e-12, 0.0), (1e-6, 0.0), (1e15, 0.0),
    ],
    ids=str,
)  # fmt: skip
def test_scale_of_gradients(
    scale: float, delta: float, history: int, backend: str, algorithm: str
) -> None:
    """As long as their squares are floats, tiny and huge gradients are as good as others."""
    problem = realistic_problem(
        [(500,), (33, 3)], algorithm, history=history, scale=scale, delta=delta
    )
    check_step(problem, backend)


@pytest.mark.parametrize("high", [0.999, 1 - 1e-6, 1 - 1e-9], ids=str)
def test_large_gradients_under_a_beta_near_1(high: float, backend: str, algorithm: str) -> None:
    problem = realistic_problem([(500,)], algorithm, scale=1e15, betas=(0.9, high))
    check_step(problem, backend)


@pytest.mark.parametrize("eps", [0.0, 1e-8], ids=["eps_0", "eps"])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_zero_gradients_move_nothing(
    eps: float, inside: bool, backend: str, algorithm: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=generator)
    start[:2] = torch.tensor([0.0, 1e-40])
    for options in ({}, {"amsgrad": True}, {"nesterov": True}, {"trust_ratio": True}):
        p = Parameter(start.clone())
        opt = FUSED[algorithm]([p], backend=backend, eps=eps, eps_inside_sqrt=inside, **options)
        for _ in range(4):
            p.grad = torch.zeros(300)
            opt.step()
        assert torch.equal(p.detach(), start)
        assert not any(opt.state[p][key].any() for key in ("exp_avg", "exp_avg_sq", "maxva_avg"))


@pytest.mark.parametrize("g", [1.0, -0.3, 1e-12, 1e10], ids=str)
def test_constant_gradient(g: float, backend: str, algorithm: str) -> None:
    """Whatever beta rounding chooses, u/w, v/w and the update stay those of a constant."""
    p = Parameter(torch.zeros(130))
    opt = FUSED[algorithm]([p], lr=1e-2, eps=0.0, backend=backend)
    for t in range(1, 40):
        p.grad = torch.full((130,), g)
        opt.step()
        state = opt.state[p]
        w = state["maxva_weight"].double()
        assert ((w > 0) & (w <= 1 + 1e-6)).all()
        mean, vhat = state["maxva_avg"].double() / w, state["exp_avg_sq"].double() / w
        torch.testing.assert_close(mean / g, torch.ones_like(mean), rtol=0, atol=t * 2e-7)
        torch.testing.assert_close(vhat / g**2, torch.ones_like(mean), rtol=0, atol=t * 2e-7)
    expected = -39 * 1e-2 * np.sign(g)
    torch.testing.assert_close(p.detach(), torch.full((130,), expected).float(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-6, 1e-4, 1e-2], ids=str)
@pytest.mark.parametrize("history", [1, 2, 8, 30])
@pytest.mark.parametrize(
    "options",
    [{}, {"delta": 0.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9, 1 - 1e-9)}],
    ids=["default", "delta_0", "beta_high_1", "beta_high_almost_1"],
)
def test_nearly_constant_gradient(
    options: dict[str, Any], history: int, spread: float, backend: str, algorithm: str
) -> None:
    """Rounding may choose beta, but only within the envelope."""
    check_step(steady_problem(algorithm, history, spread, **options), backend, only_averages=True)


def test_alternating_gradient(backend: str, algorithm: str) -> None:
    problem = realistic_problem([(200,)], algorithm, history=1)
    opt = problem.optimizer(backend)
    (p,) = params_of(opt)
    for t in range(30):
        check_step(
            Problem(
                algorithm,
                problem.options,
                [p.detach().clone()],
                [(-1.0) ** t * problem.g[0].abs()],
                [{k: x.clone() for k, x in opt.state[p].items()}],
            ),
            backend,
        )
        p.grad = (-1.0) ** t * problem.g[0].abs()
        opt.step()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1}, L2, {"trust_ratio": True, "weight_decay": 0.1}, {"eps": 0.0}],
    ids=["decay", "l2", "lamb", "eps_0"],
)
def test_lr_0_keeps_every_bit(
    options: dict[str, Any], tensor_lr: bool, dtype: torch.dtype, backend: str, algorithm: str
) -> None:
    """-0.0, subnormal and infinite parameters, zero and NaN gradients included."""
    values = torch.tensor([-0.0, 0.0, 1e-40, -1e-40, 65504.0, -float("inf"), 1.0, -3.0])
    p = Parameter(values.repeat(20).to(dtype))
    generator = torch.Generator().manual_seed(0)
    p.grad = torch.randn(160, generator=generator).to(dtype)
    p.grad[::7] = float("nan")
    p.grad[1::7] = float("inf")
    p.grad[2::7] = 0.0
    before = p.detach().clone()
    lr = torch.tensor(0.0) if tensor_lr else 0.0
    opt = FUSED[algorithm]([p], lr=lr, backend=backend, **options)
    for _ in range(3):
        opt.step()
    assert same_bits(p.detach(), before)
    assert opt.state[p]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_lr_0_keeps_every_bit_pattern(dtype: torch.dtype, backend: str, algorithm: str) -> None:
    """Of a 16-bit parameter: it is not rounded again, so NaN keep their payload too."""
    p = Parameter(torch.arange(-32768, 32768).to(torch.int16).view(dtype))
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    FUSED[algorithm]([p], lr=0.0, weight_decay=0.1, backend=backend).step()
    assert same_bits(p.detach(), before)


# --- conversions of the 16-bit types -------------------------------------------------------------

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def all_halves(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a 16-bit type."""
    return torch.arange(-32768, 32768).to(torch.int16).view(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_every_half_is_read_as_torch_reads_it(
    dtype: torch.dtype, isa: str, use_isa: Callable[[str], None]
) -> None:
    """Without momentum, m after the first step is the gradient."""
    use_isa(isa)
    g = all_halves(dtype)
    p = Parameter(torch.zeros(65536))
    set_grad(p, g)
    opt = FUSED["madam"]([p], betas=(0.0, 0.999), backend="cpu")
    opt.step()
    m = opt.state[p]["exp_avg"]
    nan = torch.isnan(g.float())
    assert torch.equal(torch.isnan(m), nan)
    assert torch.equal(m[~nan], g.float()[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_parameters_are_rounded_as_torch_rounds_them(
    dtype: torch.dtype, isa: str, use_isa: Callable[[str], None]
) -> None:
    """Every 16-bit value, the ties between neighbours, and one float above and below each."""
    use_isa(isa)
    at = all_halves(dtype).float()
    finite = at[torch.isfinite(at)].sort().values
    largest = finite[-1]
    ties = (finite[1:].double() / 2 + finite[:-1].double() / 2).float()
    # halfway to the next power of two, where overflow begins
    edge = largest + (largest - finite[-2]) / 2
    points = torch.cat([finite, ties, edge.view(1), -edge.view(1), torch.tensor([3e38, -3e38])])
    up = torch.nextafter(points, torch.tensor(float("inf")))
    down = torch.nextafter(points, torch.tensor(float("-inf")))
    master = torch.cat([points, up, down])
    master = torch.cat([master[torch.isfinite(master)], torch.tensor([float("nan")])])
    p = Parameter(torch.zeros(master.numel(), dtype=dtype))
    p.grad = torch.zeros_like(p)
    opt = FUSED["madam"]([p], lr=1.0, master_weights=True, backend="cpu")
    opt.setup_fp32_params()
    opt.state[p]["master_param"].copy_(master)
    opt.step()
    moved = opt.state[p]["master_param"]
    assert torch.equal(moved[:-1], master[:-1])
    expected = moved.to(dtype)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(p.detach()), nan)
    assert same_bits(p.detach()[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_unscaled_gradients_are_rounded_as_torch_rounds_them(
    dtype: torch.dtype, backend: str
) -> None:
    g = all_halves(dtype)
    g = g[torch.isfinite(g.float())].clone()
    p = Parameter(torch.zeros(g.numel(), dtype=dtype))
    p.grad = g.clone()
    opt = FUSED["madam"]([p], lr=1e-3, backend=backend)
    take_step(opt, grad_scale=3.0)
    assert same_bits(p.grad, (g.float() / torch.tensor(3.0)).to(dtype))


# --- the same bits whatever does the work --------------------------------------------------------


def results(problem: Problem, **kwargs: Any) -> dict[str, Any]:
    return snapshot(take_step(problem.optimizer("cpu"), **kwargs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "max_grad_norm": 0.5, "skip_nonfinite": True},
        {"trust_ratio": True, "weight_decay": 0.1, "max_grad_norm": 0.5},
    ],
    ids=["plain", "clipped_amsgrad", "lamb_clipped"],
)
def test_results_do_not_depend_on_the_number_of_threads(
    options: dict[str, Any], algorithm: str
) -> None:
    shapes = [(3,), (100003,), (0,), (7, 11), (40000,), (1,), (2, 32768), (65537,)]
    problem = realistic_problem(shapes, algorithm, history=2, **options)
    torch.set_num_threads(1)
    alone = results(problem, grad_scale=4.0, found_inf=0.0)
    for n in (2, 3, 7):
        torch.set_num_threads(n)
        assert same_bits(alone, results(problem, grad_scale=4.0, found_inf=0.0)), f"{n} threads"


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_can_be_chosen(
    isa: str, algorithm: str, use_isa: Callable[[str], None]
) -> None:
    """Each set that this machine has is really used, and is exact, for every type and option."""
    from maxva_kernels import _C

    use_isa(isa)
    assert _C.cpu_isa() == isa
    for options in (
        {},
        {"amsgrad": True, "nesterov": True, "weight_decay": 0.1},
        {"trust_ratio": True, "weight_decay": 0.01, "max_grad_norm": 0.5},
        {"betas": (0.9, 1 - 1e-9)},
        L2,
    ):
        for history in (0, 5):
            check_step(realistic_problem(SEVERAL, algorithm, history=history, **options), "cpu")
    dtypes = list(FLOATS.values())
    problem = realistic_problem(
        [(129,), (7,), (1000,), (333,)], algorithm, dtype=dtypes, grad_dtype=dtypes[::-1]
    )
    check_step(problem, "cpu")


def _step_in_a_process(isa: str | None) -> subprocess.CompletedProcess[str]:
    """A process of its own with MAXVA_CPU_ISA: prints the set in use, takes a step."""
    environment = {name: value for name, value in os.environ.items() if name != "MAXVA_CPU_ISA"}
    if isa is not None:
        environment["MAXVA_CPU_ISA"] = isa
    program = """
import os, torch
from maxva_kernels import _C, FusedMAdam
p = torch.nn.Parameter(torch.ones(10))
p.grad = torch.ones(10)
optimizer = FusedMAdam([p], backend="cpu")
os.environ["MAXVA_CPU_ISA"] = "baseline"  # too late: it is read at import
try:
    optimizer.step()
finally:
    print("untouched" if torch.equal(p, torch.ones(10)) and not optimizer.state[p] else "moved")
print(_C.cpu_isa())
"""
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", [None, "", *ISAS])
def test_instruction_set_is_read_at_import(isa: str | None) -> None:
    """The widest where none is named."""
    run = _step_in_a_process(isa)
    assert run.stdout.split() == ["moved", isa or ISAS[-1]], run.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", "neon", *({"avx2", "avx512"} - set(ISAS))])
def test_instruction_set_that_is_not_there_is_refused(
    name: str, use_isa: Callable[[str], None]
) -> None:
    run = _step_in_a_process(name)
    assert run.returncode != 0
    assert run.stdout.split() == ["untouched"]
    assert re.search(f"RuntimeError: MAXVA_CPU_ISA={name}: .*use baseline", run.stderr)
    use_isa("baseline")
    with pytest.raises(RuntimeError, match=f"MAXVA_CPU_ISA={name}.*baseline"):
        use_isa(name)
    from maxva_kernels import _C

    assert _C.cpu_isa() == "baseline"


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(ISAS), reason="needs a processor with AVX2 and AVX-512"
)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_avx2_and_avx512_give_the_same_bits(
    dtype: torch.dtype, algorithm: str, use_isa: Callable[[str], None]
) -> None:
    for options in ({}, {"amsgrad": True, "nesterov": True, "weight_decay": 0.1}, L2):
        problem = realistic_problem([(1001,), (33, 130)], algorithm, dtype=dtype, **options)
        use_isa("avx2")
        narrow = results(problem, grad_scale=3.0)
        use_isa("avx512")
        assert same_bits(narrow, results(problem, grad_scale=3.0))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="x86-64 instructions"
)
def test_vector_instructions_stay_where_they_may_run() -> None:
    """One binary for every machine: AVX only in functions that are chosen at run time."""
    from maxva_kernels import _C

    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    avx512_only = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")
    seen: dict[str, list[str]] = {"avx2": [], "avx512": [], "other": []}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        name, _, body = function.partition("\n")
        if "maxva" not in name or "@plt" in name:
            continue
        # operands of vector registers and mnemonics; VEX-coded instructions begin with v
        avx = re.search(r"%[yz]mm|\tv[a-z0-9]+ +[^\n]*%xmm", body)
        if "_avx512" in name:
            assert "%zmm" in body, f"{name} is not vectorised with 512 bits"
            seen["avx512"].append(name)
        elif "_avx2" in name:
            assert "%ymm" in body, f"{name} is not vectorised with 256 bits"
            assert not avx512_only.search(body), f"{name} needs AVX-512"
            seen["avx2"].append(name)
        else:
            assert not avx, f"{name} needs AVX: {avx.group(0) if avx else ''}"
            seen["other"].append(name)
    # update_* for two algorithms, amsgrad or not, two precisions; and sum_of_squares_*
    assert len(seen["avx2"]) >= 9
    assert len(seen["avx512"]) >= 9
    assert len(seen["other"]) > 20


def test_repeated_steps_are_bit_identical(algorithm: str) -> None:
    problem = realistic_problem([(70001,), (5,)], algorithm, max_grad_norm=0.1)
    assert same_bits(results(problem), results(problem))


# --- memory layouts ------------------------------------------------------------------------------

LAYOUTS = [
    ("transposed", "transposed"),
    ("transposed", "contiguous"),
    ("contiguous", "transposed"),
    ("gappy", "gappy"),
    ("gappy", "contiguous"),
    ("contiguous", "gappy"),
    ("rows", "transposed"),
    ("misaligned", "misaligned"),
    ("contiguous", "expanded"),
    ("transposed", "expanded"),
    ("gappy", "expanded"),
    ("channels_last", "channels_last"),
    ("channels_last", "contiguous"),
    ("contiguous", "channels_last"),
]


@pytest.mark.parametrize(
    "options",
    [{}, {"trust_ratio": True, "weight_decay": 0.01, "amsgrad": True, "max_grad_norm": 0.1}],
    ids=["plain", "lamb_amsgrad_clipped"],
)
@pytest.mark.parametrize(
    ("layout", "grad_layout"), LAYOUTS, ids=[f"p_{p}-g_{g}" for p, g in LAYOUTS]
)
def test_layouts(
    layout: str, grad_layout: str, options: dict[str, Any], backend: str, algorithm: str
) -> None:
    shapes = [(4, 3, 5, 6), (2, 7, 1, 3), (1, 1, 1, 1), (9, 1, 4, 1), (1, 33, 2, 2)]
    for history in (0, 4):
        problem = realistic_problem(shapes, algorithm, history=history, **options)
        check_step(problem, backend, layout=layout, grad_layout=grad_layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16_master", "fp32"])
@pytest.mark.parametrize(
    ("layout", "grad_layout"), LAYOUTS[:8], ids=[f"{p}-{g}" for p, g in LAYOUTS[:8]]
)
def test_layouts_with_master_weights_and_scaling(
    layout: str, grad_layout: str, dtype: torch.dtype, backend: str
) -> None:
    problem = realistic_problem([(12, 11), (5, 130)], dtype=dtype, master_weights=True)
    check_step(problem, backend, layout=layout, grad_layout=grad_layout, grad_scale=2.0)


def test_a_layout_is_followed_for_many_steps(backend: str) -> None:
    """New states of a strided parameter, and the same results as for a contiguous one."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 10, generator=generator)
    grads = [torch.randn(6, 10, generator=generator) for _ in range(5)]
    outcomes = []
    for layout in ("contiguous", "transposed", "gappy", "rows"):
        p = Parameter(in_layout(start, layout))
        address, strides = p.data_ptr(), p.stride()
        opt = FUSED["madam"]([p], lr=0.1, backend=backend)
        for g in grads:
            p.grad = g.clone()
            opt.step()
        assert (p.data_ptr(), p.stride()) == (address, strides)
        outcomes.append([p.detach(), *(opt.state[p][k] for k in list(KEYS.values())[:4])])
    assert all(same_bits(outcomes[0], other) for other in outcomes[1:])


def test_expanded_gradient_with_scale_is_right_or_refused(backend: str) -> None:
    """It cannot be written back: an error must come before anything has changed."""
    problem = realistic_problem([(5, 3), (8, 2)])
    opt = problem.optimizer(backend, grad_layout="expanded")
    before = snapshot(opt)
    try:
        take_step(opt, grad_scale=2.0)
    except (RuntimeError, ValueError):
        assert same_bits(before, snapshot(opt))
    else:
        check_step(problem, backend, grad_layout="expanded", grad_scale=2.0)


def test_expanded_parameter_is_refused(kernel: str) -> None:
    base = torch.ones(1, 3)
    p = Parameter(base.expand(4, 3))
    p.grad = torch.ones(4, 3)
    opt = FUSED["madam"]([p], backend=kernel)
    with pytest.raises(ValueError, match="share memory"):
        opt.step()
    assert torch.equal(base, torch.ones(1, 3))
    assert not opt.state[p]


@pytest.mark.parametrize("which", ["parameter", "state", "gradient"])
@pytest.mark.parametrize("later", [False, True], ids=["first_batch", "later_batch"])
def test_nothing_moves_where_a_written_tensor_is_expanded(
    which: str, later: bool, backend: str
) -> None:
    shape = (4, 3)
    usual = Parameter(torch.ones(shape))
    bad = Parameter(torch.ones(1, 3).expand(shape) if which == "parameter" else torch.ones(shape))
    # amsgrad is of a batch of its own
    groups = [{"params": [usual], "amsgrad": later}, {"params": [bad], "amsgrad": not later}]
    opt = FUSED["madam"](groups if later else groups[::-1], backend=backend)
    usual.grad = bad.grad = torch.ones(shape)
    if which == "state":
        opt.step()
        opt.state[bad]["exp_avg"] = torch.zeros(1, 3).expand(shape)
    if which == "gradient":  # which is written where it is unscaled
        bad.grad = torch.ones(1, 3).expand(shape)
        opt.grad_scale = torch.tensor(2.0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="is expanded" if which == "gradient" else "share memory"):
        opt.step()
    assert same_bits(before, snapshot(opt))
    assert torch.equal(usual.grad, torch.ones(shape))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_misaligned_gradients_give_the_same_bits(
    offset: int, dtype: torch.dtype, algorithm: str
) -> None:
    """Views into a bucket start at any element."""
    shapes = [(1000,), (3, 77), (32769,)]
    problem = realistic_problem(shapes, algorithm, dtype=dtype, history=2, max_grad_norm=1.0)
    aligned = results(problem)
    bucket = torch.full((offset + sum(g.numel() for g in problem.g),), SENTINEL, dtype=dtype)
    opt = problem.optimizer("cpu")
    at = offset
    for p, g in zip(params_of(opt), problem.g, strict=True):
        view = bucket[at : at + g.numel()].view(g.shape).copy_(g)
        p.grad = view
        at += g.numel()
    opt.step()
    assert same_bits(aligned, snapshot(opt))
    assert (bucket[:offset] == SENTINEL).all()


ZERO_SIZES = {
    "first": [(0,), (5,), (7,)],
    "last": [(5,), (7,), (0,)],
    "between": [(5,), (0, 3), (2, 0, 4), (7,)],
    "all": [(0,), (3, 0)],
    "first_and_last_of_many": [(0,), *[(3,)] * 40, (0,)],
    "every_other": [(0,), (3,)] * 25,
}


@pytest.mark.parametrize("shapes", ZERO_SIZES.values(), ids=ZERO_SIZES)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 1.0, "trust_ratio": True, "weight_decay": 0.1}],
    ids=["plain", "lamb_clipped"],
)
def test_zero_size_tensors(
    shapes: list[tuple[int, ...]], options: dict[str, Any], backend: str, algorithm: str
) -> None:
    """Every other tensor is updated exactly once."""
    for history in (0, 3):
        check_step(realistic_problem(shapes, algorithm, history=history, **options), backend)


def test_21000_tiny_parameters(algorithm: str) -> None:
    """As the same elements in one tensor, to the last bit."""
    n, size = 21000, 3
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n * size, generator=generator)
    whole = Parameter(start.clone())
    parts = [Parameter(x.clone()) for x in start.split(size)]
    opts = [FUSED[algorithm](of, backend="cpu") for of in ([whole], parts)]
    for _ in range(2):
        g = torch.randn(n * size, generator=generator)
        whole.grad = g.clone()
        for p, x in zip(parts, g.split(size), strict=True):
            p.grad = x
        for opt in opts:
            opt.step()
    assert same_bits(torch.cat([p.detach() for p in parts]), whole.detach())


def test_two_tensors_with_one_gradient(backend: str) -> None:
    """One gradient tensor may serve two parameters."""
    problem = realistic_problem([(50,), (50,)])
    shared = problem.g[0]
    opt = problem.with_gradients([shared, shared]).optimizer(backend)
    p, q = params_of(opt)
    q.grad = p.grad
    opt.step()
    apart = problem.with_gradients([shared, shared]).optimizer(backend)
    apart.step()
    assert same_bits(snapshot(opt), snapshot(apart))


def test_swapped_parameter_data_is_seen(backend: str) -> None:
    """Nothing remembers an address: p.data, a gradient or a state may be replaced."""
    problem = realistic_problem([(64,), (9,)])
    opt = problem.optimizer(backend)
    kept = []
    for p in params_of(opt):
        kept.append(p.data)
        p.data = p.data.clone()
        p.grad = p.grad.clone()
        for key in KEYS.values():
            if key in opt.state[p]:
                opt.state[p][key] = opt.state[p][key].clone()
    untouched = [x.clone() for x in kept]
    opt.step()
    straight = problem.optimizer(backend)
    straight.step()
    assert same_bits(snapshot(opt), snapshot(straight))
    assert same_bits(kept, untouched)


# --- anything at all -----------------------------------------------------------------------------

LAYOUT_NAMES = ["contiguous", "transposed", "gappy", "misaligned"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, str, str]:
    """Tensors of any shape and dtype, some without gradient, in any layout."""
    n = draw(st.integers(1, 5))
    shapes = [tuple(draw(st.lists(st.integers(0, 9), max_size=4))) for _ in range(n)]
    dtypes = [draw(st.sampled_from(list(FLOATS.values()))) for _ in range(n)]
    grad_dtypes = [draw(st.sampled_from(list(FLOATS.values()))) for _ in range(n)]
    options = {
        name: True
        for name in ("amsgrad", "nesterov", "maximize", "master_weights")
        if draw(st.booleans())
    }
    if draw(st.booleans()):
        options["weight_decay"] = 0.1
        options["trust_ratio"] = draw(st.booleans()) and torch.float64 not in dtypes
    problem = realistic_problem(
        shapes,
        draw(st.sampled_from(["madam", "lamadam"])),
        dtype=dtypes,
        grad_dtype=grad_dtypes,
        seed=draw(st.integers(0, 2**31)),
        history=draw(st.integers(0, 4)),
        **options,
    )
    g = [x if draw(st.integers(0, 3)) else None for x in problem.g]
    return (
        problem.with_gradients(g),
        draw(st.sampled_from(LAYOUT_NAMES)),
        draw(st.sampled_from(LAYOUT_NAMES)),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=problems())
def test_any_problem(case: tuple[Problem, str, str]) -> None:
    problem, layout, grad_layout = case
    check_step(problem, "cpu", layout=layout, grad_layout=grad_layout)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 5, 127, 128, 129, 300, 32768, 32769]), max_size=9),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_any_list_of_sizes_equals_its_tensors_one_by_one(
    sizes: list[int], threads: int, seed: int
) -> None:
    """Chunks and threads are shared out so that every element is met exactly once."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(seed)
        start = [torch.randn(n, generator=generator) for n in [*sizes, 1]]
        grads = [torch.randn(n, generator=generator) for n in [*sizes, 1]]
        together = [Parameter(x.clone()) for x in start]
        opt = FUSED["madam"](together, backend="cpu")
        for p, g in zip(together, grads, strict=True):
            p.grad = g
        opt.step()
        for p, x, g in zip(together, start, grads, strict=True):
            alone = Parameter(x.clone())
            alone.grad = g
            FUSED["madam"]([alone], backend="cpu").step()
            assert same_bits(p.detach(), alone.detach())
    finally:
        torch.set_num_threads(before)


# --- the operators themselves --------------------------------------------------------------------

LISTS = ("theta", "g", "m", "u", "v", "w", "vmax", "master", "step", "group_step")


def operator_arguments(**options: Any) -> dict[str, Any]:
    """Valid arguments of maxva::update_ for two float32 parameters of one group."""
    problem = realistic_problem([(4, 3), (7,)], **options)
    key = {"theta": None, "g": None, **KEYS, "step": "step"}
    lists = {k: [state[key[k]].clone() for state in problem.states] for k in "muvw"}
    return {
        "theta": [x.clone() for x in problem.theta],
        "g": [x.clone() for x in problem.g],
        **lists,
        "vmax": [],
        "master": [],
        "step": [state["step"].clone() for state in problem.states],
        "group_step": [],
        "group_sizes": [2],
        "hyper": [1e-3, 0.9, 0.5, 0.999, 0.999, 1e-8, 0.0, 1e-16, 1, 1, 0, 0, 0, 0],
        "lr": [None],
        "control": None,
        "grad_scale": None,
        "norms": None,
        "statistics": None,
        "rounding": [],
        "algorithm": "madam",
        "phase": 0,
    }


def call(arguments: dict[str, Any], check_only: bool = False) -> None:
    torch.ops.maxva.update_(*arguments.values(), check_only)


def replaced(name: str, i: int, make: Any) -> Any:
    def change(a: dict[str, Any]) -> None:
        a[name] = list(a[name])
        a[name][i] = make(a[name][i])

    return change


def assign(**values: Any) -> Any:
    return lambda a: a.update(values)


BAD_ARGUMENTS: dict[str, tuple[Any, str]] = {
    **{
        f"{name}_of_another_size": (replaced(name, 1, lambda x: torch.zeros(8)), "shape")
        for name in "gmuvw"
    },
    **{
        f"{name}_of_another_shape": (replaced(name, 0, lambda x: torch.zeros(3, 4)), "shape")
        for name in "gmuvw"
    },
    **{
        f"{name}_of_another_dtype": (replaced(name, 1, lambda x: x.double()), "must be")
        for name in "muvw"
    },
    **{
        f"{name}_16_bit": (replaced(name, 1, lambda x: x.bfloat16()), "must be") for name in "muvw"
    },
    **{
        f"{name}_integer": (replaced(name, 0, lambda x: x.int()), "is Int")
        for name in ("theta", "g", *"muvw")
    },
    **{
        f"{name}_complex": (replaced(name, 0, lambda x: x.to(torch.complex64)), "ComplexFloat")
        for name in ("theta", "g", "m")
    },
    **{
        f"{name}_sparse": (replaced(name, 1, lambda x: x.to_sparse()), "[Ss]parse")
        for name in ("theta", "g", "m", "step")
    },
    **{
        f"{name}_too_few": (lambda a, name=name: a[name].pop(), "2 parameters, but")
        for name in ("g", *"muvw", "step")
    },
    **{
        f"{name}_too_many": (
            lambda a, name=name: a[name].append(torch.zeros(7)),
            "2 parameters, but",
        )
        for name in ("g", *"muvw", "step")
    },
    "theta_too_few": (lambda a: a["theta"].pop(), "1 parameters, but"),
    **{
        f"{name}_on_another_device": (replaced(name, 1, lambda x: x.to("meta")), "meta|device")
        for name in ("theta", "g", *"muvw", "step")
    },
    "vmax_too_few": (assign(vmax=[torch.zeros(4, 3)]), "vmax"),
    "vmax_of_another_size": (assign(vmax=[torch.zeros(4, 3), torch.zeros(6)]), "shape"),
    "master_too_few": (assign(master=[torch.zeros(4, 3)]), "master"),
    "master_of_another_dtype": (
        assign(master=[torch.zeros(4, 3).half(), torch.zeros(7).half()]), "must be",
    ),
    "step_of_another_dtype": (replaced("step", 0, lambda x: x.long()), "step"),
    "step_of_two_elements": (replaced("step", 0, lambda x: torch.zeros(2)), "step"),
    "group_sizes_too_small": (assign(group_sizes=[1]), "group_sizes"),
    "group_sizes_too_large": (assign(group_sizes=[3]), "group_sizes"),
    "group_sizes_huge": (assign(group_sizes=[2**62]), "group_sizes"),
    "group_sizes_negative": (
        lambda a: a.update(group_sizes=[3, -1], hyper=a["hyper"] * 2, lr=[None, None]),
        "negative",
    ),
    "group_sizes_empty": (assign(group_sizes=[], hyper=[], lr=[]), "group_sizes"),
    "hyper_too_short": (lambda a: a["hyper"].pop(), "hyper-parameters"),
    "hyper_too_long": (lambda a: a["hyper"].append(0.0), "hyper-parameters"),
    "hyper_empty": (assign(hyper=[]), "hyper-parameters"),
    "lr_too_few": (assign(lr=[]), "learning rates"),
    "lr_of_two_elements": (assign(lr=[torch.zeros(2)]), "lr"),
    "lr_empty": (assign(lr=[torch.zeros(0)]), "lr"),
    "group_step_of_another_dtype": (assign(group_step=[torch.zeros(1)]), "group_step"),
    "group_step_of_two_elements": (
        assign(group_step=[torch.zeros(2, dtype=torch.int32)]), "group_step",
    ),
    "control_too_short": (assign(control=torch.zeros(2, dtype=torch.float64)), "control"),
    "control_float32": (assign(control=torch.zeros(3)), "control"),
    "control_strided": (assign(control=torch.zeros(6, dtype=torch.float64)[::2]), "control"),
    "grad_scale_of_two_elements": (assign(grad_scale=torch.ones(2)), "grad_scale"),
    "norms_missing": (assign(phase=1), "norms"),
    "norms_too_few": (assign(phase=2, norms=torch.ones(1, 2, dtype=torch.float64)), "norms"),
    "norms_flat": (assign(phase=2, norms=torch.ones(4, dtype=torch.float64)), "norms"),
    "norms_float32": (assign(phase=1, norms=torch.ones(2, 2)), "norms"),
    "norms_transposed": (
        assign(phase=1, norms=torch.ones(2, 2, dtype=torch.float64).t()), "norms",
    ),
    "statistics_too_narrow": (
        assign(statistics=torch.ones(2, 4, dtype=torch.float64)), "statistics",
    ),
    "statistics_too_few": (assign(statistics=torch.ones(1, 5, dtype=torch.float64)), "statistics"),
    "statistics_float32": (assign(statistics=torch.ones(2, 5)), "statistics"),
    "rounding_too_few": (assign(rounding=[0, -1, 0, 1, 1]), "rounding"),
    **{
        f"rounding_{what}": (assign(rounding=[*row, *row]), "offset >= 0 and positive inner sizes")
        for what, row in {
            "offset_negative": (0, 0, -1, 12, 12, 0),
            "inner_local_0": (0, 0, 0, 0, 12, 0),
            "inner_global_negative": (0, 0, 0, 12, -1, 0),
        }.items()
    },
    "rounding_of_float32": (assign(rounding=[0, 0, 0, 12, 12, 1, 0, 1, 0, 7, 7, 1]), "bfloat16"),
    "master_of_float64": (
        lambda a: a.update(
            {name: [x.double() for x in a[name]] for name in ("theta", *"muvw")},
            master=[x.clone() for x in a["theta"]],
        ),
        "parameter 0 is float64, which has no master weight",
    ),
    "rounding_with_masters": (
        lambda a: a.update(
            theta=[x.bfloat16() for x in a["theta"]], master=[x.clone() for x in a["theta"]],
            rounding=[0, 0, 0, 12, 12, 1, 0, 1, 0, 7, 7, 1],
        ),
        "without master weights",
    ),
    "algorithm_unknown": (assign(algorithm="adam"), "algorithm"),
    "phase_unknown": (assign(phase=3), "phase"),
    "phase_negative": (assign(phase=-1), "phase"),
}  # fmt: skip


@pytest.mark.parametrize("check_only", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_update_refuses_bad_arguments(change: Any, message: str, check_only: bool) -> None:
    arguments = operator_arguments()
    change(arguments)
    tensors = {
        name: [x for x in arguments[name] if x.layout is torch.strided and not x.is_meta]
        for name in LISTS
    }
    before = {name: [x.clone() for x in of] for name, of in tensors.items()}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(arguments, check_only)
    assert same_bits(tensors, before)


def test_valid_operator_arguments_do_work() -> None:
    """What the test above changes is right before the change."""
    arguments = operator_arguments()
    assert len(arguments["hyper"]) == len(ROW) + 1
    before = {name: [x.clone() for x in arguments[name]] for name in LISTS}
    call(arguments, check_only=True)
    assert same_bits(before, {name: arguments[name] for name in LISTS})
    call(arguments)
    for name in ("theta", "m", "u", "v", "w", "step"):
        assert not any(
            torch.equal(a, b) for a, b in zip(before[name], arguments[name], strict=True)
        )


def test_whatever_is_written_counts_and_has_a_new_version() -> None:
    """Groups' counters and tables of the caller's, too, in both phases of a step."""
    arguments = operator_arguments(trust_ratio=True)
    counter = torch.tensor([3], dtype=torch.int32)
    norms, statistics = (torch.zeros(2, k, dtype=torch.float64) for k in (2, 5))
    arguments |= {"group_step": [counter], "norms": norms, "statistics": statistics}
    for phase, counted in ((1, 0), (2, 1)):
        call(arguments | {"phase": phase})
        assert counter.item() == 3 + counted
        assert norms._version == statistics._version == phase
    assert counter._version > 0
    assert arguments["step"][0]._version > 0
    control = torch.zeros(3, dtype=torch.float64)
    torch.ops.maxva.write_control_(control, torch.ones(1).double(), None, None, 1.0, False)
    assert control._version == 1
    control[0] = 1.0
    call(arguments | {"control": control})
    assert counter.item() == 4


def test_norms_are_set_whatever_was_there() -> None:
    found = [torch.full((2, 2), x, dtype=torch.float64) for x in (0.0, 7.0, float("nan"))]
    for norms in found:
        call(operator_arguments(trust_ratio=True) | {"norms": norms, "phase": 1})
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("found_inf", [-1.0, float("nan")])
def test_found_inf_is_anything_but_0(found_inf: float) -> None:
    control, square = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    torch.ops.maxva.write_control_(control, square, None, torch.tensor(found_inf), 2.0, False)
    assert control.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": torch.zeros(2, dtype=torch.float64)}, "control"),
        ({"control": torch.zeros(3)}, "control"),
        ({"control": torch.zeros(6, dtype=torch.float64)[::2]}, "control"),
        ({"sum_of_squares": torch.zeros(1)}, "sum_of_squares"),
        ({"sum_of_squares": torch.zeros(2, dtype=torch.float64)}, "sum_of_squares"),
        ({"grad_scale": torch.ones(2)}, "grad_scale"),
        ({"found_inf": torch.ones(0)}, "found_inf"),
    ],
)
def test_write_control_refuses_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "control": torch.full((3,), 7.0, dtype=torch.float64),
        "sum_of_squares": torch.ones(1, dtype=torch.float64),
        "grad_scale": None,
        "found_inf": None,
        "max_grad_norm": 1.0,
        "skip_nonfinite": False,
        **change,
    }
    before = arguments["control"].clone()
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        torch.ops.maxva.write_control_(*arguments.values())
    assert same_bits(arguments["control"], before)


def test_sum_of_squares_refuses_bad_arguments() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.maxva.sum_of_squares([])
    with pytest.raises((RuntimeError, TypeError), match="Int"):
        torch.ops.maxva.sum_of_squares([torch.zeros(3, dtype=torch.int32)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_sum_of_squares(dtype: torch.dtype, isa: str, use_isa: Callable[[str], None]) -> None:
    use_isa(isa)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40000, generator=generator).to(dtype)
    g = [base, base[:0], base[1:8], base[:600].view(20, 30).t(), base[5], base[:50:3]]
    g.append(base[:1].expand(9))
    truth = sum(float((x.double() ** 2).sum()) for x in g)
    result = torch.ops.maxva.sum_of_squares(g)
    assert result.dtype == torch.float64
    assert result.shape == (1,)
    assert float(result) == pytest.approx(truth, rel=1e-13)
    for value in (float("nan"), float("inf")):
        bad = base.clone()
        bad[33333] = value
        found = float(torch.ops.maxva.sum_of_squares([base, bad]))
        assert found == value or (np.isnan(value) and np.isnan(found))


def test_this_extension_was_built_for_this_torch() -> None:
    from maxva_kernels import _C

    assert torch.__version__.startswith(_C.TORCH_VERSION.split("+")[0])
    assert _extension.why_not() is None
    assert len(ROW) + 1 == _C.HYPER_FIELDS
    assert _C.CONTROL_FIELDS == 3
    assert os.path.dirname(_C.__file__).endswith("maxva_kernels")
