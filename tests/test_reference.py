"""What is computed, by the eager reference and by the kernels.

Against the authors' trajectories, against the equations written a second time, and against other
optimizers where MaxVA becomes them.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from definition import Coordinates, Definition
from exactness import FUSED, KEYS, REFERENCE, heavy_tailed, realistic_problem, take_step
from torch import Tensor
from torch.nn import Parameter

from maxva_kernels.hyper import default_beta_init

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
BY_CLASS = {"FusedMAdam": "madam", "FusedLaMAdam": "lamadam"}


def make(backend: str, algorithm: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """The reference class for "eager", the fused class for a kernel."""
    if backend == "eager":
        return REFERENCE[algorithm](params, **options)
    return FUSED[algorithm](params, backend=backend, **options)


def states_of(opt: torch.optim.Optimizer, p: Tensor) -> dict[str, np.ndarray]:
    """m, u, v, w (and vmax) in float64."""
    state = opt.state[p]
    return {s: state[k].double().numpy() for s, k in KEYS.items() if k in state}


# --- the authors' optimizers ---------------------------------------------------------------------


def run_golden(case: str, backend: str, dtype: torch.dtype) -> Any:
    """Runs a golden case; yields what is to be compared per tensor: ours and theirs."""
    options = dict(CASES[case])
    algorithm = BY_CLASS[options.pop("optimizer")]
    data = np.load(GOLDEN / f"{case}.npz")
    params = [Parameter(torch.tensor(data[f"param0_{k}"], dtype=dtype)) for k in range(3)]
    opt = make(backend, algorithm, params, **options)
    path: list[list[np.ndarray]] = [[], [], []]
    for t, lr in enumerate(data["lr"]):
        opt.param_groups[0]["lr"] = float(lr)
        for k, p in enumerate(params):
            p.grad = torch.tensor(data[f"grads_{k}"][t], dtype=dtype)
        opt.step()
        for k, p in enumerate(params):
            path[k].append(p.detach().double().numpy().copy())
    for k, p in enumerate(params):
        theirs = {name: data[f"{name}_{k}"] for name in ("params", "m", "u", "v", "w")}
        if options["amsgrad"]:
            theirs["max_denominator"] = data[f"max_denominator_{k}"]
        yield np.stack(path[k]), states_of(opt, p), theirs, options


@pytest.mark.parametrize("case", CASES)
def test_golden_trajectory_in_float64(case: str, backend: str) -> None:
    for path, ours, theirs, options in run_golden(case, backend, torch.float64):
        np.testing.assert_allclose(path, theirs["params"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours["m"], theirs["m"], rtol=1e-9, atol=0)
        for x in "uv":
            np.testing.assert_allclose(
                ours[x] / ours["w"], theirs[x] / theirs["w"], rtol=1e-9, atol=0, err_msg=x
            )
        if options["amsgrad"]:
            denominator = np.sqrt(ours["vmax"]) + options["eps"]
            np.testing.assert_allclose(denominator, theirs["max_denominator"], rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_golden_trajectory_in_float32(case: str, backend: str) -> None:
    l2 = not CASES[case]["adam_w_mode"]
    m_bound, u_bound, v_bound = (5e-4, 5e-4, 1e-3) if l2 else (3e-5, 5e-5, 2e-4)
    for path, ours, theirs, options in run_golden(case, backend, torch.float32):
        np.testing.assert_allclose(path, theirs["params"], rtol=0, atol=1e-5)
        assert np.abs(ours["m"] - theirs["m"]).max() <= m_bound * np.abs(theirs["m"]).max()
        vhat = theirs["v"] / theirs["w"]
        error = np.abs(ours["u"] / ours["w"] - theirs["u"] / theirs["w"])
        assert (error <= u_bound * np.sqrt(vhat)).all()
        np.testing.assert_allclose(ours["v"] / ours["w"], vhat, rtol=v_bound, atol=0)
        if not l2:
            np.testing.assert_allclose(ours["w"], theirs["w"], rtol=0, atol=3e-5)
        if options["amsgrad"]:
            denominator = np.sqrt(ours["vmax"]) + options["eps"]
            np.testing.assert_allclose(denominator, theirs["max_denominator"], rtol=v_bound)


# --- beta_t --------------------------------------------------------------------------------------


def beta_of_step(w_before: np.ndarray, w_after: np.ndarray) -> np.ndarray:
    """beta_t, from w <- beta w + 1 - beta."""
    return (1 - w_after) / (1 - w_before)


@pytest.mark.parametrize("bounds", [(0.5, 0.999), (0.9, 0.95), (0.01, 1.0)], ids=str)
def test_beta_maximises_the_variance(bounds: tuple[float, float], backend: str) -> None:
    """Eq. 6 against every beta of a fine grid."""
    low, high = bounds
    problem = realistic_problem(
        [(300,)], dtype=torch.float64, betas=(0.9, high), beta_min=low, delta=0.0
    )
    opt = problem.optimizer(backend)
    (p,) = opt.param_groups[0]["params"]
    old = {s: problem.states[0][k].numpy() for s, k in KEYS.items() if s in "uvw"}
    take_step(opt)
    new = states_of(opt, p)
    seen = old["w"] > 0
    g = problem.g[0].numpy()[seen]
    u, v, w = (old[s][seen] for s in "uvw")

    def variance(beta: Any) -> np.ndarray:
        wb = beta * w + 1 - beta
        return (beta * v + (1 - beta) * g**2) / wb - ((beta * u + (1 - beta) * g) / wb) ** 2

    grid = np.linspace(low, high, 20001)
    values = np.stack([variance(beta) for beta in grid])
    beta = beta_of_step(w, new["w"][seen])
    assert beta.min() >= low - 1e-9
    assert beta.max() <= high + 1e-9
    rounding = 1e-13 * (v / w + g**2)
    assert (variance(beta) >= values.max(axis=0) - rounding).all()
    # the largest variance of the grid may be anywhere in a flat top, but beta is beside it
    apart = np.abs(beta - grid[values.argmax(axis=0)])
    flat = values.max(axis=0) - values.min(axis=0) < 1e-6 * (v / w)
    assert (apart[~flat] <= 2 * (grid[1] - grid[0])).all()
    assert (~flat).sum() > 200
    inside = (beta > low + 1e-6) & (beta < high - 1e-6)
    assert inside.sum() > 5, "too few unclipped coordinates to mean anything"


@pytest.mark.parametrize("beta_init", [0.3, 0.5, 0.9, None])
def test_second_beta_is_constant(beta_init: float | None, backend: str, algorithm: str) -> None:
    """At t = 2 beta is 1 / (2 - beta_1) whatever the two gradients are."""
    generator = torch.Generator().manual_seed(3)
    p = Parameter(torch.zeros(500, dtype=torch.float64))
    opt = make(backend, algorithm, [p], betas=(0.9, 1.0), beta_init=beta_init, delta=0.0)
    w = [np.zeros(500)]
    for _ in range(2):
        p.grad = torch.randn(500, generator=generator, dtype=torch.float64)
        opt.step()
        w.append(states_of(opt, p)["w"].copy())
    first = 0.9 if beta_init is None else beta_init
    np.testing.assert_allclose(beta_of_step(w[0], w[1]), first, rtol=1e-14)
    np.testing.assert_allclose(beta_of_step(w[1], w[2]), 1 / (2 - first), rtol=1e-12)


def test_beta_and_w_keep_their_bounds(backend: str, algorithm: str) -> None:
    """It is beta >= 1 / (1 + w) where the lower bound does not clip it, and w only grows."""
    generator = torch.Generator().manual_seed(4)
    p = Parameter(torch.zeros(400, dtype=torch.float64))
    opt = make(backend, algorithm, [p], betas=(0.9, 1.0), beta_min=0.01, delta=0.0)
    before = np.zeros(400)
    unclipped = 0
    for t in range(60):
        p.grad = heavy_tailed((400,), generator, t).double()
        opt.step()
        w = states_of(opt, p)["w"].copy()
        assert (w >= before).all()
        assert (w <= 1).all()
        if t:
            beta = beta_of_step(before, w)
            free = (beta < 1 - 1e-9) & (before < 0.99)
            assert (beta[free] >= 1 / (1 + before[free]) - 1e-9).all()
            unclipped += free.sum()
        before = w
    assert unclipped > 400


def test_w_grows_to_one(backend: str, algorithm: str) -> None:
    generator = torch.Generator().manual_seed(4)
    p = Parameter(torch.zeros(400, dtype=torch.float64))
    opt = make(backend, algorithm, [p], betas=(0.9, 0.9), beta_min=0.5)
    before = np.zeros(400)
    for t in range(1, 200):
        p.grad = heavy_tailed((400,), generator, t).double()
        opt.step()
        w = states_of(opt, p)["w"].copy()
        assert (w >= 1 - 0.9**t - 1e-14).all()
        assert (w <= 1).all()
        assert (w > before)[before < 1 - 1e-9].all()
        before = w
    assert before.min() > 1 - 1e-8


@pytest.mark.parametrize(("high", "expected"), [(0.999, 0.999), (0.5, 0.5), (1.0, 0.9)])
def test_default_beta_init(high: float, expected: float, backend: str) -> None:
    """Eq. 7: the first beta is betas[1], and 0.9 where that is 1; not clipped by beta_min."""
    assert default_beta_init(high) == expected
    p = Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    opt = make(backend, "madam", [p], betas=(0.9, high), beta_min=0.4)
    opt.step()
    np.testing.assert_allclose(states_of(opt, p)["w"], 1 - expected, rtol=1e-15)


def test_given_beta_init_is_not_clipped(backend: str, algorithm: str) -> None:
    p = Parameter(torch.ones(2, dtype=torch.float64))
    p.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    opt = make(backend, algorithm, [p], betas=(0.9, 0.999), beta_min=0.9, beta_init=0.25)
    opt.step()
    np.testing.assert_allclose(states_of(opt, p)["w"], 0.75, rtol=1e-15)


@pytest.mark.parametrize("delta", [0.0, 1e-16, 1e-3])
def test_delta_in_the_denominator(delta: float, backend: str) -> None:
    """It shifts beta as Eq. 6 with the authors' delta says, and 0/0 becomes beta_min."""
    g = torch.tensor([0.02, 0.5, 1e-9, 1.0], dtype=torch.float64)
    u = torch.tensor([0.01, 0.02, 0.0, 0.5], dtype=torch.float64)
    v = torch.tensor([0.0004, 0.001, 0.0, 0.5], dtype=torch.float64)
    w = torch.full((4,), 0.5, dtype=torch.float64)
    p = Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = g.clone()
    opt = make(backend, "madam", [p], betas=(0.9, 0.999999), beta_min=0.05, delta=delta)
    opt.state[p] = {
        "step": torch.tensor(3.0), "exp_avg": torch.zeros_like(g), "maxva_avg": u.clone(),
        "exp_avg_sq": v.clone(), "maxva_weight": w.clone(),
    }  # fmt: skip
    opt.step()
    mean, vhat = u / w, v / w
    d, var = (g - mean) ** 2, vhat - mean**2
    expected = (d + var) / (w * (d - var) + d + var + delta)
    expected = expected.nan_to_num(0.05).clamp(0.05, 0.999999).numpy()  # the last is 0/0
    got = beta_of_step(w.numpy(), states_of(opt, p)["w"])
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_zero_over_zero_is_beta_min(backend: str, algorithm: str) -> None:
    p = Parameter(torch.ones(5))
    opt = make(backend, algorithm, [p], betas=(0.9, 0.999), beta_min=0.6, delta=0.0, eps=0.0)
    for _ in range(3):
        p.grad = torch.zeros(5)
        opt.step()
    assert torch.equal(p.detach(), torch.ones(5))
    w = 1.0 - 0.999 * 0.6**2
    np.testing.assert_allclose(states_of(opt, p)["w"], w, rtol=1e-6)


