"""A parameter's state: made for the first step, converted, checked and placed when loaded.

It has one of two forms: float32 tensors (float64 for float64 parameters), or compact.py's words.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from maxva_kernels import rounding
from maxva_kernels.compact import (
    MAXIMUM_DTYPE,
    WORD_DTYPE,
    Moments,
    Packed,
    holds_nonfinite,
    num_blocks,
    pack,
    unpack,
    used_exponents,
)
from maxva_kernels.hyper import describe
from maxva_kernels.layouts import facts_of, fit, rows_are_dense, same_layout
from maxva_kernels.sharding import (
    check_placement,
    division,
    holds_dtensor,
    holds_whole_blocks,
    local,
    zeros_per_block,
)
from maxva_kernels.streams import empty_apart, moved_apart

#: Keys of a parameter's float32 state that every step needs, beside its counter.
MOMENTS = ("exp_avg", "exp_avg_sq", "maxva_avg", "maxva_weight")
MAXIMUM = "max_exp_avg_sq"
#: Keys of a compact state.
PACKED, SCALE, PACKED_MAXIMUM = "maxva_packed", "maxva_scale", "maxva_packed_max"
COMPACT = (PACKED, SCALE, PACKED_MAXIMUM)
#: See Note [Streams apart] in streams.py. Words of PACKED take up to twice the room.
_STREAMS = {
    **{key: number for number, key in enumerate((*MOMENTS, MAXIMUM, "master_param"), 1)},
    PACKED: 1,
    PACKED_MAXIMUM: 3,
}

#: The default of the group key: parameters of fewer elements keep float32 states.
FP32_STATE_BELOW = 4096


def word_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype | None:
    """Which compact form p's state is to have: a value of WORD_DTYPE; None for float32.

    Compact are the states of parameters of two dimensions or more with fp32_state_below elements
    or more, counted over all ranks, whose rows hold whole blocks; not of float64 ones.
    """
    dtype = WORD_DTYPE.get(group["state_dtype"])
    if (
        dtype is None
        or p.dim() < 2
        or p.dtype == torch.float64
        or p.numel() < group["fp32_state_below"]
        or not holds_whole_blocks(p)
    ):
        return None
    return dtype


def has_moments(state: dict[str, Any]) -> bool:
    """Whether a step or a load has made this state, in whichever form."""
    return "maxva_weight" in state or PACKED in state


class Forms:
    """In which form parameters keep their states and how they are rounded, from step to step.

    A group's are found anew where anything has changed that they depend on.
    """

    def __init__(self) -> None:
        self._known: dict[int, KnownForms] = {}

    def of(self, index: int, group: dict[str, Any], start: int) -> KnownForms:
        """Sorts a group's parameters by word_dtype, and tells how they are rounded.

        Args:
            index: the group's in the optimizer.
            group: the group.
            start: its first parameter's index in the optimizer.
        """
        params = group["params"]
        if group["state_dtype"] == "float32" and not group["stochastic_rounding"]:
            n = len(params)
            return KnownForms([], {None: range(n)}, [rounding.NEAREST] * n, {})
        found_from = [start, *(group[name] for name in _FORM_KEYS), facts_of(params)]
        sharded = holds_dtensor(params)
        if sharded:
            found_from += [(division(p), p.grad is None) for p in params]
        known = self._known.get(index)
        if known is None or known.found_from != found_from:
            places: dict[torch.dtype | None, list[int]] = {}
            rows: list[tuple[int, ...]] = []
            for i, p in enumerate(params):
                word = word_dtype(p, group)
                places.setdefault(word, []).append(i)
                if sharded and p.grad is None:  # it may be one that cannot be numbered
                    rows.append(rounding.NEAREST)
                else:
                    rows.append(rounding.row(group, p, start + i, word is not None))
            flat = {word: _flat(rows, of_word) for word, of_word in places.items()}
            known = self._known[index] = KnownForms(found_from, places, rows, flat)
        return known


#: What word_dtype and rounding.row read of a group.
_FORM_KEYS = ("state_dtype", "fp32_state_below", "stochastic_rounding", "rounding_seed")


class KnownForms(NamedTuple):
    """What was found for a group, and from what.

    Attributes:
        found_from: the first parameter's index, the values of _FORM_KEYS, facts_of the parameters
            and, where one is a DTensor, of each how it is divided and whether it has no gradient.
        places: by word_dtype the indices of parameters in the group.
        rows: per parameter its row of rounding.FIELDS, which a DTensor without a gradient has not.
        flat: by word_dtype the rows of its parameters, one after the other.
    """

    found_from: list[Any]
    places: Mapping[torch.dtype | None, Sequence[int]]
    rows: list[tuple[int, ...]]
    flat: Mapping[torch.dtype | None, list[int]]

    def rounding(self, word: torch.dtype | None, places: Sequence[int]) -> list[int]:
        """The rows of some of the parameters with this word_dtype, one after the other."""
        if word in self.flat and places is self.places[word]:  # nearly always
            return self.flat[word]
        return _flat(self.rows, places)


def _flat(rows: list[tuple[int, ...]], places: Sequence[int]) -> list[int]:
    return list(chain.from_iterable(rows[i] for i in places))


def are_complete(
    params: list[Tensor],
    states: list[dict[str, Any]],
    compact: torch.dtype | None,
    amsgrad: bool,
    has_master: bool,
) -> bool:
    """Whether parameters can make a step with these states, in the form `compact` (word_dtype)."""
    needed = ["maxva_weight" if compact is None else PACKED]
    if amsgrad:
        needed.append(MAXIMUM if compact is None else PACKED_MAXIMUM)
    if has_master:
        needed.append("master_param")
    for key in needed:
        if False in [key in state for state in states]:
            return False
    # a master weight that is not used would be out of date when it is used again
    most = 1 + len(state_fields(compact, amsgrad, False))
    may_have_master = not has_master and max(map(len, states), default=0) > most
    if may_have_master and any("master_param" in state for state in states):
        return False
    if compact is None:
        return True
    if not amsgrad and True in [PACKED_MAXIMUM in state for state in states]:
        return False
    # layouts, too: blocks are of memory
    return fit([state[PACKED] for state in states], params, compact)


def state_fields(compact: torch.dtype | None, amsgrad: bool, has_master: bool) -> list[str]:
    """The fields of a Batch that states of this form fill, beside `step`."""
    if compact is None:
        fields = ["m", "u", "v", "w", *(["vmax"] if amsgrad else [])]
    else:
        fields = ["packed", *(["scale"] if compact == torch.int32 else [])]
        fields += ["maximum"] if amsgrad else []
    return fields + (["master"] if has_master else [])


def _has_form(p: Tensor, state: dict[str, Any], compact: torch.dtype) -> bool:
    return PACKED in state and fit([state[PACKED]], [p], compact)


def completed(
    p: Tensor,
    state: dict[str, Any],
    compact: torch.dtype | None,
    amsgrad: bool,
    has_master: bool,
    algorithm: str,
) -> dict[str, Any]:
    """A state for a step of p: `state`, converted to the form `compact`, and zeros it lacks.

    Without what such a step would not keep up to date. Shares tensors with `state` and does not
    change it.
    """
    new = in_form(p, state, compact, algorithm)
    if compact is None:
        for key in (*MOMENTS, *((MAXIMUM,) if amsgrad else ())):
            if key not in new:
                new[key] = _zeros(p, key, state_dtype(p))
    else:
        if PACKED not in new:
            new[PACKED] = _zeros(p, PACKED, compact)
        if compact == torch.int32 and SCALE not in new:
            new[SCALE] = zeros_per_block(p)
        if not amsgrad:
            new.pop(PACKED_MAXIMUM, None)  # steps without it do not keep its scales
        elif PACKED_MAXIMUM not in new:
            new[PACKED_MAXIMUM] = _zeros(p, PACKED_MAXIMUM, MAXIMUM_DTYPE[compact])
    if "step" not in new:
        new["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    if not has_master:
        new.pop("master_param", None)
    elif "master_param" not in new:
        new["master_param"] = new_master(p)
    return new


def _zeros(p: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    return empty_apart(p, p, _STREAMS[key], dtype).zero_()


def state_dtype(p: Tensor) -> torch.dtype:
    """The precision of p's update, and of its states where they are not compact."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def in_form(
    p: Tensor, state: dict[str, Any], compact: torch.dtype | None, algorithm: str
) -> dict[str, Any]:
    """A copy of a dict of p's state, with the moments in the form `compact` (word_dtype).

    To the nearest code, so with the error of one; from codes to float32, u = mean w and
    v = (mean^2 + var) w are rounded to float32. What has that form already stays as it is.

    Raises:
        ValueError: the state is of another shape, as p's data has been replaced.
    """
    if not has_moments(state) or (
        PACKED not in state if compact is None else _has_form(p, state, compact)
    ):
        return dict(state)
    held = state[PACKED if PACKED in state else "maxva_weight"]
    if held.shape != p.shape:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has a state of shape {tuple(held.shape)}; "
            f"delete optimizer.state[p] or load a state of its shape"
        )
    moments = _moments(state, algorithm)
    new = {key: state[key] for key in state if key not in (*MOMENTS, MAXIMUM, *COMPACT)}

    def fill(key: str, value: Tensor, dtype: torch.dtype) -> None:
        new[key] = zeros_per_block(p) if key == SCALE else _zeros(p, key, dtype)
        local(new[key]).copy_(value)

    if compact is None:
        mean, w = moments.mean.double(), moments.w.double()
        dtype = state_dtype(p)
        fill("exp_avg", moments.m, dtype)
        fill("exp_avg_sq", (mean.square() + moments.var.double()) * w, dtype)
        fill("maxva_avg", mean * w, dtype)
        fill("maxva_weight", moments.w, dtype)
        if moments.vmax is not None:
            fill(MAXIMUM, moments.vmax, dtype)
        return new
    coded = pack(moments, algorithm, torch.empty_like(local(p), dtype=compact), None)
    for key, value in zip(COMPACT, coded, strict=True):
        if value is not None:
            fill(key, value, value.dtype)
    return new


