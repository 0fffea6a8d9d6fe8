"""Measures optimizers on this machine: time, bandwidth and memory of a step, against each other.

Exit status: 0; 1 if a kernel computed a wrong result or --compare found a regression; 2 for input
that has to be changed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from maxva_kernels.backends import BACKENDS
from maxva_kernels.profile import InputError, report, unknown
from maxva_kernels.profile.comparison import Case, Comparison, Row
from maxva_kernels.profile.contenders import (
    BASELINE,
    DEFAULTS,
    EXTRAS,
    OTHERS,
    OURS,
    Contender,
    check_backend,
    measured_backends,
    names,
    parse,
)
from maxva_kernels.profile.measure import environment, free_bytes, traced
from maxva_kernels.profile.models import MODELS, Model, find_model, load_shapes
from maxva_kernels.profile.traffic import DTYPE_MODES

_DEFAULT_MODELS = {
    "cpu": "bert-base",
    "cuda": "bert-base,bert-large,gpt2-xl,llama-1b,resnet-50,tiny-10000x64",
}
#: The update kernel of csrc/update_kernel.cuh, and of triton_kernels/ as well.
_KERNEL = "update_kernel"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _words(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found


def _positive(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be a number above 0, is {text!r}")
        return value

    return parsed


def _thread_counts(text: str) -> list[int]:
    return [_positive(int)(word) for word in _words(text)]


def _parser() -> _Parser:
    parser = _Parser(prog="maxva-profile", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--models", type=_words, metavar="NAMES", help=f"of {', '.join(MODELS)}")
    add(
        "--model",
        action="append",
        default=[],
        metavar="MODULE:FACTORY",
        help="a model of your own: what the factory returns, a Module or its parameters",
    )
    add(
        "--shapes",
        type=Path,
        metavar="FILE",
        help="a JSON list of shapes, or of objects with shape, count and decays",
    )
    add(
        "--dtypes",
        type=_words,
        default=["float32"],
        metavar="NAMES",
        help=f"of {', '.join(DTYPE_MODES)}; default float32",
    )
    add(
        "--optimizers",
        type=_words,
        metavar="NAMES",
        help=f"of {', '.join(names())}; ours may be followed by +{', +'.join(EXTRAS)}",
    )
    add("--backends", type=_words, metavar="NAMES", help="of ours; default: all compiled ones")
    add(
        "--baseline",
        metavar="NAME",
        help=f"what ratios are to; default {BASELINE}, with clipping where the others clip",
    )
    add("--clip", action="store_true", help="measure everything with clipping, too")
    add("--threads", type=_thread_counts, metavar="NUMBERS", help="of the CPU; default: all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=_positive(int), help="rounds of every comparison")
    length.add_argument(
        "--seconds",
        type=_positive(float),
        default=10.0,
        help="time of every comparison, at least 5 rounds; default 10",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--markdown", type=Path, metavar="FILE", help="write the table")
    add("--plots", type=Path, metavar="DIR", help="write bars.png and roofline.png")
    add(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="judge the ratios against an earlier --json",
    )
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write torch's trace of one step of each optimizer of the first comparison",
    )
    add("--ncu", action="store_true", help="print the Nsight Compute command for our kernel, only")
    add("--list", action="store_true", help="print models, dtypes, optimizers and backends, only")
    return parser  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be measured; everything has been checked."""

    device: torch.device
    models: list[Model]
    dtypes: list[str]
    comparisons: list[tuple[list[Contender], Contender]]
    threads: list[int | None]
    missing: dict[str, str]


