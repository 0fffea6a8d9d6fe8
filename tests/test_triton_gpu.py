"""The Triton backend on a GPU: the rule, graphs, no waiting, tables, equality with CUDA."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from exactness import FUSED, Problem, realistic_problem
from torch.nn import Parameter

import maxva_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

SHAPES = [(33,), (0,), (4096,), (4097,), (3, 5000), (), (70001,)]
FLOATS = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decoupled_nesterov": {"weight_decay": 0.1, "nesterov": True},
    "l2_amsgrad": {"weight_decay": 0.125, "adam_w_mode": False, "amsgrad": True},
    "maximize_inside": {"maximize": True, "eps_inside_sqrt": True},
    "master": {"master_weights": True},
    "clipped": {"max_grad_norm": 0.5},
    "lamb": {"trust_ratio": True, "weight_decay": 0.01},
    "statistics": {"collect_stats": True},
}
STOCHASTIC: dict[str, Any] = {"stochastic_rounding": True, "rounding_seed": 2**40 + 3}


def on_gpu(problem: Problem, backend: str, misaligned: bool = False) -> torch.optim.Optimizer:
    """An optimizer of this problem with everything on the GPU."""
    params = [Parameter(theta.cuda()) for theta in problem.theta]
    for p, g in zip(params, problem.g, strict=True):
        p.grad_dtype = None
        storage = torch.empty(g.numel() + 1, dtype=g.dtype, device="cuda")
        p.grad = storage[int(misaligned) :][: g.numel()].view(g.shape).copy_(g)
    opt = FUSED[problem.algorithm](params, backend=backend, **problem.options)
    for p, state in zip(params, problem.states, strict=True):
        if state:
            opt.state[p] = {key: x.cuda() for key, x in state.items()}
    return opt


def everything(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters and states, on the CPU."""
    found = []
    for p in opt.param_groups[0]["params"]:
        found.append(p.detach().cpu())
        found += [x.cpu() for _, x in sorted(opt.state[p].items())]
    return found


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_close_to_the_cpu_kernels(
    options: dict[str, Any], dtype: torch.dtype, algorithm: str
) -> None:
    """The same bits where no norm is summed and alpha^t is rounded from float64 to float32."""
    problem = realistic_problem(SHAPES, algorithm, dtype=dtype, **options)
    gpu, cpu = on_gpu(problem, "triton"), problem.optimizer("cpu")
    gpu.step()
    cpu.step()
    summed = "max_grad_norm" in options or "trust_ratio" in options
    exact = dtype != torch.float64 and not summed
    rtol = 1e-10 if dtype == torch.float64 else 1e-2 if dtype.itemsize == 2 else 1e-3
    for ours, theirs in zip(everything(gpu), everything(cpu), strict=True):
        if exact:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.skipif(
    maxva_kernels.backends()["cuda"] != "available", reason="the CUDA backend is not built"
)
@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_bits_as_cuda(options: dict[str, Any], dtype: torch.dtype, algorithm: str) -> None:
    options = {k: x for k, x in options.items() if k not in ("max_grad_norm", "trust_ratio")}
    if dtype == torch.float64:
        options["bias_correction"] = False  # alpha^t is rounded by another library
    problem = realistic_problem(SHAPES, algorithm, dtype=dtype, **options)
    ours, theirs = on_gpu(problem, "triton"), on_gpu(problem, "cuda")
    for _ in range(3):
        ours.step()
        theirs.step()
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                maxva_kernels.backends()["cuda"] != "available",
                reason="the CUDA backend is not built",
            ),
        ),
    ],
)
@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("misaligned", [False, True])
def test_stochastic_rounding_has_the_bits_of(
    backend: str, algorithm: str, misaligned: bool
) -> None:
    problem = realistic_problem(
        SHAPES, algorithm, dtype=torch.bfloat16, collect_stats=True, **STOCHASTIC
    )
    ours = on_gpu(problem, "triton", misaligned)
    theirs = problem.optimizer("cpu") if backend == "cpu" else on_gpu(problem, backend)
    for _ in range(3):
        ours.step()
        theirs.step()
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(a, b)
    assert ours.stats()[0] == pytest.approx(theirs.stats()[0], rel=1e-5)


def test_random_words_and_rounding() -> None:
    from triton_rounding import KNOWN_ANSWERS, ROUNDED, random_words, rounded_bits

    for counter_and_key, words in KNOWN_ANSWERS:
        assert random_words(counter_and_key, "cuda") == words
    for x, word, expected in ROUNDED:
        assert rounded_bits(x, word, "cuda") == expected