# --- the equations, once more --------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decoupled_decay": {"weight_decay": 0.1},
    "l2_decay": {"weight_decay": 0.1, "adam_w_mode": False},
    "amsgrad": {"amsgrad": True},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True},
    "maximize_l2": {"maximize": True, "weight_decay": 0.1, "adam_w_mode": False},
    "maximize_decoupled": {"maximize": True, "weight_decay": 0.1},
    "eps_inside_sqrt": {"eps_inside_sqrt": True, "eps": 1e-3},
    "eps_large": {"eps": 1e-2},
    "no_bias_correction": {"bias_correction": False},
    "trust_ratio": {"trust_ratio": True, "weight_decay": 0.05},
    "trust_ratio_without_decay": {"trust_ratio": True},
    "trust_ratio_l2": {"trust_ratio": True, "weight_decay": 0.05, "adam_w_mode": False},
    "trust_ratio_no_bias_correction": {
        "trust_ratio": True, "weight_decay": 0.05, "bias_correction": False,
    },
    "clipped": {"max_grad_norm": 0.5},
    "clip_never_reached": {"max_grad_norm": 1e6},
    "clipped_maximize_l2": {
        "max_grad_norm": 0.5, "maximize": True, "weight_decay": 0.1, "adam_w_mode": False,
    },
    "beta_high_1": {"betas": (0.9, 1.0)},
    "beta_high_almost_1": {"betas": (0.9, 1 - 1e-6)},
    "alpha_0": {"betas": (0.0, 0.999)},
    "equal_betas": {"betas": (0.8, 0.95), "beta_min": 0.95},
    "beta_init": {"beta_init": 0.3},
    "delta_0": {"delta": 0.0},
    "all_at_once": {
        "amsgrad": True, "nesterov": True, "trust_ratio": True, "weight_decay": 0.03,
        "maximize": True, "max_grad_norm": 1.0, "eps_inside_sqrt": True, "eps": 1e-4,
        "betas": (0.85, 0.99), "beta_min": 0.7, "beta_init": 0.6,
    },
}  # fmt: skip
SHAPES = [(5,), (4, 33), (), (0, 3), (130,)]


