"""Compact states on a GPU, by both backends: beside the reference, one set of bits, graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exactness import FUSED, heavy_tailed
from test_packed_kernels import take_step
from test_triton_packed import OPTIONS, cancelled, check_neighbours, make_batch, packed_of
from torch import Tensor
from torch.nn import Parameter

import maxva_kernels
from maxva_kernels.backends import find_backend
from maxva_kernels.batch import Batch, Statistic
from maxva_kernels.reference import EagerBackend

REPORT = maxva_kernels.backends()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

WORDS = ["int8", "bfloat16"]
#: Whole blocks, the fast path; short ends; rows of odd length, misaligned from the second on.
SHAPES = [(70, 128), (33, 1000), (2, 9, 261), (0, 130)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "misaligned": {"layout": "misaligned"},
    "misaligned_gradient": {"grad_layout": "misaligned"},
}


#: Of the gradient; None is what most steps have.
SCALES = [None, 0.5]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if REPORT[name] != "available":
        pytest.skip(f"backend {name!r}: {REPORT[name]}")
    return name


def moved(batch: Batch, device: str) -> Batch:
    """A copy with all tensors on a device; layouts and alignment stay."""
    batch = copy.deepcopy(batch)
    batch.device = torch.device(device)
    for name in ("theta", "g", "packed", "scale", "maximum", "master", "step", "group_step"):
        tensors: list[Tensor] = getattr(batch, name)
        for i, x in enumerate(tensors):
            storage = x.new_empty(x.untyped_storage().nbytes() // x.itemsize, device=device)
            tensors[i] = storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
    if batch.statistics is not None:
        batch.statistics = batch.statistics.to(device)
    return batch


def on_device(scale: float | None, batch: Batch) -> Tensor | None:
    return None if scale is None else torch.tensor(scale, device=batch.device)


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scale", SCALES, ids=["unscaled", "scaled"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_beside_the_reference(
    options: dict[str, Any], scale: float | None, layout: dict[str, Any], word: str,
    algorithm: str, backend: str,
) -> None:  # fmt: skip
    """Codes and random words are the definition's; divisions and roots are the device's own."""
    start = make_batch(SHAPES, word, algorithm, **{**layout, **options})
    start.statistics = torch.full((len(SHAPES), len(Statistic)), torch.nan, dtype=torch.float64)
    ours, theirs = moved(start, "cuda"), moved(start, "cpu")
    for batch, kernels in ((ours, find_backend(backend, "cuda")), (theirs, EagerBackend())):
        control = torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64, device=batch.device)
        take_step(kernels, batch, algorithm, control, on_device(scale, batch))
    ours = moved(ours, "cpu")
    for i, before in enumerate(start.theta):
        if before.numel() == 0:
            continue
        label = f"{i} {tuple(before.shape)}"
        slack = cancelled(packed_of(start, i), packed_of(theirs, i), algorithm)
        check_neighbours(packed_of(ours, i), packed_of(theirs, i), label, slack)
        kept, expected = ((x.master or x.theta)[i].double() for x in (ours, theirs))
        change = (expected - before.double()).abs()
        ulp = torch.finfo(torch.float32 if ours.master else before.dtype).eps * expected.abs()
        assert ((kept - expected).abs() <= 1e-4 * change + 2 * ulp).all(), label
        assert torch.equal(ours.step[i], theirs.step[i])
        assert torch.equal(ours.g[i], theirs.g[i])
    torch.testing.assert_close(ours.statistics, theirs.statistics, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("scale", SCALES, ids=["unscaled", "scaled"])
def test_same_bits_on_every_path(
    scale: float | None, word: str, algorithm: str, backend: str
) -> None:
    """Of whole blocks that are aligned, with an unscaled gradient, CUDA has a path of its own."""
    batches = [
        moved(make_batch([(64, 256)], word, algorithm, amsgrad=True, **layout), "cuda")
        for layout in LAYOUTS.values()
    ]
    for batch in batches:
        for _ in range(3):
            scales = on_device(scale, batch)
            take_step(find_backend(backend, "cuda"), batch, algorithm, None, scales)
    for batch in batches[1:]:
        for name in ("theta", "packed", "scale", "maximum"):
            for a, b in zip(getattr(batches[0], name), getattr(batch, name), strict=True):
                assert torch.equal(a, b), name


def make_optimizer(algorithm: str, backend: str, **options: Any) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).cuda()) for shape in SHAPES]
    set_grads(params, 0)
    return FUSED[algorithm](params, lr=1e-2, backend=backend, fp32_state_below=0, **options)


def set_grads(params: list[Tensor], step: int) -> None:
    """The same for every optimizer, into the same storage."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        g = heavy_tailed(p.shape, generator, step).to(p)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def everything(opt: torch.optim.Optimizer) -> list[Tensor]:
    params = opt.param_groups[0]["params"]
    return [*params, *(x for p in params for _, x in sorted(opt.state[p].items()))]


@pytest.mark.parametrize("algorithm", ["madam", "lamadam"])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5, "amsgrad": True}, {"trust_ratio": True, "weight_decay": 0.1}],
    ids=["plain", "clip-amsgrad", "trust"],
)
def test_graph_replays_what_steps_would_do(
    options: dict[str, Any], word: str, algorithm: str, backend: str
) -> None:
    """Without waiting for the device, with statistics, and after a skipped step."""
    options = {**options, "state_dtype": word, "capturable": True, "collect_stats": True}
    options["skip_nonfinite"] = True
    captured, plain = (make_optimizer(algorithm, backend, **options) for _ in range(2))
    for opt in (captured, plain):
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 5):
        for opt in (captured, plain):
            set_grads(opt.param_groups[0]["params"], step)
            if step == 3:
                opt.param_groups[0]["params"][1].grad[0, 0] = torch.inf
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            plain.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(everything(captured), everything(plain), strict=True):
            assert torch.equal(a, b)
    assert captured.stats() == plain.stats()
    assert captured.stats()[0]["skipped_steps"] == 1
