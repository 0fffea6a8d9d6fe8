"""What ranks do in tests/test_distributed.py; the same functions run on all ranks of a world.

Truth is one process: the same optimizer over whole, plain tensors with the same gradients.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from exactness import same_bits, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from maxva_kernels import FusedLaMAdam, FusedMAdam, LaMAdam, MAdam
from maxva_kernels.sharding import Sharding, holds_whole_blocks, linear_index
from maxva_kernels.state import word_dtype

WORLDS = (2, 4, 1, 3)
_SCENARIOS: dict[int, dict[str, Callable[[Path], None]]] = {world: {} for world in WORLDS}


def scenario(*worlds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of (directory for checkpoints) for world sizes."""

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        for world in worlds:
            _SCENARIOS[world][fn.__name__] = fn
        return fn

    return register


def scenarios_of(world: int) -> dict[str, Callable[[Path], None]]:
    return _SCENARIOS[world]


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    names = {1: ("dp",), 2: ("replicate", "shard") if shape else ()}
    return init_device_mesh("cpu", shape, mesh_dim_names=names[len(shape)])


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def raises(kind: type[Exception], *parts: str) -> Any:
    """An error whose message holds the parts in this order."""
    return pytest.raises(kind, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# --- parameters whose gradients are given ---------------------------------------------------------

SHAPES = [(5, 7), (3,), (8, 6), (1, 4), (), (2, 3, 4), (6,)]
FROZEN, LATE = 6, 1


def placements_of(kind: str) -> list[Any]:
    """Per shape; None is a plain tensor."""
    if kind == "fsdp":
        return [[Shard(0)], [Shard(0)], [Shard(1)], [Shard(0)], [Replicate()], None, [Shard(0)]]
    if kind == "hsdp":
        shard = [Replicate(), Shard(0)]
        return [shard, shard, [Replicate(), Shard(1)], shard, [Replicate()] * 2, None, shard]
    return [
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Shard(0), Replicate()],
        [Replicate(), Replicate()],
        None,
        [Shard(0), Shard(0)],
    ]


def kinds() -> list[str]:
    return ["fsdp", "hsdp", "2d"] if world() == 4 else ["fsdp"]


def mesh_for(kind: str) -> DeviceMesh:
    return mesh_of(world()) if kind == "fsdp" else mesh_of(2, 2)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def spread(full: Tensor, kind: str, placements: Any) -> Tensor:
    if placements is None:
        return full.clone()
    return distribute_tensor(full.clone(), mesh_for(kind), placements, src_data_rank=None)


class Twins:
    """The same training twice: sharded over ranks, and whole in this process."""

    def __init__(
        self,
        kind: str,
        cls: Any = FusedMAdam,
        dtype: torch.dtype = torch.float64,
        shapes: Any = SHAPES,
        placements: Any = None,
        **options: Any,
    ) -> None:
        self.kind, self.shapes, self.dtype = kind, shapes, dtype
        self.placements = placements or placements_of(kind)
        generator = torch.Generator().manual_seed(3)
        full = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.whole = [Parameter(x.clone()) for x in full]
        self.sharded = [
            Parameter(spread(x, kind, place))
            for x, place in zip(full, self.placements, strict=True)
        ]

        def make(params: list[Parameter]) -> Any:
            groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.03}]
            return cls(groups, **{"lr": 0.1, **options})

        self.truth, self.opt = make(self.whole), make(self.sharded)

    def set_gradients(self, t: int, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(100 + t)
        for i, shape in enumerate(self.shapes):
            g = factor * torch.randn(shape, generator=generator).to(self.dtype)
            if (i == FROZEN or (i == LATE and t < 2)) and len(self.shapes) > 2:
                continue
            self.whole[i].grad = g
            self.sharded[i].grad = spread(g, self.kind, self.placements[i])

    def step(self, t: int) -> None:
        self.set_gradients(t)
        self.truth.step()
        self.opt.step()

    def check(self, tolerance: float = 1e-12) -> None:
        for i, (p, q) in enumerate(zip(self.sharded, self.whole, strict=True)):
            label = f"{self.kind} parameter {i} {self.placements[i]}"
            place = functools.partial(spread, kind=self.kind, placements=self.placements[i])
            close(p.detach(), place(q.detach()), tolerance, label)
            state, truth = self.opt.state[p], self.truth.state[q]
            assert state.keys() == truth.keys(), label
            for key, value in state.items():
                if key != "step":
                    assert isinstance(value, DTensor) == isinstance(p, DTensor), label
                    close(value, place(truth[key]), tolerance, f"{label} {key}")
                else:
                    assert same_bits(value, truth[key]), label

    def difference(self) -> float:
        pairs = zip(self.sharded, self.whole, strict=True)
        return max(float((whole(p) - whole(q)).abs().max()) for p, q in pairs)


def close(x: Tensor, y: Tensor, tolerance: float, label: str) -> None:
    """Of two DTensors the local parts are compared, else whole tensors."""
    if isinstance(x, DTensor) and isinstance(y, DTensor):
        assert x.placements == y.placements, label
        x, y = x.to_local(), y.to_local()
    x, y = whole(x), whole(y)
    assert x.dtype == y.dtype, label
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m: f"{label}: {m}")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.1},
    "clip": {"max_grad_norm": 0.5},
    "trust": {"trust_ratio": True, "weight_decay": 0.1},
    "all": {"trust_ratio": True, "weight_decay": 0.1, "max_grad_norm": 0.5, "amsgrad": True,
            "skip_nonfinite": True, "nesterov": True},
}  # fmt: skip


@scenario(2, 4)
def sharded_equals_whole(directory: Path) -> None:
    """Uneven and empty shards, a frozen and a late parameter, replicated and plain ones."""
    for kind in kinds():
        fused = [(cls, o) for cls in (FusedMAdam, FusedLaMAdam) for o in OPTIONS.values()]
        for cls, options in [*fused, (MAdam, OPTIONS["all"]), (LaMAdam, OPTIONS["all"])]:
            twins = Twins(kind, cls, **options)
            if kind == "fsdp" and rank() > 0:
                assert twins.sharded[3].to_local().numel() == 0
            for t in range(4):
                twins.step(t)
            twins.check()
            assert [int(g["step"]) for g in twins.opt.param_groups] == [4, 4]


@scenario(2, 4)
def without_the_reduction_it_would_be_wrong(directory: Path) -> None:
    """What the test before this one can see: norms of parts give other parameters."""
    for name in ("clip", "trust"):
        twins = Twins("fsdp", **OPTIONS[name])
        reduce, Sharding._all_reduce = Sharding._all_reduce, lambda self, values, group: values
        try:
            for t in range(4):
                twins.step(t)
        finally:
            Sharding._all_reduce = reduce
        assert twins.difference() > 1e-3, name


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[Any]]:
    calls: list[Any] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(tensor.shape))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield calls
    finally:
        dist.all_reduce = real


