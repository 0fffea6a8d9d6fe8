"""On several ranks: each test is a scenario of distributed_scenarios.py at one world size.

The ranks of a world size are started once for all of its scenarios.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from distributed_scenarios import WORLDS, scenarios_of
from ranks import run_world


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
