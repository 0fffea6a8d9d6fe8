"""The benchmarks' own code: its comparisons can be made, the model of scaling is what it says."""

from __future__ import annotations

import pytest
from bench_step import COMPARISONS, backends
from scaling import STATE_BYTES, largest_share, make_optimizer, state_bytes

from maxva_kernels.profile.contenders import parse
from maxva_kernels.profile.models import MODELS


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_name_what_there_is(name):
    model, baseline, others, _ = COMPARISONS[name]
    assert model in MODELS
    assert all(parse(each, backends(name)) for each in (baseline, *others))


@pytest.mark.parametrize(
    ("strategy", "ranks", "shards", "share"),
    [
        ("DDP", 4, 1, 19),
        ("FSDP2", 2, 1, 3 * 3 + 2),
        ("FSDP2", 4, 1, 2 * 3 + 1),
        ("FSDP2", 10_000, 1, 3 + 1),
        ("HSDP", 4, 2, 3 * 3 + 2),
        ("ZeRO-1", 2, 1, 15),
        ("ZeRO-1", 10_000, 1, 15),
    ],
)
def test_the_fullest_ranks_share(strategy, ranks, shards, share):
    """Rows are never divided by fully_shard, parameters never by ZeRO-1."""
    assert largest_share([((5, 3), True), ((4,), False)], strategy, ranks, shards) == share


def test_states_take_what_the_model_says():
    optimizer = make_optimizer([((5, 3), True), ((4,), False)], "DDP", mesh=None)
    optimizer.step()
    assert state_bytes(optimizer) == STATE_BYTES * 19
