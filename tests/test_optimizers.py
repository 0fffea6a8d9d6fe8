"""The step protocol and the public surface: what is accepted, counted, skipped and refused."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from definition import Coordinates, Definition
from exactness import (
    FUSED,
    KEYS,
    REFERENCE,
    heavy_tailed,
    params_of,
    realistic_problem,
    same_bits,
    set_grad,
    snapshot,
    take_step,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.testing._internal.two_tensor import TwoTensor

import maxva_kernels
from maxva_kernels import FusedLaMAdam, FusedMAdam, LaMAdam, MAdam

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

CLASSES = {cls.__name__: cls for cls in (FusedMAdam, FusedLaMAdam, MAdam, LaMAdam)}
GROUP_KEYS = {
    "params", "lr", "betas", "beta_min", "eps", "weight_decay", "bias_correction", "adam_w_mode",
    "amsgrad", "nesterov", "trust_ratio", "maximize", "max_grad_norm", "skip_nonfinite",
    "master_weights", "capturable", "delta", "beta_init", "eps_inside_sqrt", "set_grad_none",
    "collect_stats", "stochastic_rounding", "rounding_seed", "state_dtype", "fp32_state_below",
    "differentiable", "step",
}  # fmt: skip
STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "maxva_avg", "maxva_weight"}


def two_groups(backend: str, shapes: Any = ((3, 4), (5,)), **options: Any) -> Any:
    """FusedMAdam over two groups with one gradient each."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    opt = FusedMAdam([{"params": [p]} for p in params], backend=backend, **options)
    return opt, params


# --- constructor ---------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_OPTIONS = [
    ("lr", -1e-9, "lr"),
    ("lr", NAN, "lr"),
    ("lr", INF, "lr"),
    ("lr", torch.zeros(2), "lr"),
    ("lr", torch.zeros(0), "lr"),
    ("betas", (-0.1, 0.999), r"betas\[0\]"),
    ("betas", (1.0, 0.999), r"betas\[0\]"),
    ("betas", (NAN, 0.999), r"betas\[0\]"),
    ("betas", (0.9, 0.0), r"betas\[1\]"),
    ("betas", (0.9, 1.0000001), r"betas\[1\]"),
    ("betas", (0.9, NAN), r"betas\[1\]"),
    ("betas", (0.9, 0.4), "beta_min"),
    ("betas", (0.9,), "betas"),
    ("betas", (0.9, 0.99, 0.999), "betas"),
    ("betas", 0.9, "betas"),
    ("beta_min", 0.0, "beta_min"),
    ("beta_min", -0.5, "beta_min"),
    ("beta_min", 0.9991, "beta_min"),
    ("beta_min", NAN, "beta_min"),
    ("eps", -1e-8, "eps"),
    ("eps", NAN, "eps"),
    ("eps", INF, "eps"),
    ("weight_decay", -0.1, "weight_decay"),
    ("weight_decay", NAN, "weight_decay"),
    ("weight_decay", INF, "weight_decay"),
    ("delta", -1e-16, "delta"),
    ("delta", NAN, "delta"),
    ("delta", INF, "delta"),
    ("beta_init", 1.0, "beta_init"),
    ("beta_init", -0.1, "beta_init"),
    ("beta_init", NAN, "beta_init"),
    ("max_grad_norm", 0.0, "max_grad_norm"),
    ("max_grad_norm", -1.0, "max_grad_norm"),
    ("max_grad_norm", NAN, "max_grad_norm"),
    ("max_grad_norm", INF, "max_grad_norm"),
    ("state_dtype", "int4", "state_dtype.*'float32', 'int8', 'bfloat16'"),
    ("state_dtype", torch.bfloat16, "state_dtype"),
    ("state_dtype", None, "state_dtype"),
    ("fp32_state_below", -1, "fp32_state_below"),
    ("fp32_state_below", 4096.0, "fp32_state_below"),
    ("fp32_state_below", True, "fp32_state_below"),
]


@pytest.mark.parametrize("value", [-1.0, -1e-9, NAN, INF])
@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_tensor_lr_is_checked_where_it_is_given(cls: Any, value: float) -> None:
    p, q = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="lr must be finite and >= 0, is"):
        cls([p], lr=torch.tensor(value))
    opt = cls([p])
    with pytest.raises(ValueError, match="lr must be finite and >= 0, is"):
        opt.add_param_group({"params": [q], "lr": torch.tensor(value)})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_eps_passed_by_position_is_noticed(cls: Any) -> None:
    """torch.optim.AdamW(params, lr, betas, eps, weight_decay)."""
    p = Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="beta_min=1e-06.*keyword") as record:
        cls([p], 1e-3, (0.9, 0.98), 1e-6, 0.01)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([p], 1e-3, (0.9, 0.98), 1e-3)
        cls([p], 1e-3, (0.9, 1e-6), 1e-6)  # below which it can only be small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "no such"}, "backend concerns the optimizer, which has 'auto'"),
        ({"norm_process_group": None}, "norm_process_group concerns the optimizer"),
        ({"differentiable": True}, "differentiable must be False"),
        ({"step": torch.zeros(2)}, "."),
        ({"step": "x"}, "."),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_group_option_that_would_be_ignored_is_refused(options: Any, message: str) -> None:
    opt = FusedMAdam([Parameter(torch.zeros(2))])
    with pytest.raises((ValueError, RuntimeError), match=message):
        opt.add_param_group({"params": [Parameter(torch.zeros(2))], **options})
    assert len(opt.param_groups) == 1


