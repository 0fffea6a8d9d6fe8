"""A parameter's state: made for the first step, checked and placed when it is loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from maxva_kernels.hyper import describe
from maxva_kernels.sharding import check_placement, local

#: Keys of a parameter's state that every step needs, beside its counter.
MOMENTS = ("exp_avg", "exp_avg_sq", "maxva_avg", "maxva_weight")


def new_state(
    p: Tensor, state: dict[str, Any], amsgrad: bool, has_master: bool
) -> dict[str, Tensor]:
    """What `state` lacks for a step of p: zeros in p's layout, float32 or float64."""
    keys = [*MOMENTS, *(["max_exp_avg_sq"] if amsgrad else [])]
    new = {
        key: torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
        for key in keys
        if key not in state
    }
    if "step" not in state:
        new["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    if has_master and "master_param" not in state:
        new["master_param"] = new_master(p)
    return new


def state_dtype(p: Tensor) -> torch.dtype:
    """The precision of p's states and of its update."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


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
    missing = [key for key in ("step", *MOMENTS) if key not in values]
    if values and missing:
        raise ValueError(
            f"{described}: the loaded state lacks {', '.join(missing)}; it is of another "
            f"optimizer (has {', '.join(map(str, values))})"
        )
    for key, value in values.items():
        if not isinstance(value, Tensor):
            if key in MOMENTS:
                raise ValueError(f"{described}: the loaded {key} is no tensor but {value!r}")
            continue
        if value.shape != p.shape and (key != "step" or value.numel() != 1):
            raise ValueError(
                f"{described}: the loaded {key} has shape {tuple(value.shape)}; it is of another "
                f"model"
            )
        if key == "step":
            continue
        check_placement(described, p, f"the loaded {key}", value)
        if not local(value).isfinite().all():
            kind = "NaN" if local(value).isnan().any() else "inf"
            # at the caller of load_state_dict, in torch 2.13
            warnings.warn(f"{described}: the loaded {key} holds {kind}", stacklevel=8)


def placed(p: Tensor, key: str, value: Tensor) -> Tensor:
    """Puts a loaded state on p's device and in the precision that states of p have."""
    if key == "step":
        return value.to(dtype=torch.float32, device=p.device).reshape(())
    return value.to(dtype=state_dtype(p), device=p.device)


def new_master(p: Tensor) -> Tensor:
    """The float32 copy of a low-precision parameter, in its layout."""
    return p.detach().to(torch.float32, memory_format=torch.preserve_format)
