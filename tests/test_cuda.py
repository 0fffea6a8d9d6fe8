"""The CUDA backend on a GPU: exactness, launches, graphs, plans. The maths is test_kernels.py's."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from definition import Coordinates, Definition
from torch import Tensor

import maxva_kernels
from maxva_kernels import FusedLaMAdam, FusedMAdam, LaMAdam, MAdam

REASON = maxva_kernels.backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON != "available", reason=f"backend 'cuda': {REASON}"),
]

CLASSES = {"madam": FusedMAdam, "lamadam": FusedLaMAdam}
EAGER = {"madam": MAdam, "lamadam": LaMAdam}
STATES = ("exp_avg", "maxva_avg", "exp_avg_sq", "maxva_weight", "max_exp_avg_sq", "master_param")
#: Empty tensors, tails, one chunk (8192) and one more, several chunks.
SIZES = (0, 1, 3, 4, 5, 1000, 8191, 8192, 8193, 0, 40000, 0)
#: Options under which one step is compared with float64 and with the CPU kernels.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "adam_w_mode": False},
    "amsgrad": {"amsgrad": True},
    "nesterov": {"nesterov": True, "weight_decay": 0.1},
    "maximize": {"maximize": True},
    "no-bias-correction": {"bias_correction": False},
    "eps-inside": {"eps_inside_sqrt": True},
    "clip": {"max_grad_norm": 0.5},
    "trust-ratio": {"trust_ratio": True, "weight_decay": 0.1},
}

#: Those without a norm, which the CPU adds up in another order.
ELEMENTWISE = {id: o for id, o in OPTIONS.items() if id not in ("clip", "trust-ratio")}


def make_params(
    device: str,
    sizes: tuple[int, ...] = SIZES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in sizes
    ]


def set_grads(
    params: list[torch.nn.Parameter], step: int = 0, dtype: torch.dtype | None = None
) -> None:
    """Gradients that depend on nothing but the step, in the same storage every time."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.device, dtype or p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, states and counters, on the CPU."""
    found = []
    for group in optimizer.param_groups:
        found.append(torch.as_tensor(group["step"]).reshape(()).cpu())
        for p in group["params"]:
            state = optimizer.state[p]
            found += [p.detach().cpu(), state["step"].cpu()]
            found += [state[key].cpu() for key in STATES if key in state]
    return found


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"tensor {i}: {m}"
        )


def launches(work: Callable[[], object]) -> list[str]:
    """Names of the kernels that `work` launches, and of its copies and fills."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        work()
        torch.cuda.synchronize()
    on_gpu = (e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    # the profiler also marks on the GPU's track which launches belong to a step
    return [name for name in on_gpu if not name.startswith("Optimizer.")]


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """Call it to make torch refuse every synchronisation from then on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_step_against_float64(algorithm: str, options: dict[str, Any]) -> None:
    """Theta and m: at most twice the float32 eager reference's error plus a floor."""
    sizes = (1, 5, 1000, 20000)
    fused_params, eager_params = make_params("cuda", sizes), make_params("cuda", sizes)
    fused = CLASSES[algorithm](fused_params, lr=1e-2, backend="cuda", **options)
    eager = EAGER[algorithm](eager_params, lr=1e-2, **options)
    for step in range(3):
        set_grads(eager_params, step)
        eager.step()
    # from the same state: what the eager reference has after three steps
    fused.load_state_dict(eager.state_dict())
    truth = []
    for p, q in zip(eager_params, fused_params, strict=True):
        q.data.copy_(p.data)
        state = eager.state[p]
        c = Coordinates.start(p.detach().cpu().numpy())
        c.m, c.u, c.v, c.w = (state[key].cpu().numpy().astype(np.float64) for key in STATES[:4])
        if "max_exp_avg_sq" in state:
            c.vmax = state["max_exp_avg_sq"].cpu().numpy().astype(np.float64)
        c.t = 3
        truth.append(c)
    for params, optimizer in ((fused_params, fused), (eager_params, eager)):
        set_grads(params, 3)
        optimizer.step()
    grads = [p.grad.cpu().numpy() for p in eager_params]
    Definition(algorithm, **options).step(truth, grads, lr=1e-2)
    for p, q, c in zip(fused_params, eager_params, truth, strict=True):
        for name, expected in (("theta", c.theta), ("m", c.m)):
            ours, theirs = (
                (x.detach() if name == "theta" else optimizer.state[x]["exp_avg"]).cpu().numpy()
                for x, optimizer in ((p, fused), (q, eager))
            )
            floor = 2**-23 * np.abs(expected).max()
            allowed = 2 * np.abs(theirs - expected).max() + floor
            assert np.abs(ours - expected).max() <= allowed, name