def run_beside_definition(
    backend: str,
    algorithm: str,
    steps: int = 25,
    lr: Any = lambda t: 1e-2,
    has_gradient: Any = lambda i, t: True,
    shapes: Any = SHAPES,
    **options: Any,
) -> None:
    """Trajectories in float64 under the same gradients must stay within 1e-12."""
    generator = torch.Generator().manual_seed(11)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    params = [Parameter(x.clone()) for x in start]
    # wider than float64: 1 - beta loses digits where beta is close to 1
    tensors = [Coordinates.start(x.numpy(), np.longdouble) for x in start]
    opt = make(backend, algorithm, params, **options)
    definition = Definition(algorithm, **options)
    for t in range(steps):
        grads = [heavy_tailed(s, generator, t).double() for s in shapes]
        grads = [g if has_gradient(i, t) else None for i, g in enumerate(grads)]
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        opt.param_groups[0]["lr"] = lr(t)
        opt.step()
        definition.step(tensors, [None if g is None else g.numpy() for g in grads], lr(t))
        for p, c in zip(params, tensors, strict=True):
            theta = c.theta.astype(np.float64)
            np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-12, atol=1e-12)
    for p, c in zip(params, tensors, strict=True):
        if c.t:
            ours = states_of(opt, p)
            assert float(opt.state[p]["step"]) == c.t
            scale = np.sqrt(c.v / np.where(c.w == 0, 1, c.w))
            assert (np.abs(ours["m"] - c.m) <= 1e-9 * np.abs(c.m).max(initial=0)).all()
            assert (np.abs(ours["u"] / ours["w"] - c.u / c.w) <= 1e-9 * scale).all()
            np.testing.assert_allclose(ours["v"] / ours["w"], c.v / c.w, rtol=1e-9)
            if options.get("amsgrad"):
                np.testing.assert_allclose(ours["vmax"], c.vmax, rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_against_the_definition(
    options: dict[str, Any], backend: str, algorithm: str
) -> None:
    run_beside_definition(backend, algorithm, **options)


@pytest.mark.parametrize("options", [{}, OPTIONS["all_at_once"]], ids=["default", "all_at_once"])
def test_late_and_intermittent_gradients(
    options: dict[str, Any], backend: str, algorithm: str
) -> None:
    """Tensor 1 begins at step 4, tensor 4 comes and goes; each counts its own updates."""
    run_beside_definition(
        backend,
        algorithm,
        has_gradient=lambda i, t: (i != 1 or t >= 4) and (i != 4 or t % 3 == 1),
        **options,
    )


def test_changing_learning_rate(backend: str, algorithm: str) -> None:
    """It scales the update of its step; LaMAdam keeps no lr in its momentum (Alg. 2)."""
    run_beside_definition(
        backend, algorithm, lr=lambda t: 0.01 * (1 + np.cos(t)) if t != 5 else 0.0, weight_decay=0.1
    )


def test_momentum_does_not_depend_on_lr(backend: str, algorithm: str) -> None:
    momenta = []
    for lr in (0.0, 1e-3, 1.0):
        p = Parameter(torch.zeros(40, dtype=torch.float64))
        opt = make(backend, algorithm, [p], lr=lr)
        generator = torch.Generator().manual_seed(1)
        for t in range(5):
            p.grad = heavy_tailed((40,), generator, t).double()
            opt.step()
        momenta.append(states_of(opt, p)["m"])
    assert np.array_equal(momenta[0], momenta[1])
    assert np.array_equal(momenta[0], momenta[2])


def test_several_groups(backend: str, algorithm: str) -> None:
    """Every group's own hyper-parameters; the gradient norm is of all groups together."""
    generator = torch.Generator().manual_seed(5)
    groups = [
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 3e-2, "betas": (0.5, 0.99), "beta_min": 0.9, "eps": 1e-4},
        {"lr": 1e-3, "amsgrad": True, "nesterov": True},
        {"lr": 2e-3, "trust_ratio": True, "weight_decay": 0.02, "maximize": True},
    ]
    shapes = [[(7,), (3, 5)], [(11,)], [(40,)], [(6, 6), (2,)]]
    start = [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in of] for of in shapes
    ]
    params = [[Parameter(x.clone()) for x in of] for of in start]
    opt = make(
        backend,
        algorithm,
        [{"params": of, **group} for of, group in zip(params, groups, strict=True)],
        max_grad_norm=1.0,
    )
    tensors = [[Coordinates.start(x.numpy()) for x in of] for of in start]
    for t in range(20):
        grads = [[heavy_tailed(s, generator, t).double() for s in of] for of in shapes]
        for p, g in zip(chain(*params), chain(*grads), strict=True):
            p.grad = g.clone()
        norm = np.sqrt(sum(float((g**2).sum()) for g in chain(*grads)))
        assert norm > 1
        opt.step()
        for group, of, gs in zip(groups, tensors, grads, strict=True):
            options = {k: x for k, x in group.items() if k != "lr"}
            clipped = [g.numpy() / norm for g in gs]
            Definition(algorithm, **options).step(of, clipped, group["lr"])
    for p, c in zip(chain(*params), chain(*tensors), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), c.theta, rtol=1e-12, atol=1e-12)