def value_id(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


@pytest.mark.parametrize(
    ("name", "value", "message"), BAD_OPTIONS, ids=[f"{n}={value_id(x)}" for n, x, _ in BAD_OPTIONS]
)
@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_value_out_of_range_is_refused_by_name(
    cls: Any, name: str, value: Any, message: str
) -> None:
    p = Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        cls([p], **{name: value})
    opt = cls([p])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [Parameter(torch.zeros(3))], name: value})
    assert len(opt.param_groups) == 1
    # set later, it is found before anything changes
    p.grad = torch.ones(2)
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert same_bits(p.detach(), torch.zeros(2))
    assert not opt.state[p]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0}, {"lr": 10.0}, {"betas": (0.0, 1.0)}, {"betas": [0.5, 0.6]},
        {"betas": (0.9, 1e-6), "beta_min": 1e-6}, {"betas": (0.9, 0.99), "beta_min": 0.99},
        {"eps": 0.0}, {"weight_decay": 0}, {"delta": 0.0}, {"beta_init": 0.0},
        {"max_grad_norm": 1e-9}, {"max_grad_norm": None},
        {"state_dtype": "int8", "fp32_state_below": 0}, {"state_dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_ends_of_the_ranges_are_accepted(cls: Any, options: dict[str, Any]) -> None:
    p = Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, -2.0])
    opt = cls([p], **options)
    opt.step()
    assert torch.isfinite(p).all()
    assert opt.state[p]["step"] == 1


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_signature_is_frozen(cls: Any) -> None:
    """Names, order and defaults that other people's calls rely on."""
    own = inspect.signature(cls.__init__).parameters
    names = ["self", "params", "lr", "betas", "beta_min", "eps", "weight_decay"]
    assert list(own)[:7] == names
    eps = 1e-8 if cls in (FusedMAdam, MAdam) else 1e-15
    group = cls([Parameter(torch.zeros(1))]).param_groups[0]
    expected = {
        "lr": 1e-3, "betas": (0.9, 0.999), "beta_min": 0.5, "eps": eps, "weight_decay": 0.0,
        "bias_correction": True, "adam_w_mode": True, "amsgrad": False, "nesterov": False,
        "trust_ratio": False, "maximize": False, "max_grad_norm": None, "skip_nonfinite": False,
        "master_weights": False, "capturable": False, "delta": 1e-16, "beta_init": None,
        "eps_inside_sqrt": False, "set_grad_none": True, "collect_stats": False,
        "stochastic_rounding": False, "rounding_seed": 0, "state_dtype": "float32",
        "fp32_state_below": 4096, "differentiable": False, "step": 0,
    }  # fmt: skip
    assert {k: v for k, v in group.items() if k != "params"} == expected
    with pytest.raises(TypeError):
        cls([Parameter(torch.zeros(1))], 1e-3, (0.9, 0.999), 0.5, eps, 0.0, True)
    with pytest.raises(TypeError):
        cls([Parameter(torch.zeros(1))], beta2_range=(0.5, 0.999))


def test_empty_parameter_list_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        FusedMAdam([])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.complex64), r"complex.*|.*complex"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, dtype=torch.float8_e4m3fn), "float8"),
    ],
    ids=["complex", "integer", "float8"],
)
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_parameter_of_another_type_is_refused(tensor: Tensor, message: str, named: bool) -> None:
    good, bad = Parameter(torch.zeros(1)), Parameter(tensor, requires_grad=False)
    params = [("good", good), ("encoder.bad", bad)] if named else [good, bad]
    where = "encoder.bad" if named else "parameter 1 of its group"
    with pytest.raises(TypeError, match=message) as raised:
        FusedMAdam(params)
    assert where in str(raised.value)
    assert "(2, 3)" in str(raised.value)


# --- gradients that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 1.0}, {"state_dtype": "int8", "fp32_state_below": 0}],
    ids=["plain", "in_the_norm", "in_a_later_batch"],
)
def test_sparse_gradient_names_the_parameter(options: Any, backend: str) -> None:
    dense, sparse = Parameter(torch.ones(2, 256)), Parameter(torch.ones(4, 2))
    dense.grad = torch.ones(2, 256)
    sparse.grad = torch.ones(4, 2).to_sparse()
    for params, where in (
        ([dense, sparse], "parameter 1 of its group"),
        ([("a", dense), ("embedding.weight", sparse)], "'embedding.weight'"),
    ):
        opt = FusedMAdam(params, backend=backend, **options)
        with pytest.raises(RuntimeError, match="does not support sparse gradients") as raised:
            opt.step()
        assert where in str(raised.value)
        assert raised.value.__suppress_context__  # one message, the one that names it
        assert torch.equal(dense.detach(), torch.ones(2, 256))
        assert not opt.state.get(dense)
        assert opt.param_groups[0]["step"] == 0


@pytest.mark.parametrize("stepped", [False, True], ids=["first_step", "later_step"])
@pytest.mark.parametrize("kind", ["gradient", "state"])
def test_tensor_of_another_shape_leaves_everything_as_it_was(
    kind: str, stepped: bool, backend: str
) -> None:
    opt, (_p, q) = two_groups(backend)
    if stepped or kind == "state":
        opt.step()
    if kind == "gradient":
        # torch itself refuses an assignment: a changed p.data does not ask
        q.grad = torch.ones(5)
        q.data = torch.ones(6)
    else:
        opt.state[q]["maxva_avg"] = torch.zeros(6)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="shape"):
        opt.step()
    assert same_bits(before, snapshot(opt))
    if kind == "gradient":
        with pytest.raises(ValueError, match=r"parameter 0 of its group.*\(6,\).*\(5,\)"):
            opt.step()


def test_failed_step_keeps_master_weights_made_before(backend: str) -> None:
    p = Parameter(torch.ones(4).bfloat16())
    q = Parameter(torch.ones(4))
    opt = FusedMAdam([p, q], master_weights=True, backend=backend)
    opt.setup_fp32_params()
    opt.state[p]["master_param"].add_(1e-4)
    before = snapshot(opt)
    p.grad = torch.ones(4).bfloat16()
    q.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError):
        opt.step()
    assert same_bits(snapshot(opt)["states"], before["states"])
    assert "master_param" in opt.state[p]


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"), [("max_grad_norm", (1.0, 2.0)), ("skip_nonfinite", (True, False))]
)
def test_groups_must_agree_on_what_concerns_all(name: str, values: Any, backend: str) -> None:
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=name):
        FusedMAdam([{"params": [p], name: values[0]}, {"params": [q], name: values[1]}])
    opt = FusedMAdam([p], backend=backend, **{name: values[0]})
    with pytest.raises(ValueError, match=name):
        opt.add_param_group({"params": [q], name: values[1]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match=name):  # the constructor's value is not overridden
        FusedMAdam([{"params": [p], name: values[0]}, {"params": [q]}], **{name: values[1]})
    with pytest.raises(TypeError, match="dict"):
        opt.add_param_group([q])
    # also where they have come with a checkpoint
    for group in opt.param_groups:
        group[name] = values[1]
    opt.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert opt.param_groups[2][name] == values[1]
    opt.param_groups[0][name] = values[0]
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match=name):
        opt.step()
    assert not opt.state.get(p)