def _moments(state: dict[str, Any], algorithm: str) -> Moments:
    """This rank's part of a state, decoded."""
    if PACKED in state:
        return unpack(_packed(state), algorithm)
    m, v, u, w = (local(state[key]).double() for key in MOMENTS)
    divisor = torch.where(w == 0, 1.0, w)
    mean = u / divisor
    var = (v / divisor - mean.square()).clamp(min=0)
    vmax = local(state[MAXIMUM]).float() if MAXIMUM in state else None
    return Moments(m.float(), mean.float(), var.float(), w.float(), vmax)


def _packed(state: dict[str, Any]) -> Packed:
    parts = (local(state[key]) if key in state else None for key in COMPACT)
    return Packed(*parts)  # type: ignore[arg-type]


def memory(states: list[dict[str, Any]]) -> dict[str, int]:
    """What MaxVA.state_memory returns."""
    kinds = {
        **dict.fromkeys((*MOMENTS, MAXIMUM, PACKED, PACKED_MAXIMUM), "states"),
        SCALE: "scales",
        "master_param": "master_weights",
    }
    found = dict.fromkeys(("states", "scales", "master_weights", "other"), 0)
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                part = local(value)
                found[kinds.get(key, "other")] += part.numel() * part.element_size()
    return {**found, "total": sum(found.values())}


