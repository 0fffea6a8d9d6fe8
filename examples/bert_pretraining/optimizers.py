"""The table of optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from errors import UserError
from recipes import Phase
from torch.optim.lr_scheduler import LambdaLR


def _madam() -> type[torch.optim.Optimizer]:
    from maxva_kernels import FusedMAdam

    return FusedMAdam


def _lamadam() -> type[torch.optim.Optimizer]:
    from maxva_kernels import FusedLaMAdam

    return FusedLaMAdam


def _adamw8bit() -> type[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


@dataclass(frozen=True)
class Choice:
    """An optimizer class, its default lr here, and how it is called.

    Attributes:
        load: Imports the class.
        lr: Default peak on the default corpus.
        arguments: Given to it, from all settings.
        clips: Whether it clips gradients itself.
        install: How to get what it is imported from.
    """

    load: Callable[[], type[torch.optim.Optimizer]]
    lr: float
    arguments: Callable[[dict[str, Any]], dict[str, Any]]
    clips: bool = True
    install: str = "pip install --no-build-isolation ."


def _maxva(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "beta_min": settings["beta_min"],
        "max_grad_norm": settings["max_grad_norm"],
        "state_dtype": settings["state_dtype"],
        "collect_stats": True,
    }


def _lamb(settings: dict[str, Any]) -> dict[str, Any]:
    # With equal bounds of beta_t MAdam is AdamW, and AdamW with the trust ratio is LAMB.
    return {
        **_maxva(settings),
        "beta_min": settings["betas"][1],
        "trust_ratio": True,
        "eps": 1e-6,
    }


OPTIMIZERS = {
    "madam": Choice(_madam, 5e-3, _maxva),
    "lamadam": Choice(_lamadam, 5e-3, _maxva),
    "lamb": Choice(_madam, 1e-2, _lamb),
    "adamw": Choice(lambda: torch.optim.AdamW, 5e-3, lambda _: {"fused": True}, clips=False),
}
#: The same optimizers from elsewhere, by how they keep their states.
OTHERS = {
    ("adamw", "int8"): Choice(
        _adamw8bit, 5e-3, lambda _: {}, clips=False, install="pip install bitsandbytes"
    ),
}


def build_optimizer(
    groups: list[dict], settings: dict[str, Any], lr: float
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Makes the optimizer and the function that clips and steps.

    Args:
        groups: Parameter groups.
        settings: `optimizer`, `betas`, `beta_min`, `max_grad_norm`, `state_dtype`; `eps` where it
            is not to be the optimizer's own.
        lr: Peak lr of the first phase.

    Raises:
        UserError: The optimizer cannot be imported or refuses its arguments.
    """
    name = settings["optimizer"]
    choice = OTHERS.get((name, settings["state_dtype"]), OPTIMIZERS[name])
    arguments = {"lr": lr, "betas": tuple(settings["betas"]), **choice.arguments(settings)}
    if settings.get("eps") is not None:
        arguments["eps"] = settings["eps"]
    try:
        optimizer = choice.load()(groups, **arguments)
    except ImportError as error:
        raise UserError(
            f"--optimizer: {name} needs a package that cannot be imported ({error}); install it "
            f"from the repository root with `{choice.install}`."
        ) from error
    except ValueError as error:
        raise UserError(f"--optimizer: {name} refused: {error}") from error
    parameters = [p for group in groups for p in group["params"]]

    def clip_and_step() -> None:
        if not choice.clips:
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
    steps: int, warmup: float, power: float, whole: bool
) -> Callable[[int], float]:
    """Linear warm-up over the share `warmup` of the steps, then polynomial decay towards 0.

    Args:
        steps: Steps in all.
        warmup: Share of them with rising lr.
        power: Power of the decay.
        whole: Decay counts from the first step, as in NVIDIA's script, not from the peak; lr then
            drops by (1 - warmup)^power when the warm-up ends.
    """
    warmup_steps = round(warmup * steps)
    decaying = steps if whole else max(1, steps - warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (steps - step) / decaying) ** power

    return factor


def schedule(
    optimizer: torch.optim.Optimizer, phases: Sequence[Phase], power: float, whole: bool
) -> LambdaLR:
    """`warmup_polynomial` in every phase anew; `optimizer` was made with the lr of the first."""
    factors = [warmup_polynomial(p.steps, p.warmup, power, whole) for p in phases]

    def factor(step: int) -> float:
        # After the last step the schedule is asked once more.
        here = next((p for p in phases if step < p.end), phases[-1])
        return here.lr / phases[0].lr * factors[here.number](step - here.first_step)

    return LambdaLR(optimizer, factor)
