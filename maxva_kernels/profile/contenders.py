"""The optimizers that can be measured, by name: ours on every backend, torch's, other packages'."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from maxva_kernels import FusedLaMAdam, FusedMAdam
from maxva_kernels.backends import BACKENDS
from maxva_kernels.optimizers import MaxVA
from maxva_kernels.profile import InputError, unknown
from maxva_kernels.profile.foreach import ForeachMAdam
from maxva_kernels.profile.measure import Groups, Step, copied, parameters
from maxva_kernels.profile.models import Shapes, num_parameters
from maxva_kernels.profile.traffic import (
    COMPACT,
    DtypeMode,
    adam_bytes,
    maxva_bytes,
    maxva_state_bytes,
)

BASELINE = "AdamW-fused"
OURS: dict[str, type[MaxVA]] = {"FusedMAdam": FusedMAdam, "FusedLaMAdam": FusedLaMAdam}
#: Below the norm of any gradients that are made here, so that clipping does clip.
MAX_GRAD_NORM = 0.1
LR = 1e-3

#: What may follow a name, as in FusedMAdam+clip+stats, and the options of ours that it sets.
EXTRAS: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": MAX_GRAD_NORM},
    "skip": {"skip_nonfinite": True},
    "stats": {"collect_stats": True},
    "sr": {"stochastic_rounding": True},
    "amsgrad": {"amsgrad": True},
    "trust": {"trust_ratio": True},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int8": {"state_dtype": "int8"},
}

Make = Callable[[Groups, DtypeMode, dict[str, Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Other:
    """An optimizer that is not ours.

    Attributes:
        module: what has to be importable.
        make: makes it from groups, dtypes and options.
        extras: the extras that it knows, beside "clip".
        devices: device types that it serves.
        state: bytes of an element of its states, with what scales them; None for the parameter's
            dtype.
        keeps_master: whether it has float32 master weights of its own; where not, it is given
            float32 parameters in the modes with a master copy.
        temporaries: copies of the parameters that a step makes on the way. Its traffic is then a
            chain of operations, and no floor is known.
        low_precision: whether it takes bfloat16 and float16 parameters.
        operators: whether it computes in torch operators, whose time can be told on a CPU.
    """

    module: str
    make: Make
    extras: frozenset[str] = frozenset()
    devices: tuple[str, ...] = ("cpu", "cuda")
    state: float | None = None
    keeps_master: bool = False
    temporaries: int = 0
    low_precision: bool = True
    operators: bool = True

    def why_not(self, device_type: str) -> str | None:
        """Why it is not available on a device here; None where it is."""
        if device_type not in self.devices:
            return f"it is for {' and '.join(self.devices)}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken installation may raise anything
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def _adamw(**options: Any) -> Make:
    def make(groups: Groups, mode: DtypeMode, extras: dict[str, Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **options, **extras)

    return make


def _imported(module: str, name: str, master: dict[str, Any] | None = None, **options: Any) -> Make:
    """Makes `module.name`, with the options `master` where a master copy is to be kept."""

    def make(groups: Groups, mode: DtypeMode, extras: dict[str, Any]) -> torch.optim.Optimizer:
        more = (master or {}) if mode.master else {}
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
            groups, **options, **more, **extras
        )
        return made

    return make


def _foreach_madam(
    groups: Groups, mode: DtypeMode, extras: dict[str, Any]
) -> torch.optim.Optimizer:
    return ForeachMAdam(groups, lr=LR)


_GPU = ("cuda",)
#: bitsandbytes and torchao: a byte, and a float32 per block of 256.
_EIGHT_BITS = 1 + 4 / 256
_AMSGRAD = frozenset({"amsgrad"})
OTHERS: dict[str, Other] = {
    BASELINE: Other("torch", _adamw(fused=True), _AMSGRAD),
    "AdamW-foreach": Other("torch", _adamw(foreach=True), _AMSGRAD, temporaries=1),
    "MAdam-foreach": Other("torch", _foreach_madam, temporaries=7, low_precision=False),
    "apex-FusedAdam": Other(
        "amp_C",  # apex without its extensions imports, but has no fused optimizers
        _imported(
            "apex.optimizers", "FusedAdam", {"master_weights": True, "capturable": True}
        ),
        devices=_GPU, state=4, keeps_master=True,
    ),
    "te-FusedAdam": Other(
        "transformer_engine.pytorch.optimizers",
        _imported("transformer_engine.pytorch.optimizers", "FusedAdam", {"master_weights": True}),
        devices=_GPU, state=4, keeps_master=True,
    ),
    "bnb-AdamW": Other(
        "bitsandbytes",
        _imported("bitsandbytes.optim", "AdamW", optim_bits=32),
        devices=_GPU, state=4,
    ),
    "bnb-AdamW8bit": Other(
        "bitsandbytes", _imported("bitsandbytes.optim", "AdamW8bit"), state=_EIGHT_BITS
    ),
    "torchao-AdamW8bit": Other(
        "torchao.optim",
        _imported("torchao.optim", "AdamW8bit"),
        state=_EIGHT_BITS, operators=False,  # torch.compile's kernels
    ),
    "deepspeed-FusedAdam": Other(
        "deepspeed", _imported("deepspeed.ops.adam", "FusedAdam"), devices=_GPU
    ),
    "deepspeed-CPUAdam": Other(
        "deepspeed",
        _imported("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        devices=("cpu",), state=4, operators=False,
    ),
}  # fmt: skip

#: What is measured where nobody names optimizers, beside packages that are installed.
DEFAULTS = (BASELINE, "AdamW-foreach", *OURS)


def names() -> list[str]:
    """Every optimizer that can be named."""
    return [*OURS, *OTHERS]


def measured_backends(device_type: str) -> list[str]:
    """Backends whose time on a device means something; the interpreter of Triton's does not."""
    return [
        name
        for name, info in BACKENDS.items()
        if (not info.device_types() or device_type in info.device_types())
        and info.in_auto(device_type)
        and info.why_not() is None
    ]


