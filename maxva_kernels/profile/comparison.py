"""Contenders over one model in one dtype mode: checked, then timed against each other in rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from maxva_kernels.optimizers import MaxVA
from maxva_kernels.profile.contenders import Contender
from maxva_kernels.profile.measure import (
    FLUSH_BYTES,
    STREAM_NUMEL,
    STREAMS,
    UNCACHED_BYTES,
    Clock,
    CpuClock,
    CudaClock,
    Groups,
    OperatorTimer,
    Rounds,
    Step,
    Timing,
    count_launches,
    flush,
    make_groups,
    parameters,
    peak_extra_bytes,
    spread,
    stream,
)
from maxva_kernels.profile.models import Model, Shapes
from maxva_kernels.profile.traffic import COMPACT, DTYPE_MODES, DtypeMode, least_shape
from maxva_kernels.profile.verify import WrongResultError, check_step

Row = dict[str, Any]
#: Steps over one-element tensors whose median is the host's time on a CPU.
_HOST_STEPS = 9
#: Copies of one parameter that the eager backend holds at the most, and with compact states.
_EAGER_TEMPORARIES, _EAGER_COMPACT_TEMPORARIES = 11, 49


@dataclass
class Problems:
    """Why contenders have no row: `unavailable` ones are fine, `wrong` ones are not."""

    unavailable: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        model: the parameter list.
        dtype: a key of DTYPE_MODES.
        contenders: in the order of the rows.
        baseline: the one of them that ratios are to.
        device: where.
        threads: of a CPU; None for all.
    """

    model: Model
    dtype: str
    contenders: list[Contender]
    baseline: Contender
    device: torch.device
    threads: int | None = None

    @property
    def mode(self) -> DtypeMode:
        return DTYPE_MODES[self.dtype]

    @property
    def yardstick_numel(self) -> int:
        return STREAM_NUMEL[self.device.type]

    def bytes_needed(self, contenders: list[Contender], per: int | None = None) -> int:
        """Memory of parameters, gradients, states and the yardstick, for contenders at once."""
        numel = self.model.numel if per is None else per
        kinds = {(d.theta, d.grad) for d in (c.dtypes(self.mode) for c in contenders)}
        shared = sum(theta.itemsize + grad.itemsize for theta, grad in kinds)
        states = sum(c.state_bytes(self.mode, self.model.shapes) for c in contenders)
        fixed = 2 * 4 * self.yardstick_numel + FLUSH_BYTES
        eager = [c for c in contenders if c.backend == "eager"]
        if eager:
            largest = max(math.prod(shape) for shape, _ in self.model.shapes)
            compact = any(c.extras & COMPACT for c in eager)
            copies = _EAGER_COMPACT_TEMPORARIES if compact else _EAGER_TEMPORARIES
            fixed += copies * self.mode.state.itemsize * largest
        return math.ceil(numel * (shared + states)) + fixed

    def fitting(self, free: int) -> list[list[Contender]]:
        """Parts of the contenders, each with the baseline, that fit in memory one at a time."""
        parts: list[list[Contender]] = []
        part = [self.baseline]
        for contender in self.contenders:
            if contender in part:
                continue
            if len(part) > 1 and self.bytes_needed([*part, contender]) > free:
                parts.append(part)
                part = [self.baseline]
            part.append(contender)
        return [*parts, part]

    def largest_numel(self, free: int) -> int:
        """Parameters for which the baseline and each contender alone still fit in memory."""
        return min(
            (free - self.bytes_needed(pair, per=0))
            // (self.bytes_needed(pair, per=1) - self.bytes_needed(pair, per=0))
            for pair in ([self.baseline, contender] for contender in self.contenders)
        )


