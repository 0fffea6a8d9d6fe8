"""The study of the paper's synthetic problems: its formulas, its statistics, its command line."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from definition import Coordinates, Definition
from example_modules import import_example

from maxva_kernels import FusedMAdam

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "reproduction"
SCRIPT = FOLDER / "reproduce.py"
example = import_example(FOLDER, ("nonconvex", "quadratic", "released", "reproduce"))
nonconvex, quadratic = example.nonconvex, example.quadratic

pytestmark = pytest.mark.usefixtures("one_thread")
TRIALS = 30


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The quick study, by the command line as a user has it."""
    out = tmp_path_factory.mktemp("reproduction") / "new" / "folder"
    done = run_script(
        "--quick", "--trials", str(TRIALS), "--repetitions", "4", "--seed", "7", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    return SimpleNamespace(out=out, printed=done.stdout, results=results)


def success(quick: SimpleNamespace, optimizer: str, lr: float) -> int:
    (row,) = (
        row
        for row in quick.results["nonconvex"]["success"]
        if (row["optimizer"], row["lr"]) == (optimizer, lr)
    )
    return row["successes_after"]["5000"]


def test_madam_finds_the_optimum_where_adam_and_amsgrad_do_not(quick: SimpleNamespace) -> None:
    # Of 1000 runs of 5000 iterations (seed 12345) 911, 0 and 15 succeeded. With these rates 30 runs
    # miss the bounds for MAdam and AMSGrad less than once in 1000 times.
    assert success(quick, "MAdam", 1.2) >= 21
    assert success(quick, "Adam", 0.8) == 0
    assert success(quick, "AMSGrad", 1.2) <= 4


def test_adaptive_steps_settle_for_madam_and_amsgrad_only(quick: SimpleNamespace) -> None:
    study = quick.results["nonconvex"]
    index = study["iterations"].index(100)
    change = {
        name: curve["total_change"]["median"][-1] - curve["total_change"]["median"][index]
        for name, curve in study["curves"].items()
    }
    # S_2 of Adam goes on by about 0.027 an iteration, that of the others is bounded by 1 / sqrt(v)
    assert change["Adam"] > 50
    assert max(change["MAdam"], change["AMSGrad"]) < 1


@pytest.mark.parametrize("optimizer", ["MAdam", "LaMAdam"])
def test_maxva_ends_below_the_best_adam(quick: SimpleNamespace, optimizer: str) -> None:
    (table,) = quick.results["quadratic"]["settings"]
    margin = table["optimizers"][optimizer]["reduction"]
    assert margin["value"] > 3 * margin["standard_error"] > 0
    # every trial and repetition counts: four studies, each with its own best point
    assert len(table["optimizers"][optimizer]["reduction_of_repetition"]) == 4


def test_files_and_tables(quick: SimpleNamespace) -> None:
    names = ("nonconvex.png", "quadratic.png", "quadratic_settings.png")
    assert {path.name for path in quick.out.iterdir()} == {"results.json", *names}
    for name in names:
        assert (quick.out / name).read_bytes().startswith(b"\x89PNG")
    best = quick.results["quadratic"]["settings"][0]["optimizers"]["Adam"]["best"]
    assert f"{best['loss']:.2e} ± {best['standard_error']:.1e}" in quick.printed


def short(study: Any, **changes: Any) -> Any:
    return dataclasses.replace(study, **changes)


def test_nonconvex_depends_on_its_seed_alone() -> None:
    study = short(nonconvex.QUICK, iterations=300)
    first, again, other = (nonconvex.run(study, 5, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["curves"] != other["curves"]


@pytest.mark.parametrize("independent_noise", [False, True], ids=["shared", "independent"])
def test_a_repetition_depends_on_its_seed_alone(independent_noise: bool) -> None:
    study = short(quadratic.QUICK, steps=20)
    both = quadratic.simulate(study, 3, [5, 6], independent_noise)
    alone = quadratic.simulate(study, 3, [6], independent_noise)
    for name, runs in both.items():
        # where a coordinate lies in its tensor decides how the last bit is rounded
        torch.testing.assert_close(runs.losses[:, :, 1:], alone[name].losses, rtol=1e-4, atol=0)
        assert (runs.losses[:, :, :1] != alone[name].losses).all()


def test_points_share_a_trials_noise_or_draw_their_own() -> None:
    study = short(quadratic.QUICK, steps=20, lrs=[0.01, 0.01])
    for independent_noise in (False, True):
        runs = quadratic.simulate(study, 3, [0], independent_noise)["MAdam"]
        assert torch.equal(runs.losses[0], runs.losses[1]) != independent_noise


def test_one_trial_against_a_direct_simulation() -> None:
    setting, lr, beta, steps = quadratic.Setting(h2=20.0, sigma=0.2), 0.01, 0.8, 200
    study = quadratic.Study(steps, [setting], [lr], [beta])
    found = quadratic.simulate(study, trials=4, seeds=[3])

    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(1, 2, 4, generator=generator).double() for _ in range(steps + 1)]
    start, *noise = (draw[0, :, 2].numpy() for draw in draws)
    h = np.array([1.0, setting.h2])
    rules = {
        # Adam is MAdam without a range for beta_t
        "Adam": Definition("madam", betas=(0.9, beta), beta_min=beta, eps=1e-10),
        "MAdam": Definition("madam", betas=(0.9, 0.99), beta_min=0.5, eps=1e-10),
        "LaMAdam": Definition("lamadam", betas=(0.9, 0.99), beta_min=0.5, eps=1e-15),
    }
    for name, rule in rules.items():
        trial = Coordinates.start(start)
        for epsilon in noise:
            rule.step([trial], [h * (trial.theta - setting.sigma * epsilon)], lr)
        expected = 0.5 * (h * trial.theta**2).sum()
        # theta is known to some 1e-5 of lr in float32, and the loss is quadratic in it
        assert found[name].losses[0, 0, 0, 2].item() == pytest.approx(expected, rel=2e-3), name


def test_curvature_changes_the_weights_of_the_loss_only() -> None:
    """Adam and MaxVA divide a coordinate's gradient by its own size, so h cancels from theta."""
    paths = [
        quadratic.simulate(
            quadratic.Study(300, [quadratic.Setting(h2, 0.2)], [0.005], [0.8]), 3, [0]
        )
        for h2 in (8.0, 64.0)
    ]
    for name, runs in paths[0].items():
        torch.testing.assert_close(runs.path, paths[1][name].path, rtol=0, atol=1e-5)


def test_released_rule_is_madam_where_its_mean_does_not_matter() -> None:
    # without a range for beta_t both are Adam
    start = torch.randn(50, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone(), start.clone()
    equal = {"betas": (0.9, 0.99), "beta_min": 0.99, "eps": 1e-10}
    released = example.released.MAdamWithMomentumForMean
    optimizers = [
        (ours, FusedMAdam([{"params": [ours], "lr": 0.01}], **equal)),
        (theirs, released([{"params": [theirs], "lr": 0.01}], **equal)),
    ]
    for _ in range(50):
        for theta, optimizer in optimizers:
            theta.grad = 3 * theta
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_nonconvex_gradients_are_those_of_eq_11() -> None:
    def term(i: int, theta: torch.Tensor) -> torch.Tensor:
        size = theta.abs()
        if i == 0:
            return torch.where(size <= 1, 5.5 * theta**2, 11 * size - 5.5)
        return torch.where(size <= 1, -0.5 * theta**2, -size + 0.5)

    theta = torch.tensor([-3.0, -0.7, 0.2, 1.5], dtype=torch.float64, requires_grad=True)
    samples = torch.arange(nonconvex.SAMPLES)
    total = torch.stack([term(i, theta) for i in samples.tolist()])
    torch.testing.assert_close(total.sum(dim=0), nonconvex.objective(theta))
    for i, factor in enumerate(nonconvex.factors(samples)):
        (expected,) = torch.autograd.grad(total[i].sum(), theta, retain_graph=True)
        torch.testing.assert_close(factor * theta.detach().clamp(-1, 1), expected)


def test_update_size_and_total_change_of_one_run() -> None:
    study = short(nonconvex.QUICK, iterations=50)
    curves = nonconvex.run(study, 2, seed=4)["curves"]
    samples = torch.randint(
        nonconvex.SAMPLES, (nonconvex.BLOCK, 2), generator=torch.Generator().manual_seed(4)
    )
    sizes, changes = [], []
    for trial in range(2):
        theta, v, step, size, change = 2.0, 0.0, 0.0, 0.0, 0.0
        for t, sample in enumerate(samples[:50, trial].tolist(), start=1):
            g = (11 if sample == 0 else -1) * max(-1.0, min(1.0, theta))
            v = 0.9 * v + 0.1 * g * g
            previous, step = step, 1 / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
            theta -= 0.8 * step * g
            size += (g * step) ** 2
            change += abs(step - previous)
        sizes.append(size)
        changes.append(change)
    # the median of two is their mean
    assert curves["Adam"]["update_size"]["median"][-1] == pytest.approx(sum(sizes) / 2)
    assert curves["Adam"]["total_change"]["median"][-1] == pytest.approx(sum(changes) / 2)


def test_wilson_interval_against_its_definition() -> None:
    for successes, trials in ((0, 20), (7, 20), (100, 100)):
        for bound in nonconvex.wilson_interval(successes, trials):
            if 0 < bound < 1:
                deviation = abs(successes / trials - bound)
                assert deviation == pytest.approx(
                    1.959964 * math.sqrt(bound * (1 - bound) / trials)
                )
    assert nonconvex.wilson_interval(0, 20)[0] == 0
    assert nonconvex.wilson_interval(100, 100)[1] == 1


def test_standard_error_of_a_reduction_covers_the_truth() -> None:
    # ours is on average 0.6 of the baseline, and correlated with it
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        shared, own, other = (torch.rand(100, generator=generator) for _ in range(3))
        value, error = quadratic.reduction(0.6 * (shared + own), shared + other)
        hits += abs(value - 0.4) < 1.96 * error
    # binomial: 380 expected, standard deviation 4.4
    assert 362 <= hits <= 398


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", "1"], "--trials: '1' is no whole number from 2 on"),
        (["--trials", "many"], "--trials: 'many' is no whole number from 2 on"),
        (["--repetitions", "0"], "--repetitions: '0' is no whole number from 1 on"),
        (["--seed", "-1"], "--seed: '-1' is no whole number from 0 on"),
        (["--seed", str(2**62)], "--seed has to be below"),
        (["--threads", "0"], "--threads: '0' is no whole number from 1 on"),
        (["--trials", "5000", "--repetitions", "3"], "--trials times --repetitions is over 10000"),
        (["--slow"], "unrecognized arguments: --slow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_told_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        example.reproduce.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_a_file_in_the_place_of_the_folder_is_told_before_any_run(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    done = run_script("--quick", "--out", str(taken))
    assert done.returncode == 1
    assert done.stderr.startswith("error: --out: ")
    assert done.stderr.count("\n") == 1
    assert taken.read_text() == "mine"
