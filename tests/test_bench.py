"""The benchmarks' own code: its comparisons can be made, the model of scaling is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compact_states
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


def test_a_new_section_takes_the_place_of_the_old() -> None:
    old = "# Title\n\nHead.\n\n## One\n\na\n\n## Two\n\nb\n"
    assert compact_states.merged(old, "## One\n\nc\n\n- d\n") == old.replace("a\n", "c\n\n- d\n")
    assert compact_states.merged(old, "## Three\n\nc\n") == f"{old}\n## Three\n\nc\n"


def test_the_document_has_every_section_once() -> None:
    document = (Path(__file__).parents[1] / "docs" / "compact_states.md").read_text()
    head, sections = compact_states._sections(document)
    assert head + "\n".join(sections.values()) == document
    options = SimpleNamespace(quick=True, torchao=False)
    assert compact_states.of_rounding(options).splitlines()[0] in sections


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pretraining example, whose runs end at once; `calls` are their options."""
    from bert_runs import example

    calls: list[list[str]] = []

    def call(driver: Any, script: str, options: list[str], log: Path | None) -> None:
        if script == "prepare.py":
            return
        if "--stop" in calls:
            raise example.errors.UserError("killed")
        calls.append(options)
        told = dict(zip(options[::2], options[1::2], strict=False))
        folder = Path(options[options.index("--out") + 1])
        folder.mkdir(parents=True)
        kind, seed = options[options.index("--state-dtype") + 1], float(told.get("--seed", 0))
        end = 4 + seed / 10 + {"float32": 0.0, "bfloat16": 0.5, "int8": 1.0}[kind]
        metrics = {
            "history": {
                "train": [[7.0, 6.0], [6.0, end]],
                "held_out": [[0, 6.0], [2, end]],
                "telemetry": [],
            },
            "parameters": 1000, "unigram_mlm": 5.5, "diverged_at": None, "train_seconds": 2.0,
            "optimizer_share": 0.25, "data_share": 0.0,
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(example.compare.Driver, "_call", call)
    monkeypatch.setattr(example.compare, "end_as_by_ctrl_c", lambda: None)
    return SimpleNamespace(compare=example.compare, comparison=example.comparison, calls=calls)


@pytest.mark.parametrize("has_peer", [True, False])
def test_the_pretraining_study(
    has_peer: bool, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compact_states.importlib.util, "find_spec", lambda name: object() if has_peer else None
    )
    arguments = (example.compare, example.comparison, tmp_path / "study", False, False)
    text = compact_states.pretraining(*arguments, tmp_path / "images")
    jobs = [" ".join(options) for options in example.calls]
    asked = {
        tuple(re.findall(r"--optimizer (\w+) --lr 0.002 --seed (\d) --state-dtype (\w+)", job)[0])
        for job in jobs
    }
    kinds = [("madam", "float32"), ("madam", "bfloat16"), ("madam", "int8"), ("adamw", "float32")]
    kinds += [("adamw", "int8")] * has_peer
    assert asked == {(optimizer, str(s), kind) for optimizer, kind in kinds for s in (0, 1, 2)}
    assert len(jobs) == len(asked)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [
        "MAdam float32", "MAdam bfloat16", "MAdam int8", "AdamW float32",
        *["AdamW 8-bit (bitsandbytes)"] * has_peer,
    ]  # fmt: skip
    assert rows[2][1:] == ["4.100 ± 0.100", "4.100 ± 0.100", "–", "250.00"]
    assert rows[3][1:] == ["4.600 ± 0.100", "4.600 ± 0.100", "+0.500 ± 0.000", "250.00"]
    assert rows[4][2:4] == ["5.100 ± 0.100", "+1.000 ± 0.000"]
    image = tmp_path / "images" / "compact_states.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    # all results are kept
    example.calls[:] = ["--stop"]
    assert (
        compact_states.pretraining(*arguments, tmp_path / "images").splitlines()[7:]
        == (text.splitlines()[7:])
    )
