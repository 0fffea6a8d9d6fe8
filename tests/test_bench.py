"""The benchmarks' own code: baselines compute what they claim, tables say what was measured."""

from __future__ import annotations

import pytest
import torch
from foreach_maxva import ForeachMAdam
from measure import Rounds, Timing, copied, make_groups, parameters
from scaling import STATE_BYTES, largest_share, make_optimizer, state_bytes
from shapes import MODELS, num_parameters
from step_report import plot, table

from maxva_kernels import MAdam


def test_the_foreach_baseline_is_madam():
    shapes = [((4, 5), True), ((7,), False)]
    groups = make_groups(shapes)
    other_groups = [
        {**group, "params": [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]}
        for group in groups
    ]
    baseline, reference = ForeachMAdam(copied(groups)), MAdam(copied(other_groups))
    for t in range(5):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(parameters(groups), parameters(other_groups), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        baseline.step()
        reference.step()
    for p, q in zip(parameters(groups), parameters(other_groups), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    # BertForPreTraining of transformers, embeddings tied, vocabulary 30,522
    [("bert-base", 206, 110_106_428), ("bert-large", 398, 336_226_108)],
)
def test_parameter_lists_are_those_of_bert(model, tensors, parameters):
    assert len(MODELS[model]) == tensors
    assert num_parameters(MODELS[model]) == parameters


def test_bert_base_has_the_shapes_of_transformers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.BertForPreTraining(transformers.BertConfig())
    expected = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(shape for shape, _ in MODELS["bert-base"]) == expected


def test_ratios_are_medians_of_pairs():
    ours, theirs = Timing([3.0, 30.0, 9.0]), Timing([2.0, 10.0, 9.0])
    assert ours.median == 9.0
    assert ours.ratio_to(theirs) == 1.5


def test_every_contender_runs_once_a_round_and_none_is_always_first():
    order = []
    rounds = Rounds({name: lambda name=name: order.append(name) for name in "abc"})
    rounds.warm_up(1)
    for _ in range(3):
        rounds()
    assert [order[k : k + 3] for k in range(3, 12, 3)] == [
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    assert {name: len(timing.seconds) for name, timing in rounds.timings().items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }


def test_table_and_plot(tmp_path):
    row = {
        "comparison": "bert-base",
        "contender": "FusedMAdam",
        "ms": 12.345,
        "bytes_per_parameter": 44,
        "gb_per_s": 51.27,
        "share_of_stream": 0.934,
        "ratio": 1.5149,
        "baseline": "AdamW(fused=True)",
    }
    about = {"device": "a processor", "torch": "2.x"}
    text = table([row], about)
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == [
        "bert-base", "FusedMAdam", "12.35", "44", "51.3", "93%", "1.51", "AdamW(fused=True)",
    ]  # fmt: skip
    assert text.startswith("device a processor, torch 2.x")
    plot([row], about, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


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