@scenario(2, 4)
def one_collective_per_process_group(directory: Path) -> None:
    for kind in kinds():
        groups = 2 if kind == "2d" else 1
        for name, phases in (("plain", 0), ("clip", 1), ("trust", 1), ("all", 2)):
            twins = Twins(kind, **OPTIONS[name])
            twins.step(0)
            twins.set_gradients(1)
            with counted_collectives() as calls:
                twins.opt.step()
            assert len(calls) == groups * phases, (kind, name, calls)


@scenario(2, 4)
def a_nonfinite_shard_skips_everywhere(directory: Path) -> None:
    for kind in kinds():
        for options in ({"skip_nonfinite": True}, {"skip_nonfinite": True, "trust_ratio": True}):
            twins = Twins(kind, dtype=torch.float32, weight_decay=0.1, **options)
            for t in range(3):
                twins.step(t)
            twins.set_gradients(3)
            if has_it(kind):
                twins.sharded[2].grad.to_local().view(-1)[0] = float("inf")
            before = local_snapshot(twins)
            twins.opt.step()
            assert same_bits(before, local_snapshot(twins)), kind
            assert [g["step"] for g in twins.opt.param_groups] == [3, 3]
            twins.step(4)
            twins.check(1e-5)


def has_it(kind: str) -> bool:
    """Whether this rank holds what only one shard has: the replicas of HSDP have it both."""
    return rank() == 1 or (kind == "hsdp" and rank() == 3)


def local_snapshot(twins: Twins) -> Any:
    return copy.deepcopy(
        [
            {
                key: value.to_local() if isinstance(value, DTensor) else value
                for key, value in {"p": p.detach(), **twins.opt.state[p]}.items()
            }
            for p in twins.sharded
        ]
    )


@scenario(2, 4)
def found_inf_of_one_rank_holds_on_all(directory: Path) -> None:
    for kind in kinds():
        for options in ({}, {"max_grad_norm": 1.0}):
            twins = Twins(kind, **options)
            twins.step(2)
            twins.set_gradients(3)
            before = local_snapshot(twins)
            twins.opt.grad_scale = torch.tensor(4.0)
            twins.opt.found_inf = torch.tensor(float(has_it(kind)))
            twins.opt.step()
            assert same_bits(before, local_snapshot(twins)), kind
            # without an overflow the gradients are unscaled where they lie
            twins.opt.found_inf = torch.tensor(0.0)
            twins.set_gradients(3, factor=4.0)
            twins.opt.step()
            del twins.opt.grad_scale, twins.opt.found_inf
            scaled = [None if p.grad is None else whole(p.grad) for p in twins.sharded]
            twins.set_gradients(3)
            for g, q in zip(scaled, twins.whole, strict=True):
                if g is not None:
                    close(g, q.grad, 1e-15, "gradient")
            twins.truth.step()
            twins.check()


@scenario(2, 4)
def gradscaler_over_dtensors(directory: Path) -> None:
    """Also where the first gradient's mesh does not reach the rank with the overflow."""
    for kind in kinds():
        places = [
            place or [Replicate()] * (1 if kind == "fsdp" else 2) for place in placements_of(kind)
        ]
        twins = Twins(kind, dtype=torch.float32, placements=places[::-1], shapes=SHAPES[::-1])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        scaler.scale(torch.ones(()))  # makes the scale
        before = local_snapshot(twins)
        twins.set_gradients(2, factor=8.0)
        if has_it(kind):
            twins.sharded[4].grad.to_local().view(-1)[0] = float("inf")
        scaler.step(twins.opt)
        assert same_bits([b["p"] for b in before], [b["p"] for b in local_snapshot(twins)]), kind
        assert [g["step"] for g in twins.opt.param_groups] == [0, 0]


@scenario(2, 4)
def ranks_without_anything_take_part(directory: Path) -> None:
    """All shards but rank 0's are empty; no gradient on some ranks; on none."""
    options = {"weight_decay": 0.1, "trust_ratio": True, "max_grad_norm": 0.5}
    twins = Twins("fsdp", shapes=[(1, 5), (1,)], placements=[[Shard(0)]] * 2, **options)
    twins.truth.param_groups.pop(), twins.opt.param_groups.pop()
    for t in range(3):
        twins.step(t)
    twins.check()
    for t in range(3):
        twins.set_gradients(t)
        if rank() > 0:
            twins.sharded[0].grad = None
        twins.truth.step()
        twins.opt.step()
    assert twins.difference() < 1e-12
    twins.opt.zero_grad()
    twins.opt.step()
    assert twins.opt.param_groups[0]["step"] == 7


@scenario(2, 4)
def the_initialising_step_is_recognised_together(directory: Path) -> None:
    for kind in kinds():
        twins = Twins(kind)
        for group in twins.opt.param_groups:
            group["lr"] = 0.0
        for p in twins.sharded:
            p.grad = torch.zeros_like(p)
        before = [b["p"] for b in local_snapshot(twins)]
        twins.opt.step()
        assert {float(s["step"]) for s in twins.opt.state.values()} == {0.0}
        assert len(twins.opt.state) == len(SHAPES)
        # one element of one rank is not zero: an observation, for all
        twins = Twins(kind)
        for group in twins.opt.param_groups:
            group["lr"] = 0.0
        for p in twins.sharded:
            p.grad = torch.zeros_like(p)
        if has_it(kind):
            twins.sharded[2].grad.to_local().view(-1)[-1] = 1.0
        twins.opt.step()
        assert {float(s["step"]) for s in twins.opt.state.values()} == {1.0}
        assert same_bits(before, [b["p"] for b in local_snapshot(twins)])


