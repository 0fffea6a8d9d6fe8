"""How exactness is judged: one step from a realistic state, every element, no share of misses.

Truth is the definition in a wider precision. theta and m: the largest error of a tensor is at most
twice that of the eager reference in the same precision, plus a floor. u, v, w: every element is
inside the envelope of Eq. 6 under perturbed inputs (_check_envelope).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from definition import Coordinates, Definition
from torch import Tensor
from torch.nn import Parameter

from maxva_kernels import FusedLaMAdam, FusedMAdam, LaMAdam, MAdam

FUSED = {"madam": FusedMAdam, "lamadam": FusedLaMAdam}
REFERENCE = {"madam": MAdam, "lamadam": LaMAdam}
#: Our state keys by the paper's symbols.
KEYS = {
    "m": "exp_avg",
    "u": "maxva_avg",
    "v": "exp_avg_sq",
    "w": "maxva_weight",
    "vmax": "max_exp_avg_sq",
}
LOW_PRECISION = (torch.bfloat16, torch.float16)
SENTINEL = 12345.0


def set_grad(p: Tensor, g: Tensor | None) -> None:
    """p.grad = g, whatever the dtype of g."""
    if g is not None and g.dtype != p.dtype:
        p.grad_dtype = None
    p.grad = g


def heavy_tailed(shape: Sequence[int], generator: torch.Generator, t: int = 0) -> Tensor:
    """A gradient as training gives: scales over 4 decades, a drifting mean, heavy tails."""
    scales = torch.Generator().manual_seed(7)
    scale = 10 ** (4 * torch.rand(shape, generator=scales) - 4)
    mean = torch.randn(shape, generator=scales) * (1 + 0.3 * t)
    normal = torch.randn(shape, generator=generator)
    tail = torch.rand(shape, generator=generator).clamp_(min=1e-3) ** -0.5
    return scale * (0.3 * mean + normal * tail)


def in_layout(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of another layout."""
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        order = list(reversed(range(values.dim())))
        return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "misaligned":
        storage = values.new_full((values.numel() + 1,), SENTINEL)
        view = storage[1:].view(values.shape)
        return view.copy_(values)
    if layout == "gappy":
        view = values.new_full((*values.shape, 3), SENTINEL)[..., 1]
        return view.copy_(values)
    if layout == "rows":  # the left columns of a wider matrix
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 2), SENTINEL)
        return wide[..., : values.shape[-1]].copy_(values)
    if layout == "expanded":
        return values[:1].clone().expand(values.shape)
    raise ValueError(layout)


