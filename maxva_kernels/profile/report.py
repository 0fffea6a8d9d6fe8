"""What was measured: a table, JSON, pictures, and verdicts against an earlier report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxva_kernels.profile import InputError
from maxva_kernels.profile.measure import STREAMS

Row = dict[str, Any]
#: Of the JSON's form; another one cannot be compared with.
SCHEMA = 1
#: What makes a row of one report the same as one of another.
KEY = ("model", "dtype", "optimizer", "backend", "threads", "baseline")
#: The smallest relative change of a ratio that is called one.
LEAST_MARGIN = 0.02
_OURS, _THEIRS, _ROOF = "#2f6f8f", "#9aa5b1", "#b5483a"


def document(rows: list[Row], about: Row, missing: dict[str, str]) -> Row:
    """The JSON report: rows, what they depend on, and why others are missing."""
    return {"schema": SCHEMA, "environment": about, "rows": rows, "missing": missing}


def label(row: Row) -> str:
    """The optimizer of a row with its backend."""
    return f"{row['optimizer']} ({row['backend']})" if row["backend"] else str(row["optimizer"])


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _size(count: int | None) -> str:
    if count is None:
        return "–"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


#: Heading of a column and its cell; those that are empty in every row are left out.
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "dtype": lambda row: row["dtype"],
    "threads": lambda row: _shown(row["threads"], "d"),
    "optimizer": label,
    "step ms": lambda row: _shown(row["step_ms"], ".2f"),
    "kernel ms": lambda row: _shown(row["kernel_ms"], ".2f"),
    "host us": lambda row: _shown(row["host_us"], ".0f"),
    "launches": lambda row: _shown(row["launches"], "d"),
    "B/param": lambda row: _shown(row["bytes_per_parameter"], ".4g"),
    "GB/s": lambda row: _shown(row["gb_per_s"], ".1f"),
    "of bandwidth": lambda row: _shown(row["share_of_bandwidth"], ".0%"),
    "extra memory": lambda row: _size(row["peak_extra_bytes"]),
    "ratio": lambda row: _shown(row["ratio"], ".3f"),
    "kernel ratio": lambda row: _shown(row["kernel_ratio"], ".3f"),
    "to": lambda row: row["baseline"],
}


def table(rows: list[Row], about: Row) -> str:
    """A Markdown table, headed by what the figures depend on."""
    columns = {name: [cell(row) for row in rows] for name, cell in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    head = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    body = map(line, zip(*columns.values(), strict=True))
    return "\n".join([head, "", line(tuple(columns)), rule, *body])


def read(path: Path) -> Row:
    """An earlier report.

    Raises:
        InputError: it cannot be read, or is no report of this form.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--compare {path}: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise InputError(f"--compare {path}: is no report of --json with schema {SCHEMA}")
    return report


def check_comparable(old: Row, about: Row, path: Path) -> None:
    """Raises InputError unless the earlier report is of the same device."""
    then, now = old["environment"]["device"], about["device"]
    if then != now:
        raise InputError(f"--compare {path}: it is of another device ({then}) than this ({now})")


@dataclass(frozen=True)
class Verdict:
    """How a ratio of one row has changed: by more than `margin`, or not."""

    row: str
    figure: str
    old: float
    new: float
    margin: float

    @property
    def change(self) -> float:
        return self.new / self.old - 1

    @property
    def word(self) -> str:
        if self.change > self.margin:
            return "regression"
        return "improvement" if self.change < -self.margin else "same"

    def __str__(self) -> str:
        return (
            f"{self.word}: {self.row}: {self.figure} {self.old:.3f} -> {self.new:.3f} "
            f"({self.change:+.1%}, noise {self.margin:.1%})"
        )