def check_backend(name: str, device_type: str) -> str:
    """Returns the name of a backend that can be measured on the device, or raises InputError."""
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    if name not in measured_backends(device_type):
        reason = BACKENDS[name].why_not() or f"it is not measured on {device_type!r}"
        raise InputError(f"backend {name!r} is not available: {reason}")
    return name


@dataclass(frozen=True)
class Contender:
    """An optimizer to be measured: its name, what it is asked to do, and our backend."""

    kind: str
    extras: frozenset[str] = frozenset()
    backend: str | None = None

    @property
    def name(self) -> str:
        return "+".join([self.kind, *(extra for extra in EXTRAS if extra in self.extras)])

    @property
    def label(self) -> str:
        """Unique among contenders."""
        return f"{self.name} ({self.backend})" if self.backend else self.name

    @property
    def algorithm(self) -> str | None:
        """Of ours, the name that kernels know; None for others."""
        return OURS[self.kind].algorithm if self.kind in OURS else None

    @cached_property
    def _other(self) -> Other:
        return OTHERS[self.kind]

    @property
    def in_operators(self) -> bool:
        """Whether it computes in torch operators."""
        return self.algorithm is not None or self._other.operators

    def dtypes(self, mode: DtypeMode) -> DtypeMode:
        """The dtypes that it is given in a mode."""
        return mode if self.algorithm or self._other.keeps_master else mode.without_master

    def why_not(self, device_type: str, mode: DtypeMode) -> str | None:
        """Why it cannot be measured here in this mode; None where it can."""
        if "sr" in self.extras and (mode.theta != torch.bfloat16 or mode.master):
            return "stochastic rounding is for bfloat16 parameters without a master copy"
        if self.extras & COMPACT and mode.theta == torch.float64:
            return "float64 parameters keep float64 states"
        if self.algorithm:
            return None
        if self.dtypes(mode).theta.itemsize == 2 and not self._other.low_precision:
            return "it is for float32 and float64 parameters"
        return self._other.why_not(device_type)

    def bytes_per_parameter(self, mode: DtypeMode, shapes: Shapes) -> float | None:
        """What a step over parameters of these shapes must move; None where that is not known."""
        mode = self.dtypes(mode)
        if self.algorithm:
            moved = partial(maxva_bytes, self.algorithm, mode, self.extras)
            return _per_parameter(moved, shapes)
        if self._other.temporaries:
            return None
        return adam_bytes(mode, self.extras, self._other.state)

    def state_bytes(self, mode: DtypeMode, shapes: Shapes) -> float:
        """What its states take per parameter, a master copy and temporary lists included."""
        mode = self.dtypes(mode)
        master = 4 if mode.master else 0
        if self.algorithm:
            return _per_parameter(partial(maxva_state_bytes, mode, self.extras), shapes) + master
        states = (4 if self.kind == "MAdam-foreach" else 2) + self._other.temporaries
        element = self._other.state or mode.theta.itemsize
        return (states + ("amsgrad" in self.extras)) * element + master

    def make(self, groups: Groups, mode: DtypeMode) -> tuple[torch.optim.Optimizer, Step]:
        """The optimizer, and its step with whatever clipping goes before it."""
        groups, mode = copied(groups), self.dtypes(mode)
        params = parameters(groups)
        on_gpu = params[0].is_cuda
        if self.algorithm:
            options: dict[str, Any] = {"backend": self.backend, "master_weights": mode.master}
            for extra in self.extras:
                options |= EXTRAS[extra]
            ours = OURS[self.kind](groups, lr=LR, capturable=on_gpu, **options)
            return ours, ours.step
        options = {"amsgrad": True} if "amsgrad" in self.extras else {}
        if self.kind.startswith("AdamW-") and on_gpu:
            options["capturable"] = True
        optimizer = self._other.make(groups, mode, options)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's must stay the one it is
                group["lr"].fill_(LR)
            else:
                group["lr"] = LR
        if "clip" not in self.extras:
            return optimizer, optimizer.step
        return optimizer, partial(_clip_then_step, params, optimizer)


