"""What a run leaves for the reader: loss plot, metrics.json and the closing summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from files import write_atomically
from model import GROUPS

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_losses(path: Path, history: dict[str, list], unigram: float, title: str) -> None:
    """Draws training and held-out loss over steps.

    Args:
        path: PNG to write.
        history: `train`, a [loss, mlm] per step from 1 on, and `held_out`, [step, mlm] pairs.
        unigram: Held-out loss of the unigram model, drawn as a level.
        title: Title of the figure.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    steps = range(1, len(history["train"]) + 1)
    axes.plot(steps, [loss for loss, _ in history["train"]], lw=1, label="training, MLM + NSP")
    axes.plot(steps, [mlm for _, mlm in history["train"]], lw=1, label="training, MLM")
    axes.plot(*zip(*history["held_out"], strict=True), "o-", ms=4, label="held-out, MLM")
    axes.axhline(unigram, color="gray", ls="--", lw=1, label="unigram model, held-out")
    axes.set(yscale="log", xlabel="step", ylabel="loss (nats)", title=title)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_telemetry(path: Path, telemetry: list[list[dict[str, float]]], title: str) -> None:
    """Draws what the optimizer told: beta_t, step size and gradient norm over steps.

    Args:
        path: PNG to write.
        telemetry: Per step from 1 on and per group what `optimizer.stats()` returned.
        title: Title of the figure.
    """
    steps = range(1, len(telemetry) + 1)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    styles = zip(GROUPS, ("-", "--"), strict=True)
    for group, (name, style) in enumerate(styles):

        def line(place: int, key: str, label: str, group: int = group, style: str = style) -> None:
            values = [told[group][key] for told in telemetry]
            axes[place].plot(steps, values, style, lw=1, label=label)

        line(0, "mean_beta", f"mean beta_t, {name}")
        line(0, "share_at_beta_min", f"share at beta_min, {name}")
        line(0, "share_at_beta_max", f"share at betas[1], {name}")
        line(1, "mean_step_size", name)
        line(2, "grad_norm", name)
    axes[0].set(xlabel="step", title="averaging coefficient")
    axes[1].set(xlabel="step", yscale="log", title="mean |eta update|")
    axes[2].set(xlabel="step", yscale="log", title="gradient norm before clipping")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Writes `metrics` as JSON, in one piece or not at all."""
    write_atomically(path, (json.dumps(metrics, indent=2) + "\n").encode())


def summary(metrics: dict[str, Any]) -> str:
    """The closing summary of a finished run."""
    rows = {
        "steps": ", then ".join(
            f"{p['steps']}, {p['batch_size']} sequences each" for p in metrics["phases"]
        ),
        "training loss": f"{metrics['train_loss_first']:.3f} -> {metrics['train_loss_last']:.3f}"
        " (MLM + NSP)",
        "held-out MLM loss": f"{metrics['held_out_mlm_start']:.3f} -> "
        f"{metrics['held_out_mlm_end']:.3f} (unigram model: {metrics['unigram_mlm']:.3f})",
        "held-out NSP": f"{metrics['held_out_nsp_accuracy']:.1%} correct",
        "throughput": f"{metrics['sequences_per_second']:.1f} sequences/s",
        "optimizer": f"{metrics['optimizer']}, {metrics['optimizer_ms']:.2f} ms a step, "
        f"{metrics['optimizer_share']:.2%} of the step time",
        "data": f"{metrics['data_share']:.2%} of the step time spent waiting for it",
        "plot": metrics["plot"],
        "telemetry": metrics["telemetry"] or "none: the optimizer does not tell",
        "metrics": metrics["metrics"],
        "checkpoint": metrics["checkpoint"],
    }
    return "\n".join(f"{name + ':':<19}{text}" for name, text in rows.items())
