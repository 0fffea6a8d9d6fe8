"""Reproduces Sec. 4 of the MaxVA paper: prints tables, writes results.json and the figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import figures
import nonconvex
import quadratic
import tables
import torch

import maxva_kernels

MOST_TRIALS = 10_000


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    whole = _integer_from
    parser.add_argument(
        "--trials", type=whole(2), default=100, help="runs of each point (default: %(default)s)"
    )
    parser.add_argument(
        "--repetitions", type=whole(1), default=10,
        help="seeds of the quadratic study, from --seed on; ten times as many where the spread "
        "over seeds is looked at (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole(0), default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduction"),
        help="folder for results.json and the figures, overwritten (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=whole(1), default=1, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small grids, few iterations")
    arguments = parser.parse_args(argv)
    if arguments.trials * arguments.repetitions > MOST_TRIALS:
        parser.error(f"--trials times --repetitions is over {MOST_TRIALS}, which memory is for")
    if arguments.seed >= 2**62:
        parser.error("--seed has to be below 2**62")
    return arguments


def _integer_from(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return value

    return parse


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both studies, draws the figures, and returns all numbers."""
    started = time.perf_counter()
    quick = arguments.quick
    sampled = nonconvex.run(
        nonconvex.QUICK if quick else nonconvex.FULL, arguments.trials, arguments.seed
    )
    figures.draw_nonconvex(arguments.out / "nonconvex.png", sampled)

    study = quadratic.QUICK if quick else quadratic.FULL
    seeds = range(arguments.seed, arguments.seed + arguments.repetitions)
    runs = quadratic.simulate(study, arguments.trials, seeds)
    settings = quadratic.summarize(study, runs)
    figures.draw_quadratic(arguments.out / "quadratic.png", settings[0], runs)
    figures.draw_settings(arguments.out / "quadratic_settings.png", settings)

    study = quadratic.QUICK_SEEDS if quick else quadratic.SEEDS
    many = range(arguments.seed, arguments.seed + arguments.repetitions * (1 if quick else 10))
    runs = quadratic.simulate(study, arguments.trials, many)
    shared = quadratic.summarize(study, runs)
    study = dataclasses.replace(study, settings=study.settings[:1])
    runs = quadratic.simulate(study, arguments.trials, many, independent_noise=True)
    return {
        "nonconvex": sampled,
        "quadratic": {
            "trials": arguments.trials,
            "seeds": list(seeds),
            "settings": settings,
            "many_seeds": {
                "seeds": list(many),
                "shared_noise": shared,
                "independent_noise": quadratic.summarize(study, runs),
            },
        },
        "environment": {
            "maxva_kernels": maxva_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - started, 1),
        },
    }


def report(results: dict[str, Any]) -> str:
    """The tables that docs/reproduction.md shows."""
    quadratic_model = results["quadratic"]
    many = quadratic_model["many_seeds"]
    return "\n\n".join([
        "Eq. 11: share of runs that end within 0.1 of the optimum",
        tables.success_table(results["nonconvex"]),
        "Eq. 11: curves of Fig. 2",
        tables.curve_table(results["nonconvex"]),
        "Noisy quadratic model: best loss (lr, beta)",
        tables.loss_table(quadratic_model["settings"]),
        f"Noisy quadratic model: each of {len(many['seeds'])} seeds a study of its own",
        tables.spread_table(many),
        f"{results['environment']['seconds']} s",
    ])  # fmt: skip


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` in one piece or not at all, numbers with five digits."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(results)) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    # converged coordinates shrink to subnormal numbers, which are slow
    torch.set_flush_denormal(True)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        results = run(arguments)
        write_json(arguments.out / "results.json", results)
    except OSError as error:
        print(f"error: --out: {error}", file=sys.stderr)
        return 1
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
