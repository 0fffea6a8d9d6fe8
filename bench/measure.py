"""Paired timing of optimizer steps: each contender once per round, so that noise hits all."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Shapes
from torch import Tensor

#: An in-place a.add_(b) reads two and writes one float32 per element. On a CPU a copy pays for
#: write-allocation and would be no ceiling.
STREAM_BYTES = 12


@dataclass(frozen=True)
class Timing:
    """Times of one contender over the rounds of one run, in seconds per step."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timing) -> float:
        """The median over rounds of this contender's time by the other's in the same round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def make_groups(shapes: Shapes, device: str = "cpu", seed: int = 0) -> list[dict[str, Any]]:
    """Parameters with gradients of a realistic size (no zeros), decaying and not decaying."""
    generator = torch.Generator(device).manual_seed(seed)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.01},
        {"params": [], "weight_decay": 0.0},
    ]
    for shape, decays in shapes:
        theta = torch.randn(shape, generator=generator, device=device) * 0.02
        p = torch.nn.Parameter(theta)
        p.grad = torch.randn(shape, generator=generator, device=device) * 1e-3
        groups[0 if decays else 1]["params"].append(p)
    return groups


def copied(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same parameters for another optimizer, which adds its own keys to the groups."""
    return [dict(group) for group in groups]


def parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def stream(numel: int, device: str = "cpu") -> Callable[[], object]:
    """The yardstick of bandwidth; see STREAM_BYTES."""
    a, b = torch.rand(numel, device=device), torch.rand(numel, device=device)
    return lambda: a.add_(b)


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds per step: wall time on a CPU; on a GPU, device time of ten steps in a row."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    steps = 10
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(steps):
        step()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / steps


class Rounds:
    """Callable that runs every contender once and remembers the times.

    The order turns from round to round, so that none is always first.
    """

    def __init__(self, steps: dict[str, Callable[[], object]], device: str = "cpu") -> None:
        self._steps = steps
        self._device = device
        self._seconds: dict[str, list[float]] = {name: [] for name in steps}
        self._round = 0

    def __call__(self) -> None:
        names = list(self._steps)
        turn = self._round % len(names)
        for name in names[turn:] + names[:turn]:
            self._seconds[name].append(timed(self._steps[name], self._device))
        self._round += 1

    def warm_up(self, rounds: int = 2) -> None:
        for _ in range(rounds):
            self()
        self._seconds = {name: [] for name in self._steps}

    def timings(self) -> dict[str, Timing]:
        return {name: Timing(seconds) for name, seconds in self._seconds.items()}


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: machine, versions, commit."""
    import maxva_kernels

    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    about: dict[str, Any] = {
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maxva_kernels": maxva_kernels.__version__,
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
    if device == "cpu":
        from maxva_kernels import _C

        about["maxva_isa"] = _C.cpu_isa()
        about["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    else:
        about["cuda"] = torch.version.cuda
        about["driver"] = _driver()
    return about


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"
