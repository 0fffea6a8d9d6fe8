"""The paper's recipe (Sec. 5.4), the phases of a run, and what `--scale` makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from model import SHAPES, Shape

#: Settings that may have a value per phase.
PER_PHASE = ("sequence_length", "steps", "batch_size", "micro_batch_size", "lr", "warmup")

# Phase 2 over phase 1, as LAMB's 4e-3 and 6e-3 in NVIDIA's scripts.
_LR_RATIO = 4e-3 / 6e-3
# MAdam's and Adam's as in the paper, LAMB's as in NVIDIA's scripts, which the paper took over; the
# paper has no run with LaMAdam.
_LR = {"madam": 3.4e-3, "lamadam": 3.4e-3, "adamw": 8e-4, "lamb": 6e-3}
_BATCHES = {
    "sequence_length": [128, 512],
    "steps": [7038, 1563],
    "batch_size": [65536, 32768],
    "warmup": [0.2843, 0.128],
    "decay_power": 0.5,
    "decay_from": "start",
    "betas": [0.9, 0.999],
    "beta_min": 0.5,
    "max_grad_norm": 1.0,
}
#: Defaults that a recipe puts in the place of the parser's.
RECIPES: dict[str, dict[str, Any]] = {
    "base": {"config": "base", "micro_batch_size": [256, 64], **_BATCHES},
    "large": {"config": "large", "micro_batch_size": [128, 32], **_BATCHES},
}


@dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
        number: Counted from 0.
        first_step: Steps of the run before this phase.
        sequence_length: Tokens per example.
        steps: Optimizer steps.
        batch_size: Examples per step, of all processes.
        micro_batch_size: Examples per forward and backward pass.
        lr: Peak of the learning rate.
        warmup: Share of the steps with rising lr.
    """

    number: int
    first_step: int
    sequence_length: int
    steps: int
    batch_size: int
    micro_batch_size: int
    lr: float
    warmup: float

    @property
    def end(self) -> int:
        """Steps of the run when this phase is over."""
        return self.first_step + self.steps


def recipe_defaults(recipe: str, optimizer: str) -> dict[str, Any]:
    """Settings of a recipe; the learning rate and decay depend on the optimizer."""
    lr = _LR[optimizer]
    # The paper took NVIDIA's settings for LAMB, and 0.1 for the others.
    weight_decay = 0.01 if optimizer == "lamb" else 0.1
    return {**RECIPES[recipe], "lr": [lr, lr * _LR_RATIO], "weight_decay": weight_decay}


def completed_lr(lr: list[float], recipe: str | None) -> list[float]:
    """Adds phase 2's lr where only that of phase 1 was given with a recipe."""
    return [lr[0], lr[0] * _LR_RATIO] if recipe and len(lr) == 1 else lr


def phases(settings: dict[str, Any]) -> list[Phase]:
    """The phases of a run, `--scale` applied.

    Scale F multiplies steps and batch (to the nearest power of two) by F and the peak lr by the
    square root of what became of the batch; shares of steps, decay and clipping stay.
    """
    count = max(len(settings[name]) for name in PER_PHASE)
    found: list[Phase] = []
    for number in range(count):
        values = {
            name: settings[name][number if len(settings[name]) > 1 else 0] for name in PER_PHASE
        }
        if settings["scale"] < 1:
            values |= _scaled(values, settings["scale"])
        found.append(Phase(number=number, first_step=found[-1].end if found else 0, **values))
    return found


def _scaled(values: dict[str, Any], scale: float) -> dict[str, Any]:
    batch = 2 ** max(0, round(math.log2(scale * values["batch_size"])))
    return {
        "steps": max(1, round(scale * values["steps"])),
        "batch_size": batch,
        "micro_batch_size": min(values["micro_batch_size"], batch),
        "lr": values["lr"] * math.sqrt(batch / values["batch_size"]),
    }


def shape(settings: dict[str, Any]) -> Shape:
    """The model's shape, `--scale` applied.

    Steps times batch shrink by F^2, so width and depth shrink by F^(2/3) each: tokens per weight
    of the encoder stay. Heads keep their width.
    """
    full = SHAPES[settings["config"]]
    if settings["scale"] == 1:
        return full
    factor = settings["scale"] ** (2 / 3)
    heads = max(1, round(factor * full.heads))
    return Shape(
        layers=max(1, round(factor * full.layers)),
        hidden=heads * (full.hidden // full.heads),
        heads=heads,
        vocab_size=full.vocab_size,
        positions=full.positions,
    )