def compare(old: list[Row], new: list[Row]) -> list[Verdict]:
    """Judges the ratios of rows that both reports have.

    The margin is twice the spread of the rounds' ratios in both runs, not divided by the root of
    their number: what disturbs one round disturbs its neighbours.
    """
    known = {tuple(row[key] for key in KEY): row for row in old}
    verdicts = []
    for row in new:
        before = known.get(tuple(row[key] for key in KEY))
        if before is None or label(row) == row["baseline"]:
            continue
        for figure in ("ratio", "kernel_ratio"):
            if row[figure] is None or before[figure] is None:
                continue
            noises = (each[f"{figure}_spread"] / each[figure] for each in (before, row))
            margin = max(LEAST_MARGIN, 2 * math.hypot(*noises))
            threads = f", {row['threads']} threads" if row["threads"] else ""
            name = f"{row['model']}, {row['dtype']}{threads}, {label(row)}"
            verdicts.append(Verdict(name, figure, before[figure], row[figure], margin))
    return verdicts


def write_plots(rows: list[Row], about: Row, folder: Path) -> list[Path]:
    """Writes bars.png and roofline.png; returns their paths."""
    bars, roofline = folder / "bars.png", folder / "roofline.png"
    plot_bars(rows, about, bars)
    plot_roofline(rows, about, roofline)
    return [bars, roofline]


def _figure(about: Row, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(f"{about['device']}, torch {about['torch']}", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _color(row: Row) -> str:
    return _OURS if row["backend"] else _THEIRS


def plot_bars(rows: list[Row], about: Row, path: Path) -> None:
    """Step time of every row relative to its baseline; red where the bytes alone would put it."""
    shown = [row for row in rows if row["ratio"] is not None]
    figure, axes = _figure(about, 8, 0.42 * len(shown) + 1.2)
    names = [f"{row['model']}, {row['dtype']}{_threads(row)}\n{label(row)}" for row in shown]
    positions = range(len(shown))
    bars = axes.barh(positions, [row["ratio"] for row in shown], color=[_color(r) for r in shown])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    floors = {
        (*(row[key] for key in KEY if key not in ("optimizer", "backend")),): row
        for row in shown
        if label(row) == row["baseline"]
    }
    for position, row in zip(positions, shown, strict=True):
        base = floors.get((*(row[key] for key in KEY if key not in ("optimizer", "backend")),))
        if base and base["bytes_per_parameter"] and row["bytes_per_parameter"]:
            ratio = row["bytes_per_parameter"] / base["bytes_per_parameter"]
            axes.vlines(ratio, position - 0.4, position + 0.4, color=_ROOF, linewidth=2)
    axes.set_yticks(positions, names, fontsize=8)
    axes.invert_yaxis()
    baselines = ", ".join(dict.fromkeys(row["baseline"] for row in shown))
    axes.set_xlabel(f"step time relative to {baselines} in the same round; red: ratio of bytes")
    _save(figure, path)


def _threads(row: Row) -> str:
    return f", {row['threads']} threads" if row["threads"] else ""


def plot_roofline(rows: list[Row], about: Row, path: Path) -> None:
    """Rate of kernels and of whole steps over the bytes that they move, under the bandwidth."""
    shown = [row for row in rows if row["gb_per_s"] is not None]
    figure, axes = _figure(about, 8, 5)
    kinds = list(dict.fromkeys(f"{label(row)}, {row['dtype']}{_threads(row)}" for row in shown))
    for row in shown:
        kind = f"{label(row)}, {row['dtype']}{_threads(row)}"
        color = f"C{kinds.index(kind) % 10}"
        moved = row["bytes_per_parameter"] * row["parameters"]
        step = moved / row["step_ms"] / 1e6
        axes.plot([moved, moved], [step, row["gb_per_s"]], color=color, linewidth=0.8)
        axes.plot(moved, row["gb_per_s"], "o", color=color, markersize=6)
        axes.plot(moved, step, "o", color=color, markersize=6, fillstyle="none")
    for kind in kinds:
        axes.plot([], [], "o", color=f"C{kinds.index(kind) % 10}", label=kind)
    roof = statistics.median(row["bandwidth_gb_per_s"] for row in rows)
    yardstick = STREAMS["cuda" if "cuda" in about else "cpu"][0]
    axes.axhline(roof, color=_ROOF, linewidth=1, linestyle="--", label=f"bandwidth: {yardstick}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        set_limits(limits[0] / 2, limits[1] * 2)
    axes.set_xlabel("bytes that a step must move")
    axes.set_ylabel("GB/s: kernels (full), whole step() (hollow)")
    _save(figure, path)
