"""Command line to one flat dict of settings, and what of it a resumed run may change."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import devices
import sources
from errors import UserError
from model import SHAPES
from optimizers import OPTIMIZERS
from options import number
from parallel import MODES
from recipes import PER_PHASE, RECIPES, completed_lr, phases, recipe_defaults

RUNS = Path("runs")
# Change where a run goes or how often it reports, not what it computes.
_FREE = {"out", "resume", "overwrite", "checkpoint_every", "eval_every", "device", "threads"}
_FREE |= {"data_workers"}
# Where the text lies may change; the fingerprint of its tokens tells whether it did.
_PLACES = {"corpus", "shards"}
# What prepare.py was told already.
_OF_SHARDS = ("corpus", "docstrings", "format", "text_field", "undecodable", "held_out_share")
# Belong to one call, not to the run.
_NOT_SAVED = {"out", "resume", "overwrite", "device", "parallel"}


def parse_settings(argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parses the command line.

    Returns:
        All settings with defaults filled in, and those that were given explicitly.

    Raises:
        UserError: An option was given that `--shards` leaves nothing to do for.
    """
    settings = vars(_parser().parse_args(argv))
    # argparse leaves alone what a namespace has already, unless the option is given.
    unset = object()
    marked = argparse.Namespace(**dict.fromkeys(settings, unset))
    given = vars(_parser().parse_args(argv, marked))
    explicit = {name: value for name, value in given.items() if value is not unset}
    recipe = settings["recipe"]
    if recipe:
        defaults = recipe_defaults(recipe, settings["optimizer"])
        settings.update((name, v) for name, v in defaults.items() if name not in explicit)
    if settings["lr"] is None:
        settings["lr"] = [OPTIMIZERS[settings["optimizer"]].lr]
    settings["lr"] = completed_lr(settings["lr"], recipe)
    if "lr" in explicit:
        explicit["lr"] = settings["lr"]
    if settings["out"] is None:
        settings["out"] = _default_out(again=settings["resume"] or settings["overwrite"])
    if settings["shards"]:
        idle = [flag(name) for name in _OF_SHARDS if name in explicit]
        if idle:
            raise UserError(
                "--shards: prepare.py made them with its own choice of text and held-out part; "
                f"leave out {', '.join(idle)}, or give it to prepare.py."
            )
        settings.update(dict.fromkeys(_OF_SHARDS))
    elif settings["vocab_size"] is None:
        settings["vocab_size"] = SHAPES[settings["config"]].vocab_size
    return settings, explicit


def _default_out(again: bool) -> Path:
    """The newest run's folder if it is used again, else the next one."""
    numbers = [int(path.name[5:]) for path in RUNS.glob("bert-*") if path.name[5:].isdecimal()]
    newest = max(numbers, default=0)
    return RUNS / f"bert-{max(newest, 1) if again else newest + 1}"


def validate(settings: dict[str, Any], processes: int, launched: bool) -> None:
    """Checks what concerns several settings at once, or settings and the processes.

    Args:
        settings: All settings.
        processes: Number of processes.
        launched: Whether torchrun started them.
    """
    mode = settings["parallel"]
    if launched and mode == "none":
        raise UserError("--parallel: torchrun started this; say ddp or fsdp2.")
    if mode != "none" and not launched:
        raise UserError(
            f"--parallel: {mode} needs the processes of torchrun --nproc-per-node N pretrain.py ..."
        )
    if settings["optimizer"] == "adamw" and settings["state_dtype"] == "bfloat16":
        raise UserError(
            "--state-dtype: adamw keeps float32 or int8 states, not bfloat16; choose madam, "
            "lamadam or lamb."
        )
    counts = {name: len(settings[name]) for name in PER_PHASE if len(settings[name]) > 1}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{flag(name)} {count}" for name, count in counts.items())
        raise UserError(f"{flag(next(iter(counts)))}: not as many values as the others ({told}).")
    positions = SHAPES[settings["config"]].positions
    for phase in phases(settings):
        batch, micro = phase.batch_size, phase.micro_batch_size
        if batch % (micro * processes):
            times = f" times {processes} processes" if processes > 1 else ""
            raise UserError(
                f"--batch-size: {batch} is not a multiple of --micro-batch-size {micro}{times}."
            )
        if not 8 <= phase.sequence_length <= positions:
            raise UserError(
                f"--sequence-length: {phase.sequence_length} is outside 8 to {positions}, the "
                f"positions of the {settings['config']} model."
            )


