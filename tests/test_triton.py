"""The Triton backend on CPU tensors, interpreted: results, traversal, tables, checks."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import (
    FUSED,
    KEYS,
    check_step,
    in_layout,
    params_of,
    realistic_problem,
    same_bits,
    snapshot,
)
from interpreted import interpreted
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import maxva_kernels
from maxva_kernels.backends import find_backend

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
CHUNK = 4096
FLOATS = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decoupled_clipped_nesterov": {"weight_decay": 0.1, "max_grad_norm": 0.5, "nesterov": True},
    "l2_amsgrad": {"weight_decay": 0.125, "adam_w_mode": False, "amsgrad": True},
    "maximize_inside": {"maximize": True, "eps_inside_sqrt": True, "bias_correction": False},
    "lamb": {"trust_ratio": True, "weight_decay": 0.01},
    "lamb_amsgrad_l2": {
        "trust_ratio": True, "weight_decay": 0.125, "amsgrad": True, "adam_w_mode": False,
    },
    "alpha_0_beta_high_1": {"betas": (0.0, 1.0), "eps": 0.0},
    "equal_betas": {"betas": (0.9, 0.98), "beta_min": 0.98, "delta": 0.0},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def kernels() -> Any:
    """The package under test."""
    from maxva_kernels import triton_kernels

    return triton_kernels


# --- results -------------------------------------------------------------------------------------


def run_golden(case: str, dtype: torch.dtype) -> Any:
    """Runs a golden case; yields per tensor the path of theta, our states, theirs, the options."""
    options = dict(CASES[case])
    algorithm = {"FusedMAdam": "madam", "FusedLaMAdam": "lamadam"}[options.pop("optimizer")]
    data = np.load(GOLDEN / f"{case}.npz")
    params = [Parameter(torch.tensor(data[f"param0_{k}"], dtype=dtype)) for k in range(3)]
    opt = FUSED[algorithm](params, backend="triton", **options)
    path: list[list[np.ndarray]] = [[], [], []]
    for t, lr in enumerate(data["lr"]):
        opt.param_groups[0]["lr"] = float(lr)
        for k, p in enumerate(params):
            p.grad = torch.tensor(data[f"grads_{k}"][t], dtype=dtype)
        opt.step()
        for k, p in enumerate(params):
            path[k].append(p.detach().double().numpy().copy())
    for k, p in enumerate(params):
        ours = {s: opt.state[p][key].double().numpy() for s, key in KEYS.items() if s != "vmax"}
        theirs = {name: data[f"{name}_{k}"] for name in ("params", "m", "u", "v", "w")}
        yield np.stack(path[k]), ours, theirs, options


@pytest.mark.parametrize("case", CASES)
@interpreted
def test_golden_trajectory_in_float64(case: str) -> None:
    for path, ours, theirs, _ in run_golden(case, torch.float64):
        np.testing.assert_allclose(path, theirs["params"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours["m"], theirs["m"], rtol=1e-9, atol=0)
        for x in "uv":
            np.testing.assert_allclose(
                ours[x] / ours["w"], theirs[x] / theirs["w"], rtol=1e-9, atol=0
            )


@pytest.mark.parametrize("case", CASES)
@interpreted
def test_golden_trajectory_in_float32(case: str) -> None:
    l2 = not CASES[case]["adam_w_mode"]
    m_bound, u_bound, v_bound = (5e-4, 5e-4, 1e-3) if l2 else (3e-5, 5e-5, 2e-4)
    for path, ours, theirs, _ in run_golden(case, torch.float32):
        np.testing.assert_allclose(path, theirs["params"], rtol=0, atol=1e-5)
        assert np.abs(ours["m"] - theirs["m"]).max() <= m_bound * np.abs(theirs["m"]).max()
        vhat = theirs["v"] / theirs["w"]
        error = np.abs(ours["u"] / ours["w"] - theirs["u"] / theirs["w"])
        assert (error <= u_bound * np.sqrt(vhat)).all()
        np.testing.assert_allclose(ours["v"] / ours["w"], vhat, rtol=v_bound, atol=0)


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@interpreted
def test_one_step_by_the_rule(options: dict[str, Any], algorithm: str) -> None:
    for history in (0, 5):
        problem = realistic_problem(
            [(33,), (0,), (7, 61), ()], algorithm, history=history, **options
        )
        check_step(problem, "triton")


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@interpreted
def test_dtypes_by_the_rule(dtype: torch.dtype, algorithm: str) -> None:
    """Parameters of one dtype with gradients of every dtype, in one group."""
    problem = realistic_problem(
        [(129,), (5, 7), (), (33,)],
        algorithm,
        dtype=dtype,
        grad_dtype=list(FLOATS.values()),
        weight_decay=0.1,
    )
    check_step(problem, "triton", grad_scale=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@interpreted
def test_dtypes_with_the_trust_ratio_by_the_rule(dtype: torch.dtype) -> None:
    """Several launches, each of which has norms of its own tensors, and not the first ones."""
    problem = realistic_problem(
        [(129,), (5, 7), (CHUNK + 1,), (33,)],
        "madam",
        dtype=dtype,
        grad_dtype=list(FLOATS.values()),
        trust_ratio=True,
        weight_decay=0.1,
    )
    check_step(problem, "triton")


def fused_multiply_add_is_fused() -> bool:
    """Whether this interpreter rounds tl.fma once; see Note [Rounding] in maxva_math.py."""
    import triton
    import triton.runtime.interpreter as interpreter

    x = np.array([1 + 2.0**-12], np.float32)
    handle = interpreter.TensorHandle(x, triton.language.float32)
    minus = interpreter.TensorHandle(-(x * x), triton.language.float32)
    return bool(interpreter.InterpreterBuilder().create_fma(handle, handle, minus).data[0] != 0)


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@interpreted
def test_same_bits_as_the_cpp_kernel(
    options: dict[str, Any], dtype: torch.dtype, algorithm: str
) -> None:
    if not fused_multiply_add_is_fused():
        pytest.skip("this Triton's interpreter rounds tl.fma twice")
    from maxva_kernels import _C

    if _C.cpu_isa() == "baseline":
        pytest.skip("this processor's C++ kernels round a multiplication and addition twice")
    # a norm is a sum, whose order is a backend's own
    options = {k: x for k, x in options.items() if k not in ("max_grad_norm", "trust_ratio")}
    if dtype == torch.float64:
        options["bias_correction"] = False  # alpha^t is rounded by another library
    problem = realistic_problem(
        [(300,), (4, 65)], algorithm, dtype=dtype, master_weights=True, **options
    )
    outcome = []
    for backend in ("triton", "cpu"):
        opt = problem.optimizer(backend)
        opt.step()
        outcome.append(snapshot(opt))
    assert same_bits(*outcome)


@interpreted
def test_same_bits_as_the_cpp_kernel_of_constant_gradients(algorithm: str) -> None:
    """Whose variance is a difference of equal numbers, and negative in every second one."""
    if not fused_multiply_add_is_fused():
        pytest.skip("this Triton's interpreter rounds tl.fma twice")
    from maxva_kernels import _C

    if _C.cpu_isa() == "baseline":
        pytest.skip("this processor's C++ kernels round a multiplication and addition twice")
    outcome = []
    for backend in ("triton", "cpu"):
        p = Parameter(torch.ones(300))
        opt = FUSED[algorithm]([p], backend=backend)
        for _ in range(4):
            p.grad = torch.linspace(0.1, 3, 300)
            opt.step()
        outcome.append(snapshot(opt))
    assert same_bits(*outcome)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@interpreted
def test_signs_of_zeros_are_those_of_the_cpp_kernel(
    dtype: torch.dtype, weight_decay: float, algorithm: str
) -> None:
    """Of parameters and states, in an interpreter that rounds tl.fma twice, too."""
    if not has_extension():
        pytest.skip("there is no C++ kernel")
    outcome = []
    for backend in ("triton", "cpu"):
        params = [Parameter(torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype)) for _ in range(2)]
        opt = FUSED[algorithm](params, backend=backend, weight_decay=weight_decay)
        for _ in range(2):
            for p, g in zip(params, ([0.0, 0.0, -0.0, -0.0], [-0.0, -0.0, 0.0, 0.0]), strict=True):
                p.grad = torch.tensor(g, dtype=dtype)
            opt.step()
        outcome.append(
            [p.detach() for p in params]
            + [opt.state[p][KEYS[name]] for p in params for name in "muv"]
        )
    assert all(not tensor.any() for tensor in outcome[0])
    assert same_bits(*outcome)


@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@interpreted
def test_lr_0_keeps_the_bits(dtype: torch.dtype, master: bool) -> None:
    """Those of what is no number, too, and under updates that are none."""
    values = torch.tensor([1.0, -0.0, math.nan, -math.nan, math.inf])
    params = [Parameter(values.repeat(n)[:n].to(dtype)) for n in (33, CHUNK)]
    before = [p.detach().clone() for p in params]
    opt = FUSED["madam"](params, lr=0.0, weight_decay=0.1, master_weights=master, backend="triton")
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    opt.step()
    assert same_bits([p.detach() for p in params], before)
    masters = [
        opt.state[p].get("master_param", x.float()) for p, x in zip(params, before, strict=True)
    ]
    assert same_bits(masters, [x.float() for x in before])


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@interpreted
def test_eps_0_leaves_what_has_seen_no_gradient(amsgrad: bool, algorithm: str) -> None:
    p = Parameter(torch.ones(2, 8))
    opt = FUSED[algorithm]([p], lr=0.1, eps=0.0, amsgrad=amsgrad, backend="triton")
    for _ in range(2):
        p.grad = torch.tensor([[0.0], [1.0]]).expand(2, 8).clone()
        opt.step()
    assert bool((p[0] == 1).all())
    assert bool((p[1] < 1).all())


@interpreted
def test_without_variance_beta_is_the_lower_bound(algorithm: str) -> None:
    """Of 0 / 0, which delta = 0 permits."""
    states = []
    for backend in ("triton", "eager"):
        p = Parameter(torch.ones(8))
        opt = FUSED[algorithm]([p], delta=0.0, backend=backend)
        for _ in range(3):
            p.grad = torch.zeros(8)
            opt.step()
        states.append(opt.state[p]["maxva_weight"])
    torch.testing.assert_close(*states, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("theta", "g", "weight_decay"),
    [
        (torch.linspace(1, 2, 8), torch.ones(8), 0.0),
        (torch.zeros(8), torch.ones(8), 0.1),
        # an update whose square is 0 in float64
        (torch.full((8,), 1e-150, dtype=torch.float64), torch.zeros(8).double(), 1e-20),
    ],
    ids=["no decay", "no parameter", "no update"],
)
@interpreted
def test_trust_ratio_is_1(theta: Tensor, g: Tensor, weight_decay: float, algorithm: str) -> None:
    """Where there is nothing to compare."""
    moved = []
    for trust_ratio in (False, True):
        p = Parameter(theta.clone())
        p.grad = g.clone()
        FUSED[algorithm](
            [p], backend="triton", trust_ratio=trust_ratio, weight_decay=weight_decay
        ).step()
        moved.append(p.detach())
    assert same_bits(*moved)


# --- stochastic rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=str)
@interpreted
def test_fake_tensors_are_checked_and_not_touched(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        p, q = (Parameter(torch.ones(64, 128)) for _ in range(2))
        optimizer = FUSED["madam"]([p, q], backend="triton", max_grad_norm=1.0, **options)
        p.grad = q.grad = torch.ones(64, 128)
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == 1
        optimizer.state[q]["step"] = torch.zeros(2)
        with pytest.raises(ValueError, match="step"):
            optimizer.step()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@interpreted
def test_a_gradient_without_memory_is_refused(max_grad_norm: float | None) -> None:
    p = Parameter(torch.ones(5))
    p.grad = torch._efficientzerotensor((5,))
    optimizer = FUSED["madam"]([p], backend="triton", max_grad_norm=max_grad_norm)
    with pytest.raises(ValueError, match="ZeroTensors"):
        optimizer.step()
    assert not optimizer.state
    p.grad = p.grad.clone()
    optimizer.step()
    assert same_bits(p.detach(), torch.ones(5))


@interpreted
def test_philox_known_answers() -> None:
    from triton_rounding import KNOWN_ANSWERS, random_words

    for counter_and_key, words in KNOWN_ANSWERS:
        assert random_words(counter_and_key, "cpu") == words


@interpreted
def test_rounding_by_hand() -> None:
    from triton_rounding import ROUNDED, rounded_bits

    for x, word, expected in ROUNDED:
        assert rounded_bits(x, word, "cpu") == expected


#: Rows of rounding: seed, parameter, offset, inner_local, inner_global, theta.
ROWS = {
    "whole": (0, 0, 0, 2**40, 2**40, 1),
    "nearest": (3, -1, 0, 1, 1, 1),
    "states_alone": (3, 1, 0, 2**40, 2**40, 0),
    "rows": (1, 3, 7, 2**40, 2**40, 1),
    "far": (2**63 - 1, 5, 2**34 + 1, 2**40, 2**40, 1),
    "columns": (2**32, 1, 5, 7, 13, 1),
    "far_columns": (2**32 - 1, 2**31 - 1, 2**35 + 2, 1000, 2**33 + 3, 1),
}


def decay_alone(numels: list[int], rows: list[tuple[int, ...]], layout: str) -> dict[str, Any]:
    """Arguments of update_ whose gradient is 0: what is rounded is exact on every backend.

    The first parameter has a float32 gradient and so a launch of its own.
    """
    torch.manual_seed(0)
    theta = [in_layout(torch.randn(n).bfloat16(), layout) for n in numels]
    given = arguments(
        theta=theta,
        g=[torch.zeros(n, dtype=None if k == 0 else torch.bfloat16) for k, n in enumerate(numels)],
        step=[torch.tensor(float(7 * k)) for k in range(len(numels))],
        group_sizes=[len(numels)],
        rounding=[field for row in rows for field in row],
        **{name: [torch.zeros(n) for n in numels] for name in "muvw"},
    )
    given["hyper"][0], given["hyper"][6] = 1.0, 2.0**-10  # lr and decay
    return given


@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
@interpreted
def test_rounding_has_the_bits_of_the_cpp_kernel(layout: str) -> None:
    numels = {"whole": 0, "nearest": 40, "states_alone": 41, "rows": CHUNK + 1, "far": CHUNK,
              "columns": 2 * CHUNK - 1, "far_columns": 33}  # fmt: skip
    given, expected = (
        decay_alone([*numels.values()], [ROWS[name] for name in numels], layout) for _ in "ab"
    )
    moved = [(theta.float() * (1 - 2.0**-10)).bfloat16() for theta in given["theta"]]
    kernels().update_(**given)
    torch.ops.maxva.update_(*expected.values())
    assert same_bits(given["theta"], expected["theta"])
    for name, theta, nearest in zip(numels, given["theta"], moved, strict=True):
        assert same_bits(theta, nearest) == (name in ("whole", "nearest", "states_alone"))


@interpreted
def test_a_fitted_parameter_counts_its_elements_row_by_row() -> None:
    given, expected = (decay_alone([40], [ROWS["columns"]], "contiguous") for _ in "ab")
    for arguments_, update_ in ((given, kernels().update_), (expected, torch.ops.maxva.update_)):
        theta = in_layout(arguments_["theta"][0].view(5, 8), "gappy")
        arguments_ |= {k: [arguments_[k][0].view(5, 8)] for k in ("g", *"muvw")}
        arguments_["theta"] = [theta]
        update_(*arguments_.values())
    assert same_bits(given["theta"], expected["theta"])


@pytest.mark.parametrize("options", [{}, {"trust_ratio": True}], ids=["whole", "two_phases"])
@interpreted
def test_rounding_of_several_groups(options: dict[str, Any]) -> None:
    """Other seeds, dtypes and ways of rounding beside each other; a new seed needs a new table."""
    outcome = []
    for backend in ("triton", "cpu"):
        torch.manual_seed(0)
        groups = [
            {"params": [Parameter(torch.randn(5, 9).bfloat16())], **group}
            for group in (
                {"rounding_seed": 3}, {"rounding_seed": 2**33}, {"stochastic_rounding": False},
            )
        ]  # fmt: skip
        groups.append({"params": [Parameter(torch.randn(7))]})
        opt = FUSED["madam"](groups, backend=backend, weight_decay=2.0**-10, lr=1.0,
                             stochastic_rounding=True, **options)  # fmt: skip
        for step in range(2):
            opt.param_groups[1]["rounding_seed"] += step
            for p in params_of(opt):
                p.grad = torch.zeros_like(p)
            opt.step()
        outcome.append(snapshot(opt))
    assert same_bits(outcome[0]["params"], outcome[1]["params"])


# --- statistics ----------------------------------------------------------------------------------


def collected(
    backend: str, table: Tensor | None, problem: Any, **tensors: Tensor
) -> tuple[Tensor | None, dict[str, Any]]:
    """What a step leaves in `table`, and everything else it leaves."""
    opt = problem.optimizer(backend)
    for name, tensor in tensors.items():
        setattr(opt, name, tensor)
    run = find_backend(backend, "cpu")
    original = type(run).update

    def update(self: Any, batch: Any, *args: Any) -> None:
        batch.statistics = table
        original(self, batch, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run), "update", update)
        opt.step()
    return table, snapshot(opt)


def unset(n: int) -> Tensor:
    return torch.full((n, 5), math.nan, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "dtype", "algorithm"),
    [
        ("default", "fp32", "madam"), ("decoupled_clipped_nesterov", "bf16", "lamadam"),
        ("l2_amsgrad", "fp64", "madam"), ("lamb", "fp32", "lamadam"),
        ("lamb_amsgrad_l2", "fp16", "madam"), ("equal_betas", "fp32", "madam"),
    ],
)  # fmt: skip
@interpreted
def test_statistics(name: str, dtype: str, algorithm: str) -> None:
    """As the C++ kernel's; the same in every run; and nothing else is changed by them."""
    shapes = [(CHUNK + 33,), (0,), (7, 9)]
    problem = realistic_problem(shapes, algorithm, dtype=FLOATS[dtype], **OPTIONS[name])
    scale = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}
    found, ours = collected("triton", unset(3), problem, **scale)
    expected, _ = collected("cpu", unset(3), problem, **scale)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert same_bits(found[1], torch.zeros(5, dtype=torch.float64))
    assert same_bits((found, ours), collected("triton", unset(3), problem, **scale))
    assert same_bits(ours, collected("triton", None, problem, **scale)[1])