@scenario(2, 4)
def placements_must_fit(directory: Path) -> None:
    mesh = mesh_of(world())
    full = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)
    p = Parameter(distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
    opt = FusedMAdam([("weight", p)], lr=0.1)
    q = Parameter(full.clone())
    truth = FusedMAdam([q], lr=0.1)
    g = full.sin() + 2

    # a Partial gradient is summed, as torch's optimizers do, and left as it is
    p.grad = DTensor.from_local(g / world(), mesh, [Partial()], run_check=False)
    q.grad = g
    opt.step()
    truth.step()
    close(p, q, 1e-14, "partial gradient")
    assert p.grad.placements == (Partial(),)
    close(p.grad.to_local(), g / world(), 1e-15, "p.grad")

    before = copy.deepcopy(opt.state_dict()["state"][0])
    opt.grad_scale = torch.tensor(2.0)
    with raises(ValueError, "'weight'", "Partial", "unscale_"):
        opt.step()
    del opt.grad_scale
    good = opt.state[p]["exp_avg"]
    opt.state[p]["exp_avg"] = good.to_local()
    with raises(ValueError, "'weight'", "exp_avg is a plain tensor"):
        opt.step()
    opt.state[p]["exp_avg"] = distribute_tensor(whole(good), mesh, [Replicate()])
    with raises(ValueError, "'weight'", "exp_avg", "Replicate"):
        opt.step()
    opt.state[p]["exp_avg"] = good
    after = opt.state_dict()["state"][0]
    assert all(same_bits(local_of(before[key]), local_of(after[key])) for key in before)

    # on rank 0 the parts agree
    fits, longer = (
        distribute_tensor(torch.ones(3 * world() - rows, 2), mesh, [Shard(0)]) for rows in (1, 0)
    )
    odd = Parameter(fits)
    odd.data = longer  # for as long as torch compares the gradient with it
    odd.grad = longer.clone()
    odd.data = fits
    with raises(ValueError, "'odd'", str(tuple(fits.shape)), str(tuple(longer.shape))):
        FusedMAdam([("odd", odd)]).step()
    assert same_bits(odd.detach().to_local(), torch.ones_like(fits.to_local()))

    partial = Parameter(DTensor.from_local(g, mesh, [Partial()], run_check=False))
    partial.grad = torch.ones_like(partial)
    with raises(ValueError, "'odd'", "Partial"):
        FusedMAdam([("odd", partial)]).step()


@scenario(2)
def a_rank_without_gradients_skips_with_the_others(directory: Path) -> None:
    mesh = mesh_of(world())
    p = Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)], src_data_rank=None))
    opt = FusedMAdam([p], skip_nonfinite=True, trust_ratio=True, weight_decay=0.1)
    for count, value in enumerate((math.nan, 1.0)):
        p.grad = torch.full_like(p, value) if rank() == 0 else None
        opt.step()
        assert opt.param_groups[0]["step"] == count


@scenario(2)
def scales_must_fit(directory: Path) -> None:
    mesh = mesh_of(world())
    full = torch.ones(2 * world(), 256)
    p = Parameter(distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
    opt = FusedMAdam([("weight", p)], state_dtype="int8", fp32_state_below=0)
    p.grad = torch.ones_like(p)
    opt.step()
    good = opt.state_dict()
    scale = good["state"][0]["maxva_scale"]
    part = scale.to_local()

    def of_shape(part: Tensor, *shape: int) -> DTensor:
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
        )

    for bad, message in (
        (part, "maxva_scale is a plain tensor"),
        (distribute_tensor(whole(scale), mesh, [Replicate()]), "maxva_scale is a DTensor"),
        (of_shape(part[:1], *scale.shape), f"maxva_scale has shape {(1, 2)}"),
        (of_shape(part, 7, 2), f"maxva_scale has shape {(7, 2)}"),
    ):
        state = {0: {**good["state"][0], "maxva_scale": bad}}
        with raises(ValueError, "'weight'", message):
            opt.load_state_dict({**good, "state": state})
    opt.load_state_dict(good)


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@scenario(2, 4)
def an_index_does_not_depend_on_the_sharding(directory: Path) -> None:
    one = [Replicate(), Shard(0), Shard(1), Shard(2)]
    cases = [([placement], mesh_of(world())) for placement in one]
    if world() == 4:
        strided = [[_StridedShard(d, split_factor=2), Shard(d)] for d in range(3)]
        cases += [([a, b], mesh_of(2, 2)) for a, b in [*itertools.product(one, one), *strided]]
    numbered = refused = 0
    for placements, mesh in cases:
        for shape in [(8, 6, 4), (5, 3, 2), (1, 5, 3), (3, 1, 7), (2, 2, 2), (1, 1, 1), (7, 4, 1)]:
            full = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
            p = distribute_tensor(full, mesh, placements, src_data_rank=None)
            dims = {place.dim for place in placements if not place.is_replicate()}
            try:
                offset, inner_local, inner_global = linear_index(p)
            except NotImplementedError:
                refused += 1
                leading = next((dim for dim, size in enumerate(shape) if size > 1), 0)
                others = {dim for dim in dims if shape[dim] > 1} - {leading}
                assert len(others) > 1 or isinstance(placements[0], _StridedShard), placements
                continue
            numbered += 1
            part = p.to_local().contiguous().view(-1)
            i = torch.arange(part.numel())
            index = i // inner_local * inner_global + offset + i % inner_local
            assert torch.equal(index, part), (placements, shape, offset, inner_local, inner_global)
    assert numbered > len(cases) * 5, (numbered, refused)
    assert linear_index(torch.zeros(3, 4)) == (0, 12, 12)


@scenario(4)
def what_cannot_be_numbered_is_refused_on_all_ranks(directory: Path) -> None:
    """Rows 0 and 2 on ranks 0 and 1; the part of the others, row 1, could be numbered.

    They would wait in the sum of gradients for those that have refused.
    """
    mesh, placements = mesh_of(2, 2), [_StridedShard(0, split_factor=2), Replicate()]
    full = torch.linspace(-1, 1, 3 * 140).view(3, 140)
    rows = full[[0, 2]] if mesh.get_coordinate()[0] == 0 else full[[1]]
    shape = {"shape": full.shape, "stride": full.stride()}
    options = {"max_grad_norm": 1.0, "fp32_state_below": 0}
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), ("int8", "bfloat16")):
        p, g = (
            DTensor.from_local(x.to(dtype), mesh, placements, run_check=False, **shape)
            for x in (rows.clone(), torch.ones_like(rows))
        )
        opt = FusedMAdam([("odd", Parameter(p))], state_dtype=kind, **options)
        opt.step()  # which has nothing to number
        opt.param_groups[0]["params"][0].grad = g
        before = rows.to(dtype)
        with raises(NotImplementedError, "(3, 140)", "pieces [(0, 1), (2, 3)] of dimension 0"):
            opt.step()
        assert not opt.state
        assert same_bits(p.to_local(), before)
        opt.param_groups[0]["state_dtype"] = "float32"
        opt.step()  # which needs no numbers
        assert not same_bits(p.to_local(), before)
    dist.barrier()