def test_reference_and_fused_class_share_defaults(algorithm: str) -> None:
    p = [Parameter(torch.zeros(2))]
    assert REFERENCE[algorithm](p).defaults == FUSED[algorithm](p).defaults
    assert FUSED[algorithm](p).defaults["eps"] == {"madam": 1e-8, "lamadam": 1e-15}[algorithm]


# --- the optimizers that MaxVA contains ----------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("decay", [0.0, 0.05], ids=["no_decay", "decay"])
@pytest.mark.parametrize("adam_w_mode", [True, False], ids=["AdamW", "Adam"])
def test_equal_betas_give_adam(
    adam_w_mode: bool, decay: float, maximize: bool, backend: str
) -> None:
    other = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    start = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = Parameter(start.clone()), Parameter(start.clone())
    shared = {"lr": 1e-2, "eps": 1e-8, "weight_decay": decay, "maximize": maximize}
    ours = make(
        backend, "madam", [p], betas=(0.9, 0.99), beta_min=0.99, adam_w_mode=adam_w_mode, **shared
    )
    theirs = other([q], betas=(0.9, 0.99), **shared)
    generator = torch.Generator().manual_seed(1)
    for t in range(40):
        g = heavy_tailed((300,), generator, t).double()
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
        np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], rtol=1e-10)
    np.testing.assert_allclose(
        ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"], rtol=1e-10
    )


