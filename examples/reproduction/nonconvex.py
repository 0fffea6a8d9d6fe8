"""Sec. 4.1: Adam, AMSGrad and MAdam on the finite-sample nonconvex problem of Eq. 11."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from grid import Grid, build_grid
from torch import Tensor
from tqdm import trange

from maxva_kernels import FusedMAdam

SAMPLES = 11
BETA, EPS = 0.9, 1e-8
START = 2.0
RADIUS = 0.1
BLOCK = 1000  # iterations whose samples are drawn at once


@dataclass(frozen=True)
class Study:
    """What is run; `lrs` has the learning rates of each optimizer, `drawn` the one in Fig. 2."""

    iterations: int
    lrs: dict[str, list[float]]
    drawn: dict[str, float]


DRAWN = {"Adam": 0.8, "AMSGrad": 0.8, "MAdam": 1.2}
FULL = Study(
    iterations=100_000,
    lrs={
        "Adam": [1e-4, 1e-3, 1e-2, 0.1, 0.8, 1.0],
        "AMSGrad": [0.8, 0.9, 1.0, 1.2],
        "MAdam": [0.8, 1.0, 1.2, 1.4],
    },
    drawn=DRAWN,
)
QUICK = Study(
    iterations=5000,
    lrs={"Adam": [0.8], "AMSGrad": [0.8, 1.2], "MAdam": [1.2]},
    drawn=DRAWN,
)

# Momentum is 0 in all three, so the gradient of a step is all that it moves along.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "Adam": lambda groups: torch.optim.Adam(groups, betas=(0.0, BETA), eps=EPS, fused=True),
    "AMSGrad": lambda groups: torch.optim.Adam(
        groups, betas=(0.0, BETA), eps=EPS, amsgrad=True, fused=True
    ),
    "MAdam": lambda groups: FusedMAdam(groups, betas=(0.0, 1.0), beta_min=0.5, eps=EPS),
}


def objective(theta: Tensor) -> Tensor:
    """Eq. 11 as a whole: its eleven terms add up to a Huber function."""
    size = theta.abs()
    return torch.where(size <= 1, 0.5 * theta**2, size - 0.5)


def factors(samples: Tensor) -> Tensor:
    """What scales the gradient of l_i of Eq. 11, clamp(theta, -1, 1); `samples` are i - 1."""
    return torch.where(samples == 0, 11.0, -1.0).to(torch.float64)


def second_moment(name: str, state: dict[str, Tensor], t: int) -> Tensor:
    """v_t, without its bias, after update number t."""
    if name == "MAdam":
        return state["exp_avg_sq"] / state["maxva_weight"]
    return state["max_exp_avg_sq" if name == "AMSGrad" else "exp_avg_sq"] / (1 - BETA**t)


class Curves:
    """Objective, S_1 and S_2 of one grid point of each optimizer, recorded at some iterations."""

    def __init__(self, grids: dict[str, Grid], chosen: dict[str, int]) -> None:
        self._rows = [(name, grid, chosen[name]) for name, grid in grids.items()]
        self.update_size = self._stacked(lambda name, grid, point: grid.theta[point]).zero_()
        self.total_change = torch.zeros_like(self.update_size)
        self.step = torch.zeros_like(self.update_size)
        self.records: list[Tensor] = []

    def observe(self, t: int) -> None:
        """Accumulates S_1 and S_2 over update number t; the step before the first counts as 0."""
        v = self._stacked(lambda name, grid, point: second_moment(name, grid.state(point), t))
        step = v.sqrt_().add_(EPS).reciprocal_()
        gradients = self._stacked(lambda name, grid, point: grid.grad[point])
        self.update_size += gradients.mul_(step).square_()
        self.total_change += self.step.sub_(step).abs_()
        self.step = step

    def record(self) -> None:
        value = objective(self._stacked(lambda name, grid, point: grid.theta[point]))
        self.records.append(torch.stack([value, self.update_size, self.total_change]))

    def summary(self, index: int) -> dict[str, dict[str, list[float]]]:
        """Median and standard error over the trials of one optimizer, at each record."""
        values = torch.stack(self.records)[:, :, index]
        median = values.quantile(0.5, dim=-1)
        error = values.std(dim=-1) / math.sqrt(values.shape[-1])
        return {
            key: {"median": median[:, i].tolist(), "standard_error": error[:, i].tolist()}
            for i, key in enumerate(("objective", "update_size", "total_change"))
        }

    def _stacked(self, value: Callable[[str, Grid, int], Tensor]) -> Tensor:
        return torch.stack([value(*row) for row in self._rows])


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate."""
    z, rate = 1.959964, successes / trials
    centre = rate + z**2 / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def record_at(iterations: int) -> list[int]:
    """The iterations that curves are recorded at: 125, evenly over their logarithm, and decades."""
    last = math.log10(iterations)
    even = {round(10 ** (last * i / 124)) for i in range(125)}
    return sorted(even | {10**i for i in range(int(last) + 1)})


def count_at(iterations: int) -> list[int]:
    """The iterations that successes are counted at: 1000, 10000 ... and the last."""
    return [t for t in (1000, 10_000) if t < iterations] + [iterations]


def run(study: Study, trials: int, seed: int) -> dict[str, Any]:
    """Runs the study; all optimizers draw the same samples in the same trial, in float64.

    Args:
        study: Iterations and learning rates.
        trials: Number of runs.
        seed: Seed of the samples.

    Returns:
        `success`: a row per optimizer and learning rate, with the number of runs that are within
        RADIUS of the optimum after each number of iterations; `iterations`, and `curves` of each
        optimizer at them.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.full((trials,), START, dtype=torch.float64)
    grids = {
        name: build_grid(make, [{"lr": lr} for lr in study.lrs[name]], start)
        for name, make in OPTIMIZERS.items()
    }
    curves = Curves(grids, {name: study.lrs[name].index(lr) for name, lr in study.drawn.items()})
    recorded, counted = record_at(study.iterations), count_at(study.iterations)
    pending, successes = set(recorded), {name: [] for name in grids}
    for t in trange(1, study.iterations + 1, desc="nonconvex", disable=None, leave=False):
        if t % BLOCK == 1:
            block = factors(torch.randint(SAMPLES, (BLOCK, trials), generator=generator))
        for grid in grids.values():
            torch.clamp(grid.theta, -1, 1, out=grid.grad).mul_(block[(t - 1) % BLOCK])
            grid.optimizer.step()
        curves.observe(t)
        if t in pending:
            curves.record()
        if t in counted:
            for name, grid in grids.items():
                successes[name].append((grid.theta.abs() < RADIUS).sum(dim=-1).tolist())
    return {
        "trials": trials,
        "seed": seed,
        "success": [
            _success_row(name, lr, trials, dict(zip(counted, counts, strict=True)))
            for name in grids
            for lr, counts in zip(study.lrs[name], zip(*successes[name], strict=True), strict=True)
        ],
        "iterations": recorded,
        "curves": {
            name: {"lr": study.drawn[name], **curves.summary(index)}
            for index, name in enumerate(grids)
        },
    }


def _success_row(name: str, lr: float, trials: int, counts: dict[int, int]) -> dict[str, Any]:
    final = counts[max(counts)]
    return {
        "optimizer": name,
        "lr": lr,
        "successes_after": counts,
        "rate": final / trials,
        "interval": wilson_interval(final, trials),
    }
