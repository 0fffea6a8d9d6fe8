"""Clocks, paired rounds and the yardstick of bandwidth.

A clock tells three times of a step apart: the whole `step()` until its last write, the host's part
in it, and what the kernels alone take. Caches are emptied before each. Both take their source of
time as an argument, so that tests can bring their own.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maxva_kernels import __version__
from maxva_kernels.backends import BACKENDS
from maxva_kernels.profile.models import Shapes

Step = Callable[[], object]
Groups = list[dict[str, Any]]

#: The yardstick and the bytes that it moves per float32 element. On a CPU a copy would pay for
#: write-allocation and be no ceiling; on a GPU it is what bandwidth is quoted by.
STREAMS = {"cpu": ("a.add_(b)", 12), "cuda": ("b.copy_(a)", 8)}
#: Elements of each of its tensors: far more than a cache holds.
STREAM_NUMEL = {"cpu": 1 << 26, "cuda": 1 << 28}
#: Read to empty the caches before a model that might stay in them.
FLUSH_BYTES = 1 << 28
#: A step that moves more than this leaves nothing of its beginning in a cache.
UNCACHED_BYTES = 1 << 30


@dataclass
class Timing:
    """Times of one contender over the rounds of one run, in seconds per step."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios_to(self, other: Timing) -> list[float]:
        """This contender's time by the other's in the same round, for every round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def ratio_to(self, other: Timing) -> float:
        """The median of `ratios_to`."""
        return statistics.median(self.ratios_to(other))


def spread(values: Sequence[float]) -> float:
    """The standard deviation of normal noise with this median deviation; outliers do not count."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


class Rounds:
    """Callable that lets every contender measure itself once and remembers what it found.

    The order turns from round to round, so that none is always first: with two, A B B A A B.
    """

    def __init__(
        self, contenders: dict[str, Callable[[], dict[str, float]]], before: Step = lambda: None
    ) -> None:
        """Takes contenders that each return figures by name; `before` runs untimed every round."""
        self._contenders = contenders
        self._before = before
        self._round = 0
        self.forget()

    def __call__(self) -> None:
        self._before()
        names = list(self._contenders)
        turn = self._round % len(names)
        for name in names[turn:] + names[:turn]:
            for figure, value in self._contenders[name]().items():
                self._found[name].setdefault(figure, Timing()).seconds.append(value)
        self._round += 1

    def forget(self) -> None:
        """Drops what was found so far, as that of a warm-up."""
        self._found: dict[str, dict[str, Timing]] = {name: {} for name in self._contenders}

    def timings(self) -> dict[str, dict[str, Timing]]:
        """Per contender and figure, one value for each round."""
        return self._found


class Clock(Protocol):
    """Measures one step at a time."""

    def step(self, step: Step) -> dict[str, float]:
        """Runs a step; returns seconds as "step" and, where it can be told, "host"."""

    def kernel(self, step: Step) -> tuple[str, Callable[[], float]] | None:
        """How the kernels alone are timed, and what runs and times them; None where they cannot.

        The step must have run before; this runs it again.
        """

    def stream(self, step: Step) -> float:
        """Seconds of the yardstick."""


class OperatorTimer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the time inside the torch operators that are called under it."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = now
        self.seconds = 0.0
        self.calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        start = self._now()
        result = function(*args, **(kwargs or {}))
        self.seconds += self._now() - start
        self.calls += 1
        return result


class CpuClock:
    """Wall time; the kernel is the time inside torch's operators, ours included."""

    def __init__(
        self, flush: Step = lambda: None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._flush = flush
        self._now = now

    def step(self, step: Step) -> dict[str, float]:
        self._flush()
        start = self._now()
        step()
        return {"step": self._now() - start}

    def kernel(self, step: Step) -> tuple[str, Callable[[], float]] | None:
        def timed() -> float:
            self._flush()
            with OperatorTimer(self._now) as timer:
                step()
            return float(timer.seconds)

        return "operators", timed

    def stream(self, step: Step) -> float:
        start = self._now()
        step()
        return self._now() - start


class CudaClock:
    """Host time around a synchronised step; events around a replayed graph for the kernels.

    Args:
        flush: what empties the caches.
        now: seconds.
        cuda: torch.cuda, or what stands in for it.
        repeats: replays whose median is one round's time.
    """

    def __init__(
        self,
        flush: Step = lambda: None,
        now: Callable[[], float] = time.perf_counter,
        cuda: Any = torch.cuda,
        repeats: int = 5,
    ) -> None:
        self._flush = flush
        self._now = now
        self._cuda = cuda
        self._repeats = repeats

    def step(self, step: Step) -> dict[str, float]:
        self._flush()
        self._cuda.synchronize()
        start = self._now()
        step()
        returned = self._now()
        self._cuda.synchronize()
        return {"step": self._now() - start, "host": returned - start}

    def kernel(self, step: Step) -> tuple[str, Callable[[], float]] | None:
        try:
            replay = self._captured(step)
        except Exception:  # an optimizer that synchronises or allocates in its own way
            self._cuda.synchronize()
            if not device_activities(step):  # no permission to trace
                return None
            return "kernel events", lambda: self._traced(step)
        return "graph replay", lambda: self._between_events(replay)

    def stream(self, step: Step) -> float:
        return self._between_events(step)

    def _captured(self, step: Step) -> Step:
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            step()
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            step()
        replay: Step = graph.replay
        return replay

    def _between_events(self, replay: Step) -> float:
        """Device time of one call, that begins with cold caches while the queue is full."""
        pairs = []
        for _ in range(self._repeats):
            begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self._flush()
            begin.record()
            replay()
            end.record()
            pairs.append((begin, end))
        self._cuda.synchronize()
        return float(statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs))

    def _traced(self, step: Step) -> float:
        self._flush()
        self._cuda.synchronize()
        return float(sum(event.device_time for event in device_activities(step))) / 1e6