class Comparison:
    """Callable that runs a round; makes, checks and warms up everything when it is made."""

    def __init__(self, case: Case) -> None:
        """Takes a case whose contenders fit in memory together."""
        self.case = case
        self.problems = Problems()
        self._clock = self._make_clock()
        self._groups: dict[tuple[torch.dtype, torch.dtype], Groups] = {}
        self._facts: dict[str, Row] = {}
        #: What a round runs, by label; for `--trace`, too.
        self.steps: dict[str, Step] = {}
        self._measured: dict[str, Callable[[], dict[str, float]]] = {}
        for contender in case.contenders:
            self._add(contender)
        yardstick = stream(case.yardstick_numel, case.device)
        self._yardstick = STREAMS[case.device.type][0]
        self._measured[self._yardstick] = lambda: {"stream": self._clock.stream(yardstick)}
        self._rounds = Rounds(self._measured, self._negate_gradients)
        self()  # allocations of first calls
        self._rounds.forget()

    def __call__(self) -> None:
        self._rounds()

    def run(self, rounds: int | None, seconds: float) -> None:
        """Runs so many rounds, or as many as fit in the time, 5 at least."""
        start, done = time.perf_counter(), 0
        while done < (rounds or 5) or (
            rounds is None and time.perf_counter() - start < seconds and done < 1000
        ):
            self()
            done += 1

    def _make_clock(self) -> Clock:
        moved = self.case.model.numel * 28  # by the least of them
        cold = flush(self.case.device) if moved < UNCACHED_BYTES else lambda: None
        return CpuClock(cold) if self.case.device.type == "cpu" else CudaClock(cold)

    def _groups_for(self, contender: Contender) -> Groups:
        dtypes = contender.dtypes(self.case.mode)
        key = dtypes.theta, dtypes.grad
        if key not in self._groups:
            self._groups[key] = make_groups(self.case.model.shapes, self.case.device, 0, *key)
        return self._groups[key]

    def _negate_gradients(self) -> None:
        """A gradient that repeats itself has no variance: beta_t would hang on rounding."""
        for groups in self._groups.values():
            torch._foreach_neg_([p.grad for p in parameters(groups) if p.grad is not None])

    def _add(self, contender: Contender) -> None:
        device, mode = self.case.device, self.case.mode
        try:
            if reason := contender.why_not(device.type, mode):
                self.problems.unavailable[contender.label] = reason
                return
            optimizer, step = contender.make(self._groups_for(contender), mode)
            if isinstance(optimizer, MaxVA):
                check_step(contender, optimizer, step, self._negate_gradients, mode)
            else:
                step()
            extra_bytes, launches = peak_extra_bytes(step, device), count_launches(step, device)
            kernel = host = None
            if device.type == "cuda":
                kernel = self._clock.kernel(step)
            elif contender.in_operators:
                kernel, host = self._clock.kernel(step), self._host(contender)
        except WrongResultError as error:
            self.problems.wrong[contender.label] = str(error)
            return
        except Exception as error:  # other packages may raise anything; memory may run out
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            self.problems.unavailable[contender.label] = line
            return
        self.steps[contender.label] = step
        self._facts[contender.label] = {
            "peak_extra_bytes": extra_bytes,
            "launches": launches,
            "kernel_method": kernel and kernel[0],
            "host_us": host and host * 1e6,
        }
        self._measured[contender.label] = partial(self._measure, step, kernel and kernel[1])

    def _measure(self, step: Step, kernel: Callable[[], float] | None) -> dict[str, float]:
        found = self._clock.step(step)
        return found if kernel is None else {**found, "kernel": kernel()}

    def _host(self, contender: Contender) -> float:
        """On a CPU: a step's time outside of operators, over as many tensors of few elements.

        Beside large tensors the difference of two noisy times would hide it.
        """
        dtypes = contender.dtypes(self.case.mode)
        shapes: Shapes = [
            (least_shape(dtypes, contender.extras, shape), decays)
            for shape, decays in self.case.model.shapes
        ]
        groups = make_groups(shapes, "cpu", 0, dtypes.theta, dtypes.grad)
        _, step = contender.make(groups, self.case.mode)
        whole, inside = [], []
        for _ in range(_HOST_STEPS):
            start = time.perf_counter()
            step()
            whole.append(time.perf_counter() - start)
            with OperatorTimer(time.perf_counter) as timer:
                step()
            inside.append(timer.seconds)
        outside: float = statistics.median(whole) - statistics.median(inside)
        return max(0.0, outside)

    def rows(self) -> list[Row]:
        """What the rounds so far have found, a row per contender."""
        timings = self._rounds.timings()
        streamed = timings[self._yardstick]["stream"].median
        bandwidth = STREAMS[self.case.device.type][1] * self.case.yardstick_numel / streamed
        baseline = timings.get(self.case.baseline.label, {})
        return [
            self._row(contender, timings[contender.label], baseline, bandwidth)
            for contender in self.case.contenders
            if contender.label in self.steps
        ]

    def _row(
        self,
        contender: Contender,
        found: dict[str, Timing],
        baseline: dict[str, Timing],
        bandwidth: float,
    ) -> Row:
        case = self.case
        moved = contender.bytes_per_parameter(case.mode, case.model.shapes)
        kernel = found.get("kernel")
        rate = moved and moved * case.model.numel / (kernel or found["step"]).median
        row: Row = {
            "model": case.model.name,
            "parameters": case.model.numel,
            "tensors": len(case.model.shapes),
            "dtype": case.dtype,
            "optimizer": contender.name,
            "backend": contender.backend,
            "threads": case.threads,
            "rounds": len(found["step"].seconds),
            "step_ms": found["step"].median * 1e3,
            "kernel_ms": kernel and kernel.median * 1e3,
            "bytes_per_parameter": moved,
            "gb_per_s": rate and rate / 1e9,
            "bandwidth_gb_per_s": bandwidth / 1e9,
            "share_of_bandwidth": rate and rate / bandwidth,
            **self._facts[contender.label],
            "baseline": case.baseline.label,
        }
        if "host" in found:
            row["host_us"] = found["host"].median * 1e6
        for figure, name in (("step", "ratio"), ("kernel", "kernel_ratio")):
            both = figure in found and figure in baseline
            ratios = found[figure].ratios_to(baseline[figure]) if both else []
            row[name] = statistics.median(ratios) if ratios else None
            row[f"{name}_spread"] = spread(ratios) if ratios else None
        return row