class Shield:
    """A state tensor that passes through torch's loading as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def shielded(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks every parameter's state in a dict that fits in its groups; shields its tensors."""
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    state = {}
    named = {
        key: (describe(group, index, p), p)
        for old, group in zip(saved, groups, strict=True)
        for index, (key, p) in enumerate(zip(old["params"], group["params"], strict=True))
    }
    for key, values in state_dict["state"].items():
        if key in named:
            _check_state(*named[key], values)
            values = {
                name: Shield(value) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        state[key] = values
    return {**state_dict, "state": state}


def _check_state(described: str, p: Tensor, values: dict[str, Any]) -> None:
    is_packed = PACKED in values
    needed = (PACKED,) if is_packed else MOMENTS
    missing = [key for key in ("step", *needed) if key not in values]
    if values and missing:
        raise ValueError(
            f"{described}: the loaded state lacks {', '.join(missing)}; it is of another "
            f"optimizer (has {', '.join(map(str, values))})"
        )
    if values:
        check_count(described, values["step"])
    for key, value in values.items():
        if not isinstance(value, Tensor):
            if key in (*MOMENTS, *COMPACT):
                raise ValueError(f"{described}: the loaded {key} is no tensor but {value!r}")
            continue
        if key not in _STREAMS:  # checked elsewhere, or somebody else's
            continue
        if value.shape != p.shape:
            raise ValueError(
                f"{described}: the loaded {key} has shape {tuple(value.shape)}; it is of another "
                f"model"
            )
        check_placement(described, p, f"the loaded {key}", value)
        if key not in COMPACT and not local(value).isfinite().all():
            _warn_nonfinite(described, key, "NaN" if local(value).isnan().any() else "inf")
    if is_packed:
        _check_compact(described, p, values)
        if holds_nonfinite(_packed(values)):
            _warn_nonfinite(described, PACKED, "NaN or inf")


def check_count(described: str, step: Any) -> None:
    """Raises ValueError unless a loaded step is one number that can be a count."""
    try:
        count = float(step)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        count = math.nan
    if not 0 <= count < math.inf:
        raise ValueError(f"{described}: the loaded step is {step!r}; it must be one number >= 0")


def _warn_nonfinite(described: str, key: str, kind: str) -> None:
    # at the caller of load_state_dict, in torch 2.13
    warnings.warn(f"{described}: the loaded {key} holds {kind}", stacklevel=9)


def _check_compact(described: str, p: Tensor, values: dict[str, Any]) -> None:
    """Refuses a compact state that does not fit p or cannot be decoded."""
    packed = values[PACKED]
    if both := [key for key in (*MOMENTS, MAXIMUM) if key in values]:
        raise ValueError(
            f"{described}: the loaded state holds {PACKED} and {', '.join(both)}; it must have one "
            f"form, compact or float32"
        )
    if packed.dtype not in MAXIMUM_DTYPE:
        raise ValueError(
            f"{described}: the loaded {PACKED} is {packed.dtype}; it must be int32 "
            f"(state_dtype='int8') or int64 ('bfloat16')"
        )
    if p.dim() < 2 or not rows_are_dense(packed.shape, packed.stride()):
        raise ValueError(
            f"{described}: the loaded {PACKED} of strides {packed.stride()} cannot be compact; "
            f"that takes two dimensions, dense in memory with dimension 0 outermost"
        )
    maximum = values.get(PACKED_MAXIMUM)
    if maximum is not None and maximum.dtype != MAXIMUM_DTYPE[packed.dtype]:
        raise ValueError(
            f"{described}: the loaded {PACKED_MAXIMUM} is {maximum.dtype}; with {PACKED} in "
            f"{packed.dtype} it must be {MAXIMUM_DTYPE[packed.dtype]}"
        )
    if maximum is not None and not same_layout(maximum, packed):
        raise ValueError(
            f"{described}: the loaded {PACKED_MAXIMUM} has strides {maximum.stride()}, {PACKED} "
            f"{packed.stride()}; blocks are of memory, so the layouts must agree"
        )
    if (SCALE in values) != (packed.dtype == torch.int32):
        raise ValueError(
            f"{described}: the loaded state has {PACKED} in {packed.dtype} and "
            f"{'a' if SCALE in values else 'no'} {SCALE}; int32 words have one, int64 words none"
        )
    if SCALE in values:
        _check_scale(described, p, values)


def _check_scale(described: str, p: Tensor, values: dict[str, Any]) -> None:
    scale = values[SCALE]
    check_placement(described, p, f"the loaded {SCALE}", scale)
    part = local(values[PACKED])
    for held, of in ((scale, p), (local(scale), part)):
        needed = of.shape[0], num_blocks(of.shape[1:].numel())
        if tuple(held.shape) != needed or held.dtype != torch.int32:
            raise ValueError(
                f"{described}: the loaded {SCALE} has shape {tuple(held.shape)} and {held.dtype}; "
                f"blocks of 128 elements of a row need {needed} and torch.int32, so it is of "
                f"another block size or model"
            )
    if (used_exponents(local(scale), PACKED_MAXIMUM in values) == 255).any():
        raise ValueError(
            f"{described}: the loaded {SCALE} holds a scale that is not finite (byte 255); the "
            f"checkpoint is damaged"
        )


def check_fits(described: str, p: Tensor, state: dict[str, Any]) -> None:
    """Raises where p has another shape or precision than its state was made for."""
    for key in (*MOMENTS, MAXIMUM, PACKED, PACKED_MAXIMUM, "master_param"):
        value = state.get(key)
        if value is None or holds_dtensor([value]) != holds_dtensor([p]):  # check_placement's part
            continue
        dtype = value.dtype if key in COMPACT else state_dtype(p)
        if value.shape != p.shape or value.dtype != dtype or value.device != p.device:
            raise ValueError(
                f"{described}, {p.dtype} on {p.device}: its {key} has shape {tuple(value.shape)} "
                f"and is {value.dtype} on {value.device}; delete optimizer.state[p], or load a "
                f"state that fits"
            ) from None


def placed(p: Tensor, key: str, value: Tensor) -> Tensor:
    """Puts a loaded state on p's device, in the precision and layout that it has there."""
    if key == "step":
        return value.to(dtype=torch.float32, device=p.device).reshape(())
    if key == SCALE:
        return value.to(device=p.device).contiguous()
    dtype = value.dtype if key in COMPACT else state_dtype(p)
    if key not in _STREAMS:
        return value.to(device=p.device)
    value = value.to(dtype=dtype, device=p.device)
    if key not in COMPACT and not _lies_as(p, value):
        return empty_apart(p, p, _STREAMS[key], dtype).copy_(value)
    return moved_apart(value, p, _STREAMS[key])


def _lies_as(p: Tensor, value: Tensor) -> bool:
    """Whether a step takes the value's layout as it is; of what no copy could do better, True."""
    return same_layout(local(value), torch.empty_like(local(p), device="meta"))


def new_master(p: Tensor) -> Tensor:
    """The float32 copy of a low-precision parameter, in its layout."""
    return empty_apart(p, p, _STREAMS["master_param"], torch.float32).copy_(p.detach())