@scenario(2)
def a_plain_parameter_in_the_place_of_a_dtensor_is_numbered_as_a_whole(directory: Path) -> None:
    full = torch.linspace(-1, 1, 4 * 256).view(4, 256)
    options = {"state_dtype": "int8", "fp32_state_below": 0}
    sharded = Parameter(distribute_tensor(full, mesh_of(2), [Shard(0)]))
    opt = FusedMAdam([sharded], **options)
    sharded.grad = torch.ones_like(sharded)
    opt.step()
    p, q = Parameter(full.clone()), Parameter(full.clone())
    opt.param_groups[0]["params"][0] = p
    p.grad = q.grad = torch.cos(100 * full)
    truth = FusedMAdam([q], **options)
    opt.step()
    truth.step()
    assert same_bits(opt.state[p], truth.state[q])


@scenario(2)
def forms_of_dtensors_are_found_once_per_division(directory: Path) -> None:
    full = torch.linspace(-1, 1, 4 * 1024).view(4, 1024)
    options = {"state_dtype": "int8", "fp32_state_below": 0}
    asked: list[Any] = []

    def counted(p: Tensor, group: dict[str, Any]) -> Any:
        asked.append(p)
        return word_dtype(p, group)

    with mock.patch("maxva_kernels.state.word_dtype", counted):
        opt = FusedMAdam([Parameter(full.clone())], **options)
        # the same shape, strides and dtype, but random words of other elements
        for place in (Shard(0), Shard(1)):
            sharded = Parameter(distribute_tensor(full, mesh_of(2), [place]))
            twin = Parameter(full.clone())
            opt.param_groups[0]["params"][0] = sharded
            truth = FusedMAdam([twin], **options)
            asked.clear()
            for t in range(3):
                twin.grad = torch.cos((100 + t) * full)
                sharded.grad = distribute_tensor(twin.grad, mesh_of(2), [place])
                opt.step()
                truth.step()
            assert len([p for p in asked if p is sharded]) == 1
            for key in ("maxva_packed", "maxva_scale"):
                found, expected = opt.state[sharded][key], truth.state[twin][key]
                assert same_bits(whole(found), expected), key


@scenario(2, 4)
def stochastic_rounding_is_that_of_the_whole(directory: Path) -> None:
    for kind in kinds():
        for cls in (FusedMAdam, MAdam):
            options = {"stochastic_rounding": True, "rounding_seed": 2**50, "weight_decay": 0.1}
            twins = Twins(kind, cls, torch.bfloat16, **options)
            for t in range(3):
                twins.step(t)
            twins.check(tolerance=0)


@scenario(2, 4)
def statistics_are_of_all_ranks(directory: Path) -> None:
    for kind in kinds():
        for options in OPTIONS.values():
            twins = Twins(kind, collect_stats=True, **options)
            for t in range(3):
                twins.step(t)
                for found, expected in zip(twins.opt.stats(), twins.truth.stats(), strict=True):
                    assert found == pytest.approx(expected, rel=1e-9), kind
    parts = [Parameter(torch.linspace(-1, 1, 5 + r, dtype=torch.float64)) for r in range(world())]
    options = {"collect_stats": True, "skip_nonfinite": True}
    truth = FusedMAdam(parts, **options)
    own = Parameter(parts[rank()].detach().clone())
    opt = FusedMAdam([own], norm_process_group=dist.group.WORLD, **options)
    for t in range(3):
        for r, p in enumerate(parts):
            p.grad = torch.cos(p.detach() * (1 + r + t))
            if t == 1 and r == 0:
                p.grad[2] = torch.nan
        own.grad = parts[rank()].grad.clone()
        truth.step()
        opt.step()
    (found,), (expected,) = opt.stats(), truth.stats()
    assert found == pytest.approx(expected, rel=1e-9)
    assert found["skipped_steps"] == 1


COMPACT_SHAPES = [(5, 140), (3,), (4, 1024), (1, 4096), (4, 130), (6, 32, 4), (2, 200)]


def compact_placements_of(kind: str) -> list[Any]:
    """Per shape; the third is cut between blocks, the fifth would be cut inside one."""
    if kind == "fsdp":
        return [[Shard(0)], [Shard(0)], [Shard(1)], [Shard(0)], [Shard(1)], None, [Replicate()]]
    if kind == "hsdp":
        one = [Shard(0), Shard(0), Shard(1), Shard(0), Shard(1), None, Replicate()]
        return [place and [Replicate(), place] for place in one]
    return [
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Replicate(), Shard(0)],
        [Shard(0), Shard(1)],
        [Shard(1), Replicate()],
        [Shard(0), Shard(1)],
        None,
        [Replicate(), Replicate()],
    ]


@scenario(2, 4)
def compact_states_are_those_of_the_whole(directory: Path) -> None:
    """Bit for bit, scales included, for shards that are uneven, empty, or cut a row in blocks."""
    for kind, state_dtype, cls in itertools.product(
        kinds(), ("int8", "bfloat16"), (FusedMAdam, MAdam, FusedLaMAdam)
    ):
        options = {"state_dtype": state_dtype, "fp32_state_below": 0, "rounding_seed": 2**50}
        twins = Twins(
            kind, cls, torch.float32, COMPACT_SHAPES, compact_placements_of(kind),
            weight_decay=0.1, amsgrad=cls is FusedMAdam, **options,
        )  # fmt: skip
        for t in range(3):
            twins.step(t)
        forms = ["maxva_packed" in twins.opt.state.get(p, {}) for p in twins.sharded]
        assert forms == [True, False, True, True, False, True, False], kind
        # the truth has one process, in which nothing would be cut
        del twins.sharded[4], twins.whole[4], twins.placements[4]
        twins.check(tolerance=0)


