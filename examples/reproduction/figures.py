"""The figures of Sec. 4 and App. F, drawn from the study's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from quadratic import Runs, best_of_each_lr

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = {"Adam": "C2", "AMSGrad": "C4", "MAdam": "C3", "LaMAdam": "C0"}


def draw_nonconvex(path: Path, study: dict[str, Any]) -> None:
    """Fig. 2: objective, accumulated update size and total change of the adaptive step."""
    panels = {
        "objective": r"$f(\theta)$",
        "update_size": r"$S_1=\sum_t \|g_t/\sqrt{v_t}\|^2$",
        "total_change": r"$S_2=\sum_t \|1/\sqrt{v_t}-1/\sqrt{v_{t-1}}\|_1$",
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for ax, (key, label) in zip(axes, panels.items(), strict=True):
        for name, curve in study["curves"].items():
            _draw_band(
                ax, study["iterations"], **curve[key], label=f"{name}, $\\eta$ = {curve['lr']}",
                color=COLORS[name],
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="iteration", title=label)
    # runs that have converged fall to 0
    highest = max(max(curve["objective"]["median"]) for curve in study["curves"].values())
    axes[0].set_ylim(1e-4, 3 * highest)
    axes[0].legend()
    figure.supylabel(f"median and standard error of {study['trials']} runs", fontsize=9)
    _save(figure, path)


def draw_quadratic(path: Path, table: dict[str, Any], runs: dict[str, Runs]) -> None:
    """Fig. 3: loss over learning rate, and the first trial's path at each optimizer's best."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _draw_losses(left, table)
    left.legend()
    for name in ("Adam", "MAdam"):
        best = table["optimizers"][name]["best"]
        point = table["optimizers"][name]["grid"].index(best)
        path_of_trial = runs[name].path[:, point]
        right.plot(*path_of_trial.T, lw=0.7, color=COLORS[name], label=f"{name}, {_point(best)}")
    right.plot(*path_of_trial[0], "ks", ms=4)
    right.plot(0, 0, "k+", ms=10)
    right.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    right.set_title(f"first trial, {len(path_of_trial) - 1} steps", fontsize=9)
    right.legend()
    _save(figure, path)


def draw_settings(path: Path, tables: list[dict[str, Any]]) -> None:
    """Fig. 7: loss over learning rate, a row for each h and a column for each sigma."""
    tables = sorted(tables, key=lambda table: (table["h"], table["sigma"]))
    rows = len({table["h"][1] for table in tables})
    figure, axes = plt.subplots(
        rows, len(tables) // rows, figsize=(9, 2.4 * rows), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, table in zip(axes.flat, tables, strict=True):
        _draw_losses(ax, table)
        ax.label_outer()
    axes[0, 0].legend()
    _save(figure, path)


def _draw_losses(ax: Axes, table: dict[str, Any]) -> None:
    for name, color in COLORS.items():
        if name in table["optimizers"]:
            rows = best_of_each_lr(table["optimizers"][name]["grid"])
            _draw_band(
                ax, [row["lr"] for row in rows], [row["loss"] for row in rows],
                [row["standard_error"] for row in rows], marker="o", ms=3,
                label=f"{name}, best beta" if name == "Adam" else name, color=color,
            )  # fmt: skip
    h, sigma = table["h"], table["sigma"]
    ax.set(xscale="log", yscale="log", xlabel=r"learning rate $\eta$", ylabel="loss")
    ax.set_title(f"h = ({h[0]:g}, {h[1]:g}), $\\sigma$ = {sigma:g}", fontsize=9)


def _draw_band(
    ax: Axes, x: list[float], median: list[float], standard_error: list[float], **line: Any
) -> None:
    """Draws a line and the band of one standard error around it."""
    middle, error = np.array(median), np.array(standard_error)
    ax.plot(x, middle, lw=1.2, **line)
    ax.fill_between(x, middle - error, middle + error, color=line["color"], alpha=0.25, lw=0)


def _point(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {row[key]:g}" for key in ("lr", "beta") if key in row)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=85)
    plt.close(figure)