@pytest.mark.parametrize("options", [{}, {"trust_ratio": True}], ids=["whole", "two_phases"])
@interpreted
def test_skipped_step_leaves_statistics(options: dict[str, Any]) -> None:
    problem = realistic_problem([(40,), (0,)], dtype=torch.bfloat16, **options)
    table = torch.full((2, 5), 7.0, dtype=torch.float64)
    collected("triton", table, problem, found_inf=torch.tensor(1.0))
    assert same_bits(table, torch.full_like(table, 7.0))


@interpreted
def test_each_phase_sets_its_own_statistics() -> None:
    for phase, columns in ((1, [0, 1, 2, 3]), (2, [4]), (0, [0, 1, 2, 3, 4])):
        table = unset(2)
        norms = torch.ones(2, 2, dtype=torch.float64)
        kernels().update_(**arguments(statistics=table, norms=norms, phase=phase))
        assert [k for k in range(5) if not table[:, k].isnan().any()] == columns
        assert [k for k in range(5) if not table[:, k].isnan().all()] == columns


# --- traversal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"trust_ratio": True, "weight_decay": 0.1}], ids=str)
@interpreted
def test_chunk_edges(options: dict[str, Any]) -> None:
    """Every element of tensors around whole chunks is updated once, whatever lies beside it."""
    shapes = [(0,), (CHUNK - 1,), (CHUNK,), (1,), (CHUNK + 1,), (2 * CHUNK,), (0,)]
    check_step(realistic_problem(shapes, **options), "triton")