def traced(*activities: str, **options: Any) -> torch.profiler.profile:
    """The profiler of torch over activities of these names, less its reports on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    chosen = [getattr(torch.profiler.ProfilerActivity, name) for name in activities]
    return torch.profiler.profile(activities=chosen, **options)


def device_activities(step: Step) -> list[Any]:
    """What a step runs on a GPU: the profiler's events of its kernels, copies and fills."""
    with traced("CUDA") as trace:
        step()
        torch.cuda.synchronize()
    return activities_in(trace.events() or [])


def activities_in(events: Sequence[Any]) -> list[Any]:
    """Those of a trace's events that are work of the device and no annotation."""
    return [
        event
        for event in events
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]


def count_launches(step: Step, device: torch.device) -> int | None:
    """Kernels, copies and fills that a step sends to a GPU; None on a CPU or without a tracer."""
    if device.type == "cpu":
        return None
    return len(device_activities(step)) or None


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a step holds beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what is freed in between would be counted
    with traced("CPU", profile_memory=True) as trace:
        step()
    found = trace.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


def make_groups(
    shapes: Shapes,
    device: torch.device | str = "cpu",
    seed: int = 0,
    theta_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype = torch.float32,
) -> Groups:
    """Parameters with gradients of a realistic size (no zeros), decaying and not decaying."""
    generator = torch.Generator(device).manual_seed(seed)
    groups: Groups = [{"params": [], "weight_decay": 0.01}, {"params": [], "weight_decay": 0.0}]
    for shape, decays in shapes:
        theta = torch.randn(shape, generator=generator, device=device).mul_(0.02)
        p = torch.nn.Parameter(theta.to(theta_dtype))
        g = torch.randn(shape, generator=generator, device=device).mul_(1e-3)
        p.grad = g.to(grad_dtype)
        groups[0 if decays else 1]["params"].append(p)
    return [group for group in groups if group["params"]]


def copied(groups: Groups) -> Groups:
    """The same parameters for another optimizer, which adds its own keys to the groups."""
    return [dict(group) for group in groups]


def parameters(groups: Groups) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [p for group in groups for p in group["params"]]


def stream(numel: int, device: torch.device | str = "cpu") -> Step:
    """The yardstick of bandwidth; see STREAMS."""
    a, b = torch.rand(numel, device=device), torch.rand(numel, device=device)
    return (lambda: b.copy_(a)) if torch.device(device).type == "cuda" else (lambda: a.add_(b))


def flush(device: torch.device) -> Step:
    """Empties the caches: it reads, so that nothing is left to be written back in timed steps."""
    buffer = torch.rand(FLUSH_BYTES // 4, device=device)
    return lambda: buffer.sum()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, with a tenth left for others."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
        control = Path("/sys/fs/cgroup")  # a container may have less
        limit = int((control / "memory.max").read_text())
        free = min(free, limit - int((control / "memory.current").read_text()))
    except (OSError, ValueError, StopIteration):
        pass  # what was found last holds
    return int(0.9 * free)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the figures depend on: machine, driver, versions, commit."""
    cpu = torch.device(device).type == "cpu"
    about: dict[str, Any] = {
        "device": _cpu_name() if cpu else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maxva_kernels": __version__,
        "commit": _commit(Path(__file__).parents[2]),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
    if cpu:
        about["torch_isa"] = torch.backends.cpu.get_cpu_capability()
        if BACKENDS["cpu"].why_not() is None:
            about["maxva_isa"] = importlib.import_module("maxva_kernels._C").cpu_isa()
    else:
        about["cuda"] = torch.version.cuda
        about["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        if BACKENDS["triton"].why_not() is None:
            about["triton"] = importlib.import_module("triton").__version__
    return about


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None  # installed: another repository around it is not this one's
    return _output("git", "-C", str(checkout), "describe", "--always", "--dirty")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
