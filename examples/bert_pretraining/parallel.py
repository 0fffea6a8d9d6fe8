"""The processes that train together: torchrun's, or this one alone; knows nothing of BERT.

What the processes tell one another travels between CPUs by gloo; gradients and shards travel by
NCCL where they lie on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from errors import UserError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

MODES = ("none", "ddp", "fsdp2")
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_Result = TypeVar("_Result")


class Ranks:
    """The group of processes; a context manager that joins it and leaves it, unless it is joined.

    Attributes:
        launched: Whether torchrun started this process.
        rank: Number of this process, from 0 on.
        size: Number of processes.
        local: Number of this process on its machine.
    """

    def __init__(self) -> None:
        self.launched = all(name in os.environ for name in _LAUNCHED)
        number = {name: int(os.environ[name]) if self.launched else 0 for name in _LAUNCHED[:2]}
        self.rank, self.local = number["RANK"], number["LOCAL_RANK"]
        self.size = int(os.environ["WORLD_SIZE"]) if self.launched else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes files and speaks to the user."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        self._joins = self.launched and not dist.is_initialized()
        if self._joins:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend)
        return self

    def __exit__(self, *_: object) -> None:
        if self._joins:
            dist.destroy_process_group()

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Prints `text` once, whatever the number of processes."""
        if self.first:
            print(text, file=file, flush=True)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.maximum(0)

    def maximum(self, value: int) -> int:
        """The largest of the processes' values."""
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX))

    def sums(self, *values: float) -> list[float]:
        """Sums over the processes, in float64."""
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.launched:
            dist.all_reduce(tensor, operation)
        return tensor

    def from_first(self, function: Callable[[], _Result]) -> _Result:
        """Calls `function` in process 0 and gives its result, or its failure, to all.

        Raises:
            UserError: It raised this or an OSError.
            SystemExit: It raised this, as argparse does when it has printed what it has to say.
        """
        outcome: list[Any] = ["waiting", None]
        if self.first:
            try:
                outcome = ["done", function()]
            except (UserError, OSError) as error:
                outcome = ["failed", str(error)]
            except SystemExit as error:
                outcome = ["left", error.code]
        if self.launched:
            dist.broadcast_object_list(outcome, src=0)
        kind, result = outcome
        if kind == "failed":
            raise UserError(result)
        if kind == "left":
            raise SystemExit(result)
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends the block in all processes with the UserError that one of them raised in it.

        Raises:
            UserError: That of the first process that has one.
        """
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        for other in self._gather(message):
            if other is not None:
                raise UserError(other)

    def require_same(self, value: object, complaint: str) -> None:
        """Raises a UserError with `complaint` unless all processes have the same value."""
        values = self._gather(value)
        if any(other != values[0] for other in values):
            raise UserError(complaint)

    def _gather(self, value: object) -> list[Any]:
        if not self.launched:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def wrap(module: nn.Module, blocks: list[nn.Module], mode: str, device: torch.device) -> nn.Module:
    """Makes the forward and backward passes of `module` those of a group.

    Args:
        module: Its forward pass computes the losses; with fsdp2 its parameters become DTensors.
        blocks: Submodules that fsdp2 gathers one at a time.
        mode: One of `MODES`.
        device: Where the parameters are.
    """
    if mode == "ddp":
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    if mode == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in [*blocks, module]:
            fully_shard(block, mesh=mesh)
    return module


def exchanging_gradients(module: nn.Module, exchange: bool) -> AbstractContextManager:
    """Whether the backward pass inside the block averages gradients over the processes.

    Every backward pass of an accumulated batch but the last can do without.
    """
    if isinstance(module, DistributedDataParallel) and not exchange:
        return module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(exchange)
    return nullcontext()


def full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of model and optimizer as one process would have it, by parameter names.

    All processes call it; process 0 gets the tensors, on the CPU, the others do not. The optimizer
    has made a step: else it would be given one, at lr 0, to have a state.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return (
        get_model_state_dict(model, options=options),
        get_optimizer_state_dict(model, optimizer, options=options),
    )


def load_full_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Loads what `full_state` gave process 0, whatever the number of processes was and is.

    Args:
        model: The model, its parameters whole or sharded.
        optimizer: Its optimizer.
        model_state: In process 0 the state of the model; ignored elsewhere.
        optimizer_state: The same of the optimizer.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(model, model_state, options=options)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
