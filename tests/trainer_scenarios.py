"""What two ranks do in tests/test_trainers.py: snippets of docs/trainers.md over sharded models."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from exactness import same_bits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trainer_runs import (
    Model,
    new_loader,
    new_model,
    parameters_of,
    plain_loop,
    run,
    snippets_of,
)

from maxva_kernels import FusedMAdam


def scenarios_of(world: int) -> dict[str, Callable[[Path], None]]:
    return {scenario.__name__: scenario for scenario in (own_loop, accelerate_fsdp2)}


def whole(model: nn.Module) -> list[Tensor]:
    """The parameters as on one rank; all ranks have to ask."""
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return [p.detach().full_tensor() for p in model.parameters()]


def of_all_ranks(seen: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Each step's batches of all ranks as one batch."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seen)
    return [
        (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))
        for step in zip(*gathered, strict=True)
    ]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


def own_loop(shared: Path) -> None:
    (snippet,) = snippets_of("A loop of your own with FSDP2, as in torchtitan")
    os.chdir(shared)
    fresh: list[Tensor] = []

    class NotedModel(Model):
        def init_weights(self) -> None:
            torch.manual_seed(dist.get_rank())
            super().init_weights()
            fresh[:] = whole(self)

    def train(epochs: int, checkpoint: str | None) -> Model:
        return run(
            snippet, Model=NotedModel, device="cpu", epochs=epochs, checkpoint=checkpoint,
            loader=new_loader(seed=dist.get_rank()),
        )["model"]  # fmt: skip

    undisturbed = train(2, None)
    start = new_model()
    with torch.no_grad():
        for p, q in zip(start.parameters(), fresh, strict=True):
            p.copy_(q)
    seen = of_all_ranks(undisturbed.seen)
    truth = plain_loop(seen, start=copy.deepcopy(start))
    unclipped = plain_loop(seen, start=start, optimizer=lambda m: FusedMAdam(m.parameters()))
    moved = distance(truth, fresh)
    assert distance(unclipped, truth) > 0.01 * moved
    assert distance(whole(undisturbed), truth) < 1e-4 * moved

    train(1, None)
    resumed = train(1, "runs/fsdp2")
    assert same_bits(whole(resumed), whole(undisturbed))


def accelerate_fsdp2(shared: Path) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import DistributedType, PartialState

    (snippet,) = snippets_of("Accelerate")
    snippet = snippet.replace("Accelerator(", "Accelerator(fsdp_plugin=plugin, ").replace(
        'mixed_precision="bf16"', 'mixed_precision="no"'
    )
    os.chdir(shared)
    rank = dist.get_rank()
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
    environment = {key: str(value) for key, value in environment.items()}
    two_gpus = mock.patch.object(
        PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)
    )

    def train(model: Model, loader: Any, epochs: int, checkpoint: str | None) -> nn.Module:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        return run(
            snippet, model=model, loader=loader, epochs=epochs, checkpoint=checkpoint, plugin=plugin
        )["model"]

    with (
        mock.patch.dict(os.environ, {**environment, "ACCELERATE_TORCH_DEVICE": "cpu"}),
        two_gpus,
    ):
        undisturbed = train(new_model(), new_loader(), 2, None)
        seen = of_all_ranks(undisturbed.seen)
        # a scheduler that Accelerate has prepared steps once per process
        truth = plain_loop(seen, accumulate=2, factor=lambda step: 0.9 ** (2 * step))
        moved = distance(truth, parameters_of(new_model()))
        assert distance(whole(undisturbed), truth) < 1e-4 * moved

        train(new_model(), new_loader(), 1, None)
        resumed = train(new_model(seed=9), new_loader(), 1, "runs/accelerate")
        assert same_bits(whole(resumed), whole(undisturbed))
