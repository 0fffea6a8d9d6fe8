"""What a comparison came out as: a result per run, the best lr, table, figure, JSON."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from errors import UserError
from files import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {"adamw": "AdamW", "lamb": "LAMB", "madam": "MAdam", "lamadam": "LaMAdam"}
TABLE, FIGURE, NUMBERS = "comparison.md", "comparison.png", "comparison.json"
_COLORS = {"adamw": "tab:gray", "lamb": "tab:green", "madam": "tab:blue", "lamadam": "tab:red"}
_BEGIN, _END = "<!-- written by compare.py -->", "<!-- end of what compare.py wrote -->"
# A run whose last tenth is this far above its best tenth (nats) counts as diverged.
_ROSE_BY = 0.2


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        optimizer: Its name on the command line.
        lr: Peak.
        seed: Of weights, data and dropout.
        parameters: Number of them.
        train_mlm: Masked-LM training loss of every step.
        held_out: Step and held-out masked-LM loss.
        unigram: Held-out loss of the unigram model.
        mean_beta: Mean beta_t of the weights at every step, empty where the optimizer has none.
        step_size: Mean |eta update| of the weights at every step, empty where it is not told.
        diverged_at: Step at which the loss was no number any more, or None.
        seconds: Of all steps.
        optimizer_seconds: Of the optimizer in them.
        data_share: Share of the time spent waiting for data.
    """

    optimizer: str
    lr: float
    seed: int
    parameters: int
    train_mlm: list[float]
    held_out: list[list[float]]
    unigram: float
    mean_beta: list[float]
    step_size: list[float]
    diverged_at: int | None
    seconds: float
    optimizer_seconds: float
    data_share: float

    @property
    def final_train(self) -> float:
        """Mean training loss of the last tenth of the steps."""
        return _tenths(self.train_mlm)[-1]

    @property
    def final_held_out(self) -> float:
        """Held-out loss at the end."""
        return self.held_out[-1][1]

    @property
    def diverged(self) -> bool:
        """Whether the loss was no number, or rose and stayed up."""
        if self.diverged_at is not None:
            return True
        tenths = _tenths(self.train_mlm)
        return tenths[-1] > min(tenths) + _ROSE_BY


def _tenths(values: Sequence[float]) -> list[float]:
    return [float(part.mean()) for part in np.array_split(values, 10) if len(part)]


def result(optimizer: str, lr: float, seed: int, metrics: dict[str, Any]) -> Result:
    """The part of a run's metrics.json that a comparison keeps."""
    history = metrics["history"]
    # The first group are the weights; the other, biases and LayerNorm, are few.
    told = [groups[0] for groups in history["telemetry"]]
    adaptive = optimizer in ("madam", "lamadam")
    return Result(
        optimizer=optimizer,
        lr=lr,
        seed=seed,
        parameters=metrics["parameters"],
        train_mlm=[mlm for _, mlm in history["train"]],
        held_out=history["held_out"],
        unigram=metrics["unigram_mlm"],
        mean_beta=[values["mean_beta"] for values in told] if adaptive else [],
        step_size=[values["mean_step_size"] for values in told],
        diverged_at=metrics["diverged_at"],
        seconds=metrics["train_seconds"],
        optimizer_seconds=metrics["train_seconds"] * metrics["optimizer_share"],
        data_share=metrics["data_share"],
    )


def best_lr(results: Sequence[Result], optimizer: str) -> float | None:
    """The lr of the lowest final held-out loss among runs that did not diverge, if there are."""
    sound = [r for r in results if r.optimizer == optimizer and not r.diverged]
    return min(sound, key=lambda r: r.final_held_out).lr if sound else None


