"""How a step over compact states is judged: every element, from the decoded state, in longdouble.

Truth is the definition (definition.py) from what the codes say. Each new slot (bfloat16: m, mean,
var, w, vmax; int8: r, mean, sd, w, the root of vmax) has to decode to one of the two numbers of the
code's grid that enclose the true one, after that has been widened by a few float32 roundings; theta
is judged as with float32 states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from definition import Coordinates, Definition
from exactness import FUSED, REFERENCE, heavy_tailed, in_layout, params_of, same_bits, set_grad
from torch import Tensor
from torch.nn import Parameter

from maxva_kernels.compact import BLOCK, Moments, Packed, unpack

EPS = float(np.finfo(np.float32).eps)
WORDS = {"int8": torch.int32, "bfloat16": torch.int64}
#: |x| / scale of the codes, from their description: 16 binades over 2^-16.
SIGNED = np.array([2.0 ** (c // 8 - 16) * (1 + c % 8 / 8) - 2.0**-16 for c in range(128)])
UNSIGNED = np.array([2.0 ** (c // 16 - 16) * (1 + c % 16 / 16) - 2.0**-16 for c in range(255)])


def compact_problem(
    algorithm: str,
    state_dtype: str,
    shapes: Any,
    *,
    history: int = 5,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """The reference in the midst of training, gradients set.

    A twentieth has no observation yet, and another one w = 1, where all end: the sign of a zero
    tells the one from the other.

    Where a gradient happens to repeat the mean, beta is ill-conditioned: such ones are doubled.
    """
    generator = torch.Generator().manual_seed(seed)
    for_full = torch.Generator().manual_seed(seed + 1)
    params = [
        Parameter(in_layout(torch.randn(shape, generator=generator).to(dtype), layout))
        for shape in shapes
    ]
    options = {"lr": 0.1, "fp32_state_below": 0, "state_dtype": state_dtype, **options}
    opt = REFERENCE[algorithm](params, **options)
    for t in range(history + 1):
        for p in params:
            set_grad(p, heavy_tailed(p.shape, generator, t).to(dtype))
        if t < history:
            opt.step()
    sign = -1 if options.get("maximize") else 1
    for p in params if history else ():
        state = opt.state[p]
        unseen = torch.rand(p.shape, generator=generator) < 0.05
        packed = state["maxva_packed"]
        packed.masked_fill_(unseen, 0)
        full = torch.rand(p.shape, generator=for_full) < 0.05
        width = 8 if packed.dtype == torch.int32 else 16  # of x, the highest slot
        zero = torch.iinfo(packed.dtype).min  # -0.0
        packed.copy_(torch.where(full & ~unseen, packed & ~(-1 << 3 * width) | zero, packed))
        mean = sign * decoded(opt, p).mean
        p.grad.mul_(torch.where((p.grad - mean).abs() < 0.1 * p.grad.abs(), 2, 1))
    return opt


def decoded(opt: Any, p: Tensor) -> Moments:
    """What p's compact state says."""
    state = opt.state[p]
    keys = "maxva_packed", "maxva_scale", "maxva_packed_max"
    return unpack(Packed(*(state.get(key) for key in keys)), opt.algorithm)


def twin(opt: Any, backend: str | None) -> Any:
    """Another optimizer in the same state, with the same gradients and layouts; None: reference."""
    params = []
    for p in params_of(opt):
        params.append(Parameter(p.detach().clone(memory_format=torch.preserve_format)))
        set_grad(params[-1], p.grad.clone(memory_format=torch.preserve_format))
    if backend is None:
        other = REFERENCE[opt.algorithm](params)
    else:
        other = FUSED[opt.algorithm](params, backend=backend)
    for key in ("state_dtype", "fp32_state_below"):
        other.param_groups[0][key] = opt.param_groups[0][key]
    saved = opt.state_dict()
    saved["state"] = {
        i: {k: x.clone(memory_format=torch.preserve_format) for k, x in state.items()}
        for i, state in saved["state"].items()
    }
    other.load_state_dict(saved)
    return other


