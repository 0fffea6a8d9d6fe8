"""Sec. 4.2: Adam against MAdam and LaMAdam on the noisy quadratic model of Eq. 12."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from grid import Grid, build_grid
from released import MAdamWithMomentumForMean
from torch import Tensor
from tqdm import trange

from maxva_kernels import FusedLaMAdam, FusedMAdam

ALPHA, BETA_MIN, BETA_MAX, EPS = 0.9, 0.5, 0.99, 1e-10
BETAS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.99]
LRS = [
    *(round(1e-3 * i, 3) for i in range(1, 10)),
    *(round(1e-2 * i, 2) for i in range(1, 10)),
    0.1,
    0.2,
]
H1 = 1.0


@dataclass(frozen=True)
class Setting:
    """Curvature of the second coordinate (that of the first is 1), and the noise level."""

    h2: float
    sigma: float


@dataclass(frozen=True)
class Study:
    """What is run; `settings[0]` is drawn as Fig. 3."""

    steps: int
    settings: list[Setting]
    lrs: list[float]
    betas: list[float]


FIGURE_3 = Setting(h2=20.0, sigma=0.2)
FULL = Study(
    steps=1000,
    settings=[
        FIGURE_3,
        *(
            Setting(h2, sigma)
            for h2, sigma in itertools.product((10.0, 20.0, 50.0), (0.1, 0.2, 0.4))
            if Setting(h2, sigma) != FIGURE_3
        ),
    ],
    lrs=LRS,
    betas=BETAS,
)
QUICK = Study(steps=1000, settings=[FIGURE_3], lrs=LRS[2:7], betas=[0.8, 0.9])
# Three noise levels around the best learning rates, cheap enough for a hundred seeds: curvature
# cancels from the paths, so one h is enough.
SEEDS = Study(
    steps=1000,
    settings=[FIGURE_3, *(Setting(20.0, sigma) for sigma in (0.1, 0.4))],
    lrs=LRS[1:8],
    betas=BETAS,
)
QUICK_SEEDS = Study(steps=100, settings=[FIGURE_3], lrs=[0.03, 0.04], betas=[0.9])

MAXVA = {"betas": (ALPHA, BETA_MAX), "beta_min": BETA_MIN}
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "Adam": lambda groups: torch.optim.Adam(groups, eps=EPS, fused=True),
    "MAdam": lambda groups: FusedMAdam(groups, **MAXVA, eps=EPS),
    "LaMAdam": lambda groups: FusedLaMAdam(groups, **MAXVA),
    "MAdam, m for u": lambda groups: MAdamWithMomentumForMean(groups, **MAXVA, eps=EPS),
}


def points(name: str, study: Study) -> list[dict[str, Any]]:
    """The grid of an optimizer: learning rate, and beta for Adam."""
    if name == "Adam":
        grid = itertools.product(study.lrs, study.betas)
        return [{"lr": lr, "betas": (ALPHA, beta)} for lr, beta in grid]
    return [{"lr": lr} for lr in study.lrs]


def loss(theta: Tensor, h: Tensor) -> Tensor:
    """The loss of Sec. 4.2 less its constant 1/2 sum(h sigma^2).

    Args:
        theta: [..., settings, repetitions, 2, trials].
        h: Curvatures, [settings, 1, 2, 1].
    """
    return 0.5 * (h * theta**2).sum(dim=-2)


@dataclass(frozen=True)
class Runs:
    """What `simulate` returns for one optimizer.

    Attributes:
        points: Its grid.
        losses: At the last step, [points, settings, repetitions, trials].
        path: The first trial of the first setting, [steps + 1, points, 2].
    """

    points: Sequence[dict[str, Any]]
    losses: Tensor
    path: Tensor


def simulate(
    study: Study, trials: int, seeds: Sequence[int], independent_noise: bool = False
) -> dict[str, Runs]:
    """Runs every grid point of every optimizer, in float32.

    A trial starts every grid point from the same theta ~ N(0, I). Repetitions are the study with
    another seed: repetition r depends on seeds[r] alone.

    Args:
        study: Steps, settings and grids.
        trials: Runs of each grid point in one repetition.
        seeds: A seed for each repetition.
        independent_noise: Every grid point draws its own noise; otherwise all share a trial's.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(*leading: int) -> Tensor:
        shape = (*leading, len(study.settings), 2, trials)
        draws = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(draws, dim=-3)

    h = torch.tensor([[H1, setting.h2] for setting in study.settings])[:, None, :, None]
    sigma = torch.tensor([setting.sigma for setting in study.settings])[:, None, None, None]
    start = normal()
    grids = {
        name: build_grid(make, points(name, study), start) for name, make in OPTIMIZERS.items()
    }
    paths = {name: [_first_trial(grid)] for name, grid in grids.items()}
    for _ in trange(study.steps, desc="quadratic", disable=None, leave=False):
        noise = None if independent_noise else sigma * normal()
        for name, grid in grids.items():
            own = sigma * normal(len(grid.points)) if noise is None else noise
            torch.sub(grid.theta, own, out=grid.grad)
            grid.grad.mul_(h)
            grid.optimizer.step()
            paths[name].append(_first_trial(grid))
    return {
        name: Runs(grid.points, loss(grid.theta, h), torch.stack(paths[name]))
        for name, grid in grids.items()
    }