@interpreted
def test_sums_of_more_chunks_than_lanes() -> None:
    """Each tensor's into the row of its place in the caller's lists."""
    from maxva_kernels.triton_kernels import multi_tensor_apply as mta

    ends = [0, 300, 301, 301]
    rows = torch.zeros(3, mta.ROW.value, dtype=torch.int64)
    for row, first, end, index in zip(rows, ends, ends[1:], (2, 0, 1), strict=False):
        row[mta.FIRST_CHUNK.value], row[mta.END_CHUNK.value] = first, end
        row[mta.INDEX.value] = index
    of_chunk = torch.arange(602, dtype=torch.float64).view(301, 2)
    found = torch.full((3, 2), math.nan, dtype=torch.float64)
    mta.add_sums_kernel[(3, 2)](rows, of_chunk, None, found, FIRST_FIELD=0, WIDTH=2)
    first = of_chunk[:300].sum(0)
    assert torch.equal(found, torch.stack([of_chunk[300], torch.zeros_like(first), first]))


@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@interpreted
def test_alignment_does_not_matter(dtype: torch.dtype, layout: str) -> None:
    problem = realistic_problem([(CHUNK,), (CHUNK + 3,), (7,)], dtype=dtype, amsgrad=True)
    aligned = problem.optimizer("triton")
    misaligned = problem.optimizer("triton", layout=layout, grad_layout="misaligned")
    assert all(p.grad.data_ptr() % 16 for p in params_of(misaligned))
    aligned.step()
    misaligned.step()
    assert same_bits(snapshot(aligned), snapshot(misaligned))