def outside(view: Tensor) -> Tensor:
    """The elements of a view's storage that do not belong to it."""
    storage = torch.tensor([], dtype=view.dtype).set_(view.untyped_storage())
    inside = torch.zeros_like(storage, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return storage[~inside]


@dataclass
class Problem:
    """Parameters, gradients and states just before a step; all contiguous, never changed."""

    algorithm: str
    options: dict[str, Any]
    theta: list[Tensor]
    g: list[Tensor | None]
    states: list[dict[str, Tensor]]

    def with_gradients(self, g: list[Tensor | None]) -> Problem:
        return replace(self, g=g)

    def optimizer(
        self,
        backend: str | None = None,
        *,
        layout: str = "contiguous",
        grad_layout: str = "contiguous",
        **options: Any,
    ) -> torch.optim.Optimizer:
        """An optimizer in this state, with gradients set; backend None is the eager reference."""
        params = [Parameter(in_layout(theta, layout)) for theta in self.theta]
        for p, g in zip(params, self.g, strict=True):
            set_grad(p, None if g is None else in_layout(g, grad_layout))
        options = {**self.options, **options}
        if backend is None:
            opt = REFERENCE[self.algorithm](params, **options)
        else:
            opt = FUSED[self.algorithm](params, backend=backend, **options)
        for p, state in zip(params, self.states, strict=True):
            if state:
                opt.state[p] = {
                    k: x.clone() if k == "step" else in_layout(x, layout) for k, x in state.items()
                }
        return opt


def realistic_problem(
    shapes: Sequence[Sequence[int]],
    algorithm: str = "madam",
    *,
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    grad_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    seed: int = 0,
    history: int = 6,
    scale: float = 1.0,
    **options: Any,
) -> Problem:
    """Tensors in the midst of training: `history` steps of the reference from random values.

    Tensors begin at different steps, and a twentieth of all coordinates has seen no gradient yet.
    With history 0 there is no state. Where the new gradient happens to repeat the mean, beta is
    ill-conditioned and errors of theta and m are a matter of luck: such gradients are doubled
    (`steady_problem` has nothing but them).
    """
    n = len(shapes)
    dtypes = [dtype] * n if isinstance(dtype, torch.dtype) else list(dtype)
    if grad_dtype is None:
        grad_dtype = dtypes
    grad_dtypes = [grad_dtype] * n if isinstance(grad_dtype, torch.dtype) else list(grad_dtype)
    options = {"lr": 0.1, **options}
    generator = torch.Generator().manual_seed(seed)
    params = [
        Parameter(torch.randn(shape, generator=generator).to(d))
        for shape, d in zip(shapes, dtypes, strict=True)
    ]
    opt = REFERENCE[algorithm](params, **options)
    if options.get("master_weights"):
        opt.setup_fp32_params()

    def gradients(t: int) -> list[Tensor]:
        return [
            (scale * heavy_tailed(p.shape, generator, t)).to(d)
            for p, d in zip(params, grad_dtypes, strict=True)
        ]

    for t in range(history):
        for i, (p, g) in enumerate(zip(params, gradients(t), strict=True)):
            set_grad(p, None if t < i % 3 else g)
        opt.step()
    states: list[dict[str, Tensor]] = []
    g = gradients(history)
    sign = -1 if options.get("maximize") else 1
    for p, new in zip(params, g, strict=True):
        state = dict(opt.state[p]) if history and "maxva_weight" in opt.state[p] else {}
        unseen = torch.rand(p.shape, generator=generator) < 0.05
        for key in KEYS.values():
            if key in state:
                state[key] = state[key].masked_fill(unseen, 0.0)
        states.append(state)
        if state:
            mean = sign * state["maxva_avg"] / state["maxva_weight"]
            new.mul_(torch.where((new - mean).abs() < 0.1 * new.abs(), 2, 1))
    return Problem(algorithm, options, [p.detach() for p in params], g, states)


def steady_problem(algorithm: str, history: int, spread: float, **options: Any) -> Problem:
    """A gradient that stays the same but for a relative `spread`: beta is ill-conditioned."""
    options = {"lr": 1e-2, **options}
    generator = torch.Generator().manual_seed(history)
    mean = heavy_tailed((2000,), generator)
    p = Parameter(torch.randn(2000, generator=generator))
    opt = REFERENCE[algorithm]([p], **options)
    for t in range(history + 1):
        g = mean * (1 + spread * torch.randn(2000, generator=generator))
        if t < history:
            p.grad = g
            opt.step()
    return Problem(algorithm, options, [p.detach()], [g], [dict(opt.state[p])])


def take_step(
    opt: torch.optim.Optimizer, grad_scale: float | None = None, found_inf: float | None = None
) -> torch.optim.Optimizer:
    """step() with what a GradScaler would hand in."""
    if grad_scale is not None:
        opt.grad_scale = torch.tensor(grad_scale)
    if found_inf is not None:
        opt.found_inf = torch.tensor(found_inf)
    opt.step()
    for name in ("grad_scale", "found_inf"):
        if hasattr(opt, name):
            delattr(opt, name)
    return opt


def params_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in order."""
    return [p for group in opt.param_groups for p in group["params"]]


def snapshot(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of everything a step may change."""
    params = params_of(opt)
    return copy.deepcopy(
        {
            "params": [p.detach() for p in params],
            "grads": [p.grad for p in params],
            "states": [dict(opt.state.get(p, {})) for p in params],
            "steps": [group["step"] for group in opt.param_groups],
        }
    )


def same_bits(a: Any, b: Any) -> bool:
    """Equality to the last bit, NaN and the sign of zero included, of nested containers."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        return torch.equal(a.detach().contiguous().view(width), b.detach().contiguous().view(width))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _numpy(x: Tensor, dtype: Any) -> np.ndarray:
    return x.detach().to(torch.float64).numpy().astype(dtype)


def precise_coordinates(problem: Problem) -> list[Coordinates]:
    """The problem's tensors and states in the precision that truth is computed in."""
    result = []
    for theta, state in zip(problem.theta, problem.states, strict=True):
        wide = np.longdouble if theta.dtype == torch.float64 else np.float64
        c = Coordinates.start(_numpy(state.get("master_param", theta), wide), wide)
        for symbol, key in KEYS.items():
            if key in state:
                setattr(c, symbol, _numpy(state[key], wide))
        c.t = int(state.get("step", 0))
        result.append(c)
    return result


def _largest_error(x: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        error = np.where(x == truth, 0, np.abs(x - truth))[counts]
    return float(error.max()) if error.size else 0.0


def _check_envelope(
    definition: Definition, before: Coordinates, g: np.ndarray, new: dict[str, np.ndarray],
    counts: np.ndarray, eps: float, smallest: float, label: str,
) -> None:  # fmt: skip
    """u, v, w of every element against the range of beta that rounding may choose from."""
    seen = before.w != 0
    w = np.where(seen, before.w, 1)
    mean = before.u / w
    vhat = before.v / w
    distance, moved = np.abs(g - mean), 4 * eps * (np.abs(g) + np.abs(mean))
    var = np.maximum(vhat - mean**2, 0)
    betas = [
        definition.beta_of(d**2, s, w)
        for d in (np.maximum(distance - moved, 0), distance + moved)
        for s in (np.maximum(var - 4 * eps * vhat, 0), var + 4 * eps * vhat)
    ]
    first = definition.beta(g, before)
    lowest = np.where(seen, np.minimum.reduce(betas), first)
    highest = np.where(seen, np.maximum.reduce(betas), first)
    for symbol, x in (("u", g), ("v", g**2), ("w", np.ones_like(g))):
        old = getattr(before, symbol)
        ends = [beta * old + (1 - beta) * x for beta in (lowest, highest)]
        largest = np.maximum(np.abs(highest * old), np.abs((1 - lowest) * x))
        widened = 4 * eps * largest + 4 * eps * np.abs(x - old)
        # `smallest`: below the normal numbers rounding is absolute
        low = np.minimum(*ends) - widened - smallest
        high = np.maximum(*ends) + widened + smallest
        bad = ~((new[symbol] >= low) & (new[symbol] <= high)) & counts
        if bad.any():
            i = tuple(np.argwhere(bad)[0])
            raise AssertionError(
                f"{label}: {symbol} leaves the envelope at {bad.sum()} of {bad.size} elements; at "
                f"{i}: {new[symbol][i]!r} not in [{low[i]!r}, {high[i]!r}]; g {g[i]!r}, before: "
                f"u {before.u[i]!r} v {before.v[i]!r} w {before.w[i]!r}"
            )


def check_step(
    problem: Problem,
    backend: str,
    *,
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    grad_scale: float | None = None,
    found_inf: float | None = None,
    only_averages: bool = False,
) -> torch.optim.Optimizer:
    """Takes one step of `problem` and judges all that it wrote; returns the optimizer.

    With `only_averages` the errors of theta and m are not compared with the reference's.
    """
    opt = problem.optimizer(backend, layout=layout, grad_layout=grad_layout)
    written = [None if p.grad is None else p.grad.clone() for p in params_of(opt)]
    # an expanded gradient repeats its first slice: all three must see the same values
    problem = problem.with_gradients(written)
    eager = take_step(problem.optimizer(), grad_scale, found_inf)
    addresses = [p.data_ptr() for p in params_of(opt)]
    gaps = [outside(p.detach()) for p in params_of(opt)]
    take_step(opt, grad_scale, found_inf)

    options = dict(problem.options)
    lr = options.pop("lr")
    options.pop("skip_nonfinite", None)
    definition = Definition(problem.algorithm, **options)
    before, truth = precise_coordinates(problem), precise_coordinates(problem)
    wide = [None if g is None else _numpy(g, np.longdouble) for g in written]
    definition.step(truth, wide, lr, 1.0 if grad_scale is None else grad_scale)

    for i, (p, e, old, new) in enumerate(
        zip(params_of(opt), params_of(eager), before, truth, strict=True)
    ):
        label = f"{backend} {problem.algorithm} tensor {i} {tuple(p.shape)} {p.dtype}"
        assert p.data_ptr() == addresses[i], f"{label}: moved to other memory"
        assert same_bits(outside(p.detach()), gaps[i]), f"{label}: wrote outside the parameter"
        g = written[i]
        if g is None:
            assert same_bits(p.detach(), problem.theta[i]), label
            expected = problem.states[i]
            assert same_bits(dict(opt.state.get(p, {})), expected), label
            continue
        if grad_scale is None:
            assert same_bits(p.grad, g), f"{label}: wrote its gradient"
        else:
            compute = torch.float64 if p.dtype == torch.float64 else torch.float32
            unscaled = (g.to(compute) / torch.tensor(grad_scale, dtype=compute)).to(g.dtype)
            assert same_bits(p.grad, unscaled), f"{label}: p.grad is not the unscaled gradient"
        eps = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).eps
        dtype = new.theta.dtype
        state, eager_state = opt.state[p], eager.state[e]
        assert float(state["step"]) == new.t, label
        assert state["step"].dtype == torch.float32, label
        counts = np.isfinite(new.g)
        results = {"m": (state["exp_avg"], eager_state["exp_avg"], old.m, new.m)}
        if "master_param" in state:
            masters = state["master_param"], eager_state["master_param"]
            results["theta"] = (*masters, old.theta, new.theta)
            assert same_bits(p.detach(), masters[0].to(p.dtype)), f"{label}: is not its master"
        else:
            results["theta"] = (p, e, old.theta, new.theta)
        for symbol, (x, yardstick, was, true) in results.items():
            x, yardstick = _numpy(x, dtype), _numpy(yardstick, dtype)
            error = _largest_error(x, true, counts)
            size = np.maximum(np.abs(was), np.abs(true)) + 4 * np.abs(true - was)
            floor = eps * float(size[counts].max(initial=0.0))
            allowed = 2 * _largest_error(yardstick, true, counts) + floor
            assert error <= allowed or only_averages, (
                f"{label}: {symbol} is off by {error:.3g} > {allowed:.3g}"
            )
            assert not np.isfinite(x[~counts]).any() or symbol != "m", label
        values = {symbol: _numpy(state[KEYS[symbol]], dtype) for symbol in "uvw"}
        smallest = 4 * float(torch.finfo(state["exp_avg_sq"].dtype).smallest_normal) * eps
        with np.errstate(invalid="ignore", over="ignore"):
            _check_envelope(definition, old, new.g, values, counts, eps, smallest, label)
        if "max_exp_avg_sq" in state:
            own = np.maximum(old.vmax, values["v"] / values["w"])
            got = _numpy(state["max_exp_avg_sq"], dtype)
            np.testing.assert_allclose(got[counts], own[counts], rtol=eps, atol=0, err_msg=label)
    return opt