def saved_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of the settings that a checkpoint records."""
    return {name: value for name, value in settings.items() if name not in _NOT_SAVED}


def resumed_settings(
    settings: dict[str, Any], explicit: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """Settings of a resumed run: those of the checkpoint, where the command line is silent.

    Raises:
        UserError: The command line asks for another computation than the checkpoint's.
    """
    for name, value in explicit.items():
        if name in _FREE or name not in saved:
            continue
        if name in _PLACES and bool(value) == bool(saved[name]):
            continue
        if value != saved[name]:
            raise UserError(
                f"--resume: the checkpoint was made with {flag(name)} {_text(saved[name])}, not "
                f"{_text(value)}; leave the option out, or start a new run in another --out."
            )
    return {**settings, **saved, **explicit}


def flag(name: str) -> str:
    """The option that sets a setting."""
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a list as it would be typed."""

    def _expand_help(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(default, list):
            action.default = _text(default) or "none"
        try:
            return super()._expand_help(action)
        finally:
            action.default = default


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pretrains BERT (masked LM and next-sentence prediction).",
        formatter_class=_Help,
        epilog="An option that says N [N ...] takes one value, or one for each phase of the run: "
        "phases follow one another with their own data, batch and learning-rate schedule; weights "
        "and optimizer state go on.",
        allow_abbrev=False,
    )
    count = number(int, 1)
    share = number(float, 0.0, 0.9)
    positive = number(float, 0.0, open_low=True)
    per_phase: dict[str, Any] = {"nargs": "+", "metavar": "N"}

    group = parser.add_argument_group("data")
    sources.add_options(group)
    group.add_argument(
        "--shards", metavar="FOLDER", help="what prepare.py made, instead of --corpus"
    )
    group.add_argument(
        "--data-workers",
        type=number(int, 0),
        help="processes that make the next batch meanwhile; None: 4 on a GPU, 0 on a CPU",
    )
    group.add_argument(
        "--held-out-share", type=share, default=0.1, help="share of documents to hold out"
    )
    group.add_argument(
        "--vocab-size",
        type=count,
        help="WordPiece vocabulary; None: the config's own, with --shards theirs",
    )
    group.add_argument(
        "--sequence-length", **per_phase, type=count, default=[64], help="tokens per example"
    )

    group = parser.add_argument_group("model and training")
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        help="the paper's two phases for BERT-Base or BERT-Large: other defaults of the options "
        "below; a single --lr is that of phase 1",
    )
    group.add_argument(
        "--scale",
        type=number(float, 0.0, 1.0, open_low=True),
        default=1.0,
        metavar="F",
        help="shrink the run: steps x F, batch x F (to a power of two), peak lr x the square root "
        "of the batch's factor, width and depth of the model x F^(2/3)",
    )
    group.add_argument("--config", choices=SHAPES, default="tiny", help="model shape")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="madam", help="optimizer")
    group.add_argument("--steps", **per_phase, type=count, default=[500], help="optimizer steps")
    group.add_argument(
        "--batch-size",
        **per_phase,
        type=count,
        default=[128],
        help="examples per step, of all processes",
    )
    group.add_argument(
        "--micro-batch-size",
        **per_phase,
        type=count,
        default=[32],
        help="examples per forward and backward",
    )
    group.add_argument(
        "--lr", **per_phase, type=positive, help="peak lr; None: the optimizer's own"
    )
    group.add_argument(
        "--warmup", **per_phase, type=share, default=[0.1], help="share of steps with rising lr"
    )
    group.add_argument(
        "--decay-power", type=positive, default=1.0, help="power of the polynomial lr decay"
    )
    group.add_argument(
        "--decay-from",
        choices=("warmup", "start"),
        default="warmup",
        help="where the decay begins to count: with start, as in NVIDIA's script, lr drops by "
        "(1 - warmup)^power when the warm-up ends",
    )
    group.add_argument(
        "--weight-decay",
        type=number(float, 0.0),
        default=0.1,
        help="decoupled, not on biases and LayerNorm",
    )
    group.add_argument(
        "--betas",
        nargs=2,
        type=number(float, 0.0, 1.0),
        default=[0.9, 0.999],
        metavar=("ALPHA", "BETA"),
        help="momentum, and the (upper) averaging coefficient of squared gradients",
    )
    group.add_argument(
        "--beta-min",
        type=number(float, 0.0, 1.0, open_low=True),
        default=0.5,
        help="lower averaging coefficient of MaxVA; adamw and lamb have none",
    )
    group.add_argument(
        "--state-dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="how the optimizer keeps its states; adamw has no bfloat16, and int8 by bitsandbytes",
    )
    group.add_argument(
        "--max-grad-norm", type=positive, default=1.0, help="clip gradients to this global norm"
    )
    group.add_argument("--seed", type=number(int, 0), default=0, help="seed of everything")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of matrix products (autocast); weights and optimizer stay float32",
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--out",
        type=Path,
        help="folder of the run; without it a new one, runs/bert-1 and so on, with --resume and "
        "--overwrite the newest of them",
    )
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with its settings",
    )
    exclusive.add_argument(
        "--overwrite", action="store_true", help="delete the run that is in --out"
    )
    group.add_argument("--checkpoint-every", type=count, default=100, help="steps in between")
    group.add_argument("--eval-every", type=count, default=50, help="steps in between")
    group.add_argument(
        "--eval-examples", type=count, default=512, help="most held-out examples to evaluate"
    )
    group.add_argument(
        "--parallel",
        choices=MODES,
        default="none",
        help="how the processes that torchrun started train together",
    )
    devices.add_options(group)
    return parser