@pytest.mark.parametrize(
    ("layout", "grad_layout"),
    [("transposed", "contiguous"), ("contiguous", "transposed"), ("gappy", "contiguous"),
     ("contiguous", "expanded"), ("rows", "gappy")],
)  # fmt: skip
@interpreted
def test_layouts(layout: str, grad_layout: str) -> None:
    problem = realistic_problem([(6, 9), (31, 2)])
    plain = problem.with_gradients([g[:1].expand(g.shape).clone() for g in problem.g])
    expected = plain.optimizer("triton")
    opt = plain.optimizer("triton", layout=layout, grad_layout=grad_layout)
    for _ in range(2):
        expected.step()
        opt.step()
    assert same_bits(snapshot(expected)["params"], snapshot(opt)["params"])
    assert same_bits(snapshot(expected)["states"], snapshot(opt)["states"])


@interpreted
def test_gaps_that_all_tensors_have_are_left() -> None:
    """A parameter that is not dense goes through temporaries, though all are laid out as it is."""
    given, expected = arguments(), arguments()
    around = []
    for name in ("theta", "g", *"muvw"):
        whole = torch.full((3, 5), 7.0)
        whole[:, :2] = given[name][0]
        given[name][0] = whole[:, :2]
        around.append(whole)
    kernels().update_(**given)
    kernels().update_(**expected)
    for name in ("theta", *"muvw"):
        assert same_bits(given[name], expected[name]), name
    assert all(bool((whole[:, 2:] == 7.0).all()) for whole in around)