@pytest.mark.parametrize("columns", [(7, 13), (1000, 2**33 + 3)], ids=str)
def test_shards_of_columns_have_the_bits_of_the_cpu_kernel(columns: tuple[int, int]) -> None:
    """A gradient of 0 and a decay that is exact leave the rounding alone."""
    from maxva_kernels import triton_kernels

    hyper = [1.0, 0.9, 0.5, 0.999, 0.999, 1e-8, 2.0**-10, 1e-16, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    start = torch.randn(20011).bfloat16()
    results = []
    for device, update_ in (("cuda", triton_kernels.update_), ("cpu", torch.ops.maxva.update_)):
        theta = start.to(device, copy=True)
        states = [[torch.zeros(theta.numel(), device=device)] for _ in "muvw"]
        update_(
            [theta], [torch.zeros_like(theta)], *states, [], [],
            [torch.tensor(6.0, device=device)], [], [1], hyper, [None], None, None, None, None,
            [2**63 - 5, 3, 2**35 + 2, *columns, 1], "madam", 0,
        )  # fmt: skip
        results.append(theta.cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_misaligned_gradients(dtype: torch.dtype) -> None:
    problem = realistic_problem(SHAPES, dtype=dtype)
    aligned, misaligned = on_gpu(problem, "triton"), on_gpu(problem, "triton", misaligned=True)
    aligned.step()
    misaligned.step()
    for a, b in zip(everything(aligned), everything(misaligned), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5, "skip_nonfinite": True},
        {"trust_ratio": True, "weight_decay": 0.1},
        {"dtype": torch.bfloat16, "collect_stats": True, **STOCHASTIC},
        {"trust_ratio": True, "weight_decay": 0.1, "collect_stats": True},
    ],
    ids=["plain", "clipped", "lamb", "stochastic_statistics", "lamb_statistics"],
)
def test_graph_replays_what_steps_would_do(options: dict[str, Any]) -> None:
    """Between replays an eager step of other gradients uses the same optimizer's tables."""
    problem = realistic_problem(SHAPES, capturable=True, **options)
    captured, eager = on_gpu(problem, "triton"), on_gpu(problem, "triton")
    captured.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    params = captured.param_groups[0]["params"]
    other = eager.param_groups[0]["params"]
    static = [p.grad for p in params]
    for k in range(4):
        for q in other:
            q.grad.copy_(torch.randn_like(q))
        for g, q in zip(static, other, strict=True):
            g.copy_(q.grad)
        for opt in (captured, eager):
            opt.param_groups[0]["lr"].fill_(0.1 / (k + 1))
        if k == 2:
            for p, g in zip(params, static, strict=True):
                p.grad = g.clone()
            captured.step()
            for p, g in zip(params, static, strict=True):
                p.grad = g
        else:
            graph.replay()
        eager.step()
        torch.cuda.synchronize()
        for a, b in zip(everything(captured), everything(eager), strict=True):
            assert torch.equal(a, b)
        if "collect_stats" in options:
            assert captured.stats() == eager.stats()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_synchronization(options: dict[str, Any]) -> None:
    opt = on_gpu(realistic_problem(SHAPES, **options), "triton")
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(3):
            opt.param_groups[0]["lr"] = 0.1 / (k + 1)
            for p in opt.param_groups[0]["params"]:
                p.grad = p.grad.clone()
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "collect_stats": True, **STOCHASTIC}],
    ids=["plain", "stochastic_statistics"],
)
def test_changing_values_do_not_compile_again(options: dict[str, Any]) -> None:
    from maxva_kernels.triton_kernels import multi_tensor_apply as mta

    opt = on_gpu(realistic_problem(SHAPES, **options), "triton")
    opt.step()
    kernels = (
        mta.make_scalars_kernel, mta.update_kernel, mta.add_sums_kernel, mta.count_kernel,
    )  # fmt: skip
    device = torch.cuda.current_device()
    compiled = [len(kernel.device_caches[device][0]) for kernel in kernels]
    for k in range(10):
        opt.param_groups[0].update(lr=0.1 * k, betas=(0.1 * (k % 9), 0.99), weight_decay=0.01 * k)
        opt.param_groups[0]["rounding_seed"] = 16**k
        opt.step()
    assert [len(kernel.device_caches[device][0]) for kernel in kernels] == compiled


def test_swapped_data_is_found() -> None:
    problem = realistic_problem(SHAPES)
    elsewhere, plain = on_gpu(problem, "triton"), on_gpu(problem, "triton")
    for k in range(3):
        elsewhere.step()
        plain.step()
        p = elsewhere.param_groups[0]["params"][k % 2 * 3]
        p.data = p.data.clone()
        elsewhere.state[p]["exp_avg"] = elsewhere.state[p]["exp_avg"].clone()
    for a, b in zip(everything(elsewhere), everything(plain), strict=True):
        assert torch.equal(a, b)


def test_another_stream() -> None:
    """A step on a stream that did not build the tables waits for them."""
    problem = realistic_problem(SHAPES)
    opt, plain = on_gpu(problem, "triton"), on_gpu(problem, "triton")
    stream = torch.cuda.Stream()
    for _ in range(3):
        opt.step()
        plain.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            opt.step()
        torch.cuda.current_stream().wait_stream(stream)
        plain.step()
    for a, b in zip(everything(opt), everything(plain), strict=True):
        assert torch.equal(a, b)


def test_first_step_compiles_quickly(monkeypatch: Any, tmp_path: Any) -> None:
    from maxva_kernels.triton_kernels import multi_tensor_apply as mta

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (mta.make_scalars_kernel, mta.update_kernel, mta.count_kernel):
        kernel.device_caches.clear()
    opt = on_gpu(realistic_problem([(5000,)]), "triton")
    start = time.perf_counter()
    opt.step()
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 20