@scenario(2)
def a_piece_is_whole_blocks_only_of_rows_in_order(directory: Path) -> None:
    full = torch.zeros(4, 4, 8, 8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = full.contiguous(memory_format=memory_format)
        rows, columns = (
            distribute_tensor(laid_out, mesh_of(2), [Shard(dim)], src_data_rank=None)
            for dim in (0, 1)
        )
        assert columns.stride() == laid_out.stride()
        assert holds_whole_blocks(rows)
        assert holds_whole_blocks(columns) == (memory_format == torch.contiguous_format)
    undivided = distribute_tensor(full, mesh_of(2, 1), [Shard(0), Shard(2)], src_data_rank=None)
    assert holds_whole_blocks(undivided)
    # pieces of two and of one, in whole blocks
    uneven = distribute_tensor(torch.zeros(4, 3, 256), mesh_of(2), [Shard(1)], src_data_rank=None)
    assert not holds_whole_blocks(uneven)


@scenario(2)
def meshes_with_a_dimension_of_one_rank(directory: Path) -> None:
    """Are those without it: no collective for it, and blocks are cut by none."""
    mesh, place = mesh_of(2, 1), [Shard(0), Shard(1)]
    full = torch.linspace(-1, 1, 4 * 200).view(4, 200)
    p = Parameter(distribute_tensor(full, mesh, place, src_data_rank=None))
    q = Parameter(full.clone())
    options = {"max_grad_norm": 0.5, "state_dtype": "int8", "fp32_state_below": 0}
    opt, truth = FusedMAdam([p], **options), FusedMAdam([q], **options)
    for t in range(2):
        q.grad = torch.cos((100 + t) * full)
        p.grad = distribute_tensor(q.grad, mesh, place, src_data_rank=None)
        with counted_collectives() as calls:
            opt.step()
        assert len(calls) == 1
        truth.step()
    assert "maxva_packed" in opt.state[p]
    close(p, q, 1e-6, "mesh of 2 x 1")


@scenario(2)
def a_gradient_on_another_mesh_is_refused(directory: Path) -> None:
    mesh, other = mesh_of(2), mesh_of(1, 2)
    full = torch.ones(4, 3)
    p = Parameter(distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
    p.grad = distribute_tensor(full, other, [Replicate(), Shard(0)], src_data_rank=None)
    with raises(ValueError, "'odd'", "both must be DTensors of one mesh"):
        FusedMAdam([("odd", p)]).step()
    assert same_bits(p.detach().to_local(), torch.ones(2, 3))


@scenario(2)
def a_step_counts_the_version_of_a_dtensor(directory: Path) -> None:
    """By which autograd notices that what it has saved was written."""
    p = Parameter(distribute_tensor(torch.ones(4, 3), mesh_of(2), [Shard(0)], src_data_rank=None))
    p.grad = distribute_tensor(torch.ones(4, 3), mesh_of(2), [Shard(0)], src_data_rank=None)
    version = p._version
    FusedMAdam([p]).step()
    assert p._version > version


@scenario(4)
def alike_placements_on_other_meshes_are_summed_over_their_own_ranks(directory: Path) -> None:
    mesh = mesh_of(2, 2)
    full = [torch.linspace(k, 2, 12, dtype=torch.float64).view(4, 3) for k in (0, 1)]
    params, truth_params = [], [Parameter(x.clone()) for x in full]
    for x, q, name in zip(full, truth_params, ("replicate", "shard"), strict=True):
        p = Parameter(distribute_tensor(x, mesh[name], [Shard(0)], src_data_rank=None))
        q.grad = torch.cos(x)
        p.grad = distribute_tensor(q.grad, mesh[name], [Shard(0)], src_data_rank=None)
        params.append(p)
    for some in (params, truth_params):
        FusedMAdam(some, lr=0.1, max_grad_norm=0.1, trust_ratio=True, weight_decay=0.1).step()
    for p, q in zip(params, truth_params, strict=True):
        close(p, q, 1e-12, str(p.device_mesh))


@scenario(4)
def pieces_of_two_mesh_dimensions_are_multiplied(directory: Path) -> None:
    for size in (2, 4):
        p = distribute_tensor(torch.zeros(4, size, 128), mesh_of(2, 2), [Shard(1)] * 2)
        assert holds_whole_blocks(p) == (size == 4)


@scenario(4)
def ranks_outside_of_a_mesh_are_not_asked(directory: Path) -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    full = torch.linspace(1, 2, 12, dtype=torch.float64).view(4, 3)
    p = Parameter(distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
    q = Parameter(full.clone())
    opt, truth = (FusedMAdam([x], max_grad_norm=0.5) for x in (p, q))
    p.grad = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
    q.grad = full.clone()
    opt.step()
    truth.step()
    part = p.detach().to_local()
    if rank() < 2:
        close(part, q.detach().chunk(2)[rank()], 1e-12, "mesh of two ranks")
    else:
        assert part.numel() == 0


# --- norm_process_group --------------------------------------------------------------------------


@scenario(2, 4)
def a_norm_group_over_divided_plain_tensors(directory: Path) -> None:
    """Whole parameters on one rank each (some ranks may have none), and flat shards."""
    group = dist.group.WORLD
    shapes = [(5, 7), (3,), (8, 6)]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def whole_parts(tensors: list[Tensor]) -> list[Tensor]:
        return [x.clone() for i, x in enumerate(tensors) if i % world() == rank()]

    def flat_parts(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x.view(-1) for x in tensors]).tensor_split(world())[rank()].clone()]

    for parts_of, trust in ((whole_parts, False), (whole_parts, True), (flat_parts, False)):
        options = {"lr": 0.1, "max_grad_norm": 0.5, "trust_ratio": trust, "weight_decay": 0.1}
        truth_params = [Parameter(x.clone()) for x in full]
        params = [Parameter(x) for x in parts_of(full)]
        truth = FusedMAdam(truth_params, **options)
        opt = FusedMAdam([{"params": params}], norm_process_group=group, **options)
        for t in range(4):
            gradients = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            if t == 3:
                gradients[0][0, 0] = float("inf")
                for group_of in (*truth.param_groups, *opt.param_groups):
                    group_of["skip_nonfinite"] = True
            for p, g in zip(truth_params, gradients, strict=True):
                p.grad = g
            for p, g in zip(params, parts_of(gradients), strict=True):
                p.grad = g
            truth.step()
            opt.step()
        for p, q in zip(params, parts_of([p.detach() for p in truth_params]), strict=True):
            close(p, q, 1e-12, f"{parts_of.__name__} {trust}")
        assert opt.param_groups[0]["step"] == 3
        other = copy.deepcopy(opt)
        assert other._norm_group is opt._norm_group
        with raises(TypeError, "norm_process_group", "state_dict"):
            pickle.dumps(opt)
        assert "norm_process_group" not in opt.state_dict()["param_groups"][0]
        # found_inf of one rank, also where there is no gradient
        before = snapshot(opt)
        opt.found_inf = torch.tensor(1.0) if rank() == 0 else 0
        for p in params:
            p.grad.zero_()
        opt.step()
        assert same_bits(before["params"], snapshot(opt)["params"])
        assert opt.param_groups[0]["step"] == 3
    with raises(TypeError, "norm_process_group", "ProcessGroup"):
        FusedMAdam([Parameter(torch.zeros(2))], norm_process_group="world")
    some = dist.new_group([0])
    if rank() > 0:
        with raises(TypeError, "norm_process_group", "belongs to"):
            FusedMAdam([Parameter(torch.zeros(2))], norm_process_group=some)


@scenario(2)
def found_inf_holds_in_a_norm_group_that_needs_no_norm(directory: Path) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = FusedMAdam([p], norm_process_group=dist.group.WORLD)
    opt.found_inf = torch.tensor(float(rank() == 0))
    opt.step()
    assert same_bits(p.detach(), torch.ones(3))


@scenario(2)
def a_norm_group_knows_the_norms_of_flat_shards(directory: Path) -> None:
    p = Parameter(torch.ones(3))
    p._fsdp_flattened = True
    p.grad = torch.ones(3)
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "collect_stats": True}
    FusedMAdam([p], norm_process_group=dist.group.WORLD, **options).step()
    assert bool((p != 1).all())


