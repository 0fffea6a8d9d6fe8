"""docs/scaling.md's model of the optimizer step over ranks, and gloo runs to check it against.

python bench/scaling.py check    1, 2 and 4 ranks on this machine's CPU, beside the model
python bench/scaling.py paper    the model alone, from 1 to 10,000 ranks
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from maxva_kernels import FusedMAdam
from maxva_kernels.profile.measure import STREAMS, environment, make_groups, stream
from maxva_kernels.profile.models import MODELS, Shapes, bert, num_parameters
from maxva_kernels.profile.traffic import DTYPE_MODES, maxva_bytes

#: With clipping, as everything here.
BYTES = maxva_bytes("madam", DTYPE_MODES["float32"], frozenset({"clip"}))
STREAM_BYTES = STREAMS["cpu"][1]
#: m, u, v and w.
STATE_BYTES = 16
CHECKED = bert(layers=4, hidden=512)
STREAMED = 16_000_000


# The model.


def rows_of_rank_0(shape: tuple[int, ...], shards: int) -> int:
    """Elements of a parameter that `fully_shard` gives to rank 0: rows are never divided."""
    return -(-shape[0] // shards) * math.prod(shape[1:])


def largest_share(shapes: Shapes, strategy: str, ranks: int, shards: int) -> int:
    """Parameters that the rank with the most of them updates.

    Args:
        shapes: the model.
        strategy: "DDP", "FSDP2", "HSDP" (FSDP2 over `shards` ranks) or "ZeRO-1".
        ranks: all of them.
        shards: ranks of an HSDP replica.
    """
    if strategy == "DDP":
        return num_parameters(shapes)
    if strategy == "ZeRO-1":
        # Whole parameters, the largest first to the rank that has least: as torch divides them.
        loads = [0] * min(ranks, len(shapes))
        for size in sorted((math.prod(shape) for shape, _ in shapes), reverse=True):
            loads[loads.index(min(loads))] += size
        return max(loads)
    pieces = ranks if strategy == "FSDP2" else min(ranks, shards)
    return sum(rows_of_rank_0(shape, pieces) for shape, _ in shapes)


@dataclass(frozen=True)
class Hardware:
    """What the paper model assumes of a GPU and its network; not measured here."""

    bandwidth: float = 2.7e12  # bytes/s of device memory: 80% of an H100 SXM's 3.35e12
    hop: float = 5e-6  # s for a small message to pass one stage of a tree of ranks
    fixed: float = 1e-4  # s of Python, checks and launches in a step
    link: float = 5e10  # bytes/s that reach a rank: one 400 Gbit/s port


def paper_step(shapes: Shapes, strategy: str, ranks: int, shards: int, on: Hardware) -> float:
    """Seconds of an optimizer step with clipping on the slowest rank."""
    share = largest_share(shapes, strategy, ranks, shards)
    seconds = on.fixed + BYTES * share / on.bandwidth
    divided = {"DDP": 1, "HSDP": min(ranks, shards)}.get(strategy, ranks)
    seconds += 2 * math.ceil(math.log2(divided)) * on.hop
    if strategy == "ZeRO-1":
        seconds += 4 * num_parameters(shapes) * (1 - 1 / ranks) / on.link
    return seconds


def decoder_70b() -> Shapes:
    """Shapes of a Llama-3-70B: 80 layers of 8192, grouped-query attention."""
    layer: Shapes = [((8192, 8192), True)] * 2 + [((1024, 8192), True)] * 2
    layer += [((28672, 8192), True)] * 2 + [((8192, 28672), True)] + [((8192,), False)] * 2
    return [*layer * 80, *[((128256, 8192), True)] * 2, ((8192,), False)]


def paper() -> None:
    shards, on = 64, Hardware()
    print(f"{on}, HSDP over {shards} ranks; states in GB | step in ms, per rank\n")
    for name, shapes in (
        ("BERT-large", MODELS["bert-large"].shapes),
        ("decoder of 70 B", decoder_70b()),
    ):
        print(f"| {name}, ranks | DDP | FSDP2 | HSDP | ZeRO-1 |\n|---|---|---|---|---|")
        for ranks in (1, 8, 64, 512, 1024, 4096, 10_000):
            cells = []
            for strategy in ("DDP", "FSDP2", "HSDP", "ZeRO-1"):
                states = STATE_BYTES * largest_share(shapes, strategy, ranks, shards) / 1e9
                step = 1e3 * paper_step(shapes, strategy, ranks, shards, on)
                cells.append(f"{states:.3g} GB, {step:.3g} ms")
            print(f"| {ranks:,} | " + " | ".join(cells) + " |")
        print()


# The check.


def make_optimizer(shapes: Shapes, strategy: str, mesh: DeviceMesh | None) -> torch.optim.Optimizer:
    """An optimizer with gradients, its parameters placed as the strategy places them."""
    groups = make_groups(shapes)
    if strategy in ("FSDP2", "HSDP"):
        placements = [Shard(0)] if strategy == "FSDP2" else [Replicate(), Shard(0)]
        for group in groups:
            group["params"] = [sharded(p, mesh, placements) for p in group["params"]]
    if strategy != "ZeRO-1":
        return FusedMAdam(groups, max_grad_norm=1.0)
    # Importing it warns of what torch.jit is about to lose.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    inner = partial(FusedMAdam, norm_process_group=dist.group.WORLD)
    return ZeroRedundancyOptimizer(groups, optimizer_class=inner, max_grad_norm=1.0)


def sharded(p: torch.nn.Parameter, mesh: DeviceMesh, placements: list) -> torch.nn.Parameter:
    divided = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
    divided.grad = distribute_tensor(p.grad, mesh, placements)
    return divided


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's states, step counters aside."""
    inner = getattr(optimizer, "optim", optimizer)  # that of a ZeroRedundancyOptimizer
    tensors = [t for state in inner.state.values() for t in state.values() if t.dim()]
    return sum(
        (t.to_local() if isinstance(t, DTensor) else t).untyped_storage().nbytes() for t in tensors
    )