def mean_and_spread(values: Sequence[float]) -> str:
    """With the standard deviation, where there are several."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def difference(runs: Sequence[Result], others: Sequence[Result]) -> str:
    """Held-out loss less that of the other with the same seed: mean and standard error."""
    other = {r.seed: r.final_held_out for r in others}
    pairs = [r.final_held_out - other[r.seed] for r in runs if r.seed in other]
    if not pairs:
        return "–"
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return f"{statistics.fmean(pairs):+.3f} ± {error:.3f}"


def optimizer_ms(runs: Sequence[Result]) -> float:
    """Milliseconds of the optimizer in a step."""
    steps = sum(len(r.train_mlm) for r in runs)
    return 1e3 * sum(r.optimizer_seconds for r in runs) / steps


class Comparison:
    """The results of a study, by optimizer."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list({(r.optimizer, r.lr, r.seed): r for r in results}.values())
        self.first_seed = min(r.seed for r in self.results)
        grid = [r for r in self.results if r.seed == self.first_seed]
        self.optimizers = [name for name in NAMES if any(r.optimizer == name for r in grid)]
        self.grid = {
            name: sorted((r for r in grid if r.optimizer == name), key=lambda r: r.lr)
            for name in self.optimizers
        }
        self.best: dict[str, list[Result]] = {}
        for name in self.optimizers:
            lr = best_lr(grid, name)
            runs = [r for r in self.results if r.optimizer == name and r.lr == lr]
            self.best[name] = sorted(runs, key=lambda r: r.seed)

    def table(self) -> str:
        """A Markdown table, an optimizer a row."""
        header = (
            "optimizer",
            "lr tried (x diverged)",
            "best lr",
            "training MLM",
            "held-out MLM",
            "minus AdamW, seed by seed",
            "optimizer, ms a step",
            "its share of the time",
        )
        rows = [header, ("---",) * len(header), *map(self._row, self.optimizers)]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def _row(self, name: str) -> tuple[str, ...]:
        tried = ", ".join(f"{r.lr:g}{' x' * r.diverged}" for r in self.grid[name])
        runs = self.best[name]
        if not runs:
            return (NAMES[name], tried, "none", *["–"] * 5)
        share = sum(r.optimizer_seconds for r in runs) / sum(r.seconds for r in runs)
        return (
            NAMES[name],
            tried,
            f"{runs[0].lr:g}",
            mean_and_spread([r.final_train for r in runs]),
            mean_and_spread([r.final_held_out for r in runs]),
            "–" if name == "adamw" else difference(runs, self.best.get("adamw", [])),
            f"{optimizer_ms(runs):.2f}",
            f"{share:.2%}",
        )

    def plot(self, path: Path) -> None:
        """Draws losses with bands of one standard deviation, the grids, telemetry and times."""
        figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
        (train, held_out, grid), (beta, size, share) = axes
        for name in self.optimizers:
            runs, style = self.best[name], {"color": _COLORS[name]}
            label = f"{NAMES[name]}, lr {runs[0].lr:g}" if runs else NAMES[name]
            sound = [r for r in runs if r.diverged_at is None]
            if sound:
                plot_losses(train, held_out, sound, label, style)
                steps = np.arange(1, len(sound[0].train_mlm) + 1)
                if sound[0].mean_beta:
                    _band(beta, steps, [r.mean_beta for r in sound], NAMES[name], style)
                if sound[0].step_size:
                    _band(size, steps, [r.step_size for r in sound], NAMES[name], style)
            self._plot_grid(grid, name)
        for axis in (train, held_out, grid):
            axis.axhline(self.results[0].unigram, color="black", ls=":", lw=1)
        names = [name for name in self.optimizers if self.best[name]]
        shares = [
            sum(r.optimizer_seconds for r in self.best[n]) / sum(r.seconds for r in self.best[n])
            for n in names
        ]
        share.bar([NAMES[n] for n in names], shares, color=[_COLORS[n] for n in names])
        share.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        grid.set(title="final held-out MLM loss, first seed", xlabel="peak lr", xscale="log")
        beta.set(title="mean beta_t, weights", xlabel="step")
        size.set(title="mean |eta update|, weights", xlabel="step", yscale="log")
        share.set(title="optimizer's share of the step time")
        for axis in (train, held_out, grid, beta, size):
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        figure.suptitle(
            "bands: one standard deviation over seeds; dotted: unigram model; x: diverged"
        )
        figure.savefig(path, dpi=90)
        plt.close(figure)

    def _plot_grid(self, axis: Any, name: str) -> None:
        sound = [r for r in self.grid[name] if not r.diverged]
        lost = [r for r in self.grid[name] if r.diverged]
        color = _COLORS[name]
        axis.plot([r.lr for r in sound], [r.final_held_out for r in sound], "o-", color=color)
        # Where a loss is no number, the mark stands at the level of the unigram model.
        levels = [
            r.final_held_out if r.diverged_at is None else self.results[0].unigram for r in lost
        ]
        axis.plot([r.lr for r in lost], levels, "x", color=color, ms=9, mew=2)
        if self.best[name]:
            best = self.best[name][0]
            axis.plot(best.lr, best.final_held_out, "o", color=color, ms=12, mfc="none")


