"""What torch's own tests ask of an optimizer, as far as the wheel carries the material for it.

tests/external runs the rest from a checkout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.common_cuda import _create_scaling_case
from torch_infos import FUSED, REFERENCE, error_inputs, inputs

from maxva_kernels import FusedMAdam

pytestmark = pytest.mark.usefixtures("one_thread")

INFOS = {info.name: info for info in FUSED + REFERENCE}
INPUTS = {x.desc or "default": x.kwargs for x in inputs("cpu")}


@pytest.mark.parametrize("name", INFOS)
def test_torch_error_inputs(name: str) -> None:
    bad = error_inputs("cpu", torch.float32)
    assert len(bad) >= 7
    for case in bad:
        arguments = case.optimizer_error_input
        params = arguments.params
        if params is None:
            params = [torch.nn.Parameter(torch.ones(2))]
        refused = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with refused(case.error_type, match=case.error_regex):
            INFOS[name].optim_cls(params, **arguments.kwargs)


def scaling_case(kind: Any, dtype: torch.dtype | None, kwargs: dict[str, Any]) -> list[Any]:
    """Trains torch's case in the given way; returns gradients, parameters and states.

    Args:
        kind: "plain", "scaled" or "unscaled first"; the gradient of the third step is infinite
            under the latter two, and the first leaves the step out.
        dtype: of autocast, or None for none.
        kwargs: of the optimizer.
    """
    torch.manual_seed(20)
    _, net, _, optimizer, data, loss_fn, skip_iter = _create_scaling_case(
        device="cpu", optimizer_ctor=FUSED[0].optim_cls, optimizer_kwargs=kwargs
    )
    enabled = kind != "plain"
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1, enabled=enabled)
    for k, (x, target) in enumerate(data):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = loss_fn(net(x), target)
        scaler.scale(loss).backward()
        if k == skip_iter:
            if not enabled:
                continue
            net[1].weight.grad[0, 0] = float("inf")
        if kind == "unscaled first":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    if enabled:
        assert scaler.get_scale() == 128.0 * 2**3 / 2
    params = list(net.parameters())
    states = [optimizer.state[p] for p in params]
    assert all(state["step"] == 3 for state in states)
    return [p.grad for p in params] + params + [x for state in states for x in state.values()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast_bf16"])
@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "eager"])
@pytest.mark.parametrize("kwargs", INPUTS.values(), ids=INPUTS)
def test_a_scale_changes_no_bit(kwargs: dict[str, Any], fused: bool, dtype: Any) -> None:
    """Scales are powers of two, so neither the scaled backward nor unscaling rounds."""
    kwargs = {**kwargs, "fused": fused}
    expected = scaling_case("plain", dtype, kwargs)
    for kind in ("scaled", "unscaled first"):
        for a, b in zip(scaling_case(kind, dtype, kwargs), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("capturable", [False, True])
def test_parameters_without_storage_are_refused_by_a_kernel(capturable: bool) -> None:
    """And the same parameters train once they have one."""
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = FusedMAdam([p], backend="cpu", lr=0.5, capturable=capturable)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="'cpu' does not serve parameters on 'meta'"):
        optimizer.step()
    real = torch.nn.Parameter(torch.ones(3))
    p.grad = None
    torch.utils.swap_tensors(p, real)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(p, torch.full((3,), 0.5))
