"""What torch expects of an operator and of an optimizer: opcheck, compile, profiler, AMP, SWA."""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections import deque

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.optests import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from maxva_kernels import FusedLaMAdam, FusedMAdam, _extension, backends
from maxva_kernels.batch import CONTROL_FIELDS, Statistic
from maxva_kernels.hyper import ROW

pytestmark = pytest.mark.skipif(
    backends()["cpu"] != "available", reason=f"cpu backend: {backends()['cpu']}"
)


def update_arguments(
    phase=0, amsgrad=False, master=False, scaled=False, statistics=False, rounded=False
):
    """Arguments of torch.ops.maxva.update_ for two parameters in two groups."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if master or rounded else torch.float32

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
        torch.zeros(2, len(Statistic), dtype=torch.float64) if statistics else None,
        [x for p in range(2) for x in (7, p, 0, 1, 1, 1)] if rounded else [],
        "madam",
        phase,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {}, {"amsgrad": True}, {"master": True}, {"scaled": True}, {"phase": 1}, {"phase": 2},
        {"statistics": True}, {"rounded": True},
    ],
    ids=str,
)  # fmt: skip
def test_opcheck_update(options):
    opcheck(torch.ops.maxva.update_.default, update_arguments(**options))


@pytest.mark.parametrize("word_dtype", [torch.int32, torch.int64], ids=str)
def test_opcheck_update_packed(word_dtype):
    row = dict.fromkeys(ROW, 0.0) | {"alpha": 0.9, "beta_low": 0.5, "beta_high": 0.999}
    row |= {"beta_init": 0.999, "eps": 1e-8, "delta": 1e-16, "bias_correction": 1.0}
    shapes = [(2, 130), (1, 128)]
    maximum = {torch.int32: torch.uint8, torch.int64: torch.bfloat16}[word_dtype]
    arguments = (
        [torch.rand(shape) for shape in shapes],
        [torch.rand(shape) for shape in shapes],
        [torch.zeros(shape, dtype=word_dtype) for shape in shapes],
        [torch.zeros(n, -(-row // 128), dtype=torch.int32) for n, row in shapes]
        if word_dtype == torch.int32
        else [],
        [torch.zeros(shape, dtype=maximum) for shape in shapes],
        [],
        [torch.zeros(()) for _ in shapes],
        [],
        [2],
        [0.01, *row.values()],
        [None],
        None,
        None,
        None,
        None,
        [7, 0, 0, 260, 260, 0, 7, 1, 0, 128, 128, 0],
        "madam",
        0,
    )
    opcheck(torch.ops.maxva.update_packed_.default, arguments)


def test_opcheck_norm_and_control():
    g = [torch.rand(5), torch.rand(2, 3)]
    opcheck(torch.ops.maxva.sum_of_squares.default, (g,))
    control = torch.empty(CONTROL_FIELDS, dtype=torch.float64)
    total = torch.ones(1, dtype=torch.float64)
    found_inf, scale = torch.tensor(0.0), torch.tensor(4.0)
    arguments = (control, total, scale, found_inf, 1.0, True)
    opcheck(torch.ops.maxva.write_control_.default, arguments)


def test_every_operator_has_been_checked():
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("maxva::")}
    checked = "update_", "update_packed_", "sum_of_squares", "write_control_"
    assert registered == {f"maxva::{name}" for name in checked}


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"scaled": True}, {"rounded": True}], ids=str
)
def test_the_extension_calls_the_operator(options):
    ours, theirs = update_arguments(**options), update_arguments(**options)
    ours[0][0].requires_grad_()  # of which nothing is recorded
    versions = [p._version for p in ours[0]]
    _extension.operators.update_(*ours, False)
    torch.ops.maxva.update_(*theirs)
    for mine, reference in zip(ours[:9], theirs[:9], strict=True):
        assert len(mine) == len(reference)
        assert all(map(torch.equal, mine, reference))
    assert [p._version for p in ours[0]] == [version + 1 for version in versions]


def test_the_extension_calls_through_the_dispatcher():
    seen = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    arguments = update_arguments()
    with Recorded():
        _extension.operators.update_(*arguments, False)
        total = _extension.operators.sum_of_squares(arguments[1])
    assert seen == ["maxva.update_.default", "maxva.sum_of_squares.default"]
    assert torch.equal(total, torch.ops.maxva.sum_of_squares(arguments[1]))
    with torch.profiler.profile() as profile:
        _extension.operators.sum_of_squares(arguments[1])
    assert "maxva::sum_of_squares" in [event.name for event in profile.events()]


def test_the_extension_refuses_as_the_operator_does():
    for change, place in ((lambda g: [g[0]], 1), (lambda m: [m[0].half(), m[1]], 2)):
        arguments = list(update_arguments())
        arguments[place] = change(arguments[place])
        raised = []
        for operators in (_extension.operators, torch.ops.maxva):
            with pytest.raises((TypeError, ValueError)) as found:
                operators.update_(*arguments, False)
            raised.append((type(found.value), str(found.value)))
        assert raised[0] == raised[1]


@pytest.mark.parametrize("wrong", [None, 1.0, "theta"])
def test_the_extension_takes_tensors_alone(wrong):
    arguments = list(update_arguments())
    arguments[3] = [arguments[3][0], wrong]
    before = [p.clone() for p in arguments[0]]
    message = re.escape(f"maxva: u[1] is no tensor but a {type(wrong).__name__}")
    with pytest.raises(TypeError, match=message):
        _extension.operators.update_(*arguments, False)
    with pytest.raises(TypeError, match="not iterable"):
        _extension.operators.sum_of_squares(None)
    assert all(map(torch.equal, arguments[0], before))
    g = arguments[1]
    totals = [_extension.operators.sum_of_squares(kind(g)) for kind in (list, tuple, deque, iter)]
    assert all(torch.equal(total, totals[0]) for total in totals)


def test_the_extension_records_no_gradients():
    arguments = list(update_arguments())
    leaf = torch.rand(10, requires_grad=True)
    theta = leaf.detach()[::2].requires_grad_()  # goes through a temporary
    for place, tensors in enumerate(arguments[:8]):
        arguments[place] = [t[:5] for t in tensors]
    arguments[0] = [theta, arguments[0][1]]
    before = theta.clone()
    _extension.operators.update_(*arguments, False)
    assert not torch.equal(theta, before)
    assert theta.is_leaf
    assert not _extension.operators.sum_of_squares([leaf]).requires_grad


def test_a_list_may_be_changed_during_the_call():
    """By another thread, as the GIL is released: the tensors live on."""
    tensors = [torch.ones(500_000) for _ in range(40)]
    expected = _extension.operators.sum_of_squares(tensors)
    called = threading.Event()

    def empty():
        called.wait()
        tensors.clear()

    thread = threading.Thread(target=empty)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the thread gets the GIL when the operator releases it, not before
    try:
        called.set()
        total = _extension.operators.sum_of_squares(tensors)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert not tensors
    assert torch.equal(total, expected)


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


LR_CHANGES = {
    "float": lambda group, lr: group.update(lr=lr),
    "filled": lambda group, lr: group["lr"].fill_(lr),
    "rebound": lambda group, lr: group.update(lr=torch.tensor(lr, dtype=torch.float64)),
}


@pytest.mark.parametrize("compiled_part", ["training step", "optimizer step"])
@pytest.mark.parametrize("lr_change", LR_CHANGES)
@pytest.mark.parametrize("cls", [FusedMAdam, FusedLaMAdam])
def test_compiled_training_does_not_recompile_as_lr_changes(cls, lr_change, compiled_part):
    """The update itself is not traced, so it adds no graph, guard or recompilation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lr = 1e-2 if lr_change == "float" else torch.tensor(1e-2, dtype=torch.float64)
    net, eager_net = small_net(), small_net()
    optimizer = cls(net.parameters(), lr=copy.copy(lr), max_grad_norm=1.0)
    eager_optimizer = cls(eager_net.parameters(), lr=copy.copy(lr), max_grad_norm=1.0)
    x = torch.randn(4, 8)
    step = training_step
    if compiled_part == "training step":
        step = torch.compile(training_step, backend="aot_eager")
    else:
        optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
    counts = []
    for k in range(11):
        for opt in (optimizer, eager_optimizer):
            LR_CHANGES[lr_change](opt.param_groups[0], 1e-2 / (k + 1))
        loss = step(net, optimizer, x)
        assert torch.equal(loss, training_step(eager_net, eager_optimizer, x))
        stats = torch._dynamo.utils.counters["stats"]
        counts.append((stats["unique_graphs"], torch._dynamo.utils.counters["frames"]["ok"]))
    assert counts == [counts[0]] * 11
    # forward and loss make one graph; frames were looked at, so that compilation was on
    assert counts[0][0] == (1 if compiled_part == "training step" else 0)
    assert counts[0][1] > 0
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


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0, "skip_nonfinite": True},
        {"state_dtype": "int8", "amsgrad": True},
        {"trust_ratio": True, "collect_stats": True},
        {"lr": torch.tensor(1e-3)},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_memory_can_be_estimated_without_memory(backend, options):
    def trained(tracker):
        model = torch.nn.Sequential(torch.nn.Linear(256, 300), torch.nn.Linear(300, 256))
        optimizer = FusedMAdam(model.parameters(), backend=backend, **options)
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                model(torch.ones(4, 256)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        return optimizer

    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):  # a tensor lr is none
        estimated = trained(tracker)
    actual = trained(MemTracker())
    assert estimated.param_groups[0]["step"] == actual.param_groups[0]["step"] == 2
    assert estimated.state_memory() == actual.state_memory()
    if backend == "cpu":  # but for a tensor lr and the sums of collect_stats
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        assert 0 <= peak["Optstate"] - actual.state_memory()["total"] < 1024


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
    assert optimizer.state[next(net.parameters())]["step"] == 3