@scenario(2)
def a_norm_group_recognises_the_initialising_step_together(directory: Path) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.full_like(p, float(rank() == 0))
    opt = FusedMAdam([p], lr=0.0, norm_process_group=dist.group.WORLD)
    opt.step()
    assert opt.state[p]["step"] == 1


@scenario(4)
def a_norm_group_beside_meshes(directory: Path) -> None:
    """Two pipeline stages, each sharded over its own two ranks."""
    stage, place = divmod(rank(), 2)
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    between = [dist.new_group([0, 2]), dist.new_group([1, 3])][place]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    truth_params = [Parameter(x.clone()) for x in full]
    p = Parameter(distribute_tensor(full[stage], meshes[stage], [Shard(0)], src_data_rank=None))
    truth = FusedMAdam(truth_params, max_grad_norm=0.3, lr=0.1)
    opt = FusedMAdam([p], max_grad_norm=0.3, lr=0.1, norm_process_group=between)
    for _ in range(3):
        gradients = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
        for q, g in zip(truth_params, gradients, strict=True):
            q.grad = g
        p.grad = distribute_tensor(gradients[stage], meshes[stage], [Shard(0)], src_data_rank=None)
        truth.step()
        opt.step()
    close(p, truth_params[stage], 1e-12, "stage")


# --- models under the engines of torch.distributed -----------------------------------------------


class Net(nn.Module):
    """Dimensions that no world size divides; a frozen layer; one that only odd steps use."""

    def __init__(self, hidden: int = 7, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(5, hidden)
        self.second = nn.Linear(hidden, 3)
        self.frozen = nn.Linear(3, 3)
        self.sometimes = nn.Linear(3, 3, bias=False)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor, odd: bool) -> Tensor:
        y = self.frozen(self.second(torch.tanh(self.first(x))))
        return y + self.sometimes(y) if odd else y