def find_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is."""
    available = torch.cuda.is_available()
    name = name or ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, is {name!r}")
    if device.type == "cuda":
        if not available:
            raise InputError("--device cuda: torch sees no CUDA device")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def make_plan(options: argparse.Namespace) -> Plan:
    """Checks the options.

    Raises:
        InputError: a name is not known or not available, a file does not fit.
    """
    device = find_device(options.device)
    models = chosen_models(options)
    backends = measured_backends(device.type)
    if options.backends:
        backends = [check_backend(name, device.type) for name in options.backends]
    else:
        backends = [name for name in backends if name != "eager"] or ["eager"]
    if options.threads and device.type != "cpu":
        raise InputError("--threads are of the CPU, and the device is a GPU")
    comparisons, missing = _contenders(options, backends, device.type)
    return Plan(
        device,
        models or [find_model(name) for name in _DEFAULT_MODELS[device.type].split(",")],
        options.dtypes,
        comparisons,
        options.threads or [torch.get_num_threads() if device.type == "cpu" else None],
        missing,
    )


def chosen_models(options: argparse.Namespace) -> list[Model]:
    """The models that the options name; checks the dtype modes, too."""
    models = [find_model(name) for name in options.models or []]
    for name in options.model:
        if ":" not in name:
            raise InputError(f"--model must be MODULE:FACTORY, is {name!r}; --models takes names")
        models.append(find_model(name))
    if options.shapes:
        models.append(load_shapes(options.shapes))
    for dtype in options.dtypes:
        if dtype not in DTYPE_MODES:
            raise unknown("dtype", dtype, DTYPE_MODES)
    return models


def _contenders(
    options: argparse.Namespace, backends: list[str], device_type: str
) -> tuple[list[tuple[list[Contender], Contender]], dict[str, str]]:
    """What is measured together with its baseline, and what is not there, with the reason."""
    missing = {}
    if options.optimizers:
        chosen = options.optimizers
        for kind in (name.split("+")[0] for name in chosen):
            if kind in OTHERS and (reason := OTHERS[kind].why_not(device_type)):
                raise InputError(f"optimizer {kind!r} is not available: {reason}")
    else:
        others = [
            name
            for name, other in OTHERS.items()
            if other.module != "torch" and device_type in other.devices
        ]
        missing = {name: why for name in others if (why := OTHERS[name].why_not(device_type))}
        chosen = [*DEFAULTS, *(name for name in others if name not in missing)]
    contenders = [contender for name in chosen for contender in parse(name, backends)]
    (baseline, *_) = parse(options.baseline or BASELINE, backends)
    comparisons = [(_with(baseline, contenders), baseline)]
    if options.clip:
        clipping = [replace(c, extras=c.extras | {"clip"}) for c in contenders]
        clipped = replace(baseline, extras=baseline.extras | {"clip"})
        comparisons.append((_with(clipped, clipping), clipped))
    return comparisons, missing


def _with(baseline: Contender, contenders: list[Contender]) -> list[Contender]:
    return list(dict.fromkeys([baseline, *contenders]))


def check_outputs(options: argparse.Namespace) -> None:
    """Raises InputError if a file that is to be written cannot be, before anything is measured."""
    for name in ("json", "markdown", "trace"):
        path = getattr(options, name)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            existed = path.exists()
            with path.open("a"):
                pass
            if not existed:
                path.unlink()
        except OSError as error:
            raise InputError(f"--{name} {path}: {error.strerror}") from error
    if options.plots:
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError("--plots needs matplotlib: pip install matplotlib")
        try:
            options.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--plots {options.plots}: {error.strerror}") from error


def ncu_command(options: argparse.Namespace) -> str:
    """The Nsight Compute command that profiles one launch of our update kernel.

    Raises:
        InputError: a name is not known. Whether there is a GPU is not asked.
    """
    chosen_models(options)
    for name in options.optimizers or []:
        parse(name, ["cuda"])
    ours = next((n for n in options.optimizers or OURS if n.split("+")[0] in OURS), "FusedMAdam")
    backend = next((name for name in options.backends or [] if name in ("cuda", "triton")), "cuda")
    target = ["--device", options.device or "cuda"]
    if options.shapes:
        target += ["--shapes", str(options.shapes)]
    elif options.model:
        target += ["--model", options.model[0]]
    else:
        target += ["--models", (options.models or ["bert-large"])[0]]
    target += ["--dtypes", options.dtypes[0], "--optimizers", ours, "--backends", backend]
    # the baseline's kernels have other names; the first steps are those of the check
    launches = 2 if "trust" in ours.split("+") else 1
    ncu = ["ncu", "--set", "full", "--import-source", "yes", "--kernel-name", _KERNEL]
    ncu += ["--launch-skip", str(3 * launches), "--launch-count", str(launches)]
    ncu += ["--export", "maxva", "--force-overwrite"]
    command = [sys.executable, "-m", "maxva_kernels.profile", *target, "--rounds", "1"]
    return shlex.join([*ncu, *command])


def listing(device: torch.device) -> str:
    """Everything that can be named, with why it is not available here."""
    lines = ["models:"]
    lines += [
        f"  {m.name:22} {m.numel:>13,} parameters in {len(m.shapes):,}" for m in MODELS.values()
    ]
    lines += ["dtypes:", *(f"  {name}" for name in DTYPE_MODES), "optimizers:"]
    lines += [f"  {name:22} +{', +'.join(EXTRAS)}" for name in OURS]
    for name, other in OTHERS.items():
        extras = ", ".join(f"+{extra}" for extra in ("clip", *sorted(other.extras)))
        lines.append(f"  {name:22} {other.why_not(device.type) or extras}")
    measured = measured_backends(device.type)
    lines += ["backends:"]
    for name, info in BACKENDS.items():
        served = "measured here" if name in measured else f"not for parameters on {device.type!r}"
        lines.append(f"  {name}: {info.why_not() or served}")
    return "\n".join(lines)


def measure(
    plan: Plan, options: argparse.Namespace, save: Callable[[list[Row]], None]
) -> tuple[list[Row], bool]:
    """Runs every comparison; returns the rows and whether all results were right.

    `save` gets all rows so far after each of them, so that an interrupted run is not lost.
    """
    rows: list[Row] = []
    right = True
    trace = options.trace
    for model, dtype, (contenders, baseline), threads in itertools.product(
        plan.models, plan.dtypes, plan.comparisons, plan.threads
    ):
        if threads:
            torch.set_num_threads(threads)
        case = _fitted(Case(model, dtype, contenders, baseline, plan.device, threads))
        parts = case.fitting(free_bytes(plan.device)) if case else []
        for index, part in enumerate(parts):
            assert case is not None
            comparison = Comparison(replace(case, contenders=part))
            right &= _tell(comparison)
            comparison.run(options.rounds, options.seconds)
            found = comparison.rows()
            # the baseline is in every part, and has its row from the first
            rows += [row for row in found if not index or report.label(row) != baseline.label]
            save(rows)
            if trace:
                write_trace(comparison, trace)
                trace = None
            del comparison
            gc.collect()  # its callables refer to it
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows, right


def _fitted(case: Case) -> Case | None:
    """The case with a model that fits in memory; says so where it had to be changed."""
    free = free_bytes(case.device)
    model = case.model.shrunk_to(case.largest_numel(free))
    if model is None:
        needed = max(case.bytes_needed([case.baseline, c]) for c in case.contenders)
        _say(
            f"skipped {case.model.name} in {case.dtype}: needs {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free"
        )
        return None
    if model is not case.model:
        _say(f"{case.model.name} in {case.dtype} does not fit in {free / 1e9:.1f} GB: measuring "
             f"{model.name}, {model.numel:,} parameters")  # fmt: skip
    return replace(case, model=model)


def _tell(comparison: Comparison) -> bool:
    case = comparison.case
    for name, reason in comparison.problems.unavailable.items():
        _say(f"not measured: {name} on {case.model.name} in {case.dtype}: {reason}")
    for reason in comparison.problems.wrong.values():
        _say(f"WRONG, not timed: {case.model.name} in {case.dtype}: {reason}")
    return not comparison.problems.wrong


def write_trace(comparison: Comparison, path: Path) -> None:
    """Writes a Chrome trace of one step of each contender."""
    on_gpu = comparison.case.device.type == "cuda"
    with traced("CPU", *(["CUDA"] if on_gpu else [])) as trace:
        for name, step in comparison.steps.items():
            with torch.profiler.record_function(name):
                step()
        if on_gpu:
            torch.cuda.synchronize()
    trace.export_chrome_trace(str(path))


def _say(line: str) -> None:
    print(f"maxva-profile: {line}", file=sys.stderr, flush=True)


def run(arguments: list[str] | None) -> int:
    """Does what the arguments say; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.list:
        print(listing(find_device(options.device)))
        return 0
    if options.ncu:
        print(ncu_command(options))
        return 0
    plan = make_plan(options)
    check_outputs(options)
    about = environment(plan.device)
    old = None
    if options.compare:
        old = report.read(options.compare)
        report.check_comparable(old, about, options.compare)
    if plan.device.type == "cpu" and about["load"] > about["cores"] / 4:
        _say(
            f"other programs use this machine (load {about['load']} on {about['cores']} cores): "
            "threads that wait for each other suffer most; --threads 1 gives the steadiest ratios"
        )

    def save(rows: list[Row]) -> None:
        if options.json:
            content = report.document(rows, about, plan.missing)
            options.json.write_text(json.dumps(content, indent=1) + "\n")

    rows, right = measure(plan, options, save)
    for name, reason in plan.missing.items():
        _say(f"not measured: {name}: {reason}")
    if not rows:
        _say("nothing was measured")
        return 2 if right else 1
    text = report.table(rows, about)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.plots:
        report.write_plots(rows, about, options.plots)
    if old is None:
        return 0 if right else 1
    verdicts = report.compare(old["rows"], rows)
    if not verdicts:
        raise InputError(f"--compare {options.compare}: it has none of these rows")
    print("", *verdicts, sep="\n")
    return 0 if right and all(v.word != "regression" for v in verdicts) else 1


def main(arguments: list[str] | None = None) -> int:
    """The console script; errors are one line."""
    try:
        return run(arguments)
    except InputError as error:
        _say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
