"""The table of optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from errors import UserError
from torch.optim.lr_scheduler import LambdaLR


def _madam() -> type[torch.optim.Optimizer]:
    from maxva_kernels import FusedMAdam

    return FusedMAdam


def _lamadam() -> type[torch.optim.Optimizer]:
    from maxva_kernels import FusedLaMAdam

    return FusedLaMAdam


@dataclass(frozen=True)
class Choice:
    """An optimizer class, its default lr here, and whether it has MaxVA's own arguments."""

    load: Callable[[], type[torch.optim.Optimizer]]
    lr: float
    maxva: bool = True


OPTIMIZERS = {
    "madam": Choice(_madam, lr=5e-3),
    "lamadam": Choice(_lamadam, lr=5e-3),
    "adamw": Choice(lambda: torch.optim.AdamW, lr=5e-3, maxva=False),
}


def build_optimizer(
    groups: list[dict], settings: dict[str, Any]
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Makes the optimizer and the function that clips and steps.

    Args:
        groups: Parameter groups.
        settings: `optimizer`, `lr`, `betas`, `beta_min`, `max_grad_norm`.

    Raises:
        UserError: The optimizer cannot be imported or refuses its arguments.
    """
    choice = OPTIMIZERS[settings["optimizer"]]
    arguments: dict[str, Any] = {"lr": settings["lr"], "betas": tuple(settings["betas"])}
    if choice.maxva:
        arguments["beta_min"] = settings["beta_min"]
        arguments["max_grad_norm"] = settings["max_grad_norm"]
        arguments["collect_stats"] = True
    try:
        optimizer = choice.load()(groups, **arguments)
    except ImportError as error:
        raise UserError(
            f"--optimizer: {settings['optimizer']} needs the maxva_kernels package, which cannot "
            f"be imported ({error}); install it from the repository root with "
            "`pip install --no-build-isolation .`."
        ) from error
    except ValueError as error:
        raise UserError(f"--optimizer: {settings['optimizer']} refused: {error}") from error
    parameters = [p for group in groups for p in group["params"]]

    def clip_and_step() -> None:
        if not choice.maxva:
            torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        # Looked up at every call, because a scheduler replaces it on the instance.
        optimizer.step()

    return optimizer, clip_and_step


def telemetry(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What the last step did, a dict per parameter group; empty for optimizers that do not tell.

    All processes call it: where parameters are sharded the values are those of all.
    """
    return optimizer.stats() if hasattr(optimizer, "stats") else []


def warmup_polynomial(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, power: float
) -> LambdaLR:
    """Linear warm-up over the share `warmup` of the steps, then polynomial decay towards 0."""
    warmup_steps = round(warmup * steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (steps - step) / max(1, steps - warmup_steps)) ** power

    return LambdaLR(optimizer, factor)