def plot_losses(
    train: Any, held_out: Any, runs: Sequence[Result], label: str, style: dict[str, Any]
) -> None:
    """Draws running means of training losses and held-out losses over two axes, with bands."""
    steps = np.arange(1, len(runs[0].train_mlm) + 1)
    _band(train, steps, [_smoothed(r.train_mlm) for r in runs], label, style)
    _band(
        held_out,
        [step for step, _ in runs[0].held_out],
        [[mlm for _, mlm in r.held_out] for r in runs],
        label,
        {**style, "marker": "o", "ms": 3},
    )
    train.set(title="training MLM loss (running mean)", xlabel="step", ylabel="nats")
    held_out.set(title="held-out MLM loss", xlabel="step", ylabel="nats")


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to nine before it."""
    return np.array([np.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))])


def _band(axis: Any, x: Any, curves: Sequence[Any], label: str, style: dict[str, Any]) -> None:
    values = np.array(curves)
    mean = values.mean(0)
    axis.plot(x, mean, label=label, lw=1.5, **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.2, lw=0)


def report(results: Sequence[Result], record: dict[str, Any], out: Path, docs: Path | None) -> str:
    """Writes table, figure and numbers.

    Args:
        results: Of all runs.
        record: `study`, `machine` and `seconds`.
        out: Folder of the study.
        docs: Folder whose comparison.md is to have them, too, between its marks.

    Returns:
        The text of the table.
    """
    found = Comparison(results)
    seeds = len(next((runs for runs in found.best.values() if runs), []))
    text = (
        f"{found.table()}\n\n"
        f"Losses: nats per masked token at the end, mean ± standard deviation over {seeds} seeds "
        "at the best lr; training: the last tenth of the steps. Minus AdamW: mean ± standard error "
        f"of the differences. Unigram model, held-out: {found.results[0].unigram:.3f}. "
        f"{len(found.results)} runs of {len(found.results[0].train_mlm)} steps, "
        f"{found.results[0].parameters / 1e6:.2f} M parameters, took {record['seconds'] / 60:.0f} "
        f"minutes on {record['machine']}.\n"
    )
    if docs:
        _insert(docs / TABLE, f"{text}\n![losses and telemetry](images/{FIGURE})\n")
    numbers = {**record, "runs": [asdict(r) for r in found.results]}
    rounded = json.loads(json.dumps(numbers), parse_float=lambda s: float(f"{float(s):.6g}"))
    found.plot(out / FIGURE)
    write_atomically(out / NUMBERS, (json.dumps(rounded) + "\n").encode())
    write_atomically(out / TABLE, text.encode())
    if docs:
        shutil.copyfile(out / FIGURE, docs / "images" / FIGURE)
        shutil.copyfile(out / NUMBERS, docs / NUMBERS)
    return text


def _insert(page: Path, text: str) -> None:
    """Puts `text` between the marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"--docs: {page} has no {_BEGIN} ... {_END}.")
    write_atomically(page, f"{before}{begin}\n\n{text}\n{end}{after}".encode())
