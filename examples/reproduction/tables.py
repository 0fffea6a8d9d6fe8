"""The study's numbers beside the paper's, as Markdown."""

from __future__ import annotations

from typing import Any

import numpy as np

# App. E; Adam "never converged" for any learning rate in [1e-4, 1].
PAPER_SUCCESS = {
    ("AMSGrad", 0.8): "100 %",
    ("AMSGrad", 0.9): "65 %",
    ("AMSGrad", 1.2): "1 %",
    ("MAdam", 1.2): "100 %",
}


def success_table(study: dict[str, Any]) -> str:
    """Success rates of Sec. 4.1: a row for each optimizer and learning rate."""
    after = list(study["success"][0]["successes_after"])
    rows = [
        [
            row["optimizer"],
            f"{row['lr']:g}",
            _paper_success(row),
            f"{row['rate']:.0%} ({row['interval'][0]:.0%} to {row['interval'][1]:.0%})",
            *(str(row["successes_after"][t]) for t in after),
        ]
        for row in study["success"]
    ]
    counts = [f"successes in {study['trials']} after {t:,}" for t in after]
    return _markdown(["optimizer", "lr", "paper", "here (95 % interval)", *counts], rows)


def _paper_success(row: dict[str, Any]) -> str:
    if row["optimizer"] == "Adam" and row["lr"] <= 1:
        return "never"
    return PAPER_SUCCESS.get((row["optimizer"], row["lr"]), "")


def curve_table(study: dict[str, Any]) -> str:
    """Medians of the curves of Fig. 2 at decades."""
    iterations = study["iterations"]
    shown = [t for t in (10, 100, 1000, 10_000, 100_000) if t in iterations]
    labels = {"objective": "f", "update_size": "S_1", "total_change": "S_2"}
    rows = [
        [f"{label}, {name}", *(f"{curve[key]['median'][iterations.index(t)]:.3g}" for t in shown)]
        for key, label in labels.items()
        for name, curve in study["curves"].items()
    ]
    return _markdown(["median", *(f"after {t:,}" for t in shown)], rows)


def loss_table(tables: list[dict[str, Any]]) -> str:
    """Best losses of Sec. 4.2 and how far MaxVA's lie below Adam's, for each setting."""
    header = ["h_2", "sigma", "Adam", "MAdam", "LaMAdam", "MAdam below Adam", "LaMAdam below Adam"]
    rows = []
    for table in sorted(tables, key=lambda table: (table["h"], table["sigma"])):
        ours = table["optimizers"]
        names = ("Adam", "MAdam", "LaMAdam")
        rows.append([
            f"{table['h'][1]:g}",
            f"{table['sigma']:g}",
            *(_best(ours[name]["best"]) for name in names),
            *(_reduction(ours[name]["reduction"]) for name in names[1:]),
        ])  # fmt: skip
    return _markdown(header, rows)


def spread_table(many: dict[str, Any]) -> str:
    """How far below Adam each study of one seed ends, by noise level and by how noise is drawn."""
    noises = {"shared_noise": "shared", "independent_noise": "own of each point"}
    rows = [
        [
            f"{table['sigma']:g}",
            noise,
            name,
            _reduction(row["reduction"]),
            *_spread(row["reduction_of_repetition"]),
            _spread_of_losses(table["optimizers"]["Adam"]),
            _spread_of_losses(row),
        ]
        for key, noise in noises.items()
        for table in sorted(many[key], key=lambda table: table["sigma"])
        for name, row in table["optimizers"].items()
        if name != "Adam"
    ]
    return _markdown(
        [
            "sigma",
            "noise",
            "optimizer",
            "below Adam, all trials",
            "of one seed: mean",
            "5 to 95 %",
            "all",
            "best Adam of one seed",
            "best of one seed",
        ],
        rows,
    )


def _best(row: dict[str, Any]) -> str:
    beta = f", {row['beta']:g}" if "beta" in row else ""
    return f"{row['loss']:.2e} ± {row['standard_error']:.1e} ({row['lr']:g}{beta})"


def _reduction(value: dict[str, float]) -> str:
    return f"{value['value']:.1%} ± {value['standard_error']:.1%}"


def _spread(values: list[float]) -> list[str]:
    """Mean with its standard error, the middle nine tenths, and the extremes."""
    low, high = np.quantile(values, [0.05, 0.95])
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1%}" if len(values) > 1 else ""
    return [
        f"{np.mean(values):.1%}{error}",
        f"{low:.0%} to {high:.0%}",
        f"{min(values):.0%} to {max(values):.0%}",
    ]


def _spread_of_losses(row: dict[str, Any]) -> str:
    values = [best["loss"] for best in row["best_of_repetition"]]
    return f"{np.mean(values):.2e} ({min(values):.2e} to {max(values):.2e})"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