def test_group_added_after_steps(backend: str, algorithm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2)]
    p, q = (Parameter(x.clone()) for x in start)
    opt = FUSED[algorithm]([p], lr=1e-2, backend=backend)
    tensors = [Coordinates.start(x.numpy()) for x in start]
    for t in range(8):
        if t == 3:
            opt.add_param_group({"params": [q], "lr": 5e-2, "weight_decay": 0.1})
        for i, (x, options, lr) in enumerate(((p, {}, 1e-2), (q, {"weight_decay": 0.1}, 5e-2))):
            if i == 0 or t >= 3:
                x.grad = torch.randn(6, generator=generator, dtype=torch.float64)
                Definition(algorithm, **options).step([tensors[i]], [x.grad.numpy()], lr)
        opt.step()
    for x, c in zip((p, q), tensors, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), c.theta, rtol=1e-12, atol=1e-12)
    assert [group["step"] for group in opt.param_groups] == [8, 5]
    assert [int(opt.state[x]["step"]) for x in (p, q)] == [8, 5]


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_group_and_state_keys_are_frozen(cls: Any) -> None:
    """Flattened distributed checkpoints break when a key appears."""
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2).half())]
    for p in params:
        p.grad = torch.ones_like(p)
    for options, extra in (
        ({}, set()),
        ({"amsgrad": True}, {"max_exp_avg_sq"}),
        ({"master_weights": True}, {"master_param"}),
        ({"amsgrad": True, "master_weights": True}, {"max_exp_avg_sq", "master_param"}),
    ):
        opt = cls(params, **options)
        assert set(opt.param_groups[0]) == GROUP_KEYS
        for _ in range(2):
            opt.step()
            assert set(opt.param_groups[0]) == GROUP_KEYS
            assert set(opt.state) == set(params)
            assert set(opt.state[params[0]]) == STATE_KEYS | (extra - {"master_param"})
            assert set(opt.state[params[1]]) == STATE_KEYS | extra
        step = opt.state[params[0]]["step"]
        assert step.dtype == torch.float32
        assert step.shape == ()
        assert step.device.type == "cpu"
        assert type(opt.param_groups[0]["step"]) is int


# --- learning rate -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "one_element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", ["fill", "rebind"])
def test_tensor_lr(shape: Any, dtype: torch.dtype, change: str, backend: str) -> None:
    """A tensor acts as its value; filled in place or replaced, the next step reads it."""
    values = [0.25, 0.125, 0.0, 0.5]
    outcomes = []
    for tensor in (False, True):
        p = Parameter(torch.linspace(-1, 1, 50))
        lr: Any = torch.full(shape, values[0], dtype=dtype) if tensor else values[0]
        opt = FusedMAdam([p], lr=lr, weight_decay=0.1, backend=backend)
        generator = torch.Generator().manual_seed(0)
        for value in values:
            if tensor and change == "fill":
                opt.param_groups[0]["lr"].fill_(value)
            else:
                opt.param_groups[0]["lr"] = (
                    torch.full(shape, value, dtype=dtype) if tensor else value
                )
            p.grad = torch.randn(50, generator=generator)
            before = p.detach().clone()
            opt.step()
            assert torch.equal(before, p.detach()) == (value == 0)
        outcomes.append(p.detach().clone())
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=3e-7, atol=1e-7)


def test_default_lr_tensor_is_not_shared(backend: str) -> None:
    lr, own = torch.tensor(0.1), torch.tensor(0.7)
    p, q, r = (Parameter(torch.zeros(2)) for _ in range(3))
    opt = FusedMAdam([{"params": [p]}, {"params": [q]}, {"params": [r], "lr": own}], lr=lr)
    lrs = [group["lr"] for group in opt.param_groups]
    lrs[0].fill_(0.5)
    assert [round(float(x), 6) for x in lrs] == [0.5, 0.1, 0.7]
    assert lrs[0] is lr
    assert lrs[2] is own


def test_a_tensor_lr_of_low_precision_acts_as_its_value(backend: str) -> None:
    """The product lr * weight_decay has more digits than float16 has."""
    outcomes = []
    value = torch.tensor(3e-4, dtype=torch.float16)
    for lr in (value, float(value)):
        p = Parameter(torch.full((3,), 100.0, dtype=torch.float64))
        p.grad = torch.zeros_like(p)
        opt = FusedMAdam([p], lr=lr, weight_decay=1e-4, backend=backend)
        opt.step()
        outcomes.append(p.detach())
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-15, atol=0)


def test_two_groups_may_share_one_lr_tensor_on_purpose(backend: str) -> None:
    lr = torch.tensor(0.25)
    p, q = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    opt = FusedMAdam(
        [{"params": [p], "lr": lr}, {"params": [q], "lr": lr}], eps=0.0, backend=backend
    )
    lr.fill_(0.5)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    opt.step()
    assert torch.equal(p.detach(), torch.full((3,), -0.5))
    assert torch.equal(p.detach(), q.detach())


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.1, total_steps=12, cycle_momentum=True
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(schedule: Any, tensor: bool, backend: str, algorithm: str) -> None:
    """Lr and momentum of every step are those that the scheduler has set."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
    c = Coordinates.start(p.detach().numpy())
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05
    opt = FUSED[algorithm]([p], lr=lr, backend=backend)
    scheduler = schedule(opt)
    seen = set()
    for _ in range(10):
        group = opt.param_groups[0]
        seen.add((round(float(group["lr"]), 9), round(float(group["betas"][0]), 9)))
        p.grad = torch.randn(30, generator=generator, dtype=torch.float64)
        definition = Definition(algorithm, betas=tuple(float(x) for x in group["betas"]))
        definition.step([c], [p.grad.numpy()], float(group["lr"]))
        opt.step()
        scheduler.step()
        np.testing.assert_allclose(p.detach().numpy(), c.theta, rtol=1e-12, atol=1e-12)
    assert len(seen) > 5


# --- step() --------------------------------------------------------------------------------------


def test_closure_runs_with_gradients_enabled(backend: str) -> None:
    p = Parameter(torch.ones(3))
    opt = FusedMAdam([p], lr=0.5, eps=0.0, backend=backend)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (p * torch.tensor([1.0, 2.0, -3.0])).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
        assert opt.step(closure=closure) is not None
    assert calls == [True, True]
    assert float(loss.detach()) == 0.0
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 0.0, 2.0]))
    assert opt.step() is None


def test_step_hooks(backend: str) -> None:
    opt, (p, _) = two_groups(backend)
    seen: list[Any] = []
    opt.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(("pre", float(p.detach().sum())))
    )
    opt.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", float(p.detach().sum())))
    )
    before = float(p.detach().sum())
    opt.step()
    assert seen == [("pre", before), ("post", float(p.detach().sum()))]
    assert seen[0][1] != seen[1][1]


def test_all_gradients_none(backend: str) -> None:
    opt, _params = two_groups(backend, max_grad_norm=1.0, skip_nonfinite=True)
    before = snapshot(opt)
    opt.zero_grad()
    assert opt.step() is None
    after = snapshot(opt)
    assert same_bits(before["params"], after["params"])
    assert not any(after["states"])


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "max_grad_norm": 0.5}], ids=str)
def test_intermittent_gradients_of_every_pattern(
    options: dict[str, Any], backend: str, algorithm: str
) -> None:
    """Tensor i has a gradient in step t when bit i of t is set."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(4, generator=generator, dtype=torch.float64)) for _ in range(3)]
    tensors = [Coordinates.start(p.detach().numpy()) for p in params]
    opt = FUSED[algorithm](params, lr=1e-2, backend=backend, **options)
    definition = Definition(algorithm, **options)
    for t in [*range(8), *range(7, -1, -1)]:
        for i, p in enumerate(params):
            g = torch.randn(4, generator=generator, dtype=torch.float64)
            p.grad = g if t >> i & 1 else None
        grads = [None if p.grad is None else p.grad.numpy() for p in params]
        opt.step()
        definition.step(tensors, grads, 1e-2)
    for p, c in zip(params, tensors, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), c.theta, rtol=1e-12, atol=1e-12)
        assert int(opt.state[p]["step"]) == c.t == 8
    assert opt.param_groups[0]["step"] == 16