def loss_of(net: nn.Module, t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every rank, so that averaging over ranks changes nothing."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(4, 5, generator=generator).to(dtype)
    return net(x, odd=t % 2 == 1).square().mean()


def train(net: nn.Module, opt: Any, steps: range, dtype: torch.dtype = torch.float64) -> None:
    for t in steps:
        loss_of(net, t, dtype).backward()
        opt.step()
        opt.zero_grad()


def shard(net: nn.Module, **options: Any) -> nn.Module:
    for layer in (net.first, net.second, net.frozen, net.sometimes):
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def sharded_net(**options: Any) -> nn.Module:
    return shard(Net(), mesh=mesh_of(world()), **options)


def make_optimizer(net: nn.Module, cls: Any = FusedMAdam, **options: Any) -> Any:
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return cls([{"params": named[:2]}, {"params": named[2:], "lr": 0.05}], lr=0.1, **options)


def check_against_shadow(net: nn.Module, tolerance: float, dtype: Any, **options: Any) -> None:
    """Trains; a twin over whole tensors gets the gathered gradients and must go the same way."""
    opt = make_optimizer(net, **options)
    params = [p for p in net.parameters() if p.requires_grad]
    shadow_params = [Parameter(whole(p).clone()) for p in params]
    groups = [{"params": shadow_params[:2]}, {"params": shadow_params[2:], "lr": 0.05}]
    shadow = FusedMAdam(groups, lr=0.1, **options)
    unused = 0
    for t in range(4):
        loss_of(net, t, dtype).backward()
        for p, q in zip(params, shadow_params, strict=True):
            q.grad = None if p.grad is None else whole(p.grad).clone()
            unused += p.grad is None
        opt.step()
        shadow.step()
        opt.zero_grad()
    assert unused == 2
    for p, q in zip(params, shadow_params, strict=True):
        close(whole(p), q.detach(), tolerance, f"{tuple(p.shape)} {options}")
        for key, value in opt.state[p].items():
            close(whole(value), shadow.state[q][key], tolerance, f"{key} {options}")
            if key != "step":
                assert value.placements == p.placements, key


@scenario(2, 4)
def fsdp2_models(directory: Path) -> None:
    every = {**OPTIONS["all"]}
    flat = mesh_of(world())
    for options in (OPTIONS["plain"], every):
        check_against_shadow(shard(Net(), mesh=flat), 1e-11, torch.float64, **options)
    # elementwise, so the bits are the same however the elements are divided
    check_against_shadow(shard(Net(dtype=torch.float32), mesh=flat), 0, torch.float32)
    bf16 = torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    net = shard(Net(dtype=torch.float32), mesh=flat, mp_policy=policy)
    check_against_shadow(net, 1e-5, torch.float32, max_grad_norm=0.5)
    net = shard(Net(dtype=bf16), mesh=flat)
    check_against_shadow(net, 0, bf16, master_weights=True)
    net = shard(Net(), mesh=flat, offload_policy=CPUOffloadPolicy(pin_memory=False))
    check_against_shadow(net, 1e-11, torch.float64, **every)
    if world() == 4:
        check_against_shadow(shard(Net(), mesh=mesh_of(2, 2)), 1e-11, torch.float64, **every)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        net = parallelize_module(Net(hidden=8), mesh["tp"], plan)
        net = shard(net, mesh=mesh["dp"])
        assert any(isinstance(p.placements[0], _StridedShard) for p in net.parameters())
        check_against_shadow(net, 1e-11, torch.float64, **every)


# --- checkpoints ---------------------------------------------------------------------------------

FULL = StateDictOptions(full_state_dict=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in net.named_parameters()}


@scenario(2, 4)
def initialising_for_a_checkpoint_changes_nothing(directory: Path) -> None:
    for options in ({}, {"max_grad_norm": 0.5, "trust_ratio": True, "weight_decay": 0.1}):
        nets = [sharded_net() for _ in range(2)]
        opts = [make_optimizer(net, **options) for net in nets]
        before = parameters_of(nets[0])
        state_dict = get_optimizer_state_dict(nets[0], opts[0])
        assert state_dict["state"]["second.weight"]["step"] == 0
        assert same_bits(before, parameters_of(nets[0]))
        for net, opt in zip(nets, opts, strict=True):
            train(net, opt, range(1, 4))
        assert same_bits(parameters_of(nets[0]), parameters_of(nets[1]))
        assert not same_bits(before, parameters_of(nets[0]))


@scenario(2, 4)
def state_dicts_of_every_form_go_on(directory: Path) -> None:
    one = Net()
    one_opt = make_optimizer(one)
    train(one, one_opt, range(4))
    for options in (None, FULL, FLAT):
        net = sharded_net()
        opt = make_optimizer(net)
        train(net, opt, range(2))
        saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
        if options is FULL and rank() == 0:
            m = saved["state"]["first.weight"]["exp_avg"]
            assert type(m) is Tensor
            assert m.shape == (7, 5)
        other = sharded_net()
        set_model_state_dict(other, get_model_state_dict(net))
        other_opt = make_optimizer(other)
        if options is FULL:
            broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(other, other_opt, saved, options=broadcast)
        else:
            set_optimizer_state_dict(other, other_opt, saved, options=options)
        for p in other.parameters():
            for key, value in other_opt.state.get(p, {}).items():
                assert isinstance(value, DTensor) == (key != "step"), key
        train(net, opt, range(2, 4))
        train(other, other_opt, range(2, 4))
        assert same_bits(parameters_of(net), parameters_of(other)), options
        for (name, p), q in zip(net.named_parameters(), one.parameters(), strict=True):
            close(whole(p), q.detach(), 1e-11, name)


@scenario(2, 4)
def plain_state_dicts_and_copies(directory: Path) -> None:
    net = sharded_net()
    opt = make_optimizer(net)
    train(net, opt, range(2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = sharded_net()
    set_model_state_dict(other, get_model_state_dict(net))
    other_opt = make_optimizer(other)
    other_opt.load_state_dict(loaded)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        for key, value in opt.state.get(p, {}).items():
            assert type(other_opt.state[q][key]) is type(value), key
    train(net, opt, range(2, 4))
    train(other, other_opt, range(2, 4))
    assert same_bits(parameters_of(net), parameters_of(other))

    copied = copy.deepcopy(opt)
    pairs = [
        (p, q)
        for group, other_group in zip(opt.param_groups, copied.param_groups, strict=True)
        for p, q in zip(group["params"], other_group["params"], strict=True)
    ]
    for p, q in pairs:
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
        assert p is not q
        assert isinstance(copied.state[q]["exp_avg"], DTensor)
    opt.step()
    copied.step()
    assert all(same_bits(p.to_local(), q.to_local()) for p, q in pairs)

    broken = other_opt.state_dict()
    state = broken["state"][0]
    broken["state"][0] = {**state, "exp_avg": whole(state["exp_avg"])}
    kept = other_opt.state[other.first.weight]["exp_avg"]
    with raises(ValueError, "'first.weight'", "exp_avg", "set_optimizer_state_dict"):
        other_opt.load_state_dict(broken)
    assert other_opt.state[other.first.weight]["exp_avg"] is kept


@scenario(2)
def save_for_other_world_sizes(directory: Path) -> None:
    net = sharded_net()
    opt = make_optimizer(net, amsgrad=True, max_grad_norm=0.5)
    train(net, opt, range(3))
    states = {"net": get_model_state_dict(net), "opt": get_optimizer_state_dict(net, opt)}
    # in a thread: collectives of its own, while training goes on
    own = dist.new_group(backend="gloo")
    future = dcp.async_save(states, checkpoint_id=directory / "async", process_group=own)
    at_save = parameters_of(net)
    dcp.save(states, checkpoint_id=directory / "two")
    states["opt"] = get_optimizer_state_dict(net, opt, options=FLAT)
    dcp.save(states, checkpoint_id=directory / "flat")
    train(net, opt, range(3, 6))
    at_end = parameters_of(net)
    future.result()
    if rank() == 0:
        torch.save((at_save, at_end), directory / "expected.pt")
    dist.barrier()


@scenario(1, 2, 3, 4)
def load_what_two_ranks_have_saved(directory: Path) -> None:
    at_save, at_end = torch.load(directory / "expected.pt")
    for name, options in (("two", None), ("flat", FLAT), ("async", None)):
        net = sharded_net()
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(7.0)
        opt = make_optimizer(net, amsgrad=True, max_grad_norm=0.5)
        states = {
            "net": get_model_state_dict(net),
            "opt": get_optimizer_state_dict(net, opt, options=options),
        }
        dcp.load(states, checkpoint_id=directory / name)
        set_model_state_dict(net, states["net"])
        set_optimizer_state_dict(net, opt, states["opt"], options=options)
        assert same_bits(parameters_of(net), at_save), name
        assert {int(opt.state[p]["step"]) for p in net.first.parameters()} == {3}
        assert int(opt.state[net.sometimes.weight]["step"]) == 1
        train(net, opt, range(3, 6))
        for key, value in parameters_of(net).items():
            close(value, at_end[key], 1e-11, f"{name} {key}")


def compact_net_and_optimizer(state_dtype: str) -> tuple[nn.Module, Any]:
    """The second layer's weight has rows of 140 and no even shards."""
    net = shard(Net(hidden=140, dtype=torch.float32), mesh=mesh_of(world()))
    options = {"state_dtype": state_dtype, "fp32_state_below": 0, "amsgrad": True}
    return net, make_optimizer(net, **options)


@scenario(2, 4)
def compact_states_under_fsdp2(directory: Path) -> None:
    for state_dtype in ("int8", "bfloat16"):
        options = {"state_dtype": state_dtype, "fp32_state_below": 0}
        net = shard(Net(hidden=140, dtype=torch.float32), mesh=mesh_of(world()))
        check_against_shadow(net, 0, torch.float32, **options)
        for form in (None, FULL, FLAT):
            net, opt = compact_net_and_optimizer(state_dtype)
            train(net, opt, range(2), torch.float32)
            saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=form))
            other, other_opt = compact_net_and_optimizer(state_dtype)
            set_model_state_dict(other, get_model_state_dict(net))
            set_optimizer_state_dict(other, other_opt, saved, options=form)
            state = other_opt.state[other.second.weight]
            assert state["maxva_packed"].placements == other.second.weight.placements
            if state_dtype == "int8":
                assert state["maxva_scale"].shape == (3, 2)
            train(net, opt, range(2, 4), torch.float32)
            train(other, other_opt, range(2, 4), torch.float32)
            assert same_bits(parameters_of(net), parameters_of(other)), form
        # the other forms of the same states
        for group in other_opt.param_groups:
            group["state_dtype"] = "float32"
        train(other, other_opt, range(4, 5), torch.float32)
        assert "exp_avg" in other_opt.state[other.second.weight]
        other_opt.load_state_dict(opt.state_dict())
        assert "exp_avg" in other_opt.state[other.second.weight]


@scenario(2)
def save_compact_states(directory: Path) -> None:
    for state_dtype in ("int8", "bfloat16"):
        net, opt = compact_net_and_optimizer(state_dtype)
        train(net, opt, range(3), torch.float32)
        states = {"net": get_model_state_dict(net), "opt": get_optimizer_state_dict(net, opt)}
        dcp.save(states, checkpoint_id=directory / state_dtype)
        weight = net.second.weight
        expected = {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in opt.state[weight].items()
        }
        if rank() == 0:
            torch.save(expected, directory / f"{state_dtype}.pt")
        train(net, opt, range(3, 5), torch.float32)
        at_end = parameters_of(net)
        if rank() == 0:
            torch.save(at_end, directory / f"{state_dtype}_end.pt")
        dist.barrier()


@scenario(1, 2, 3, 4)
def load_compact_states_of_two_ranks(directory: Path) -> None:
    for state_dtype in ("int8", "bfloat16"):
        net, opt = compact_net_and_optimizer(state_dtype)
        states = {"net": get_model_state_dict(net), "opt": get_optimizer_state_dict(net, opt)}
        dcp.load(states, checkpoint_id=directory / state_dtype)
        set_model_state_dict(net, states["net"])
        set_optimizer_state_dict(net, opt, states["opt"])
        expected = torch.load(directory / f"{state_dtype}.pt")
        found = {key: whole(value) for key, value in opt.state[net.second.weight].items()}
        assert found.keys() == expected.keys()
        assert all(same_bits(found[key], expected[key]) for key in found)
        train(net, opt, range(3, 5), torch.float32)
        for key, value in parameters_of(net).items():
            end = torch.load(directory / f"{state_dtype}_end.pt")[key]
            close(value, end, 1e-3, f"{state_dtype} {key}")


# --- engines that leave plain tensors ------------------------------------------------------------


@scenario(2, 4)
def ddp_keeps_ranks_identical(directory: Path) -> None:
    for options in (
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": True, "static_graph": True},
        {"find_unused_parameters": True},
    ):
        net = Net(dtype=torch.float32)
        ddp = DistributedDataParallel(net, **options)
        opt = make_optimizer(net, max_grad_norm=0.5, trust_ratio=True, weight_decay=0.1)
        misaligned = 0
        for t in range(50):
            odd = t % 2 == 1 if "find_unused_parameters" in options else True
            generator = torch.Generator().manual_seed(1000 * rank() + t)
            ddp(torch.randn(4, 5, generator=generator), odd).square().mean().backward()
            misaligned += sum(
                p.grad is not None and p.grad.data_ptr() % 16 for p in net.parameters()
            )
            opt.step()
            opt.zero_grad()
        assert misaligned or "gradient_as_bucket_view" not in options
        for name, p in net.named_parameters():
            for tensor in (p.detach(), *opt.state.get(p, {}).values()):
                gathered = [torch.empty_like(tensor) for _ in range(world())]
                dist.all_gather(gathered, tensor)
                assert all(same_bits(tensor, other) for other in gathered), (name, options)
        assert int(opt.param_groups[0]["step"]) == 50


@scenario(2, 4)
def zero_redundancy_optimizer(directory: Path) -> None:
    group = dist.group.WORLD
    options = {"lr": 0.1, "max_grad_norm": 0.3, "weight_decay": 0.1, "trust_ratio": True}
    divided = functools.partial(FusedMAdam, norm_process_group=group)

    def trainable(net: nn.Module) -> list[Parameter]:
        return [p for p in net.parameters() if p.requires_grad]

    net, one = Net(), Net()
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    opt = ZeroRedundancyOptimizer(trainable(net), divided, **options)
    truth = FusedMAdam(trainable(one), **options)
    train(ddp, opt, range(3))
    train(one, truth, range(3))
    opt.consolidate_state_dict()
    # copied: ZeroRedundancyOptimizer hands out and loads the very tensors on the CPU
    holder = [copy.deepcopy(opt.state_dict()) if rank() == 0 else None]
    dist.broadcast_object_list(holder)
    other = Net()
    other.load_state_dict(net.state_dict())
    other_ddp = DistributedDataParallel(other, find_unused_parameters=True)
    other_opt = ZeroRedundancyOptimizer(trainable(other), divided, **options)
    other_opt.load_state_dict(holder[0])
    for model, optimizer in ((ddp, opt), (other_ddp, other_opt), (one, truth)):
        train(model, optimizer, range(3, 6))
    assert same_bits(parameters_of(net), parameters_of(other))
    for (name, p), q in zip(net.named_parameters(), one.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-11, name)
    # more ranks than parameters
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    p.grad, q.grad = torch.full((3,), 5.0), torch.full((3,), 5.0)
    ZeroRedundancyOptimizer([p], divided, backend="cpu", **options).step()
    FusedMAdam([q], **options).step()
    assert same_bits(p.detach(), q.detach())
    with raises(ValueError, "norm_process_group", "functools.partial"):
        ZeroRedundancyOptimizer([p], FusedMAdam, norm_process_group=group, **options)


def flattened_net(use_orig_params: bool) -> nn.Module:
    net = Net(dtype=torch.float32)
    net.frozen.requires_grad_(True)
    return FullyShardedDataParallel(
        net, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


@scenario(2, 4)
def fsdp1(directory: Path) -> None:
    world_group = dist.group.WORLD
    for use_orig_params in (True, False):
        for options in (
            {"trust_ratio": True},
            {"max_grad_norm": 1.0},
            {"skip_nonfinite": True},
            {"trust_ratio": True, "norm_process_group": world_group},
        ):
            net = flattened_net(use_orig_params)
            opt = FusedMAdam(net.parameters(), **options)
            loss_of(net, 1, torch.float32).backward()
            with raises(NotImplementedError, "FSDP1", next(iter(options))):
                opt.step()
            assert not opt.state
        for options in ({}, {"max_grad_norm": 0.1, "norm_process_group": world_group}):
            net, one = flattened_net(use_orig_params), Net(dtype=torch.float32)
            one.frozen.requires_grad_(True)
            opt = FusedMAdam(net.parameters(), lr=0.01, **options)
            options.pop("norm_process_group", None)
            truth = FusedMAdam(one.parameters(), lr=0.01, **options)
            # odd steps alone: in a flat parameter an unused layer has a gradient of zeros
            train(net, opt, range(1, 7, 2), torch.float32)
            train(one, truth, range(1, 7, 2), torch.float32)
            with FullyShardedDataParallel.summon_full_params(net):
                for name, q in one.named_parameters():
                    close(net.module.get_parameter(name).detach(), q.detach(), 1e-5, name)