def _per_parameter(of_shape: Callable[[tuple[int, ...]], float], shapes: Shapes) -> float:
    """The mean over all elements of a figure that depends on their parameter's shape."""
    counts = Counter(shape for shape, _ in shapes)
    total = sum(n * math.prod(shape) * of_shape(shape) for shape, n in counts.items())
    return total / num_parameters(shapes)


def _clip_then_step(params: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    # nothing is clipped, so that gradients shared with others stay as they are
    torch.nn.utils.clip_grad_norm_(params, 1e30)
    optimizer.step()


def parse(name: str, backends: list[str]) -> list[Contender]:
    """The contenders that a name such as `FusedMAdam+clip` stands for: ours once per backend.

    Raises:
        InputError: an unknown name, or an extra that the optimizer does not know.
    """
    kind, *extras = name.split("+")
    if kind not in names():
        raise unknown("optimizer", kind, names())
    known = set(EXTRAS) if kind in OURS else {"clip", *OTHERS[kind].extras}
    for extra in extras:
        if extra not in known:
            listed = [f"+{extra}" for extra in EXTRAS if extra in known]
            raise unknown(f"extra of {kind},", f"+{extra}", listed)
    chosen = frozenset(extras)
    if len(chosen & COMPACT) > 1:
        raise InputError(f"optimizer {name!r}: states have one dtype, choose one of "
                         f"+{', +'.join(e for e in EXTRAS if e in COMPACT)}")  # fmt: skip
    if kind in OURS:
        return [Contender(kind, chosen, backend) for backend in backends]
    return [Contender(kind, chosen)]
