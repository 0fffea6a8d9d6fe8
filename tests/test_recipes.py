"""The paper's recipe in the pretraining example: phases, `--scale`, LAMB, a run through both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bert_runs import assert_same_training, example, newest_state
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def phases(*argv: str) -> list:
    return example.recipes.phases(example.settings.parse_settings(argv)[0])


@pytest.mark.parametrize("recipe", ["base", "large"])
def test_recipe_is_the_papers(recipe: str) -> None:
    settings, _ = example.settings.parse_settings(["--recipe", recipe])
    first, second = example.recipes.phases(settings)
    assert (first.sequence_length, second.sequence_length) == (128, 512)
    assert (first.steps, second.steps) == (7038, 1563)
    assert (first.batch_size, second.batch_size) == (64 * 1024, 32 * 1024)
    assert first.lr == 3.4e-3
    assert second.lr / first.lr == pytest.approx(4e-3 / 6e-3)
    assert (first.end, second.first_step, second.end) == (7038, 7038, 8601)
    assert settings["weight_decay"] == 0.1
    assert settings["max_grad_norm"] == 1.0
    assert (settings["beta_min"], settings["betas"][1]) == (0.5, 0.999)
    shape = example.recipes.shape(settings)
    assert shape == example.model.SHAPES[recipe]
    # The paper names NVIDIA's scripts for the rest: the momentum of their LAMB and their schedule.
    assert settings["betas"][0] == 0.9
    assert (first.warmup, second.warmup) == (0.2843, 0.128)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=first.lr)
    from_start = settings["decay_from"] == "start"
    schedule = example.optimizers.schedule(
        optimizer, (first, second), settings["decay_power"], from_start
    )
    (lr_at,) = schedule.lr_lambdas
    for phase in (first, second):
        rising = round(phase.warmup * phase.steps)
        assert rising == {7038: 2001, 1563: 200}[phase.steps]
        for step in range(phase.steps):
            # Their step counts from 1 while lr rises; the decay has its value after `step` steps.
            share = (step + 1) / rising if step < rising else (1 - step / phase.steps) ** 0.5
            found = first.lr * lr_at(phase.first_step + step)
            assert found == pytest.approx(phase.lr * share, rel=1e-9), step


def test_recipe_gives_way_to_the_command_line() -> None:
    first, second = phases("--recipe", "base", "--lr", "3e-3", "--micro-batch-size", "64")
    assert (first.lr, second.lr) == pytest.approx((3e-3, 2e-3))
    assert first.micro_batch_size == second.micro_batch_size == 64
    assert [p.lr for p in phases("--recipe", "base", "--lr", "1", "0.5")] == [1, 0.5]
    assert phases("--recipe", "base", "--optimizer", "lamb")[0].lr == 6e-3
    assert phases("--recipe", "base", "--optimizer", "adamw")[0].lr == 8e-4
    assert [p.steps for p in phases("--steps", "5", "6")] == [5, 6]


def test_scale_shrinks_coherently() -> None:
    full = phases("--recipe", "base")
    for scale in (0.5, 0.1, 0.001):
        argv = ["--recipe", "base", "--scale", str(scale)]
        small = phases(*argv)
        for before, after in zip(full, small, strict=True):
            assert after.steps == round(scale * before.steps)
            ratio = after.batch_size / before.batch_size
            assert scale / 2**0.5 <= ratio <= scale * 2**0.5
            assert math.log2(after.batch_size).is_integer()
            assert after.lr == pytest.approx(before.lr * ratio**0.5)
            assert after.batch_size % after.micro_batch_size == 0
            assert after.warmup == before.warmup
    shape = example.recipes.shape(
        example.settings.parse_settings(["--recipe", "base", "--scale", "0.125"])[0]
    )
    # A quarter of 12 layers and of 12 heads of 64: a 64th of the encoder, as of steps times batch.
    assert (shape.layers, shape.heads, shape.hidden) == (3, 3, 192)


def test_uneven_lists_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--steps", "1", "2", "3", "--lr", "1", "2", "--out", str(tmp_path / "run")]
    assert example.pretrain.main(argv) == 2
    assert "--steps: not as many values" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def scaled_run(corpus: Path, out: Path, *more: str) -> list[str]:
    options = (
        "--recipe base --scale 0.0005 --vocab-size 256 --sequence-length 32 64 --eval-examples 8 "
        "--eval-every 2 --checkpoint-every 1 --threads 1 --device cpu"
    )
    return ["--corpus", str(corpus), "--out", str(out), *options.split(), *more]


@pytest.fixture(scope="module")
def both_phases(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only checkpoints are those of its end."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    threads = torch.get_num_threads()
    assert example.pretrain.main(scaled_run(corpus_file, out)) == 0
    torch.set_num_threads(threads)
    return out


def test_one_command_runs_both_phases(both_phases: Path) -> None:
    metrics = json.loads((both_phases / "metrics.json").read_text())
    first, second = metrics["phases"]
    assert (first["steps"], second["steps"]) == (4, 1)
    assert (first["sequence_length"], second["sequence_length"]) == (32, 64)
    assert metrics["steps"] == len(metrics["history"]["train"]) == 5
    # Evaluated at every second step, at the ends of both phases, and at the start of each.
    assert [step for step, _ in metrics["history"]["held_out"]] == [0, 2, 4, 4, 5]
    state = newest_state(both_phases)
    steps = {int(s["step"]) for s in state["optimizer"]["state"].values() if "step" in s}
    assert steps == {5}


@pytest.mark.parametrize("stopped_after", [3, 4])
def test_resumes_into_the_right_phase(
    stopped_after: int, both_phases: Path, corpus_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / "run"

    class Killed(BaseException):
        pass

    save = example.pretrain.Run.save

    def save_and_die(run: object) -> Path:
        path = save(run)
        if run.step == stopped_after:
            raise Killed
        return path

    with monkeypatch.context() as patch:
        patch.setattr(example.pretrain.Run, "save", save_and_die)
        with pytest.raises(Killed):
            example.pretrain.main(scaled_run(corpus_file, out))
    capsys.readouterr()
    assert example.pretrain.main(["--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert ("phase 1 of 2" in printed) == (stopped_after < 4)
    assert "phase 2 of 2" in printed
    assert_same_training(newest_state(both_phases), newest_state(out))


def test_a_resumed_recipe_refuses_another(both_phases: Path, capsys: pytest.CaptureFixture) -> None:
    resume = ["--out", str(both_phases), "--resume"]
    for more, complaint in (
        (["--scale", "0.5"], "--scale 0.0005, not 0.5"),
        (["--recipe", "large"], "--recipe base, not large"),
        (["--lr", "0.1"], "--lr 0.0034"),
    ):
        assert example.pretrain.main([*resume, *more]) == 2
        assert complaint in capsys.readouterr().err


def test_lamb_is_lamb() -> None:
    """Three steps beside LAMB as You et al. print it, with bias correction, in float64."""
    torch.manual_seed(0)
    lr, decay, eps = 0.01, 0.1, 1e-6
    w, b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
    groups = [{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}]
    settings = {
        "optimizer": "lamb",
        "betas": [0.9, 0.999],
        "beta_min": 0.5,
        "max_grad_norm": 1.0,
        "state_dtype": "float32",
    }
    _, step = example.optimizers.build_optimizer(groups, settings, lr)
    expected = [p.detach().double().clone() for p in (w, b)]
    m, v = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for t in range(1, 4):
        grads = [3 * torch.randn(p.shape) for p in (w, b)]
        w.grad, b.grad = grads
        step()
        norm = torch.cat([g.double().flatten() for g in grads]).norm()
        assert norm > 1
        for i, lam in enumerate((decay, 0.0)):
            g = grads[i].double() / norm
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            update = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + eps)
            update += lam * expected[i]
            ratio = expected[i].norm() / update.norm() if lam else 1.0
            expected[i] -= lr * ratio * update
    for found, wanted in zip((w, b), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_no_number_ends_the_run_and_is_recorded(
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    micro_losses = example.pretrain.Run._micro_losses

    def lost(run: object, batch: dict) -> tuple:
        mlm, *others = micro_losses(run, batch)
        return (mlm * float("nan") if run.step == 2 and mlm.requires_grad else mlm, *others)

    monkeypatch.setattr(example.pretrain.Run, "_micro_losses", lost)
    assert example.pretrain.main(scaled_run(corpus_file, tmp_path / "run")) == 3
    assert "--lr: the loss is nan at step 3" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["diverged_at"] == 3
    assert metrics["checkpoint"] is None
    assert len(metrics["history"]["train"]) == 3