def _first_trial(grid: Grid) -> Tensor:
    return grid.theta[:, 0, 0, :, 0].clone()


def mean_and_error(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the last axis."""
    return losses.mean(dim=-1), losses.std(dim=-1) / math.sqrt(losses.shape[-1])


def reduction(ours: Tensor, baseline: Tensor) -> tuple[float, float]:
    """How far the mean of `ours` lies below that of `baseline`, with a standard error.

    The error is that of a ratio of means over the same trials (delta method), [trials] each.
    """
    ratio = (ours.mean() / baseline.mean()).item()
    _, error = mean_and_error(ours - ratio * baseline)
    return 1 - ratio, (error / baseline.mean()).item()


def summarize(study: Study, runs: dict[str, Runs]) -> list[dict[str, Any]]:
    """Tables of a simulation, one for each setting.

    Returns:
        For each setting and optimizer, `grid` (mean and standard error of each point, over all
        trials of all repetitions), `best` of it, `best_of_repetition` (what a study of that one
        seed prints), and, but for Adam, `reduction` against Adam's best with its standard error,
        and `reduction_of_repetition`.
    """
    tables = []
    for index, setting in enumerate(study.settings):
        losses = {name: run.losses[:, index] for name, run in runs.items()}
        pooled = {name: values.flatten(1) for name, values in losses.items()}
        best = {name: values.mean(dim=-1).argmin().item() for name, values in pooled.items()}
        rows: dict[str, Any] = {}
        for name, run in runs.items():
            grid = _rows(run.points, *mean_and_error(pooled[name]))
            means, errors = mean_and_error(losses[name])
            chosen = means.argmin(dim=0)
            rows[name] = {
                "best": grid[best[name]],
                "best_of_repetition": [
                    _row(run.points[point], means[point, r], errors[point, r])
                    for r, point in enumerate(chosen.tolist())
                ],
                "grid": grid,
            }
            if name != "Adam":
                value, error = reduction(pooled[name][best[name]], pooled["Adam"][best["Adam"]])
                rows[name]["reduction"] = {"value": value, "standard_error": error}
                rows[name]["reduction_of_repetition"] = [
                    1 - ours["loss"] / baseline["loss"]
                    for ours, baseline in zip(
                        rows[name]["best_of_repetition"],
                        rows["Adam"]["best_of_repetition"],
                        strict=True,
                    )
                ]
        tables.append({"h": [H1, setting.h2], "sigma": setting.sigma, "optimizers": rows})
    return tables


def _rows(grid: Sequence[dict[str, Any]], means: Tensor, errors: Tensor) -> list[dict[str, Any]]:
    return [_row(*values) for values in zip(grid, means, errors, strict=True)]


def _row(point: dict[str, Any], mean: Tensor, error: Tensor) -> dict[str, Any]:
    beta = {"beta": point["betas"][1]} if "betas" in point else {}
    return {"lr": point["lr"], **beta, "loss": mean.item(), "standard_error": error.item()}


def best_of_each_lr(grid: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row with the lowest loss for each learning rate: what Fig. 3 and 7 draw."""
    by_lr = itertools.groupby(grid, key=lambda row: row["lr"])
    return [min(rows, key=lambda row: row["loss"]) for _, rows in by_lr]