def test_swalr_fills_a_tensor_lr():
    optimizer = FusedMAdam(small_net().parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    lr = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=1)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.01)


def test_update_bn_after_averaging():
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = FusedMAdam(net.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    data = [torch.randn(16, 8) for _ in range(3)]
    for x in data:
        training_step(net, optimizer, x)
        averaged.update_parameters(net)
    torch.optim.swa_utils.update_bn(data, averaged)
    with torch.no_grad():
        means = torch.stack([averaged.module[0](x).mean(0) for x in data]).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, means)


def test_hooks_of_all_optimizers_and_of_one():
    """In torch's order: global, own, step, own, global."""
    net = small_net()
    optimizer = FusedMAdam(net.parameters())
    seen = []

    def hook(name):
        return lambda *_: seen.append((name, optimizer.param_groups[0]["step"]))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
    ]
    training_step(net, optimizer, torch.randn(4, 8))
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == [("global pre", 0), ("pre", 0), ("post", 1), ("global post", 1)]


@pytest.mark.parametrize(
    "parametrized",
    [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal],
)
@pytest.mark.parametrize("cls", [FusedMAdam, FusedLaMAdam])
def test_parametrized_weights_are_trained(cls, parametrized):
    """What is updated lies under the weight, which is made from it anew."""
    results = []
    for backend in ("cpu", "eager"):
        torch.manual_seed(0)
        layer = parametrized(torch.nn.Linear(8, 4))
        start = layer.weight.detach().clone()
        optimizer = cls(layer.parameters(), lr=1e-2, backend=backend)
        x = torch.randn(5, 8)
        losses = [float(training_step(layer, optimizer, x).detach()) for _ in range(5)]
        assert losses[-1] < losses[0]
        assert not torch.equal(layer.weight, start)
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_one_optimizer_per_parameter_inside_backward():
    """As gradients arrive, each is used and freed; the same bits as one optimizer afterwards."""
    net, together_net = small_net(), small_net()
    together = FusedMAdam(together_net.parameters(), lr=1e-2)
    optimizers = {p: FusedMAdam([p], lr=1e-2) for p in net.parameters()}

    def use_gradient(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(use_gradient)
    for seed in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        net(x).square().mean().backward()
        assert all(p.grad is None for p in net.parameters())
        training_step(together_net, together, x)
    for p, q in zip(net.parameters(), together_net.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizers[p].state[p]["step"] == 3


def test_gradients_from_torch_func():
    net, usual_net = small_net(), small_net()
    optimizer = FusedMAdam(net.parameters(), lr=1e-2)
    usual = FusedMAdam(usual_net.parameters(), lr=1e-2)
    x = torch.randn(4, 8)

    def loss(params):
        return torch.func.functional_call(net, params, (x,)).square().mean()

    for _ in range(3):
        params = dict(net.named_parameters())
        for name, g in torch.func.grad(loss)(params).items():
            params[name].grad = g
        optimizer.step()
        training_step(usual_net, usual, x)
    for p, q in zip(net.parameters(), usual_net.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master_weights", [True, False])
def test_low_precision_parameters_under_grad_scaler(master_weights, dtype):
    """Low-precision gradients cannot be unscaled first, so the step has to do it, once."""
    net = small_net().to(dtype)
    plain_net = copy.deepcopy(net)
    options = {"lr": 1e-2, "max_grad_norm": 0.5, "master_weights": master_weights}
    optimizer = FusedMAdam(net.parameters(), **options)
    plain = FusedMAdam(plain_net.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10_000)
    params, plain_params = list(net.parameters()), list(plain_net.parameters())
    for t in range(5):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(params, plain_params, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(dtype)
            p.grad = q.grad * 64.0  # exact: a power of two, far from the largest float16
        scaler.scale(torch.zeros(()))  # makes the scale, as a backward pass would
        before = copy.deepcopy(params)
        if t == 2:
            params[1].grad[3] = float("inf")
        scaler.step(optimizer)
        if t == 2:
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        else:
            plain.step()
            for p, q in zip(params, plain_params, strict=True):
                assert torch.equal(p, q)
                assert torch.equal(p.grad, q.grad)
        scaler.update(64.0)  # on its own it would halve the scale after the overflow
    assert optimizer.param_groups[0]["step"] == 4
    assert ("master_param" in optimizer.state[params[0]]) == master_weights


def test_unscaling_by_the_user_is_not_repeated():
    net, plain_net = small_net(), small_net()
    optimizer = FusedMAdam(net.parameters(), lr=1e-2, max_grad_norm=0.05)
    plain = FusedMAdam(plain_net.parameters(), lr=1e-2, max_grad_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 8)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(net(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(optimizer, None)  # as accelerate calls it, with an empty closure
        scaler.update()
        plain.zero_grad()
        plain_net(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain_net.parameters(), 0.5)
        plain.step()
    for p, q in zip(net.parameters(), plain_net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_closure_under_grad_scaler_sees_the_same_step():
    """Torch refuses the keyword; a positional closure is called, before gradients are read."""
    net, plain_net = small_net(), small_net()
    optimizer, plain = FusedMAdam(net.parameters()), FusedMAdam(plain_net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.randn(4, 8)
    scaler.scale(net(x).square().mean()).backward()

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        scaler.scale(loss).backward()
        return loss

    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=closure)
    loss = scaler.step(optimizer, closure)
    assert torch.equal(loss, training_step(plain_net, plain, x))
    for p, q in zip(net.parameters(), plain_net.parameters(), strict=True):
        assert torch.equal(p, q)