def test_step_counts_past_what_bfloat16_can_count(backend: str) -> None:
    p = Parameter(torch.ones(2, dtype=torch.bfloat16))
    opt = FusedMAdam([p], lr=1e-4, backend=backend)
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    for _ in range(300):
        opt.step()
    assert opt.state[p]["step"] == 300
    assert opt.state[p]["step"].dtype == torch.float32
    assert opt.param_groups[0]["step"] == 300


def test_setting_the_group_step_back_changes_no_update(backend: str) -> None:
    """It is for schedulers; bias correction counts each parameter's own updates."""
    runs = []
    for reset in (False, True):
        opt, _params = two_groups(backend)
        for t in range(4):
            if reset and t == 2:
                for group in opt.param_groups:
                    group["step"] = 0
            opt.step()
        runs.append(snapshot(opt))
    assert same_bits(runs[0]["params"], runs[1]["params"])
    assert same_bits(runs[0]["states"], runs[1]["states"])
    assert runs[0]["steps"] == [4, 4]
    assert runs[1]["steps"] == [2, 2]


def test_group_step_that_is_a_tensor_goes_on_as_a_number(backend: str) -> None:
    """As after a checkpoint whose reader makes tensors of all numbers."""
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = FusedMAdam([p], backend=backend)
    opt.param_groups[0]["step"] = torch.tensor(3)
    opt.step()
    step = opt.param_groups[0]["step"]
    assert isinstance(step, int)
    assert step == 4


def test_versions_move_where_something_was_written(backend: str) -> None:
    """Autograd must notice; a gradient that was only read keeps its version."""
    opt, params = two_groups(backend)
    opt.step()
    before = [(p._version, p.grad._version) for p in params]
    states = [x._version for p in params for x in opt.state[p].values()]
    opt.step()
    for p, (version, grad_version) in zip(params, before, strict=True):
        assert p._version > version
        assert p.grad._version == grad_version
    after = [x._version for p in params for x in opt.state[p].values()]
    assert all(a > b for a, b in zip(after, states, strict=True))


def test_parameter_with_a_pending_backward_is_protected(backend: str) -> None:
    p = Parameter(torch.ones(3))
    opt = FusedMAdam([p], backend=backend)
    loss = (p**3).sum()
    p.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("keep", [True, False], ids=["set_grad_none", "keep_grads"])
def test_zero_grad(keep: bool) -> None:
    opt, params = two_groups("eager", set_grad_none=keep)
    opt.zero_grad()
    assert all((p.grad is None) == keep for p in params)
    assert keep or not any(p.grad.any() for p in params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.zero_grad(set_to_none=not keep)
    assert all((p.grad is None) == (not keep) for p in params)


# --- scaling, clipping, skipping -----------------------------------------------------------------


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("grad_scale", [None, 1024.0])
def test_overflow_at_the_very_first_step(found_inf: float, grad_scale: Any, backend: str) -> None:
    """Both groups count the skipped step alike: not at all."""
    opt, _params = two_groups(backend)
    start = snapshot(opt)
    take_step(opt, grad_scale, found_inf)
    after = snapshot(opt)
    assert same_bits(start["params"], after["params"])
    assert same_bits(start["grads"], after["grads"])
    assert after["steps"] == [0, 0]
    assert all(not x.any() for state in after["states"] for x in state.values())
    opt.step()
    fresh, _ = two_groups(backend)
    fresh.step()
    assert same_bits(snapshot(opt), snapshot(fresh))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "one_element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_and_flag_of_any_shape(shape: Any, dtype: torch.dtype, backend: str) -> None:
    opt, params = two_groups(backend)
    plain, _ = two_groups(backend)
    for p in params:
        p.grad.mul_(8)
    opt.grad_scale = torch.full(shape, 8.0, dtype=dtype)
    opt.found_inf = torch.zeros(shape, dtype=dtype)
    opt.step()
    plain.step()
    assert same_bits(snapshot(opt), snapshot(plain))


def test_scaler_without_any_flag(backend: str) -> None:
    """grad_scale None and found_inf 0, as a GradScaler gives where nothing had a gradient."""
    opt, _ = two_groups(backend)
    plain, _ = two_groups(backend)
    opt.grad_scale, opt.found_inf = None, 0
    opt.step()
    plain.step()
    assert same_bits(snapshot(opt), snapshot(plain))


def gradient_steps(opt: Any, scaler: Any, params: Any, unscale: bool, bad_step: int) -> list[Any]:
    """Six scaled backward passes; the gradient of one overflows."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for t in range(6):
        opt.zero_grad()
        direction = [torch.randn(p.shape, generator=generator) for p in params]
        loss = sum((p * d).sum() for p, d in zip(params, direction, strict=True))
        scaler.scale(loss * (INF if t == bad_step else 1.0)).backward()
        if unscale:
            scaler.unscale_(opt)
        before = snapshot(opt)
        scaler.step(opt)
        scaler.update()
        after = snapshot(opt)
        if t == bad_step:
            assert same_bits(before["params"], after["params"])
            assert before["steps"] == after["steps"]
        else:
            for p, d in zip(params, direction, strict=True):
                torch.testing.assert_close(p.grad, d)
        seen.append(after["steps"][0])
    return seen


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("unscale", [False, True], ids=["fused_unscale", "unscale_first"])
@pytest.mark.parametrize("bad_step", [0, 3])
def test_grad_scaler(bad_step: int, unscale: bool, options: dict[str, Any], backend: str) -> None:
    """As without a scaler, but for the step that overflows; clipping sees unscaled gradients."""
    opt, params = two_groups(backend, lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    seen = gradient_steps(opt, scaler, params, unscale, bad_step)
    assert seen == [t + 1 - (t >= bad_step) for t in range(6)]
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")
    plain, others = two_groups(backend, lr=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for t in range(6):
        for p in others:
            p.grad = torch.randn(p.shape, generator=generator)
        if t != bad_step:
            plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_scaler_protocol_is_the_present_one(cls: Any) -> None:
    assert cls._step_supports_amp_scaling is True
    assert "grad_scaler" not in inspect.signature(cls.step).parameters
    assert not hasattr(cls([Parameter(torch.zeros(1))]), "grad_scale")


@pytest.mark.parametrize("max_grad_norm", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_clipping_is_by_the_norm_of_all_groups(
    max_grad_norm: float, scale: Any, backend: str, algorithm: str
) -> None:
    """G * min(1, max / norm) in float64, and p.grad is not touched."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (0,), (2, 2)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    grads = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    factor = min(1.0, max_grad_norm / norm)
    ends = []
    for clip in (True, False):
        params = [Parameter(x.clone()) for x in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g * (scale if scale and clip else 1) * (1 if clip else factor)
        given = [p.grad.clone() for p in params]
        opt = FUSED[algorithm](
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}],
            backend=backend,
            max_grad_norm=max_grad_norm if clip else None,
        )
        take_step(opt, grad_scale=scale if clip else None)
        unscaled = [g / scale for g in given] if scale and clip else given
        assert same_bits([p.grad for p in params], unscaled)
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_nan_norm_is_not_hidden(backend: str) -> None:
    """Without skip_nonfinite a NaN norm makes every update NaN, as torch's clipping does."""
    opt, (p, q) = two_groups(backend, max_grad_norm=1.0)
    p.grad[0, 0] = NAN
    opt.step()
    assert torch.isnan(p).all()
    assert torch.isnan(q).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("value", "skipped"), [(1e30, False), (1e37, False), (3e38, True)], ids=["1e30", "1e37", "3e38"]
)
def test_norm_beyond_float32_counts_as_nonfinite(
    value: float, skipped: bool, dtype: torch.dtype, backend: str
) -> None:
    """Finite gradients: the norm of 64 of 3e38 is not a float, that of 64 of 1e37 is."""
    p = Parameter(torch.ones(64, dtype=dtype))
    p.grad = torch.full((64,), value).to(dtype)
    opt = FusedMAdam([p], lr=0.1, skip_nonfinite=True, max_grad_norm=1.0, backend=backend)
    opt.step()
    assert torch.equal(p.detach(), torch.ones(64, dtype=dtype)) == skipped
    assert torch.isfinite(p).all()
    assert opt.param_groups[0]["step"] == (0 if skipped else 1)
    assert float(opt.state[p]["step"]) == (0 if skipped else 1)