@pytest.mark.parametrize("decay", [0.0, 0.05], ids=["no_decay", "decay"])
def test_equal_betas_give_laprop(decay: float, backend: str) -> None:
    alpha, beta, eps = 0.9, 0.98, 1e-15
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(300, generator=generator, dtype=torch.float64).numpy()
    p = Parameter(torch.tensor(theta))
    opt = make(
        backend, "lamadam", [p], betas=(alpha, beta), beta_min=beta, eps=eps, weight_decay=decay
    )
    m, v = np.zeros(300), np.zeros(300)
    for t in range(1, 41):
        lr = 1e-2 / t**0.5
        g = heavy_tailed((300,), generator, t).double()
        p.grad = g.clone()
        opt.param_groups[0]["lr"] = lr
        opt.step()
        v = beta * v + (1 - beta) * g.numpy() ** 2
        m = alpha * m + (1 - alpha) * g.numpy() / (np.sqrt(v / (1 - beta**t)) + eps)
        theta = theta * (1 - lr * decay) - lr * m / (1 - alpha**t)
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-12, atol=1e-13)


# --- where float32 could break -------------------------------------------------------------------


@pytest.mark.parametrize("high", [1.0, 1 - 1e-9], ids=["1", "1-1e-9"])
@pytest.mark.parametrize("eps", [1e-8, 1e-15, 0.0], ids=str)
def test_extreme_beta_high_stays_finite_in_float32(
    high: float, eps: float, backend: str, algorithm: str
) -> None:
    """1 - betas[1] is taken in double: w must not become 0, theta must follow the definition."""
    generator = torch.Generator().manual_seed(6)
    start = torch.randn(200, generator=generator)
    p, c = Parameter(start.clone()), Coordinates.start(start.numpy())
    options = {"betas": (0.9, high), "eps": eps}
    opt = make(backend, algorithm, [p], lr=1e-3, **options)
    definition = Definition(algorithm, **options)
    for t in range(12):
        g = heavy_tailed((200,), generator, t)
        p.grad = g.clone()
        opt.step()
        definition.step([c], [g.double().numpy()], 1e-3)
        assert (opt.state[p]["maxva_weight"] > 0).all()
    np.testing.assert_allclose(p.detach().numpy(), c.theta, rtol=0, atol=1e-5)
