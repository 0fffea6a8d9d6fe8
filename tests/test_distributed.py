"""On several ranks: each test is a scenario of distributed_scenarios.py at one world size.

The ranks of a world size are started once for all of its scenarios.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_scenarios import WORLDS, scenarios_of
from ranks import run_world
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from maxva_kernels import FusedMAdam


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Runs a world the first time it is asked for; the others load what 2 ranks have saved."""
    shared = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def run(world: int) -> dict[str, list[str]]:
        if world != WORLDS[0]:
            run(WORLDS[0])
        directory: Path = tmp_path_factory.mktemp(f"world{world}")
        return run_world(world, directory, shared)

    return run


@pytest.mark.parametrize(
    ("world", "scenario"), [(world, name) for world in WORLDS for name in scenarios_of(world)]
)
def test_on_ranks(worlds, world, scenario):
    reports = worlds(world)
    said = reports.get(scenario, [f"was not reached; {reports['']}"])
    assert not any(said), "\n".join(said)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "trust_ratio": True}], ids=str)
def test_memory_of_many_ranks_can_be_estimated_on_one(options):
    ranks, size = 4, 512
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        with FakeTensorMode():
            model = fully_shard(torch.nn.Linear(size, size), mesh=mesh)
            optimizer = FusedMAdam(model.parameters(), max_grad_norm=1.0, **options)
            for _ in range(2):
                model(torch.ones(8, size)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        memory = optimizer.state_memory()
    finally:
        dist.destroy_process_group()
    vectors = 16 * size // ranks
    per_element, per_block = (4, 4) if options else (16, 0)
    assert memory["states"] == per_element * size * size // ranks + vectors
    assert memory["scales"] == per_block * size * size // 128 // ranks
