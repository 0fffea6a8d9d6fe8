"""What torch expects of an operator and of an optimizer: opcheck, compile, profiler, AMP, SWA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing._internal.optests import opcheck

from maxva_kernels import FusedLaMAdam, FusedMAdam, backends
from maxva_kernels.batch import CONTROL_FIELDS
from maxva_kernels.hyper import ROW

pytestmark = pytest.mark.skipif(
    backends()["cpu"] != "available", reason=f"cpu backend: {backends()['cpu']}"
)


def update_arguments(phase=0, amsgrad=False, master=False, scaled=False):
    """Arguments of torch.ops.maxva.update_ for two parameters in two groups."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if master else torch.float32

    def rand(dtype=torch.float32):
        return [torch.rand(n, generator=generator).to(dtype) for n in (5, 130)]

    theta, g, m, u = rand(dtype), rand(dtype), rand(), rand()
    v, w = rand(), rand()
    row = dict.fromkeys(ROW, 0.0) | {"alpha": 0.9, "beta_low": 0.5, "beta_high": 0.999}
    row |= {"beta_init": 0.999, "eps": 1e-8, "delta": 1e-16, "bias_correction": 1.0}
    control = torch.zeros(CONTROL_FIELDS, dtype=torch.float64)
    control[1] = 1.0
    return (
        theta, g, m, u, v, w,
        rand() if amsgrad else [],
        [p.float() for p in theta] if master else [],
        [torch.zeros(()) for _ in range(2)],
        [],
        [1, 1],
        [0.01, *row.values()] * 2,
        [None, torch.tensor(0.5)],
        control,
        torch.tensor(2.0) if scaled else None,
        torch.ones(2, 2, dtype=torch.float64) if phase else None,
        "madam",
        phase,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"master": True}, {"scaled": True}, {"phase": 1}, {"phase": 2}],
    ids=str,
)
def test_opcheck_update(options):
    opcheck(torch.ops.maxva.update_.default, update_arguments(**options))


def test_opcheck_norm_and_control():
    g = [torch.rand(5), torch.rand(2, 3)]
    opcheck(torch.ops.maxva.sum_of_squares.default, (g,))
    control = torch.empty(CONTROL_FIELDS, dtype=torch.float64)
    total = torch.ones(1, dtype=torch.float64)
    found_inf, scale = torch.tensor(0.0), torch.tensor(4.0)
    arguments = (control, total, scale, found_inf, 1.0, True)
    opcheck(torch.ops.maxva.write_control_.default, arguments)


def small_net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )  # fmt: skip


def training_step(net, optimizer, x):
    optimizer.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("cls", [FusedMAdam, FusedLaMAdam])
def test_a_compiled_training_step_does_not_recompile_as_lr_changes(cls):
    torch._dynamo.reset()
    lr = torch.tensor(1e-2, dtype=torch.float64)
    net, eager_net = small_net(), small_net()
    optimizer = cls(net.parameters(), lr=lr.clone(), max_grad_norm=1.0)
    eager_optimizer = cls(eager_net.parameters(), lr=lr.clone(), max_grad_norm=1.0)
    x = torch.randn(4, 8)
    compiled = torch.compile(training_step, backend="aot_eager")
    graphs = []
    torch._dynamo.utils.counters.clear()
    for k in range(12):
        for opt in (optimizer, eager_optimizer):
            opt.param_groups[0]["lr"].fill_(1e-2 / (k + 1))
        loss = compiled(net, optimizer, x)
        assert torch.equal(loss, training_step(eager_net, eager_optimizer, x))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # the first two steps differ in kind: states are created, then exist
    assert graphs[2:] == [graphs[2]] * 10
    assert graphs[-1] > 0
    for p, q in zip(net.parameters(), eager_net.parameters(), strict=True):
        assert torch.equal(p, q)
    torch._dynamo.reset()


def test_the_profiler_shows_the_step_and_its_operators():
    net = small_net()
    optimizer = FusedMAdam(net.parameters(), max_grad_norm=1.0)
    x = torch.randn(4, 8)
    with torch.profiler.profile() as profile:
        training_step(net, optimizer, x)
    names = {event.key for event in profile.key_averages()}
    wanted = {"maxva::update_", "maxva::sum_of_squares", "maxva::write_control_"}
    assert wanted | {"Optimizer.step#FusedMAdam.step"} <= names


def test_version_counters_of_all_that_is_written_move():
    net = small_net()
    optimizer = FusedMAdam(net.parameters())
    x = torch.randn(4, 8)
    training_step(net, optimizer, x)
    p = next(net.parameters())
    written = [p, *optimizer.state[p].values()]
    before = [tensor._version for tensor in written]
    grad_before = p.grad._version
    optimizer.step()
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    assert p.grad._version == grad_before


def test_backward_through_a_stale_parameter_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedMAdam([p])
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [FusedMAdam, FusedLaMAdam])
def test_training_under_grad_scaler_agrees_with_training_without(cls, dtype):
    """But for what the scale saves from underflow in the low-precision backward."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10_000)
    net, plain_net = small_net(), small_net()
    optimizer = cls(net.parameters(), lr=1e-2, max_grad_norm=0.5)
    plain = cls(plain_net.parameters(), lr=1e-2, max_grad_norm=0.5)
    x = torch.randn(4, 8)
    for _ in range(5):
        for this_net, opt, scale in ((net, optimizer, True), (plain_net, plain, False)):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = this_net(x).float().square().mean()
            if scale:
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
            else:
                loss.backward()
                opt.step()
        for p, q in zip(net.parameters(), plain_net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=1e-7)
            torch.testing.assert_close(p, q, rtol=0, atol=2e-4)


def test_overflow_at_the_first_step_with_two_groups_counts_nothing():
    net = small_net()
    first, second = net[0].parameters(), net[2].parameters()
    optimizer = FusedMAdam([{"params": list(first)}, {"params": list(second), "lr": 0.1}])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 8)
    scaler.scale(net(x).square().mean()).backward()
    next(net.parameters()).grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**13
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    for p in net.parameters():
        assert all(not value.any() for value in optimizer.state[p].values())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    optimizer.zero_grad()
    scaler.scale(net(x).square().mean()).backward()
    scaler.step(optimizer)
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]


def test_averaged_model_and_swalr():
    net = small_net()
    optimizer = FusedMAdam(net.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    x = torch.randn(4, 8)
    seen = []
    for _ in range(3):
        training_step(net, optimizer, x)
        averaged.update_parameters(net)
        seen.append(next(net.parameters()).detach().clone())
        schedule.step()
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(next(averaged.parameters()), mean)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