@interpreted
def test_groups_without_parameters_are_counted() -> None:
    """More of them than a program has lanes."""
    sizes = [0] * 130 + [2] + [0] * 130
    given = arguments(
        group_sizes=sizes,
        group_step=[torch.zeros(1, dtype=torch.int32) for _ in sizes],
        hyper=arguments()["hyper"] * len(sizes),
        lr=[None] * len(sizes),
    )
    kernels().update_(**given)
    assert all(int(step) == 1 for step in given["group_step"])
    assert [step.item() for step in given["step"]] == [1, 1]


@interpreted
def test_several_groups_with_different_options() -> None:
    """Each tensor has its own group's scalars, lr tensors of any dtype included."""
    lrs = [0.1, torch.tensor(0.25), torch.tensor([0.5], dtype=torch.float64),
           torch.tensor(0.125, dtype=torch.bfloat16)]  # fmt: skip

    def make(backend: str) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        groups = [
            {"params": [Parameter(torch.randn(5)) for _ in range(k + 1)], "lr": lr, "eps": 10.0**-k}
            for k, lr in enumerate(lrs)
        ]
        opt = FUSED["madam"](groups, backend=backend, weight_decay=0.1)
        for p in params_of(opt):
            p.grad = torch.randn(5)
        return opt

    opt, reference = make("triton"), make("eager")
    for _ in range(2):
        opt.step()
        reference.step()
    for p, q in zip(params_of(opt), params_of(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@interpreted
def test_skipped_step_changes_nothing(options: dict[str, Any]) -> None:
    problem = realistic_problem([(40,), (3, 5)], dtype=torch.bfloat16, **options)
    opt = problem.optimizer("triton")
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(2.0)
    before = snapshot(opt)
    opt.step()
    assert same_bits(before, snapshot(opt))
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    after = snapshot(opt)
    assert all(not same_bits(a, b) for a, b in zip(before["grads"], after["grads"], strict=True))
    assert all(
        b["step"] == a["step"] + 1 for a, b in zip(before["states"], after["states"], strict=True)
    )


@interpreted
def test_sum_of_squares() -> None:
    """Mixed dtypes, gaps, more than a chunk, values beyond float32's range; same bits again."""
    torch.manual_seed(0)
    g = [
        torch.randn(40000),
        torch.randn(3, 5).bfloat16(),
        torch.randn(0),
        torch.randn(17, 3).half()[:, 1],
        torch.randn(16384, dtype=torch.float64) * 1e30,
        torch.randn(9)[1:],
    ]
    expected = math.fsum(x * x for tensor in g for x in tensor.double().flatten().tolist())
    found = kernels().sum_of_squares(g)
    assert found.dtype == torch.float64
    assert found.shape == (1,)
    assert abs(found.item() / expected - 1) < 1e-13
    assert same_bits(found, kernels().sum_of_squares(g))
    assert kernels().sum_of_squares([torch.zeros(0)]).item() == 0
    assert math.isinf(kernels().sum_of_squares([torch.tensor([1.0, -math.inf])]).item())
    assert math.isnan(kernels().sum_of_squares([torch.tensor([1.0, math.nan])]).item())


@pytest.mark.parametrize("numel", [1, 40000])
@interpreted
def test_sum_of_squares_of_one_size(numel: int) -> None:
    """Where none of the gradients hides what another one adds."""
    torch.manual_seed(0)
    g = [
        torch.randn(numel),
        torch.randn(3, 5).bfloat16(),
        torch.randn(17, 3).half()[:, 1],
        torch.randn(16384, dtype=torch.float64),
        torch.randn(16385)[1:],
        torch.randn(9)[1:],
    ]
    for part in (g, *([tensor] for tensor in g)):
        expected = math.fsum(x * x for tensor in part for x in tensor.double().flatten().tolist())
        found = kernels().sum_of_squares(part).item()
        assert abs(found / expected - 1) < 1e-13


@interpreted
def test_sum_of_more_chunks_than_a_block() -> None:
    from maxva_kernels.triton_kernels import norm

    partial, result = torch.ones(2049, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    norm.add_partial_sums_kernel[(1,)](partial, result, 2049)
    assert result.item() == 2049


@pytest.mark.parametrize("norm", [0.0, 0.3, 7.0, 1e39, math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [0.1, 1.0, math.inf])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("found_inf", [None, 0.0, 2.0])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
@interpreted
def test_control_block(
    norm: float, max_grad_norm: float, scale: Any, found_inf: Any, skip_nonfinite: bool
) -> None:
    square = torch.tensor([norm * norm], dtype=torch.float64)
    controls = []
    for backend in ("triton", "eager"):
        control = torch.full((3,), -1.0, dtype=torch.float64)
        find_backend(backend, "cpu").write_control(
            control,
            square,
            None if scale is None else torch.tensor(scale),
            None if found_inf is None else torch.tensor(found_inf),
            max_grad_norm,
            skip_nonfinite,
        )
        controls.append(control)
    torch.testing.assert_close(*controls, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("found_inf", [-1.0, math.nan])
@interpreted
def test_found_inf_is_anything_but_0(found_inf: float) -> None:
    control = torch.zeros(3, dtype=torch.float64)
    square = torch.ones(1, dtype=torch.float64)
    kernels().write_control_(control, square, None, torch.tensor(found_inf), 2.0, False)
    assert control.tolist() == [1.0, 1.0, 1.0]


# --- tables --------------------------------------------------------------------------------------


def move_data(p: Parameter, opt: torch.optim.Optimizer) -> None:
    p.data = p.data.clone()


def transpose_in_place(p: Parameter, opt: torch.optim.Optimizer) -> None:
    p.data = p.data.t()  # same address, same sizes, other strides
    p.grad = p.grad.t().contiguous()


def narrow_in_place(p: Parameter, opt: torch.optim.Optimizer) -> None:
    """Leaves the address as it is."""
    p.data = p.data[:3]
    p.grad = p.grad[:3]
    for key in ("exp_avg", "exp_avg_sq", "maxva_avg", "maxva_weight"):
        opt.state[p][key] = opt.state[p][key][:3]


def replace_state(p: Parameter, opt: torch.optim.Optimizer) -> None:
    opt.state[p]["maxva_weight"] = opt.state[p]["maxva_weight"] * 0.5


def restart(p: Parameter, opt: torch.optim.Optimizer) -> None:
    opt.state[p]["step"] = torch.zeros(())


def change_hyper_parameters(p: Parameter, opt: torch.optim.Optimizer) -> None:
    opt.param_groups[0].update(weight_decay=0.5, betas=(0.5, 0.9), lr=0.03)


def drop_gradient(p: Parameter, opt: torch.optim.Optimizer) -> None:
    p.grad = None


def reinterpret(p: Parameter, opt: torch.optim.Optimizer) -> None:
    p.data = p.data.view(torch.float16)  # same address, same sizes, same layout
    p.grad_dtype = None


def transpose_gradient(p: Parameter, opt: torch.optim.Optimizer) -> None:
    assert p.grad is not None
    p.grad = p.grad.t().contiguous().t()


def make_gradient_half(p: Parameter, opt: torch.optim.Optimizer) -> None:
    assert p.grad is not None
    p.grad_dtype = None
    p.grad = p.grad.bfloat16()


def share_memory_until_written(p: Parameter, opt: torch.optim.Optimizer) -> None:
    p.copy_of_then = torch._lazy_clone(p.detach())
    p.values_then = p.detach().clone()


def add_group(p: Parameter, opt: torch.optim.Optimizer) -> None:
    q = Parameter(torch.ones(4))
    q.grad = torch.ones(4)
    opt.add_param_group({"params": [q], "lr": 1.0})


@pytest.mark.parametrize(
    "change",
    [move_data, transpose_in_place, narrow_in_place, replace_state, restart,
     change_hyper_parameters, drop_gradient, reinterpret, transpose_gradient, make_gradient_half,
     share_memory_until_written, add_group],
)  # fmt: skip
@interpreted
def test_no_stale_table(change: Any, asked: str) -> None:
    """What a step reads is what is there now: the same as a backend that keeps nothing."""
    dtype = torch.bfloat16 if change is reinterpret else torch.float32
    problem = realistic_problem([(6, 6), (6, 6), (9,)], dtype=dtype)
    outcome = []
    for backend in ("triton", "cpu" if has_extension() else "eager"):
        opt = problem.optimizer(backend)
        for _ in range(2):
            opt.step()
        change(params_of(opt)[1], opt)
        for _ in range(2):
            opt.step()
        outcome.append(snapshot(opt))
        for p in params_of(opt):
            if hasattr(p, "copy_of_then"):
                assert torch.equal(p.copy_of_then, p.values_then)
    for ours, theirs in zip(outcome[0]["params"], outcome[1]["params"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    for ours, theirs in zip(outcome[0]["states"], outcome[1]["states"], strict=True):
        assert ours["step"] == theirs["step"]


@interpreted
def test_exchanged_counters_are_found(asked: str) -> None:
    """Those of groups, too; and what is no counter any more is refused where the old one was."""
    given = arguments(group_step=[torch.zeros(1, dtype=torch.int32)])
    kernels().update_(**given)
    first = given["group_step"][0]
    given["group_step"] = [torch.zeros(1, dtype=torch.int32)]
    kernels().update_(**given)
    assert [int(step) for step in (first, *given["group_step"])] == [1, 1]
    pair = torch.zeros(2)
    given["step"][1] = pair[:1]
    kernels().update_(**given)
    given["step"][1] = pair
    with pytest.raises(ValueError, match="step must have one element"):
        kernels().update_(**given)
    assert pair.tolist() == [1, 0]


@interpreted
def test_tables_end_with_their_optimizer() -> None:
    from maxva_kernels.triton_kernels import operators

    before = len(operators._update_tables)
    opt = realistic_problem([(5,)]).optimizer("triton")
    opt.step()
    assert len(operators._update_tables) == before + 1
    del opt
    assert len(operators._update_tables) == before


@interpreted
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (3, 0)])
def test_empty_tensors_have_every_layout(shape: tuple[int, ...], asked: str) -> None:
    strides = tuple(range(5, 5 + len(shape)))
    p, empty = Parameter(torch.ones(3)), Parameter(torch.empty_strided(shape, strides))
    p.grad, empty.grad = torch.ones(3), torch.empty(shape)
    assert empty.stride() != empty.grad.stride()
    opt = FUSED["madam"]([p, empty], lr=0.1, backend="triton")
    opt.step()
    opt.step()
    assert opt.state[empty]["step"].item() == 2
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8), rtol=0, atol=1e-5)


@interpreted
def test_equal_steps_copy_nothing_anew(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and hyper-parameters where they were, no word travels to the device."""
    from maxva_kernels.triton_kernels import tables

    opt = realistic_problem([(5,), (6, 2)], max_grad_norm=1.0).optimizer("triton")
    opt.step()
    copies = []
    copy = tables.Uploads.copy
    monkeypatch.setattr(
        tables.Uploads, "copy", lambda self, *args: copies.append(args) or copy(self, *args)
    )
    opt.step()
    assert not copies
    opt.param_groups[0]["lr"] *= 0.5
    opt.step()
    assert len(copies) == 1


@interpreted
def test_norms_of_many_optimizers_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from maxva_kernels.triton_kernels import operators

    built = []
    table = operators.NormTable
    monkeypatch.setattr(operators, "_norm_tables", {})
    monkeypatch.setattr(operators, "NormTable", lambda *args: built.append(args) or table(*args))
    for _ in range(2):
        for numel in range(1, 33):
            assert kernels().sum_of_squares([torch.ones(numel)]).item() == numel
    assert len(built) == 32


@interpreted
def test_a_capture_is_asked_for_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its current stream, not of one of the device that happens to be current."""
    from maxva_kernels.triton_kernels import operators, tables

    current, asked_there = [], []

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def is_capturing(device: torch.device) -> bool:
        asked_there.append(current == [device])
        return False

    monkeypatch.setattr(operators, "_on_device", on_device)
    for module in (operators, tables):
        monkeypatch.setattr(module, "is_capturing", is_capturing)
    given = arguments()
    for run in (lambda: kernels().update_(**given), lambda: kernels().sum_of_squares(given["g"])):
        asked_there.clear()
        run()
        assert asked_there
        assert all(asked_there)


class Interrupted(list[Any]):
    """Compared, lets another thread run before the answer is used, to its end if that can be."""

    def __init__(self, values: list[Any], other: Callable[[], Any]) -> None:
        super().__init__(values)
        self.other = other

    def __eq__(self, there: object) -> bool:
        same = super().__eq__(there)
        if same:
            thread = threading.Thread(target=self.other)
            thread.start()
            thread.join(timeout=0.5)
        return same

    def __ne__(self, there: object) -> bool:
        return not self == there

    __hash__ = None


@interpreted
def test_threads_that_share_tables_get_their_own() -> None:
    """Whichever thread looks at a device's tables while another one does."""
    from maxva_kernels.triton_kernels.tables import StepWords, Tables, Uploads

    device = torch.device("cpu")
    tables: Any = Tables(capacity=3)
    for name in "abc":
        assert tables.find([name], device, lambda name=name: f"table {name}") == f"table {name}"
    found = tables.find(Interrupted(["b"], lambda: tables.find(["a"], device, str)), device, str)
    assert found == "table b"
    words = StepWords(Uploads(device))
    words.on_device([1, 2], None, False)
    again = Interrupted([1, 2], lambda: words.on_device([3, 4], None, False))
    assert words.on_device(again, None, False).tolist() == [1, 2]


# --- checks --------------------------------------------------------------------------------------


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of update_ for two tensors in one group, with changes."""
    torch.manual_seed(0)
    lists = {name: [torch.rand(3, 2), torch.rand(4)] for name in ("theta", "g", "m", "u", "v", "w")}
    return {
        **lists,
        "vmax": [], "master": [], "step": [torch.zeros(()), torch.zeros(())], "group_step": [],
        "group_sizes": [2],
        "hyper": [0.1, 0.9, 0.5, 0.999, 0.999, 1e-8, 0.0, 1e-16, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        "lr": [None], "control": None, "grad_scale": None, "norms": None, "statistics": None,
        "rounding": [], "algorithm": "madam", "phase": 0,
        **changes,
    }  # fmt: skip


NEAREST = [0, -1, 0, 1, 1, 0]
BFLOAT16 = {"theta": [torch.ones(3, 2).bfloat16(), torch.ones(4).bfloat16()]}
MASTER = [torch.ones(3, 2), torch.ones(4)]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"algorithm": "adam"}, ValueError, "algorithm"),
        (
            {"theta": [x.double() for x in MASTER], "master": MASTER},
            TypeError,
            "parameter 0 is float64, which has no master weight",
        ),
        ({"phase": 3}, ValueError, "phase"),
        ({"g": [torch.rand(3, 2)]}, ValueError, "2 parameters, but 1 gradients"),
        ({"u": []}, ValueError, r"2 parameters, but 0 of maxva_avg \(u\)"),
        ({"vmax": [torch.rand(3, 2)]}, ValueError, "max_exp_avg_sq"),
        ({"hyper": [0.1]}, ValueError, "hyper-parameters"),
        ({"lr": [torch.rand(2)]}, ValueError, "lr must have one element"),
        ({"group_step": [torch.zeros(1), torch.zeros(1)]}, ValueError, "group steps"),
        ({"group_sizes": [1]}, ValueError, "add up to 1"),
        ({"group_sizes": [3, -1]}, ValueError, "."),
        ({"control": torch.zeros(3)}, ValueError, "control must be float64"),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must have one element"),
        ({"phase": 1}, ValueError, r"norms must be float64 \[2, 2\]"),
        ({"statistics": torch.zeros(2, 5)}, ValueError, r"statistics must be float64 \[2, 5\]"),
        ({"statistics": torch.zeros(5, 2).double().t()}, ValueError, "statistics must be float64"),
        ({"rounding": [0, 0, 0, 1, 1, 1]}, ValueError, "empty or 2 rows of 6, has 6 entries"),
        (
            {"rounding": [*NEAREST, 0, 0, 0, 1, 1, 1]},
            ValueError,
            r"rounding\[1\] is for a bfloat16",
        ),
        (
            {**BFLOAT16, "rounding": [*NEAREST, 0, 0, 0, 1, 1, 1], "master": MASTER},
            ValueError,
            "without master weights",
        ),
        ({**BFLOAT16, "rounding": [*NEAREST, 0, 0, -1, 1, 1, 1]}, ValueError, "offset >= 0"),
        ({**BFLOAT16, "rounding": [*NEAREST, 0, 0, 0, 0, 1, 0]}, ValueError, "inner sizes"),
        ({**BFLOAT16, "rounding": [*NEAREST, 0, 0, 0, 1, -1, 1]}, ValueError, "inner sizes"),
        ({"g": [torch.rand(3, 2), torch.rand(5)]}, ValueError, r"gradient\[1\] has shape \[5\]"),
        ({"g": [torch.rand(3, 2), torch.rand(4, device="meta")]}, ValueError, "is on meta"),
        ({"g": [torch.rand(3, 2), torch.ones(4, dtype=torch.int32)]}, TypeError, "int32"),
        ({"g": [torch.rand(3, 2), torch.ones(4).to_sparse()]}, TypeError, "only dense"),
        ({"theta": [torch.rand(3, 2), torch.rand(1).expand(4)]}, ValueError, "clone it first"),
        (
            {"g": [torch.rand(3, 2), torch.rand(1).expand(4)], "grad_scale": torch.ones(1)},
            ValueError,
            r"gradient\[1\] .* clone it first",
        ),
        ({"v": [torch.rand(3, 2), torch.rand(1).expand(4)]}, ValueError, r"exp_avg_sq \(v\)\[1\]"),
        ({"w": [torch.rand(3, 2), torch.rand(4).half()]}, TypeError, "maxva_weight"),
        ({"theta": [torch.rand(3, 2).double(), torch.rand(4)]}, TypeError, "float64"),
        ({"step": [torch.zeros(()), torch.zeros(2)]}, ValueError, "step must have one element"),
        ({"step": [torch.zeros(()), torch.zeros((), dtype=torch.int32)]}, TypeError, "step must"),
    ],
)
@interpreted
def test_refusal_changes_nothing(changes: dict[str, Any], error: type, words: str) -> None:
    given = arguments(**changes)
    before = [
        (tensor, tensor.clone())
        for value in given.values()
        if isinstance(value, list)
        for tensor in value
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided
    ]
    for check_only in (False, True):
        with pytest.raises(error, match=words):
            kernels().update_(**given, check_only=check_only)
    assert all(same_bits(tensor, copy) for tensor, copy in before if tensor.device.type == "cpu")
    kernels().update_(**arguments())  # and an accepted call is accepted afterwards


@interpreted
def test_version_counters() -> None:
    given = arguments(grad_scale=torch.tensor(2.0))
    before = [tensor._version for tensor in (*given["theta"], *given["g"])]
    kernels().update_(**given, check_only=True)
    assert [tensor._version for tensor in (*given["theta"], *given["g"])] == before
    kernels().update_(**given)
    after = [tensor._version for tensor in (*given["theta"], *given["g"])]
    assert all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["theta", "g", "v"])
@interpreted
def test_a_tensor_without_strides_is_named(name: str, asked: str) -> None:
    """Though to ask for them raises before anything is checked."""
    given = arguments()
    given[name][1] = given[name][1].to_sparse()
    for _ in range(2):
        with pytest.raises(TypeError, match="only dense"):
            kernels().update_(**given)


# --- availability --------------------------------------------------------------------------------


def has_extension() -> bool:
    return maxva_kernels.backends()["cpu"] == "available"


@interpreted
def test_interpreter_is_for_those_who_ask() -> None:
    assert maxva_kernels.backends()["triton"] == "available"
    auto = find_backend("auto", "cpu")
    assert auto is find_backend("cpu" if has_extension() else "eager", "cpu")
    assert auto is not find_backend("triton", "cpu")
    with pytest.raises(ValueError, match="does not serve"):
        find_backend("triton", "cuda")


def run_python(code: str, folder: Path, **variables: str) -> str:
    """What a fresh interpreter prints, started in a folder that is first on its path."""
    import os
    import subprocess
    import sys

    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


REPORT = "import maxva_kernels; print(maxva_kernels.backends()['triton'])"


def test_missing_triton_is_reported(tmp_path: Path) -> None:
    """A folder that happens to be called triton is no Triton."""
    (tmp_path / "triton").mkdir()
    hide = (
        "from importlib.machinery import PathFinder\n"
        "class Folder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return PathFinder.find_spec(name, [{str(tmp_path)!r}]) if name == 'triton' "
        "else None\n"
        "sys.meta_path.insert(0, Folder)\n"
    )
    found = run_python(f"{hide}import triton; {REPORT}", tmp_path)
    assert "Triton does not load" in found
    assert "triton.language" in found
    assert "pip install triton" in found


def test_broken_triton_is_reported(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: no such file')")
    assert "OSError: libtriton.so: no such file" in run_python(REPORT, tmp_path)


def test_triton_without_driver_is_reported(tmp_path: Path) -> None:
    code = (
        "import torch, triton.backends\n"
        "triton.backends.backends.clear()\n"
        "torch.cuda.is_available = lambda: True\n" + REPORT
    )
    assert "no usable driver" in run_python(code, tmp_path)


def test_auto_on_the_cpu_does_not_import_the_kernels(tmp_path: Path) -> None:
    code = (
        "import sys, maxva_kernels, torch\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "maxva_kernels.FusedMAdam([p]).step()\n"
        "print('maxva_kernels.triton_kernels' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "False\n"


# --- checkpoints ---------------------------------------------------------------------------------


@interpreted
def test_state_goes_on_from_backend_to_backend(algorithm: str) -> None:
    """Eager, CPU, Triton and CPU again: as the reference throughout, whoever takes the steps."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=generator).bfloat16() for n in (5, 4099)]
    params, expected = ([Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"master_weights": True, "amsgrad": True, "weight_decay": 0.1}
    reference = FUSED[algorithm](expected, backend="eager", **options)
    saved = None
    for backend in ("eager", "cpu", "triton", "cpu"):
        opt = FUSED[algorithm](params, backend=backend, **options)
        if saved is not None:
            opt.load_state_dict(saved)
        for _ in range(2):
            for p, q in zip(params, expected, strict=True):
                p.grad = q.grad = torch.randn(p.shape, generator=generator).bfloat16()
            opt.step()
            reference.step()
        saved = opt.state_dict()
    for p, q in zip(params, expected, strict=True):
        master, other = opt.state[p]["master_param"], reference.state[q]["master_param"]
        torch.testing.assert_close(master, other, rtol=0, atol=1e-6)
        assert same_bits(p.detach(), master.bfloat16())
        assert opt.state[p]["step"] == 8