def _wide(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy().astype(np.longdouble)


def _coordinates(opt: Any, p: Tensor) -> tuple[Coordinates, np.ndarray, np.ndarray]:
    """The states of p as the definition wants them, and mean and variance."""
    state = opt.state[p]
    c = Coordinates.start(_wide(state.get("master_param", p)), np.longdouble)
    if "maxva_packed" not in state:
        return c, np.zeros_like(c.theta), np.zeros_like(c.theta)
    stored = decoded(opt, p)
    mean, var, c.w = _wide(stored.mean), _wide(stored.var), _wide(stored.w)
    c.m, c.t = _wide(stored.m), int(state["step"])
    c.u, c.v = mean * c.w, (var + mean**2) * c.w
    if stored.vmax is not None:
        c.vmax = _wide(stored.vmax)
    return c, mean, var


def _ranges(
    definition: Definition, old: Coordinates, mean: Any, var: Any, g: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per slot of both kinds what float32 roundings can lead to: the lowest, the highest value."""
    o, alpha = definition.o, definition.o["betas"][0]
    seen = old.w != 0
    w = np.where(seen, old.w, 1)
    deviation = g - mean
    d = deviation**2
    betas = [
        definition.beta_of(d * (1 + i * EPS), var * (1 + j * EPS), w)
        for i in (-8, 0, 8)
        for j in (-4, 0, 4)
    ]
    first = definition.beta(g, old)
    names = "m", "r", "mean", "var", "sd", "w", "vmax", "root"
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    low, high = np.minimum.reduce(betas) - 4 * EPS, np.maximum.reduce(betas) + 4 * EPS
    bounds = o["beta_min"], o["betas"][1]
    for beta in (np.clip(low, *bounds), np.clip(high, *bounds)):
        c = 1 - np.where(seen, beta, first)
        w_new = old.w + c * (1 - old.w)
        share = c / w_new
        moved = mean + share * deviation
        spread = var + share * d
        near = 4 * EPS * (np.abs(moved) + np.abs(share * deviation))
        # lambda = c / c = 1 at the first observation, which leaves a variance of exactly 0
        slack = np.where(seen, 8 * EPS * spread, 0)
        variances = [np.maximum((1 - share) * spread + k * slack, 0) for k in (-1, 1)]
        vmaxes = [np.maximum(old.vmax, moved**2 + x) * (1 + k * 8 * EPS)
                  for k, x in zip((-1, 1), variances, strict=True)]  # fmt: skip
        found["mean"] += [moved - near, moved + near]
        found["var"] += variances
        found["sd"] += [np.sqrt(x) for x in variances]
        found["w"] += [w_new * (1 - 4 * EPS), w_new * (1 + 4 * EPS)]
        found["vmax"] += vmaxes
        found["root"] += [np.sqrt(x) for x in vmaxes]
        x, relative = g, 4 * EPS
        if definition.algorithm == "lamadam":
            vhat = np.maximum(old.vmax, moved**2 + variances[1]) if o["amsgrad"] else (
                moved**2 + (1 - share) * spread)  # fmt: skip
            inside = o["eps"] if o["eps_inside_sqrt"] else 0
            x = g / (np.sqrt(vhat + inside) + (o["eps"] - inside))
            relative = 16 * EPS
        m = alpha * old.m + (1 - alpha) * x
        m_near = 4 * EPS * (np.abs(old.m) + np.abs(m)) + relative * np.abs(x)
        for k in (-1, 1):
            found["m"].append(m + k * m_near)
            for near_k, variance in zip((-1, 1), variances, strict=True):
                unit = np.abs(moved) + near_k * near + np.sqrt(variance)
                if definition.algorithm == "lamadam":
                    unit = np.ones_like(unit)
                found["r"].append(np.where(unit <= 0, 0, (m + k * m_near) / unit) * (1 + k * EPS))
    ranges = {}
    for slot, values in found.items():
        lowest, highest = np.minimum.reduce(values), np.maximum.reduce(values)
        slack = 4 * EPS * np.maximum(np.abs(lowest), np.abs(highest))
        ranges[slot] = lowest - slack, highest + slack
    for slot in ("var", "sd", "vmax", "root"):
        ranges[slot] = np.maximum(ranges[slot][0], 0), ranges[slot][1]
    return ranges


def enclosing(low: np.ndarray, high: np.ndarray, magnitudes: np.ndarray) -> Any:
    """The numbers of a symmetric grid that enclose [low, high]."""
    grid = np.concatenate([-magnitudes[:0:-1], magnitudes])
    below = np.searchsorted(grid, low.astype(np.float64), side="right") - 1
    above = np.searchsorted(grid, high.astype(np.float64), side="left")
    return grid[np.maximum(below, 0)], grid[np.minimum(above, len(grid) - 1)]


def enclosing_bfloat16(low: np.ndarray, high: np.ndarray) -> Any:
    """The bfloat16 numbers that enclose [low, high]."""

    def spacing(x: np.ndarray) -> np.ndarray:
        exponent = np.frexp(x.astype(np.float64))[1]
        return np.ldexp(1.0, np.maximum(exponent - 8, -133))

    below, above = spacing(low), spacing(high)
    return np.floor(low / below) * below, np.ceil(high / above) * above


def in_rows(x: Any) -> np.ndarray:
    """[size(0), row] in memory order of a tensor that is dense with dimension 0 outermost."""
    x = torch.as_tensor(x)
    return x.as_strided((x.shape[0], x.shape[1:].numel()), (x.shape[1:].numel(), 1)).numpy()


def exponent_of(largest: np.ndarray) -> np.ndarray:
    """The e with largest / 2^(e - 127) in [0.40625, 0.8125); 1 for 0."""
    mantissa, exponent = np.frexp(largest.astype(np.float64))
    return np.where(largest == 0, 1, np.maximum(exponent + 127 + (mantissa >= 0.8125), 1))


def _check_slot(
    value: Tensor, low: np.ndarray, high: np.ndarray, like: Tensor, label: str,
    byte: Tensor | None, grid: np.ndarray | None,
) -> None:  # fmt: skip
    """One slot of one parameter; byte: its exponents, None for bfloat16."""
    lows, highs, values = (
        in_rows(torch.empty_like(like, dtype=torch.float64).copy_(torch.as_tensor(x)))
        for x in (low.astype(np.float64), high.astype(np.float64), value.double())
    )
    if byte is None:
        below, above = enclosing_bfloat16(lows, highs)
    else:
        each, blocks = np.zeros_like(lows), byte.numpy()
        for k in range(blocks.shape[1]):
            block = slice(k * BLOCK, (k + 1) * BLOCK)
            ends = [np.abs(x[:, block]) for x in (lows, highs)]
            # the largest of a block may be any of those that rounding could have exchanged
            least = np.where(lows[:, block] * highs[:, block] < 0, 0, np.minimum(*ends)).max(1)
            most = np.maximum(*ends).max(1)
            chosen = blocks[:, k]
            ok = (chosen >= exponent_of(least)) & (chosen <= exponent_of(most))
            assert ok.all(), f"{label}: block {k} of scale 2^{chosen - 127}, largest {most}"
            each[:, block] = np.ldexp(1.0, blocks[:, k : k + 1] - 127)
        below, above = enclosing(lows / each, highs / each, grid)
        below, above = below * each, above * each
    bad = ~((values >= below) & (values <= above))
    if bad.any():
        i = tuple(np.argwhere(bad)[0])
        raise AssertionError(
            f"{label}: {bad.sum()} of {bad.size} elements are not beside the true value; at {i}: "
            f"{values[i]!r} not in [{below[i]!r}, {above[i]!r}], true [{lows[i]!r}, {highs[i]!r}]"
        )


def check_compact_step(
    problem: Any, backend: str | None, *, grad_scale: float | None = None
) -> torch.optim.Optimizer:
    """Takes one step of `problem` (compact_problem) and judges all that it wrote."""
    opt, eager = twin(problem, backend), twin(problem, None)
    for optimizer in (opt, eager):
        if grad_scale is not None:
            optimizer.grad_scale = torch.tensor(grad_scale)
        optimizer.step()
    group = problem.param_groups[0]
    names = ("betas", "beta_min", "eps", "weight_decay", "bias_correction", "adam_w_mode",
             "amsgrad", "nesterov", "trust_ratio", "maximize", "max_grad_norm", "delta",
             "beta_init", "eps_inside_sqrt")  # fmt: skip
    definition = Definition(problem.algorithm, **{name: group[name] for name in names})
    before = [_coordinates(problem, p) for p in params_of(problem)]
    truth = [_coordinates(problem, p)[0] for p in params_of(problem)]
    gradients = [_wide(p.grad) for p in params_of(problem)]
    definition.step(truth, gradients, group["lr"], grad_scale or 1.0)
    word = WORDS[group["state_dtype"]]
    for i, (p, e, (old, mean, var), new) in enumerate(
        zip(params_of(opt), params_of(eager), before, truth, strict=True)
    ):
        label = f"{backend} {problem.algorithm} {group['state_dtype']} {i} {tuple(p.shape)}"
        state = opt.state[p]
        assert state["maxva_packed"].dtype == word, label
        assert float(state["step"]) == new.t, label
        if grad_scale is None:
            assert same_bits(p.grad, params_of(problem)[i].grad), f"{label}: wrote its gradient"
        stored = decoded(opt, p)
        with np.errstate(divide="ignore", invalid="ignore"):
            ranges = _ranges(definition, old, mean, var, new.g)
        for slot, (value, byte, grid) in _slots(state, stored).items():
            _check_slot(value, *ranges[slot], p, f"{label} {slot}", byte, grid)
        _check_w(stored.w, *ranges["w"], f"{label} w", word)
        master = "master_param" in state
        x, y = (s[q].get("master_param", q) for s, q in ((opt.state, p), (eager.state, e)))
        if not master and p.dtype != torch.float32:
            continue
        errors = [np.abs(_wide(z) - new.theta).max(initial=0) for z in (x, y)]
        size = np.maximum(np.abs(old.theta), np.abs(new.theta)) + 4 * np.abs(new.theta - old.theta)
        allowed = 2 * errors[1] + EPS * size.max(initial=0)
        assert errors[0] <= allowed, f"{label}: theta is off by {errors[0]:.3g} > {allowed:.3g}"
    return opt


def _slots(state: dict[str, Tensor], stored: Moments) -> dict[str, Any]:
    """Per slot but w: what its codes stand for, its blocks' exponents and the grid of its codes."""
    scale, vmax = state.get("maxva_scale"), stored.vmax
    if scale is None:
        values = {"m": stored.m, "mean": stored.mean, "var": stored.var}
        values |= {} if vmax is None else {"vmax": vmax}
        return {name: (value, None, None) for name, value in values.items()}
    # LaMAdam's momentum is stored as it is, so r is decoded as that; roots of squares are exact
    r = unpack(Packed(state["maxva_packed"], scale, None), "lamadam").m
    parts = [("r", r, SIGNED), ("mean", stored.mean, SIGNED), ("sd", stored.var.sqrt(), UNSIGNED)]
    parts += [] if vmax is None else [("root", vmax.sqrt(), UNSIGNED)]
    return {
        name: (value, scale >> 8 * k & 0xFF, grid) for k, (name, value, grid) in enumerate(parts)
    }


def _check_w(w: Tensor, low: np.ndarray, high: np.ndarray, label: str, word: torch.dtype) -> None:
    """Judges w by way of x: w up to 1/2, -(1 - w) above; either where rounding decides which."""
    values = _wide(w)
    assert (values > 0).all(), f"{label}: a coordinate has returned to 0"
    x = np.where(high <= 0.5, values, 1 - values)
    lows, highs = np.where(high <= 0.5, low, 1 - high), np.where(high <= 0.5, high, 1 - low)
    # what is below float32's spacing at 1 is decided by the rounding of w itself
    lows, highs = np.maximum(lows - (high > 0.5) * EPS, 0), highs + (high > 0.5) * EPS
    if word == torch.int32:
        below, above = enclosing(lows, highs, SIGNED)
        # the lowest code stands for all that is not 0
        above = np.where(high <= 0.5, np.maximum(above, SIGNED[1]), above)
    else:
        below, above = enclosing_bfloat16(lows, highs)
        below, above = below - EPS, above + EPS  # 1 - |x| is rounded to float32
    ok = (x >= below) & (x <= above) | ((low <= 0.5) & (high > 0.5))
    assert ok.all(), f"{label}: {(~ok).sum()} of {ok.size} elements are not beside the true value"