def slowest(function: Callable[[], object]) -> float:
    """Seconds of a call that all ranks make at once, on the slowest of them."""
    dist.barrier()
    start = time.perf_counter()
    function()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def check_strategy(strategy: str, ranks: int, rounds: int) -> list[float]:
    """Medians over the rounds of the columns that `check` prints, in SI units."""
    mesh = init_device_mesh("cpu", (2, ranks // 2) if strategy == "HSDP" else (ranks,))
    optimizer = make_optimizer(CHECKED, strategy, mesh)
    # The same number of tensors with next to nothing in them: what does not grow with size.
    fixed = make_optimizer([((ranks,), decays) for _, decays in CHECKED], strategy, mesh)
    share = largest_share(CHECKED, strategy, ranks, shards=ranks // 2)
    update = BYTES * share
    add = stream(STREAMED)
    # As many bytes as the update moves, so that other programs disturb both alike.
    repeats = max(1, round(update / (STREAM_BYTES * STREAMED)))
    norm = torch.zeros(1, dtype=torch.float64)
    part = torch.zeros(num_parameters(CHECKED) // ranks)

    def add_repeatedly() -> None:
        for _ in range(repeats):
            add()

    def broadcast_parts() -> None:
        for source in range(ranks if strategy == "ZeRO-1" else 0):
            dist.broadcast(part, source)

    table: list[list[float]] = []
    for _ in range(rounds + 2):
        second = slowest(add_repeatedly) / (repeats * STREAM_BYTES * STREAMED)
        reduce = slowest(lambda: dist.all_reduce(norm))
        small = slowest(fixed.step)
        model = update * second + small + slowest(broadcast_parts)
        step = slowest(optimizer.step)
        table.append([step, model, step / model, 1 / second, reduce, small])
    states = torch.tensor(state_bytes(optimizer))
    dist.all_reduce(states, dist.ReduceOp.MAX)
    medians = [statistics.median(column) for column in zip(*table[2:], strict=True)]
    return [states.item(), STATE_BYTES * share, *medians]


def check_rank(rank: int, ranks: int, rounds: int, store: str, strategies: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for strategy in strategies:
        states, states_model, step, model, ratio, rate, reduce, small = check_strategy(
            strategy, ranks, rounds
        )
        if rank == 0:
            print(
                f"| {strategy} | {ranks} | {states / 1e6:.1f} | {states_model / 1e6:.1f} | "
                f"{1e3 * step:.1f} | {1e3 * model:.1f} | {ratio:.2f} | {rate / 1e9:.1f} | "
                f"{1e6 * reduce:.0f} | {1e3 * small:.1f} |",
                flush=True,
            )
    dist.destroy_process_group()


def check(rounds: int) -> None:
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(f"{num_parameters(CHECKED):,} parameters in {len(CHECKED)} tensors, {rounds} rounds\n")
    print(
        "| strategy | ranks | states MB | model | step ms | model | ratio | GB/s a rank | "
        "all-reduce us | fixed ms |\n|" + "---|" * 10
    )
    for ranks in (1, 2, 4):
        strategies = ["DDP", "FSDP2", "ZeRO-1"] if ranks < 4 else ["DDP", "FSDP2", "HSDP", "ZeRO-1"]
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, rounds, str(Path(folder) / "store"), strategies)
            multiprocessing.start_processes(
                check_rank, args=arguments, nprocs=ranks, start_method="fork"
            )


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=("check", "paper"))
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    paper() if chosen.what == "paper" else check(chosen.rounds)