def _cpu_kernels_fuse() -> bool:
    fuses = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fuses and maxva_kernels.backends()["cpu"] == "available"


@pytest.mark.parametrize("options", ELEMENTWISE.values(), ids=ELEMENTWISE)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, True),
    ],
    ids=["f32", "f32-gbf16", "bf16", "bf16-gf32-master", "f16-master"],
)
def test_same_bits_as_the_cpu_kernels(
    algorithm: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    master: bool,
) -> None:
    if not _cpu_kernels_fuse():
        pytest.skip("the CPU has no fused multiply-add kernels to compare with")
    results = []
    for device in ("cpu", "cuda"):
        params = make_params(device, dtype=dtype)
        for p in params:
            if hasattr(p, "grad_dtype"):
                p.grad_dtype = None
            elif grad_dtype != dtype:
                pytest.skip("this torch has no gradients of another dtype")
        optimizer = CLASSES[algorithm](params, lr=1e-2, master_weights=master, **options)
        for step in range(4):
            set_grads(params, step, grad_dtype)
            optimizer.step()
        results.append(everything(optimizer))
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize(
    "options", [OPTIONS["trust-ratio"], OPTIONS["clip"]], ids=["trust-ratio", "clip"]
)
def test_norms_agree_with_the_cpu(algorithm: str, options: dict[str, Any]) -> None:
    results = []
    for device in ("cpu", "cuda"):
        params = make_params(device)
        optimizer = CLASSES[algorithm](params, lr=1e-2, **options)
        set_grads(params)
        optimizer.step()
        results.append(everything(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_misaligned_gradients_same_bits(algorithm: str, dtype: torch.dtype) -> None:
    """As DDP's bucket views: one flat buffer, each gradient where the last one ended."""
    results = []
    for shift in (None, 1, 2, 3):
        params = make_params("cuda", dtype=dtype)
        optimizer = CLASSES[algorithm](params, lr=1e-2, weight_decay=0.1)
        for step in range(3):
            set_grads(params, step)
            if shift is not None:
                bucket = torch.zeros(sum(SIZES) + shift, dtype=dtype, device="cuda")
                offset = shift
                for p in params:
                    view = bucket[offset : offset + p.numel()]
                    p.grad = view.copy_(p.grad)
                    offset += p.numel()
            optimizer.step()
        results.append(everything(optimizer))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_many_groups_and_dtypes_together(algorithm: str) -> None:
    """float32, bfloat16 with master, float16, float64 and 600 groups in one optimizer."""
    results = []
    for device in ("cpu", "cuda"):
        dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        groups = [
            {
                "params": make_params(device, (k % 7, 3), dtype=next(dtypes), seed=k),
                "lr": 1e-2 / (1 + k),
                "weight_decay": 0.1 * (k % 2),
                "master_weights": k % 3 == 0,
            }
            for k in range(600)
        ]
        optimizer = CLASSES[algorithm](groups)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        results.append(everything(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"skip_nonfinite": True}, OPTIONS["trust-ratio"]],
    ids=["found_inf", "own", "trust-ratio"],
)
def test_skipped_steps_change_nothing(algorithm: str, options: dict[str, Any]) -> None:
    params = make_params("cuda")
    optimizer = CLASSES[algorithm](params, lr=1e-2, amsgrad=True, **options)
    for taken in range(2):  # the very first step, and one after a step that was taken
        set_grads(params, taken)
        before = [p.detach().clone() for p in params]
        params[4].grad[2] = math.inf
        grads = [p.grad.clone() for p in params]
        if not options.get("skip_nonfinite"):
            optimizer.grad_scale = torch.tensor(2.0, device="cuda")
            optimizer.found_inf = torch.tensor(2.0, device="cuda")  # summed over devices
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None
        assert_same_bits([p.detach() for p in params], before)
        assert_same_bits([p.grad for p in params], grads)
        assert all(optimizer.state[p]["step"] == taken for p in params)
        assert optimizer.param_groups[0]["step"] == taken
        set_grads(params, 10)
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == taken + 1
        if taken == 0:
            twin_params = make_params("cuda")
            twin = CLASSES[algorithm](twin_params, lr=1e-2, amsgrad=True, **options)
            set_grads(twin_params, 10)
            twin.step()
            assert_same_bits(everything(optimizer), everything(twin))


def test_unscaled_gradients_are_written_back(algorithm: str) -> None:
    params, twin_params = make_params("cuda"), make_params("cuda")
    optimizer, twin = (CLASSES[algorithm](p, lr=1e-2) for p in (params, twin_params))
    set_grads(params)
    set_grads(twin_params)
    for p in params:
        p.grad *= 1024
    optimizer.grad_scale = torch.tensor(1024.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    optimizer.step()
    twin.step()
    assert_same_bits(everything(optimizer), everything(twin))
    assert_same_bits([p.grad for p in params], [p.grad for p in twin_params])


def bert_large_like() -> tuple[int, ...]:
    """398 tensors with BERT-Large's number of tensors, small ones in place of its matrices."""
    return tuple(64 * (1 + k % 50) for k in range(398))


@pytest.mark.parametrize("groups", [2, 398])
def test_launches_of_a_step(groups: int) -> None:
    params = make_params("cuda", bert_large_like())
    optimizer = FusedMAdam(
        [{"params": params[k::groups], "weight_decay": 0.01 * k} for k in range(groups)],
        max_grad_norm=1.0,
    )
    set_grads(params)
    for _ in range(3):
        optimizer.step()
    names = launches(optimizer.step)
    assert len([name for name in names if "update_kernel" in name]) == 1
    assert len(names) <= 4, names


def test_launches_for_many_tiny_tensors() -> None:
    params = make_params("cuda", (3,) * 20000)
    optimizer = FusedMAdam(params)
    set_grads(params)
    optimizer.step()
    names = launches(optimizer.step)
    assert len([name for name in names if "update_kernel" in name]) == 7
    assert len(names) == 8, names
    expected = make_params("cpu", (3,) * 20000)
    twin = FusedMAdam(expected)
    set_grads(expected)
    twin.step()
    twin.step()
    for p, q in zip(params[::997], expected[::997], strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0, "skip_nonfinite": True},
        {"trust_ratio": True},
        {"capturable": True},
        {"collect_stats": True, "skip_nonfinite": True},
    ],
    ids=["plain", "norm", "trust", "capturable", "statistics"],
)
def test_no_synchronisation(
    algorithm: str, options: dict[str, Any], no_sync: Callable[[], None]
) -> None:
    params = make_params("cuda")
    optimizer = CLASSES[algorithm](params, weight_decay=0.1, **options)
    set_grads(params)
    optimizer.grad_scale = torch.tensor(2.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    no_sync()
    for _ in range(3):
        optimizer.step()


def _captured(optimizer: torch.optim.Optimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5}, {"trust_ratio": True, "weight_decay": 0.1}, {"amsgrad": True}],
    ids=["plain", "norm", "trust", "amsgrad"],
)
@pytest.mark.parametrize("lr_changes", ["in-place", "rebound"])
def test_graph_equals_uncaptured(algorithm: str, options: dict[str, Any], lr_changes: str) -> None:
    results = []
    for captured in (False, True):
        params = make_params("cuda")
        optimizer = CLASSES[algorithm](params, lr=1e-2, capturable=captured, **options)
        optimizer.grad_scale = torch.tensor(4.0, device="cuda")
        optimizer.found_inf = found_inf = torch.zeros((), device="cuda")
        group = optimizer.param_groups[0]
        graph = None
        for step in range(8):
            lr = 1e-2 / (1 + step)
            if not captured:
                group["lr"] = lr
            elif lr_changes == "in-place" or step not in (0, 2, 5):
                group["lr"].fill_(lr)
            else:  # a new tensor: the graph is captured again
                group["lr"], graph = torch.tensor(lr, dtype=torch.float64, device="cuda"), None
            found_inf.fill_(float(step == 4))
            set_grads(params, step)
            if captured and step >= 2:
                if graph is None:
                    before = [x.clone() for x in (*params, *(p.grad for p in params))]
                    graph = _captured(optimizer)  # records, runs nothing
                    assert_same_bits([*params, *(p.grad for p in params)], before)
                graph.replay()
            else:
                optimizer.step()
        results.append(everything(optimizer))
        assert group["step"] == 7
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("options", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_stochastic_rounding_same_bits_as_the_cpu(algorithm: str, options: dict[str, Any]) -> None:
    results = []
    for device in ("cuda", "cpu"):
        params = make_params(device, dtype=torch.bfloat16)
        optimizer = CLASSES[algorithm](
            params, lr=1e-3, stochastic_rounding=True, rounding_seed=2**40 + 1, **options
        )
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results.append(everything(optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_statistics(algorithm: str, options: dict[str, Any]) -> None:
    """As the CPU's; and collecting them changes no bit."""
    results, told = [], []
    for device, collect in (("cuda", True), ("cuda", False), ("cpu", True)):
        params = make_params(device)
        optimizer = CLASSES[algorithm](params, beta_min=0.99, collect_stats=collect, **options)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results.append(everything(optimizer))
        if collect:
            told += optimizer.stats()
    assert_same_bits(results[0], results[1])
    for name, value in told[0].items():
        few = 1e-3 if name.startswith("share") else 0
        assert value == pytest.approx(told[1][name], rel=1e-4, abs=few), name


def test_statistics_of_nothing_but_empty_tensors() -> None:
    """As on a rank whose shards are all empty: sums of 0, which other ranks may add to theirs."""
    params = make_params("cuda", (0, 0))
    optimizer = FusedMAdam(params, collect_stats=True)
    set_grads(params)
    optimizer.step()
    assert not any(rows.isnan().any() for rows in optimizer._statistics._rows.values())


def test_capture_without_a_place_for_statistics_is_refused() -> None:
    params = make_params("cuda", (5, 7))
    optimizer = FusedMAdam(params, capturable=True)
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[0]["collect_stats"] = True
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"collect_stats.*before the capture"):
        _captured(optimizer)


def test_a_step_with_other_gradients_leaves_the_captured_statistics_alone() -> None:
    params = make_params("cuda", (5, 7))
    optimizer = FusedMAdam(params, capturable=True, collect_stats=True)
    set_grads(params)
    optimizer.step()
    graph = _captured(optimizer)
    params[1].grad, kept = None, params[1].grad
    optimizer.step()
    params[1].grad = kept
    graph.replay()
    squares = sum(p.grad.double().square().sum() for p in params)
    assert optimizer.stats()[0]["grad_norm"] == pytest.approx(squares.sqrt().item(), rel=1e-6)


def test_rounding_and_statistics_move_on_in_a_replayed_graph() -> None:
    results, told = [], []
    for captured in (False, True):
        params = make_params("cuda", dtype=torch.bfloat16)
        optimizer = FusedMAdam(
            params, capturable=True, stochastic_rounding=True, collect_stats=True
        )
        optimizer.found_inf = found_inf = torch.zeros((), device="cuda")
        graph = None
        for step in range(6):
            found_inf.fill_(float(step == 3))
            set_grads(params, step)
            if captured and step >= 2:
                graph = graph or _captured(optimizer)
                graph.replay()
            else:
                optimizer.step()
        results.append(everything(optimizer))
        told += optimizer.stats()
    assert_same_bits(*results)
    assert told[0] == told[1]
    assert told[0]["skipped_steps"] == 1


def test_capture_before_the_first_step_is_refused() -> None:
    params = make_params("cuda", (5,))
    optimizer = FusedMAdam(params, capturable=True)
    set_grads(params)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="Run a step before the capture"):
        _captured(optimizer)
    assert not optimizer.state[params[0]]


def test_capture_with_lr_on_the_cpu_is_refused() -> None:
    params = make_params("cuda", (5,))
    optimizer = FusedMAdam(params, capturable=True)
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(RuntimeError, match="lr is a CPU tensor"):
        _captured(optimizer)


def _swap_data(optimizer: Any, params: list[Any]) -> None:
    params[3].data = params[3].data.clone()


def _swap_all_data(optimizer: Any, params: list[Any]) -> None:
    for p in params:
        p.data = p.data.clone()


def _reload(optimizer: Any, params: list[Any]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _reuse_addresses(optimizer: Any, params: list[Any]) -> None:
    """Two states of the same size change places, so that only the order of addresses changes."""
    a, b = params[6], params[8]
    for key in STATES[:4]:
        x, y = optimizer.state[a][key], optimizer.state[b][key][:8191]
        kept = x.clone(), y.clone()
        optimizer.state[a][key] = y.copy_(kept[0])
        optimizer.state[b][key] = torch.cat([kept[1], optimizer.state[b][key][8191:]])


def _add_group(optimizer: Any, params: list[Any]) -> None:
    device = params[0].device.type
    added = make_params(device, (77, 0, 5), seed=9)
    params += added
    optimizer.add_param_group({"params": added, "weight_decay": 0.3})


def _other_decay(optimizer: Any, params: list[Any]) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)


def _new_gradients(optimizer: Any, params: list[Any]) -> None:
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "change",
    [_swap_data, _swap_all_data, _reload, _reuse_addresses, _add_group, _other_decay,
     _new_gradients],
)  # fmt: skip
def test_no_plan_is_ever_stale(change: Callable[[Any, list[Any]], None]) -> None:
    if not _cpu_kernels_fuse():
        pytest.skip("the CPU has no fused multiply-add kernels to compare with")
    results = []
    for device in ("cpu", "cuda"):
        params = make_params(device)
        optimizer = FusedMAdam(params, lr=1e-2, weight_decay=0.1)
        for step in range(6):
            if step == 3:
                change(optimizer, params)
            set_grads(params, step)
            optimizer.step()
        results.append(everything(optimizer))
    assert_same_bits(results[1], results[0])


