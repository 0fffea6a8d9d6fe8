"""The benchmark's rows as a Markdown table and as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLUMNS = ("comparison", "optimizer", "ms", "B/param", "GB/s", "of a.add_(b)", "ratio", "to")


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    share = row["share_of_stream"]
    return [
        row["comparison"],
        row["contender"],
        shown(row["ms"], ".2f"),
        shown(row["bytes_per_parameter"], "d"),
        shown(row["gb_per_s"], ".1f"),
        "–" if share is None else f"{share:.0%}",
        shown(row["ratio"], ".2f"),
        row["baseline"],
    ]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """A Markdown table, headed by what the figures depend on."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(_COLUMNS))]

    def line(cells: list[str] | tuple[str, ...]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    head = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    return "\n".join([f"{head}", "", line(_COLUMNS), rule, *(line(_cells(r)) for r in rows)])


def plot(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Bars of step time relative to each comparison's baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["baseline"] == "AdamW(fused=True)"]
    labels = [f"{row['comparison']}\n{row['contender']}" for row in rows]
    colors = ["#9aa5b1" if row["contender"] == row["baseline"] else "#2f6f8f" for row in rows]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    bars = axes.barh(labels, [row["ratio"] for row in rows], color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(44 / 28, color="#b5483a", linewidth=1, linestyle="--")
    axes.text(44 / 28, -0.9, "bytes 44/28", color="#b5483a", fontsize=8, ha="center")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("step time relative to torch.optim.AdamW(fused=True)")
    axes.set_title(f"{about['device']}, torch {about['torch']}", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
