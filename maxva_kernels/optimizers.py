"""The optimizers: what a step is made of, in the order of the protocol in docs/algorithm.md.

    step() -> _collect (states, batches) -> Sharding.localize (DTensors to local parts) ->
    _write_controls (one read of the gradients, if clipping or skipping needs it) ->
    Backend.check, Backend.update (all tensors checked; one memory pass) -> counters

No mathematics of the update rule here: that is reference.py, csrc/maxva_math.h and its twin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from typing_extensions import Unpack

from maxva_kernels import rounding
from maxva_kernels.backends import check_name, find_backend
from maxva_kernels.batch import (
    CONTROL_FIELDS,
    DTYPES,
    SKIP,
    STATE_KEYS,
    Backend,
    Batch,
    Phase,
    is_expanded,
    skips_on_host,
)
from maxva_kernels.hyper import (
    SHARED,
    check_given_lr,
    check_lr,
    describe,
    hyper_row,
    warn_of_eps,
)
from maxva_kernels.layouts import is_fake
from maxva_kernels.sharding import NormGroup, Sharding, is_made_of_others
from maxva_kernels.state import (
    FP32_STATE_BELOW,
    Forms,
    Shield,
    are_complete,
    check_count,
    check_fits,
    completed,
    has_moments,
    in_form,
    memory,
    placed,
    shielded,
    state_fields,
    word_dtype,
)
from maxva_kernels.statistics import StepStatistics

_LOW_PRECISION = (torch.bfloat16, torch.float16)
#: Group keys that a loaded state dict does not bring along.
_KEPT = ("state_dtype", "fp32_state_below")


class Options(TypedDict, total=False):
    """Keyword options of every class here; FusedMAdam describes them."""

    bias_correction: bool
    adam_w_mode: bool
    amsgrad: bool
    nesterov: bool
    trust_ratio: bool
    maximize: bool
    max_grad_norm: float | None
    skip_nonfinite: bool
    master_weights: bool
    capturable: bool
    delta: float
    beta_init: float | None
    eps_inside_sqrt: bool
    set_grad_none: bool
    collect_stats: bool
    stochastic_rounding: bool
    rounding_seed: int
    state_dtype: str
    fp32_state_below: int
    norm_process_group: Any


class FusedOptions(Options, total=False):
    """Keyword options of the fused classes."""

    backend: str


class MaxVA(Optimizer):
    """The step protocol that MAdam and LaMAdam share; subclasses name the algorithm."""

    algorithm: ClassVar[str]
    # a class attribute: instance attributes do not survive deepcopy and pickle
    _step_supports_amp_scaling = True
    # no class attributes: Lightning's wrapper inherits from its optimizer's class and asks the
    # optimizer itself for what the class lacks only
    _backend: str
    _norm_group: NormGroup | None
    _statistics: StepStatistics | None
    _forms: Forms

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        amsgrad: bool = False,
        nesterov: bool = False,
        trust_ratio: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        capturable: bool = False,
        delta: float = 1e-16,
        beta_init: float | None = None,
        eps_inside_sqrt: bool = False,
        set_grad_none: bool = True,
        collect_stats: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        state_dtype: str = "float32",
        fp32_state_below: int = FP32_STATE_BELOW,
        norm_process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        self._norm_group = None if norm_process_group is None else NormGroup(norm_process_group)
        check_name(backend)
        self._backend = backend
        self._statistics = None
        self._forms = Forms()
        # a group key added in a later release would break flattened distributed checkpoints
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "beta_min": beta_min,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
            "amsgrad": amsgrad,
            "nesterov": nesterov,
            "trust_ratio": trust_ratio,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "master_weights": master_weights,
            "capturable": capturable,
            "delta": delta,
            "beta_init": beta_init,
            "eps_inside_sqrt": eps_inside_sqrt,
            "set_grad_none": set_grad_none,
            "collect_stats": collect_stats,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
            "state_dtype": state_dtype,
            "fp32_state_below": fp32_state_below,
            "differentiable": False,
            "step": 0,
        }
        check_given_lr(lr)
        hyper_row(defaults)
        warn_of_eps(beta_min, betas[1], 3 + (type(self).__init__ is not MaxVA.__init__))
        self._constructing = True  # groups take nothing over from each other
        super().__init__(params, defaults)
        del self._constructing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a hyper-parameter is out of range, or differs from the other groups' where
                it concerns the whole optimizer (max_grad_norm, skip_nonfinite: by default as they
                have it).
            TypeError: a parameter is complex or not a float32, float64, bfloat16 or float16, or a
                tensor subclass made of others (but for DTensors, and on the eager backend).
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # refuses it in its own words
        if "norm_process_group" in param_group:
            raise ValueError(
                "norm_process_group concerns the optimizer and is no group key; a wrapper that "
                "passes it to groups (ZeroRedundancyOptimizer) takes optimizer_class="
                "functools.partial(FusedMAdam, norm_process_group=...)"
            )
        # ZeroRedundancyOptimizer passes what it has given the optimizer to groups, too
        if param_group.get("backend", self._backend) != self._backend:
            raise ValueError(
                f"backend concerns the optimizer, which has {self._backend!r}, and is no group key"
            )
        given = set(param_group)
        if self.param_groups and not hasattr(self, "_constructing"):
            for name in SHARED:
                param_group.setdefault(name, self.param_groups[0][name])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if "lr" not in given and isinstance(lr := group["lr"], Tensor):
                # schedulers fill it, once per group
                is_taken = any(other["lr"] is lr for other in self.param_groups[:-1])
                group["lr"] = lr.clone() if is_taken else lr
            self._place_group_tensors(group)
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned, as `torch.optim.Optimizer.load_state_dict`.

        States keep their precision (float32 beside bfloat16 parameters) and follow their parameter
        to its device. Group keys that an older dict lacks take their defaults; keys added by others
        are kept; parameters without state are legal. A tensor lr moves to its group's device. An
        inf or NaN in a loaded state gives a warning. Tensors of the dict become the states, but for
        large ones on a CPU that lie where a step would be slow (streams.py): those are copied.

        state_dtype and fp32_state_below stay this optimizer's own: they say how it keeps states,
        not what it computes. Loaded states of another form are converted, to the nearest code: the
        loss is at most that of one rounding (docs/algorithm.md, "Compact states"), none where the
        form is the same.

        Raises:
            ValueError: groups of other sizes or with values out of range, a step that is no count,
                or a parameter's state with keys missing, or of another shape or form, as another
                optimizer's or another model's. Nothing has changed then.
        """
        # torch rounds every state to its parameter's dtype; what is no tensor passes through. The
        # last pre-hook sees what the user's own hooks have made of the dict.
        handle = self.register_load_state_dict_pre_hook(self._check_loaded)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Completes what was loaded or unpickled: shielded tensors, group keys, devices."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            self._place_group_tensors(group, move_lr=isinstance(group["lr"], Tensor))
        for p, values in self.state.items():
            if not isinstance(p, Tensor):
                continue  # torch keeps what belongs to no parameter
            for key, value in values.items():
                if isinstance(value, Shield):
                    values[key] = placed(p, key, value.tensor)
                elif key == "step" and not isinstance(value, Tensor):
                    values[key] = torch.tensor(float(value), dtype=torch.float32, device=p.device)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    values = self.state.get(p)
                    if values:
                        self.state[p] = in_form(p, values, word_dtype(p, group), self.algorithm)

    def _check_loaded(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Pre-hook of load_state_dict: refuses what does not fit, before anything has changed."""
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [
            len(group["params"]) for group in self.param_groups
        ]:
            return state_dict  # torch refuses it in its own words
        saved = [
            {**group, **{key: own[key] for key in _KEPT}}
            for group, own in zip(saved, self.param_groups, strict=True)
        ]
        merged = [
            {**self.defaults, **group, "params": own["params"]}
            for group, own in zip(saved, self.param_groups, strict=True)
        ]
        for index, group in enumerate(merged):
            _check_options(group, merged[0])
            check_count(f"group {index}", group["step"])
        return shielded(self, {**state_dict, "param_groups": saved})

    def _check_group(self, group: dict[str, Any]) -> None:
        _check_options(group, self.param_groups[0])
        check_given_lr(group["lr"])
        for index, p in enumerate(group["params"]):
            if p.dtype not in DTYPES:
                kind = "complex parameters are" if p.is_complex() else f"{p.dtype} is"
                raise TypeError(
                    f"{describe(group, index, p)}: {kind} not supported; use float32, float64, "
                    f"bfloat16 or float16"
                )
            if is_made_of_others(p) and self._find(p.device) is not find_backend("eager", "cpu"):
                raise TypeError(
                    f"{describe(group, index, p)} is a {type(p).__name__}, made of other tensors; "
                    f"kernels take plain tensors and DTensors, use backend='eager'"
                )

    def _place_group_tensors(self, group: dict[str, Any], move_lr: bool = False) -> None:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        # float64, so that the value is the one a Python number gives; "meta" would lose it
        if (group["capturable"] or move_lr) and device.type != "meta":
            group["lr"] = torch.as_tensor(
                group["lr"],
                dtype=None if isinstance(group["lr"], Tensor) else torch.float64,
                device=device,
            )
        self._place_group_step(group, device)

    @staticmethod
    def _place_group_step(group: dict[str, Any], device: torch.device) -> None:
        """An int for CPU groups, an int32 tensor of shape [1] on the device for others.

        An int as well where there is only a shape yet: a tensor on "meta" would lose the count.
        """
        step = group["step"]
        if device.type in ("cpu", "meta"):
            group["step"] = int(step)
        elif not isinstance(step, Tensor) or step.device != device or step.numel() != 1:
            group["step"] = torch.tensor([int(step)], dtype=torch.int32, device=device)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Resets all gradients: to None, or to zeros if `set_to_none` (or set_grad_none) is off."""
        if set_to_none is None:
            set_to_none = self.defaults.get("set_grad_none", True)
        super().zero_grad(set_to_none=set_to_none)

    def setup_fp32_params(self, refresh: bool = False) -> None:
        """Makes the float32 master weights now instead of at the first step.

        Call it when the parameters have their starting values (after DDP has broadcast them).
        Does nothing where no parameter needs one. Else all states are made, those of float32
        parameters as well: torch.distributed.checkpoint takes an optimizer that has any state for
        one that has all of it.

        Args:
            refresh: take over the parameters' values into master weights that exist already. A step
                moves the master weight and rounds it into the parameter, so that values written
                there by others (`model.load_state_dict`) are lost without this.
        """
        if refresh:
            with torch.no_grad():
                for p in self.state:
                    if isinstance(p, Tensor) and "master_param" in self.state[p]:
                        self.state[p]["master_param"].copy_(p)
        complete: list[tuple[Tensor, dict[str, Any]]] = []
        makes_master = False
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    has_master = group["master_weights"] and p.dtype in _LOW_PRECISION
                    known = self.state.get(p, {})
                    makes_master |= has_master and "master_param" not in known
                    compact = word_dtype(p, group)
                    complete.append((p, completed(
                        p, known, compact, group["amsgrad"], has_master, self.algorithm
                    )))  # fmt: skip
        if makes_master:
            for p, state in complete:
                _refill(self.state[p], state)

    def state_memory(self) -> dict[str, int]:
        """Bytes that the states made so far take on this rank.

        Returns:
            `states` (moments, as float32 tensors or codes), `scales` (of int8's blocks),
            `master_weights`, `other` (step counters, and what others keep in a state), `total`.
        """
        return memory([self.state[p] for p in self.state if isinstance(p, Tensor)])

    def stats(self) -> list[dict[str, float]]:
        """Telemetry of the last step that was not skipped, for groups with collect_stats=True.

        Waits for the device. Where parameters are sharded, or with norm_process_group, the values
        are those of all ranks, and all ranks have to call it.

        Returns:
            Per group, in order: `mean_beta`, the mean of beta_t over coordinates (Eq. 6);
            `share_at_beta_min` and `share_at_beta_max`, the shares of coordinates whose beta_t is
            beta_min and betas[1]; `mean_step_size`, the mean of |eta update|, with the trust ratio
            and without decoupled decay (the paper's "average step size", Fig. 4 and 8);
            `grad_norm`, of the group's unscaled gradients before clipping; `skipped_steps` since
            this optimizer was made, while any group collected. NaN where there has been no step
            yet, or no gradient in it; an empty dict for groups that do not collect.

        Raises:
            RuntimeError: no group collects.
        """
        collecting = self._collecting()
        if not any(collecting):
            raise RuntimeError(
                "stats() needs collect_stats=True in at least one group; a loaded state dict "
                "brings its own value: set it in param_groups"
            )
        statistics = self._statistics or StepStatistics()
        sharding = Sharding(self.param_groups, self._norm_group)
        return statistics.read(self.param_groups, collecting, sharding)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Nothing is read back to the host. Under `torch.amp.GradScaler` the gradients are unscaled
        and the step is skipped on overflow inside the same pass.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse. ValueError or TypeError: a tensor or a
                hyper-parameter does not fit. NotImplementedError: an option needs the norm of a
                parameter that FSDP1 has flattened. Nothing has been changed then.
        """
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    # torch.compile has nothing to fuse here and would trace tables and checks. (This is
    # torch.compiler.disable without its import of torch._dynamo, which takes seconds.)
    @_disable_dynamo
    def _step(self) -> None:
        rows = self._check_groups()
        sharding = Sharding(self.param_groups, self._norm_group)
        replaced: list[tuple[Tensor, dict[str, Any]]] = []
        try:
            batches = self._collect(rows, replaced)
            statistics = None
            if any(self._collecting()):
                statistics = self._statistics = self._statistics or StepStatistics()
                capturing = any(_is_capturing(batch.device) for batch in batches)
                params = [p for group in self.param_groups for p in group["params"]]
                statistics.attach(batches, params, capturing)
            sharding.localize(batches, isinstance(getattr(self, "grad_scale", None), Tensor))
            if (replaced or sharding.spans_ranks) and self._observes_nothing(
                batches, replaced, sharding
            ):
                self._refuse_tensors()  # no backend is asked
                return
            controls = self._write_controls(batches, sharding)
            counted = self._update(batches, controls, sharding, replaced)
        except Exception:
            for p, before in replaced:
                _refill(self.state[p], before)
                if not before:
                    del self.state[p]
            self._refuse_tensors()
            raise
        self._count_groups(controls, counted)
        if statistics is not None:
            statistics.record(batches, controls)

    def _collecting(self) -> list[bool]:
        return [group["collect_stats"] for group in self.param_groups]

    def _check_groups(self) -> list[tuple[float, ...]]:
        """Checks the groups' options; returns their rows of hyper.ROW."""
        first = self.param_groups[0]
        return [_check_options(group, first) for group in self.param_groups]

    def _refuse_tensors(self) -> None:
        """Raises for a gradient or a state that no backend takes, and names its parameter.

        The backends check every tensor before they move any; this says more, once one has refused.
        """
        unscales = isinstance(getattr(self, "grad_scale", None), Tensor)
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    described = describe(group, index, p)
                    if is_expanded(p):
                        raise ValueError(
                            f"{described} is expanded (strides {p.stride()}): elements that share "
                            f"memory cannot be written; clone it first"
                        ) from None
                    _check_gradient(described, p, p.grad, unscales)
                    check_fits(described, p, self.state.get(p, {}))

    def _collect(
        self, rows: list[tuple[float, ...]], replaced: list[tuple[Tensor, dict[str, Any]]]
    ) -> list[Batch]:
        """Sorts all tensors into batches.

        Where a state is missing or of another form than its group's, makes a new one and lists
        the old one in `replaced`.
        """
        batches: dict[tuple[Any, ...], Batch] = {}
        rounds = any(group["stochastic_rounding"] for group in self.param_groups)
        collects = any(self._collecting())
        end = 0
        for k, (group, row) in enumerate(zip(self.param_groups, rows, strict=True)):
            params = group["params"]
            gradients = [p.grad for p in params]
            amsgrad, trust_ratio = group["amsgrad"], group["trust_ratio"]
            start, end = end, end + len(params)
            if not params:
                continue
            self._place_group_step(group, params[0].device)
            # lists at a time, as this is a hot path
            forms = self._forms.of(k, group, start)
            for device, has_master, compact, places in _kinds(group, gradients, forms.places):
                key = device, has_master, compact, amsgrad, trust_ratio
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = Batch(device, trust_ratio)
                self._begin_group(batch, k, row)
                batch.group_sizes[-1] = len(places)
                chosen = [params[i] for i in places]
                states = self._states(chosen, compact, amsgrad, has_master, replaced)
                batch.theta += chosen
                batch.g += [gradients[i] for i in places]
                batch.step += map(itemgetter("step"), states)
                for name in state_fields(compact, amsgrad, has_master):
                    getattr(batch, name).extend(map(itemgetter(STATE_KEYS[name]), states))
                if collects:
                    batch.parameters += [start + i for i in places]
                if rounds or compact is not None:
                    batch.rounding += forms.rounding(compact, places)
        for batch in batches.values():
            if batch.device.type != "cpu" and any(step.is_cpu for step in batch.step):
                self._place_steps(batch)
        return list(batches.values())

    def _states(
        self,
        params: list[Tensor],
        compact: torch.dtype | None,
        amsgrad: bool,
        has_master: bool,
        replaced: list[tuple[Tensor, dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        """The states of parameters of one kind; completed, with the old ones in `replaced`."""
        kind = compact, amsgrad, has_master
        states = list(map(self.state.get, params, itertools.repeat({})))
        if are_complete(params, states, *kind):
            return states
        for p in params:
            if are_complete([p], [self.state.get(p, {})], *kind):
                continue
            if _is_capturing(p.device):
                raise RuntimeError(
                    "a parameter has no state yet, or one of another state_dtype, while a CUDA "
                    "graph is being captured; every replay would reset it. Run a step before the "
                    "capture"
                )
            state = self.state[p]
            replaced.append((p, dict(state)))
            _refill(state, completed(p, state, compact, amsgrad, has_master, self.algorithm))
        return [self.state[p] for p in params]

    def _place_steps(self, batch: Batch) -> None:
        """Moves counters to their device: ZeroRedundancyOptimizer loads them onto the CPU."""
        for i, p in enumerate(batch.theta):
            batch.step[i] = self.state[p]["step"] = batch.step[i].to(batch.device)

    def _begin_group(self, batch: Batch, index: int, row: tuple[float, ...]) -> None:
        group = self.param_groups[index]
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device != batch.device:
            if lr.device.type == "cpu" and _is_capturing(batch.device):
                raise RuntimeError(
                    "lr is a CPU tensor while a CUDA graph is being captured; every replay would "
                    f"use its value of now. Move it: group['lr'] = lr.to({str(batch.device)!r})"
                )
            # a CPU lr beside device parameters is known on the host
            lr = float(lr) if lr.device.type == "cpu" else lr.to(batch.device)
        host_lr = not isinstance(lr, Tensor)
        batch.hyper.extend((max(lr, 0.0) if host_lr else math.nan, *row))
        batch.lr.append(None if host_lr else lr)
        batch.group_sizes.append(0)
        batch.groups.append(index)
        step = group["step"]
        if isinstance(step, Tensor) and step.device == batch.device:
            batch.group_step.append(step)

    def _observes_nothing(
        self,
        batches: list[Batch],
        replaced: list[tuple[Tensor, dict[str, Any]]],
        sharding: Sharding,
    ) -> bool:
        """Whether this is the initialising step of torch.distributed.checkpoint.

        There no state exists, every lr is 0 and every gradient exactly 0, on all ranks; counted as
        an observation it would shrink the first real update.
        """
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor) and (lr.device.type != "cpu" or is_fake(lr)):
                return False
            if lr > 0:
                return False
        if any(_is_capturing(batch.device) or is_fake(batch.theta[0]) for batch in batches):
            return False
        fresh = sum(not has_moments(before) for _, before in replaced)
        known = sum(has_moments(self.state[p]) for p in self.state if isinstance(p, Tensor))
        observes = fresh < known or any(
            torch.stack([g.any() for g in _gradients_on(device, batches)]).any()
            for device in {batch.device for batch in batches}
        )
        return not sharding.on_any_rank(observes)

    def _write_controls(
        self, batches: list[Batch], sharding: Sharding
    ) -> dict[torch.device, tuple[Any, ...]]:
        """Per device: (control block or None, grad_scale or None)."""
        group = self.param_groups[0]
        max_grad_norm = group["max_grad_norm"]
        grad_scale = getattr(self, "grad_scale", None)
        needs_norm = max_grad_norm is not None or group["skip_nonfinite"]
        total, found_inf = sharding.control_sums(
            batches,
            (lambda device, g: self._find(device).sum_of_squares(g)) if needs_norm else None,
            getattr(self, "found_inf", None),
        )
        devices = dict.fromkeys([*(batch.device for batch in batches), *sharding.devices])
        controls: dict[torch.device, tuple[Any, ...]] = {}
        for device in devices:
            scale = _on(grad_scale, device)
            control = None
            if needs_norm or isinstance(found_inf, Tensor):
                control = torch.empty(CONTROL_FIELDS, dtype=torch.float64, device=device)
                self._find(device).write_control(
                    control,
                    _on(total, device),
                    scale,
                    _on(found_inf, device),
                    math.inf if max_grad_norm is None else max_grad_norm,
                    group["skip_nonfinite"],
                )
            controls[device] = control, scale
        return controls

    def _update(
        self,
        batches: list[Batch],
        controls: dict[torch.device, tuple[Any, ...]],
        sharding: Sharding,
        replaced: list[tuple[Tensor, dict[str, Any]]],
    ) -> set[int]:
        """Hands every batch to its backend; returns the ids of the group steps counted there.

        Empties `replaced` once something has changed: old states no longer fit then.
        """
        counted: set[int] = set()
        for batch in batches:
            # a group with parameters in two batches is counted once
            batch.group_step = [
                step
                for step in {id(step): step for step in batch.group_step}.values()
                if id(step) not in counted
            ]
            counted.update(id(step) for step in batch.group_step)
        # the first one's update checks, too, before it moves anything
        for batch in batches[1:]:
            _, grad_scale = controls[batch.device]
            self._find(batch.device).check(batch, self.algorithm, grad_scale)

        def run(batch: Batch, phase: Phase, norms: Tensor | None) -> None:
            control, grad_scale = controls[batch.device]
            backend = self._find(batch.device)
            backend.update(batch, self.algorithm, phase, control, grad_scale, norms)
            replaced.clear()

        two_phases = []
        for batch in batches:
            if batch.trust_ratio:
                n = len(batch.theta)
                norms = torch.zeros(n, 2, dtype=torch.float64, device=batch.device)
                two_phases.append((batch, norms))
                run(batch, Phase.STATES, norms)
            else:
                run(batch, Phase.WHOLE, None)
        if any(group["trust_ratio"] for group in self.param_groups):
            sharding.sum_norms(two_phases)
        for batch, norms in two_phases:
            run(batch, Phase.PARAMETERS, norms)
        return counted

    def _count_groups(
        self, controls: dict[torch.device, tuple[Any, ...]], counted: set[int]
    ) -> None:
        """Counts the groups that no backend has counted: on the CPU, or without a gradient."""
        found = {
            device: control for device, (control, _) in controls.items() if control is not None
        }
        skipped = any(map(skips_on_host, found.values()))
        for group in self.param_groups:
            step = group["step"]
            if not isinstance(step, Tensor):
                group["step"] += not skipped
            elif id(step) not in counted:
                control = found.get(step.device, next(iter(found.values()), None))
                step += 1 if control is None else (1 - control[SKIP]).to(step)

    def _find(self, device: torch.device) -> Backend:
        return find_backend(self._backend, device.type)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_backend": self._backend,
            "_norm_group": self._norm_group,
            "_statistics": None,
            "_forms": Forms(),
        }


class FusedMAdam(MaxVA):
    """MAdam (Zhu et al., Alg. 1): Adam whose beta_2 maximises the observed variance, fused.

    One memory pass per step over parameter, gradient and the four states. A call written for
    `torch.optim.AdamW` or `apex.optimizers.FusedAdam` works with the class name changed, its
    arguments after betas by keyword.

    Parameters may be DTensors (FSDP2, tensor parallelism): their states are, too, and norms are
    those of whole tensors. With FSDP1 trust_ratio, max_grad_norm, skip_nonfinite and collect_stats
    are refused.

    Args:
        params: parameters or parameter groups; float32, float64, bfloat16 or float16, any shape.
            float64 ones are updated in float64, the others in float32 with float32 states.
        lr: learning rate eta, a number or a one-element tensor, which the first group keeps as it
            is (others have copies) and whose later values are not checked.
        betas: (alpha, beta_high): momentum in [0, 1), upper bound of beta_t in (0, 1].
        beta_min: lower bound of beta_t, in (0, betas[1]]; equal to betas[1] it gives Adam(W).
        eps: added to sqrt(v/w), outside the root (Sec. 2, Eq. 15).
        weight_decay: lambda.
        bias_correction: divide the momentum by 1 - alpha^t.
        adam_w_mode: decoupled decay; False adds lambda theta to the gradient (L2).
        amsgrad: use the maximum of v/w so far.
        nesterov: look ahead with the momentum.
        trust_ratio: scale the update per tensor by ||theta|| / ||update|| (LAMB); a second pass.
        maximize: ascend.
        max_grad_norm: clip the global norm of the (unscaled) gradients at this, without writing
            scaled gradients; None for no clipping. All groups must agree.
        skip_nonfinite: skip a step whose gradients hold an inf or NaN, or have a norm above
            float32's largest number. All groups must agree.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters and update that.
        capturable: keep lr on the device as a one-element tensor, for graph capture.
        delta: added to the denominator of Eq. 6, as in the authors' code.
        beta_init: beta of a coordinate's first observation (Eq. 7); None: betas[1], or 0.9 where
            that is 1.
        eps_inside_sqrt: add eps to v/w inside the root instead (as Alg. 2 is printed).
        set_grad_none: the default of `zero_grad(set_to_none=...)`, for all groups.
        collect_stats: keep what `stats()` tells, in the same pass; results do not change.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias, so that
            updates below half a unit in the last place are not lost; instead of master_weights.
            The random bits depend on rounding_seed, the parameter's index in the optimizer, the
            element's index in the whole parameter and the number of the update alone: they are the
            same on every backend, thread count and sharding, and after resuming (but not where an
            engine gives every rank an optimizer of its own, as ZeroRedundancyOptimizer does).
        rounding_seed: in [0, 2^63).
        state_dtype: how states are stored: "float32" (16 bytes per parameter), "bfloat16" (8) or
            "int8" (4.03). The compact ones keep the momentum, the mean u/w, the variance and w in
            codes that are rounded stochastically with the random bits described above, "int8" with
            scales per block of 128 elements. Computed is in float32, in the same one pass.
            docs/algorithm.md, "Compact states", has codes and errors. A group key that may be
            changed between steps; a loaded state dict does not change it.
        fp32_state_below: parameters of fewer elements (over all ranks) keep float32 states, as do
            those of one dimension, of rows (numel / size(0)) shorter than 128, of a layout in which
            dimension 0 is not outermost, and DTensors sharded so that a block would be cut. float64
            parameters keep float64 states.
        norm_process_group: a torch.distributed.ProcessGroup over whose ranks the parameters are
            divided without DTensor, every element on exactly one of them: whole parameters
            (ZeroRedundancyOptimizer, pipeline stages) or flat shards. max_grad_norm,
            skip_nonfinite and a scaler's found_inf then hold for all its ranks, each of which must
            call step(). trust_ratio takes each tensor's norm as it is on its rank: right for whole
            parameters, not for flat shards. DTensors need no group; with one, their norms are
            summed over their mesh first. Copies share the group; an optimizer with one cannot be
            pickled (its state_dict can).
        backend: "cuda", "triton", "cpu", "eager", or "auto" for the best there is for the
            parameters' device; the MAXVA_BACKEND variable overrides "auto".

    Raises:
        ValueError: a value outside its range, or an empty parameter list.
        TypeError: a parameter of another dtype, or a norm_process_group that is none or that this
            rank does not belong to.
        RuntimeError: the backend asked for is not available here.
    """

    algorithm = "madam"


class FusedLaMAdam(MaxVA):
    """LaMAdam (Zhu et al., Alg. 2): momentum of the normalised gradient, as LaProp; fused.

    Arguments and errors as FusedMAdam, with another default of eps. Under a changing lr the
    momentum follows Alg. 2: lr scales the update, it is not inside the momentum.
    """

    algorithm = "lamadam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        **options: Unpack[FusedOptions],
    ) -> None:
        super().__init__(params, lr, betas, beta_min, eps, weight_decay, **options)


class MAdam(MaxVA):
    """FusedMAdam in plain torch operations: the reference, on any device, for any options."""

    algorithm = "madam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, beta_min, eps, weight_decay, backend="eager", **options)


class LaMAdam(MaxVA):
    """FusedLaMAdam in plain torch operations: the reference, on any device, for any options."""

    algorithm = "lamadam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, beta_min, eps, weight_decay, backend="eager", **options)


def _kinds(
    group: dict[str, Any],
    gradients: list[Any],
    forms: Mapping[torch.dtype | None, Sequence[int]],
) -> Iterator[tuple[torch.device, bool, torch.dtype | None, Sequence[int]]]:
    """The places of parameters with gradients, by device, master weights and form of state."""
    params = group["params"]
    devices = [p.device for p in params]
    masters = [False] * len(params)
    if group["master_weights"]:
        masters = [p.dtype in _LOW_PRECISION for p in params]
    is_usual = devices.count(devices[0]) == len(params) and len(set(masters)) == 1
    has_all = not any(g is None for g in gradients)
    for form, of_form in forms.items():
        places = of_form if has_all else [i for i in of_form if gradients[i] is not None]
        kinds: dict[tuple[torch.device, bool], Any] = {}
        if is_usual:
            kinds[devices[0], masters[0]] = places
        else:
            for i in places:
                kinds.setdefault((devices[i], masters[i]), []).append(i)
        for (device, has_master), of_kind in kinds.items():
            if of_kind:
                yield device, has_master, form, of_kind


def _refill(state: dict[str, Any], new: dict[str, Any]) -> None:
    """Exchanges what a state holds, in place: others may hold the dict."""
    state.clear()
    state.update(new)


def _check_options(group: dict[str, Any], first: dict[str, Any]) -> tuple[float, ...]:
    """Checks a group's options on their own and beside the first group's; returns its row."""
    check_lr(group["lr"])
    row = hyper_row(group)
    if group["differentiable"]:
        raise ValueError("differentiable must be False: no step here can be differentiated")
    if group["stochastic_rounding"]:
        rounding.check(group)
    for name in SHARED:
        if group[name] != first[name]:
            raise ValueError(
                f"{name} concerns the whole optimizer, but groups have {first[name]!r} and "
                f"{group[name]!r}"
            )
    return row


def _check_gradient(described: str, p: Tensor, g: Tensor, unscales: bool) -> None:
    # from None: one message, the one that names the parameter
    if g.layout is not torch.strided:
        raise RuntimeError(
            f"{described}: its gradient is {g.layout}; MaxVA does not support sparse gradients, "
            f"make it dense (for an embedding: sparse=False)"
        ) from None
    if g.dtype not in DTYPES:
        raise TypeError(
            f"{described}: its gradient is {g.dtype}; it must be float32, float64, bfloat16 or "
            f"float16"
        ) from None
    if g.shape != p.shape or g.device != p.device:
        raise ValueError(
            f"{described} on {p.device}: its gradient has shape {tuple(g.shape)} on {g.device}"
        ) from None
    if unscales and is_expanded(g):
        raise ValueError(
            f"{described}: its gradient is expanded (strides {g.stride()}) and cannot be unscaled "
            f"in place; clone it, or call scaler.unscale_ first"
        ) from None


def _on(value: Any, device: torch.device) -> Tensor | None:
    """A scaler's tensor on a device; Python's 0 (no gradient anywhere) and None are None."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else None


def _gradients_on(device: torch.device, batches: list[Batch]) -> list[Tensor]:
    found: Iterator[Batch] = (batch for batch in batches if batch.device == device)
    return [g for batch in found for g in batch.g]


def _check_graph_capture(optimizer: Optimizer) -> None:
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    if check is None:  # torch before 2.13
        check = optimizer._cuda_graph_capture_health_check
    check()


def _is_capturing(device: torch.device) -> bool:
    # not initialized: a fake tensor
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        and torch.cuda.is_current_stream_capturing()
    )