def test_gradients_that_come_and_go() -> None:
    results = []
    for device in ("cpu", "cuda"):
        params = make_params(device)
        optimizer = FusedMAdam(params, lr=1e-2)
        for step in range(6):
            set_grads(params, step)
            for i, p in enumerate(params):
                if (i + step) % 3 == 0:
                    p.grad = None
            optimizer.step()
        set_grads(params, 6)
        optimizer.step()
        results.append(everything(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6, atol=1e-7)


def test_counters_loaded_onto_the_cpu_follow_their_parameters() -> None:
    """As ZeroRedundancyOptimizer leaves them."""
    params = make_params("cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    opt = FusedMAdam(params)
    opt.step()
    for p in params[1:]:
        opt.state[p]["step"] = opt.state[p]["step"].cpu()
    opt.step()
    for p in params:
        assert opt.state[p]["step"].device == p.device
        assert float(opt.state[p]["step"]) == 2


def test_two_streams() -> None:
    """Two optimizers of equal lists, each on its own stream, sharing nothing."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    optimizers = []
    for _ in streams:
        params = make_params("cuda", (100_000, 7, 8193))
        set_grads(params)
        optimizers.append(FusedMAdam(params, lr=1e-2, max_grad_norm=0.1))
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, optimizer in zip(streams, optimizers, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    assert_same_bits(everything(optimizers[0]), everything(optimizers[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_is_deterministic_and_right(dtype: torch.dtype) -> None:
    params = make_params("cuda", (*SIZES, 3_000_001), dtype=dtype)
    grads = [p.detach() for p in params]
    first = torch.ops.maxva.sum_of_squares(grads)
    for _ in range(20):
        assert torch.equal(torch.ops.maxva.sum_of_squares(grads), first)
    expected = sum(g.double().square().sum() for g in grads)
    torch.testing.assert_close(first[0], expected, rtol=1e-13, atol=0)
    for bad in (math.inf, -math.inf, math.nan):
        grads[10][39_999] = bad
        assert not torch.ops.maxva.sum_of_squares(grads).isfinite()


def test_norm_of_more_tensors_than_a_launch() -> None:
    grads = [torch.full((1 + k % 3,), 2.0, device="cuda") for k in range(7000)]
    expected = 4.0 * sum(g.numel() for g in grads)
    for _ in range(3):
        assert torch.ops.maxva.sum_of_squares(grads).item() == expected


def test_tensors_on_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [*make_params("cuda:0"), *make_params("cuda:1", seed=1)]
    twins = [*make_params("cuda:0"), *make_params("cuda:0", seed=1)]
    optimizer, twin = (FusedMAdam(p, lr=1e-2, max_grad_norm=0.5) for p in (params, twins))
    for step in range(3):
        for each in (params, twins):
            set_grads(each, step)
        optimizer.step()
        twin.step()
    for a, b in zip(everything(optimizer), everything(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 9000
    free, _ = torch.cuda.mem_get_info()
    if free < numel * (2 * 2 + 4 * 4) * 1.05:
        pytest.skip(f"needs {numel * 20 * 1.05 / 2**30:.0f} GiB of GPU memory")
    p = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    p.grad[2**31 :] = -1
    optimizer = FusedMAdam([p], lr=0.5, max_grad_norm=1e6)
    optimizer.step()
    # the first update of every coordinate is lr times the sign of its gradient
    assert bool((p.detach()[: 2**31] == 0.5).all())
    assert bool((p.detach()[2**31 :] == 1.5).all())