def test_clipped_huge_gradients_are_as_good_as_small_ones(backend: str) -> None:
    """Clipping comes before beta and before squares that would overflow."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(100, generator=generator)
    g /= g.double().norm()
    ends = []
    for scale in (1.0, 2.0**100):
        p = Parameter(torch.zeros(100))
        opt = FusedMAdam([p], lr=0.1, max_grad_norm=0.5, backend=backend)
        for t in range(5):
            p.grad = g.roll(t) * scale
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


# --- steps that observe nothing, and steps at lr 0 -----------------------------------------------


@pytest.mark.parametrize("tensor", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "master_weights": True}], ids=str)
def test_initialising_step_of_distributed_checkpoint(
    options: dict[str, Any], tensor: bool, backend: str, algorithm: str
) -> None:
    """States are allocated, nothing is observed, and the next step is as if it had not been."""
    ends = []
    for initialise in (True, False):
        params = [Parameter(torch.ones(4)), Parameter(torch.ones(3, 2).bfloat16())]
        opt = FUSED[algorithm](params, lr=0.1, backend=backend, **options)
        if initialise:
            for p in params:
                p.grad = torch.zeros_like(p)
            opt.param_groups[0]["lr"] = torch.tensor(0.0) if tensor else 0.0
            opt.step(closure=None)
            opt.param_groups[0]["lr"] = 0.1
            assert opt.param_groups[0]["step"] == 0
            extra = {"max_exp_avg_sq"} if "amsgrad" in options else set()
            assert STATE_KEYS | extra == set(opt.state[params[0]])
            for p in params:
                assert not any(opt.state[p][key].any() for key in STATE_KEYS)
        for t in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.5 - t)
            opt.step()
        ends.append(snapshot(opt))
    assert same_bits(ends[0], ends[1])


@pytest.mark.parametrize("kind", ["sparse", "shape"])
def test_initialising_step_refuses_a_gradient_that_does_not_fit(kind: str, backend: str) -> None:
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(4, 3))
    opt = FusedMAdam([p, q], lr=0.0, backend=backend)
    p.grad = torch.zeros(2)
    q.grad = torch.zeros(4, 3).to_sparse() if kind == "sparse" else torch.zeros(4, 3)
    if kind == "shape":
        q.data = torch.ones(5, 3)
    with pytest.raises((ValueError, RuntimeError), match="parameter 1 of its group"):
        opt.step()
    assert not opt.state


def test_checkpoint_of_a_fresh_optimizer(backend: str) -> None:
    """torch.distributed.checkpoint asks a fresh optimizer for its state without changing it."""
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    ends = []
    for asked in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        opt = FusedMAdam(model.parameters(), lr=0.1, backend=backend)
        if asked:
            saved = api.get_optimizer_state_dict(model, opt)
            assert set(saved["state"]) == {"weight", "bias"}
            assert all(float(of["step"]) == 0 for of in saved["state"].values())
            assert opt.param_groups[0]["lr"] == 0.1
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        ends.append(snapshot(opt))
    assert same_bits(ends[0], ends[1])


@pytest.mark.parametrize(
    "case", ["one_gradient_nonzero", "one_lr_nonzero", "states_exist", "one_state_exists"]
)
def test_step_that_only_looks_like_initialising_counts(case: str, backend: str) -> None:
    opt, params = two_groups(backend, lr=0.0)
    if case == "one_state_exists":
        params[1].grad = None
    if case in ("states_exist", "one_state_exists"):
        opt.step()
    for p in params:
        p.grad = torch.zeros_like(p)
    if case == "one_gradient_nonzero":
        params[1].grad[4] = 1e-30
    if case == "one_lr_nonzero":
        opt.param_groups[1]["lr"] = 1e-3
    opt.step()
    counts = {"states_exist": [2, 2], "one_state_exists": [2, 1]}.get(case, [1, 1])
    assert [int(opt.state[p]["step"]) for p in params] == counts
    assert all((opt.state[p]["maxva_weight"] > 0).all() for p in params)


def test_warm_up_step_at_lr_0_counts(backend: str, algorithm: str) -> None:
    p = Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64))
    c = Coordinates.start(p.detach().numpy())
    opt = FUSED[algorithm]([p], backend=backend)
    generator = torch.Generator().manual_seed(0)
    for lr in (0.0, 0.01, 0.02):
        opt.param_groups[0]["lr"] = lr
        p.grad = torch.randn(20, generator=generator, dtype=torch.float64)
        Definition(algorithm).step([c], [p.grad.numpy()], lr)
        opt.step()
    assert opt.state[p]["step"] == 3
    np.testing.assert_allclose(p.detach().numpy(), c.theta, rtol=1e-12, atol=1e-13)


# --- master weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_master_weights_gather_small_updates(dtype: torch.dtype, backend: str) -> None:
    """200 steps of lr 1e-5 move the master by 2e-3, each too small for the parameter alone."""
    ends = {}
    for kept in (True, False):
        p = Parameter(torch.full((9,), 1.0, dtype=dtype))
        opt = FusedMAdam([p], lr=1e-5, master_weights=kept, backend=backend)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            opt.step()
        ends[kept] = p.detach().float()
        if kept:
            master = opt.state[p]["master_param"]
            assert master.dtype == torch.float32
            rounding = 200 * 2**-25  # half a unit in the last place per step
            torch.testing.assert_close(master, torch.full((9,), 0.998), rtol=0, atol=rounding)
            assert same_bits(p.detach(), master.to(dtype))
    assert torch.equal(ends[False], torch.ones(9))
    if dtype == torch.float16:  # bfloat16 has no number between 0.996 and 1
        assert (ends[True] < 0.999).all()


def test_setup_fp32_params(backend: str) -> None:
    params = [Parameter(torch.randn(4).to(d)) for d in (torch.float32, torch.bfloat16)]
    other, frozen = Parameter(torch.ones(2).half()), Parameter(torch.ones(2), requires_grad=False)
    opt = FusedMAdam(
        [{"params": params, "master_weights": True}, {"params": [other, frozen]}], backend=backend
    )
    opt.setup_fp32_params()
    assert same_bits(opt.state[params[1]]["master_param"], params[1].detach().float())
    # what reads or fills a state finds all of it
    for p in (*params, other):
        assert opt.state[p].keys() - {"master_param"} == STATE_KEYS
        assert ("master_param" in opt.state[p]) == (p is params[1])
        assert opt.state[p]["step"] == 0
        assert not opt.state[p]["maxva_weight"].any()
    assert not opt.state.get(frozen)
    plain = FusedMAdam([other, *params], backend=backend)
    plain.setup_fp32_params()
    assert not plain.state
    first = opt.state[params[1]]["master_param"]
    opt.setup_fp32_params()
    assert opt.state[params[1]]["master_param"] is first
    first.add_(2**-12)
    for p in (*params, other):
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.state[params[1]]["master_param"] is first
    assert set(opt.state[params[1]]) == STATE_KEYS | {"master_param"}


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_setup_makes_all_of_a_state_and_no_more(kind: str, backend: str) -> None:
    p, q, later = (Parameter(torch.ones(2, 128)) for _ in range(3))
    p.data = p.data.bfloat16()
    options = {"amsgrad": True, "state_dtype": kind, "fp32_state_below": 0}
    opt = FusedMAdam([p, q], master_weights=True, backend=backend, **options)
    opt.setup_fp32_params()
    maximum = "max_exp_avg_sq" if kind == "float32" else "maxva_packed_max"
    assert maximum in opt.state[p]
    assert maximum in opt.state[q]
    # no parameter needs a master weight any more
    opt.add_param_group({"params": [later]})
    opt.setup_fp32_params()
    assert not opt.state.get(later)


def test_state_of_no_parameter_is_passed_over() -> None:
    p = Parameter(torch.ones(3).bfloat16())
    opt = FusedMAdam([p], master_weights=True)
    opt.setup_fp32_params()
    opt.state["of no parameter"] = 5
    opt.setup_fp32_params(refresh=True)
    assert opt.state_memory()["master_weights"] == 12


def test_master_weights_record_no_gradients() -> None:
    p = Parameter(torch.ones(3).bfloat16())
    opt = FusedMAdam([p], master_weights=True)
    for refresh in (False, True):
        opt.setup_fp32_params(refresh=refresh)
        assert not opt.state[p]["master_param"].requires_grad


def test_capturable_lr_has_the_value_of_the_number(backend: str) -> None:
    opt = FusedMAdam([Parameter(torch.ones(2))], lr=1e-3, capturable=True, backend=backend)
    lr = opt.param_groups[0]["lr"]
    assert isinstance(lr, Tensor)
    assert float(lr) == 1e-3


def test_optimizer_of_parameters_without_memory_keeps_lr_and_step() -> None:
    p = Parameter(torch.ones(2, device="meta"))
    for lr in (0.5, torch.tensor(0.5)):
        opt = FusedMAdam([p], lr=lr, capturable=True)
        saved = opt.state_dict()
        saved["param_groups"][0]["step"] = 7
        opt.load_state_dict(saved)
        assert float(opt.param_groups[0]["lr"]) == 0.5
        assert opt.param_groups[0]["step"] == 7
        p.grad = torch.empty_like(p)
        opt.step()  # "auto" takes "eager", and has nothing to warn of
        assert opt.state[p]["maxva_weight"].is_meta


def test_step_lets_torch_look_for_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            monkeypatch.setattr(torch.optim.Optimizer, name, lambda self: asked.append(self))
    opt = FusedMAdam([Parameter(torch.ones(2))])
    opt.step()
    assert asked == [opt]


def test_master_weight_is_not_taken_up_again_after_steps_without(backend: str) -> None:
    p = Parameter(torch.ones(3).bfloat16())
    opt = FusedMAdam([p], lr=0.1, master_weights=True, backend=backend)
    ends = []
    for masters in (True, False, False, True):
        opt.param_groups[0]["master_weights"] = masters
        p.grad = torch.ones(3).bfloat16()
        opt.step()
        ends.append(p[0].item())
        assert ("master_param" in opt.state[p]) == masters
    expected = torch.tensor([0.9, 0.8, 0.7, 0.6])
    torch.testing.assert_close(torch.tensor(ends), expected, rtol=0, atol=1e-2)


def test_values_written_by_others_reach_the_master_weights(backend: str) -> None:
    p = Parameter(torch.ones(3).bfloat16())
    opt = FusedMAdam([p], lr=1e-3, master_weights=True, backend=backend)
    p.grad = torch.ones(3).bfloat16()
    opt.step()
    master = opt.state[p]["master_param"]
    with torch.no_grad():
        p.fill_(7.0)
    opt.setup_fp32_params()
    assert not torch.equal(master, torch.full((3,), 7.0))
    opt.setup_fp32_params(refresh=True)
    assert opt.state[p]["master_param"] is master
    assert torch.equal(master, torch.full((3,), 7.0))
    opt.step()
    torch.testing.assert_close(master, torch.full((3,), 6.999), rtol=0, atol=1e-5)


# --- copies --------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_keep_everything(copied: Any, cls: Any) -> None:
    p = Parameter(torch.linspace(-1, 1, 7).bfloat16())
    extra = {"backend": "eager"} if cls in (FusedMAdam, FusedLaMAdam) else {}
    opt = cls(
        [p], lr=0.1, amsgrad=True, master_weights=True, max_grad_norm=0.5, betas=(0.8, 0.9), **extra
    )
    for t in range(3):
        p.grad = torch.full((7,), 1.0 - t).bfloat16()
        opt.step()
    other = copied(opt)
    assert type(other) is cls
    assert other._backend == "eager"
    assert same_bits(snapshot(opt)["states"], snapshot(other)["states"])
    assert snapshot(opt)["steps"] == snapshot(other)["steps"] == [3]
    for k in GROUP_KEYS - {"params"}:
        assert opt.param_groups[0][k] == other.param_groups[0][k], k
    (q,) = params_of(other)
    assert q.data_ptr() != p.data_ptr()
    for x, o in ((p, opt), (q, other)):
        x.grad = torch.full((7,), 0.3).bfloat16()
        o.step()
    assert same_bits(snapshot(opt), snapshot(other))
    other.add_param_group({"params": [Parameter(torch.zeros(2))]})
    assert set(other.param_groups[1]) == GROUP_KEYS


# --- memory --------------------------------------------------------------------------------------


def tensor_allocations(opt: Any) -> int:
    """Bytes of tensor memory that one step asks for."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        opt.step()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "max_grad_norm": 1.0, "skip_nonfinite": True, "weight_decay": 0.1},
        {"trust_ratio": True, "weight_decay": 0.1},
    ],
    ids=["plain", "clipped_amsgrad", "lamb"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16_master"])
def test_step_allocates_nothing_that_grows(
    dtype: torch.dtype, options: dict[str, Any], algorithm: str
) -> None:
    needed = {}
    for n in (1000, 100_000):
        params = [Parameter(torch.ones(n, 3, dtype=dtype)), Parameter(torch.ones(9, n).t())]
        for p in params:
            set_grad(p, torch.ones_like(p))
        opt = FUSED[algorithm](params, master_weights=True, backend="cpu", **options)
        opt.step()
        needed[n] = tensor_allocations(opt)
        tracemalloc.start()
        opt.step()
        python_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert python_peak < 200_000
    assert needed[1000] == needed[100_000] < 1000
    # the measurement sees what it should: the reference allocates temporaries
    reference = REFERENCE[algorithm](params, **options)
    reference.step()
    assert tensor_allocations(reference) > 100_000


# --- backends ------------------------------------------------------------------------------------


def test_report_of_backends() -> None:
    report = maxva_kernels.backends()
    assert {"cuda", "cpu", "eager"} <= set(report)
    assert report["eager"] == "available"
    assert report["cpu"] == "available"
    assert all(isinstance(text, str) and text for text in report.values())
    if not torch.cuda.is_available():
        assert report["cuda"] != "available"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of.*'auto'.*'cpu'.*'eagre'"):
        FusedMAdam([Parameter(torch.zeros(1))], backend="eagre")


@pytest.mark.skipif(
    maxva_kernels.backends()["cuda"] == "available", reason="needs a machine without CUDA backend"
)
def test_backend_that_is_not_there_says_why() -> None:
    why = maxva_kernels.backends()["cuda"]
    with pytest.raises(RuntimeError, match="'cuda' is not available") as raised:
        FusedMAdam([Parameter(torch.zeros(1))], backend="cuda")
    assert why in str(raised.value)


def operators_of(opt: Any) -> set[str]:
    """Names of the operators that a step calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("variable", "argument", "fused"),
    [
        (None, "auto", True),
        (None, "eager", False),
        (None, "cpu", True),
        ("eager", "auto", False),
        ("eager", "cpu", True),
        ("cpu", "auto", True),
        ("cpu", "eager", False),
        ("", "auto", True),
        ("auto", "auto", True),
    ],
)
def test_variable_overrides_auto_alone(
    variable: str | None, argument: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv("MAXVA_BACKEND", raising=False)
    else:
        monkeypatch.setenv("MAXVA_BACKEND", variable)
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    assert ("maxva::update_" in operators_of(FusedMAdam([p], backend=argument))) == fused


@pytest.mark.parametrize("variable", ["nonsense", "cuda"])
def test_bad_variable_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if maxva_kernels.backends().get(variable) == "available":
        pytest.skip("the backend is available here, and serves another device")
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = FusedMAdam([p])
    monkeypatch.setenv("MAXVA_BACKEND", variable)
    with pytest.raises((ValueError, RuntimeError), match=variable):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert not opt.state.get(p)
    monkeypatch.delenv("MAXVA_BACKEND")
    opt.step()


def test_reference_classes_ignore_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXVA_BACKEND", "cpu")
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    assert "maxva::update_" not in operators_of(MAdam([p]))
    with pytest.raises(TypeError):
        MAdam([p], backend="cpu")


@pytest.mark.parametrize("built_for", ["1.0.0", None], ids=["another_torch", "no_extension"])
def test_extension_that_cannot_be_used_is_explained(built_for: str | None) -> None:
    """A sentence and the eager backend, not an undefined symbol."""
    script = f"""
import sys, types
build_info = None  # importing it then fails
if {built_for!r}:
    build_info = types.ModuleType("maxva_kernels._build_info")
    build_info.TORCH_VERSION, build_info.CUDA_VERSION = {built_for!r}, None
sys.modules["maxva_kernels._build_info"] = build_info
import torch, maxva_kernels
why = maxva_kernels.backends()["cpu"]
assert "pip install" in why and ({built_for!r} or "no compiled extension") in why, why
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
maxva_kernels.FusedMAdam([p]).step()
assert (p < 1).all()
try:
    maxva_kernels.FusedMAdam([p], backend="cpu")
except RuntimeError as error:
    assert why in str(error)
else:
    raise AssertionError("backend='cpu' was accepted")
"""
    env = {k: v for k, v in os.environ.items() if k != "MAXVA_BACKEND"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("grown", [False, True], ids=["first_step", "new_parameter"])
def test_refused_capture_leaves_no_state(
    grown: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, params = two_groups(backend)
    if grown:
        new = params[1].grad
        params[1].grad = None
        opt.step()
        params[1].grad = new
    before, owners = snapshot(opt), set(opt.state)
    monkeypatch.setattr(maxva_kernels.optimizers, "_is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="Run a step before the capture"):
        opt.step()
    assert same_bits(before, snapshot(opt))
    assert set(opt.state) == owners


@pytest.mark.parametrize("seed", range(3))
def test_kernels_follow_the_reference_for_many_steps(
    seed: int, kernel: str, algorithm: str
) -> None:
    """In float64, over mixed options and gradients that come and go."""
    options = [
        {"weight_decay": 0.1, "nesterov": True},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.05, "adam_w_mode": False},
        {"trust_ratio": True, "weight_decay": 0.02, "max_grad_norm": 1.0, "skip_nonfinite": True},
    ][seed]
    problem = realistic_problem([(33, 7), (4,)], algorithm, dtype=torch.float64, **options)
    opts = [problem.optimizer(kernel), problem.optimizer()]
    generator = torch.Generator().manual_seed(seed)
    for t in range(20):
        grads = [heavy_tailed(p.shape, generator, t).double() for p in problem.theta]
        if t % 5 == 3 and options.get("skip_nonfinite"):
            grads[0][0, 0] = INF
        for opt in opts:
            for i, (p, g) in enumerate(zip(params_of(opt), grads, strict=True)):
                p.grad = None if (t + i) % 4 == 0 else g.clone()
            opt.step()
    for p, q in zip(*(params_of(opt) for opt in opts), strict=True):
        np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
        for key in KEYS.values():
            if key in opts[0].state[p] and key != "maxva_weight":
                torch.testing.assert_close(
                    opts[0].state[p][key], opts[1].state[q][key], rtol=1e-7, atol=1e-9
                )
    assert opts[0].param_groups[0]["step"] == opts[1].param_groups[0]["step"]


# --- what is not a plain, finite tensor ----------------------------------------------------------


def test_infinite_parameter_without_decay_does_not_reach_the_states(
    backend: str, algorithm: str
) -> None:
    p = Parameter(torch.tensor([-INF, INF, 1.0]))
    opt = FUSED[algorithm]([p], weight_decay=0.0, adam_w_mode=False, backend=backend)
    p.grad = torch.zeros(3)
    for _ in range(3):
        opt.step()
    assert all(torch.isfinite(x).all() for x in opt.state[p].values())


def test_tensor_made_of_tensors_is_refused_by_kernels(kernel: str) -> None:
    """The operator would be called once for each of them, and count two steps."""
    p = Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(TypeError, match=r"parameter 0 of its group.*TwoTensor.*backend='eager'"):
        FusedMAdam([p], backend=kernel)
    opt = FusedMAdam([p], backend="eager")
    p.grad = TwoTensor(torch.ones(2), torch.ones(2))
    opt.step()
    assert opt.state[p]["step"].item() == 1


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch before 2.13 allows no other")
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_gradient_of_another_kind_is_refused_by_name(dtype: torch.dtype, backend: str) -> None:
    p = Parameter(torch.ones(3))
    opt = FusedMAdam([("head", p)], backend=backend)
    p.grad = torch.ones(3)
    opt.step()
    before = snapshot(opt)
    p.grad_dtype = None
    p.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"'head'.*gradient is {dtype}"):
        opt.step()
    p.grad = torch.ones(3)
    assert same_bits(snapshot(opt)["states"], before["states"])


CHANGES = {
    "another shape": (lambda x: torch.ones(4, 2), r"exp_avg has shape \(2, 2\)"),
    "another precision": (lambda x: x.double(), r"float64 on cpu: its exp_avg .* torch.float32"),
    "expanded": (lambda x: torch.ones(2).expand(2, 2), "is expanded"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_parameter_that_no_longer_fits_its_state_is_named(kind: str, backend: str) -> None:
    change, message = CHANGES[kind]
    params = [Parameter(torch.ones(2, 2)) for _ in range(3)]
    opt = FusedMAdam([("a", params[0]), ("b", params[1]), ("head", params[2])], backend=backend)
    for p in params:
        p.grad = torch.ones(2, 2)
    opt.step()
    params[0].grad = None
    head = params[2]
    head.grad = None
    head.data = change(head.data)
    head.grad = torch.ones_like(head.data)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=f"'head'.*{message}"):
        opt.step()
    assert same_bits(snapshot(opt), before)


MISFITS: dict[str, tuple[str, Any]] = {
    "master weight": ("master_param", lambda x: x[:1]),
    "maximum": ("max_exp_avg_sq", lambda x: x[:1]),
    "words": ("maxva_packed", lambda x: x[:1]),
    "maximum of words": ("maxva_packed_max", lambda x: x[:1]),
    "device": ("exp_avg", lambda x: x.to("meta")),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_state_that_no_longer_fits_its_parameter_is_named(kind: str, backend: str) -> None:
    key, change = MISFITS[kind]
    state_dtype = "int8" if key.startswith("maxva_packed") else "float32"
    params = [Parameter(torch.ones(4, 256).bfloat16()) for _ in range(2)]
    opt = FusedMAdam(
        [("a", params[0]), ("head", params[1])],
        amsgrad=True, master_weights=True, state_dtype=state_dtype, fp32_state_below=0,
        backend=backend,
    )  # fmt: skip
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = params[0].detach().clone()
    opt.state[params[1]][key] = change(opt.state[params[1]][key])
    with pytest.raises(ValueError, match=f"'head'.*{key if kind != 'words' else ''}"):
        opt.step()
    assert same_bits(params[0].detach(), before)


def test_parameter_made_in_inference_mode_is_moved(kernel: str) -> None:
    """It has no version to count up."""
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
    opt = FusedMAdam([p], lr=0.1, backend=kernel)
    opt.step()
    torch.testing.assert_close(p, torch.full((3,), 0.9), rtol=0, atol=1e-5)


def test_dimension_of_one_element_may_have_stride_0(backend: str) -> None:
    """It shares no memory: torch.expand makes such ones."""
    p = Parameter(torch.ones(6).as_strided((1, 3, 2), (0, 1, 3)))
    opt = FusedMAdam([p], lr=0.1, backend=backend)
    p.grad = torch.ones(6).as_strided((1, 3, 2), (0, 1, 3))
    opt.grad_scale = torch.tensor(1.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((1, 3, 2), 0.9), rtol=0, atol=1e-5)


# --- schedulers ----------------------------------------------------------------------------------


def test_schedule_that_is_rounded_to_below_zero_ends_at_zero(backend: str) -> None:
    p = Parameter(torch.ones(3))
    opt = FusedMAdam([p], lr=1e-3, backend=backend)
    schedule = lr_scheduler.LinearLR(opt, start_factor=0.1, end_factor=0.0, total_iters=10)
    p.grad = torch.ones(3)
    for _ in range(10):
        opt.step()
        schedule.step()
    assert -1e-12 < opt.param_groups[0]["lr"] < 0
    before = p.detach().clone()
    opt.step()
    assert same_bits(p.detach(), before)
    assert opt.state[p]["step"].item() == 11
    other = FusedMAdam([p], backend=backend)
    other.load_state_dict(opt.state_dict())
    other.step()
    assert same_bits(p.detach(), before)
    # unfrozen later, with the others' lr
    lr = opt.param_groups[0]["lr"]
    for value in (lr, torch.tensor(lr)):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "lr": value})
    opt.param_groups[0]["lr"] = -1e-9
    with pytest.raises(ValueError, match="lr"):
        opt.step()


def test_lr_that_is_rounded_to_below_zero_moves_not_even_zeros(backend: str) -> None:
    p = Parameter(torch.tensor([0.0, -0.0, 1e-20]))
    before = p.detach().clone()
    opt = FusedMAdam([p], weight_decay=0.1, backend=backend)
    opt.param_groups[0]["lr"] = -1e-13
    p.grad = torch.ones(3)
    opt.step()
    assert same_bits(p.detach(), before)
