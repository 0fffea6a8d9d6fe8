"""The snippets of docs/trainers.md, run as they stand there and compared with a plain loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from exactness import same_bits
from ranks import run_world
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trainer_runs import (
    Model,
    examples,
    new_dataset,
    new_loader,
    new_model,
    parameters_of,
    plain_loop,
    run,
    snippets_of,
)
from trainer_scenarios import scenarios_of

from maxva_kernels import FusedLaMAdam, FusedMAdam


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- clipping twice -------------------------------------------------------------------------------


@pytest.mark.parametrize(("outside", "inside"), [(1.0, 5.0), (1.0, 1.0), (2.0, 0.5)])
def test_clipping_twice_is_clipping_at_the_smaller(outside, inside):
    batch = examples()
    both, once = new_model(), new_model()
    norms = []
    optimizers = [
        FusedLaMAdam(model.parameters(), lr=0.01, max_grad_norm=norm, collect_stats=True)
        for model, norm in ((both, inside), (once, min(inside, outside)))
    ]
    for _ in range(3):
        for model, optimizer in zip((both, once), optimizers, strict=True):
            optimizer.zero_grad()
            model(*batch)["loss"].backward()
            if model is both:
                nn.utils.clip_grad_norm_(model.parameters(), outside)
            optimizer.step()
        norms.append([optimizer.stats()[0]["grad_norm"] for optimizer in optimizers])
    torch.testing.assert_close(parameters_of(both), parameters_of(once), rtol=0, atol=1e-6)
    # as documented: stats() tells by a round number that somebody has clipped before
    for clipped, unclipped in norms:
        assert clipped == pytest.approx(outside, rel=1e-5)
        assert unclipped > 5


# --- Hugging Face Trainer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    return pytest.importorskip("transformers")


def linear(steps: int):
    """Trainer's default schedule."""
    return lambda step: (steps - step) / steps


def test_trainer_with_a_class(transformers):
    snippet = snippets_of("Hugging Face Trainer")[0]
    model = new_model()
    given = {"dataset": new_dataset(), "epochs": 2}
    names = run(snippet, model=model, checkpoint=None, **given)
    groups = names["trainer"].optimizer.optimizer.param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(3, 0.1), (5, 0.0)]

    def optimizer(model):
        return FusedMAdam(model.decay_groups(0.1))

    trained = parameters_of(model)
    truth = {"optimizer": optimizer, "accumulate": 2, "factor": linear(len(model.seen) // 2)}
    assert same_bits(trained, plain_loop(model.seen, clip=1.0, **truth))
    assert not same_bits(trained, plain_loop(model.seen, **truth))

    resumed = new_model(seed=9)
    run(snippet, model=resumed, checkpoint="runs/checkpoint-2", **given)
    assert len(resumed.seen) == len(model.seen) // 2
    assert same_bits(parameters_of(resumed), trained)


@contextlib.contextmanager
def written_gradients(model: Model) -> Iterator[list[bool]]:
    """Per step, whether anybody has written gradients since backward, by their version counters."""
    versions: dict[nn.Parameter, int] = {}
    found: list[bool] = []

    def note(p: nn.Parameter) -> None:
        versions[p] = p.grad._version

    def compare(*_) -> None:
        found.append(any(p.grad._version != version for p, version in versions.items()))

    handles = [p.register_post_accumulate_grad_hook(note) for p in model.parameters()]
    handles.append(register_optimizer_step_pre_hook(compare))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def decayed(model: Model, max_grad_norm: float | None = 1.0) -> FusedMAdam:
    return FusedMAdam(model.parameters(), weight_decay=0.1, max_grad_norm=max_grad_norm)


def test_trainer_with_an_optimizer_that_clips(transformers):
    snippet = snippets_of("Hugging Face Trainer")[1]
    model, resumed = new_model(), new_model(seed=9)
    given = {"dataset": new_dataset(), "epochs": 2}
    with written_gradients(model) as written:
        run(snippet, model=model, checkpoint=None, **given)
    assert written == [False] * len(model.seen)
    trained = parameters_of(model)
    assert same_bits(trained, plain_loop(model.seen, optimizer=decayed))
    unclipped = plain_loop(model.seen, optimizer=lambda model: decayed(model, None))
    assert not same_bits(trained, unclipped)

    run(snippet, model=resumed, checkpoint="runs/checkpoint-4", **given)
    assert len(resumed.seen) == len(model.seen) // 2
    assert same_bits(parameters_of(resumed), trained)


@pytest.mark.parametrize(("outside", "clip"), [("0", None), ("0.5", 0.5)])
def test_trainer_writes_gradients_even_if_told_not_to_clip(transformers, outside, clip):
    """Why docs/trainers.md has a subclass; where this fails, it needs none any more."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("said of transformers 5")
    snippet = snippets_of("Hugging Face Trainer")[1]
    snippet = snippet.replace("trainer = UnclippedTrainer(", "trainer = Trainer(")
    snippet = snippet.replace("max_grad_norm=0\n", f"max_grad_norm={outside}\n")
    model = new_model()
    with written_gradients(model) as written:
        run(snippet, model=model, dataset=new_dataset(), epochs=1, checkpoint=None)
    assert written == [True] * 4
    truth = plain_loop(model.seen, optimizer=decayed, clip=clip)
    assert same_bits(parameters_of(model), truth)


# --- Accelerate -----------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("no", None), ("fp16", None)]
)
def test_accelerate(accelerate, precision, dtype):
    if precision == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is ignored on a CPU only")
    (snippet,) = snippets_of("Accelerate")
    snippet = snippet.replace('mixed_precision="bf16"', f'mixed_precision="{precision}"')
    model, resumed = new_model(), new_model(seed=9)
    run(snippet, model=model, loader=new_loader(), epochs=1, checkpoint=None)
    checkpoint = "runs/accelerate"
    run(snippet, model=resumed, loader=new_loader(2), epochs=1, checkpoint=checkpoint)
    seen = model.seen + resumed.seen
    truth = plain_loop(seen, accumulate=2, autocast=dtype)
    assert same_bits(parameters_of(resumed), truth)


def test_accelerate_clips_as_well(accelerate):
    (snippet,) = snippets_of("Accelerate")
    clip = (
        "            if accelerator.sync_gradients:\n"
        "                accelerator.clip_grad_norm_(model.parameters(), 0.5)\n"
        "            optimizer.step()\n"
    )
    snippet = snippet.replace("            optimizer.step()\n", clip)
    model = new_model()
    run(snippet, model=model, loader=new_loader(), epochs=1, checkpoint=None)
    truth = plain_loop(model.seen, accumulate=2, autocast=torch.bfloat16, clip=0.5)
    assert same_bits(parameters_of(model), truth)


def test_accelerate_with_a_scaler(accelerate):
    """What fp16 adds to Accelerate's wrapper of the optimizer is a scaler; that one runs here."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = new_model()
    opt = FusedMAdam(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    wrapped = AcceleratedOptimizer(opt, scaler=scaler)
    for inputs, labels in new_loader():
        scaler.scale(model(inputs, labels)["loss"]).backward()
        wrapped.step()
        wrapped.zero_grad()
    assert same_bits(parameters_of(model), plain_loop(model.seen, factor=lambda step: 1.0))
    trained = parameters_of(model)
    scaler.scale(model(inputs, torch.full_like(labels, torch.inf))["loss"]).backward()
    wrapped.step()
    assert same_bits(parameters_of(model), trained)
    assert scaler.get_scale() == 2.0**9
    assert not wrapped.step_was_skipped  # as documented, and as with torch's fused AdamW


# --- PyTorch Lightning ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning():
    return pytest.importorskip("lightning")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_lightning(lightning, precision, dtype):
    (snippet,) = snippets_of("PyTorch Lightning")
    if precision == "16-mixed":  # on a CPU `precision` alone would fall back to bfloat16
        snippet = snippet.replace('precision="bf16-mixed"', "plugins=plugin()")

    def plugin():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return lightning.pytorch.plugins.MixedPrecision(precision, device)

    model, resumed = new_model(), new_model(seed=9)
    given = {"plugin": plugin}
    run(snippet, model=model, loader=new_loader(), epochs=1, checkpoint=None, **given)
    checkpoint = "runs/last.ckpt"
    run(snippet, model=resumed, loader=new_loader(2), epochs=2, checkpoint=checkpoint, **given)
    seen = model.seen + resumed.seen
    assert len(model.seen) == len(resumed.seen)
    truth = plain_loop(seen, accumulate=2, autocast=dtype)
    assert same_bits(parameters_of(resumed), truth)
    assert not same_bits(truth, parameters_of(new_model()))


def test_lightning_hands_on_what_stats_tells(lightning):
    model = new_model()
    optimizer = FusedMAdam(model.parameters(), collect_stats=True)
    wrapped = lightning.pytorch.core.optimizer.LightningOptimizer(optimizer)
    model(*examples())["loss"].backward()
    optimizer.step()
    assert wrapped.stats() == optimizer.stats()
    assert wrapped.stats()[0]["grad_norm"] > 5


@pytest.mark.parametrize("optimizer", ["ours", "torch's fused AdamW"])
def test_lightning_refuses_to_clip_under_amp(lightning, optimizer):
    (snippet,) = snippets_of("PyTorch Lightning")
    snippet = snippet.replace('"bf16-mixed"', '"bf16-mixed", gradient_clip_val=0.5')
    if optimizer != "ours":
        snippet = snippet.replace(
            "FusedMAdam(self.parameters(), lr=1e-3, max_grad_norm=1.0)",
            "__import__('torch').optim.AdamW(self.parameters(), fused=True)",
        )
        assert "AdamW" in snippet
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        run(snippet, model=new_model(), loader=new_loader(), epochs=1, checkpoint=None)


def test_lightning_clips_as_well_without_amp(lightning):
    (snippet,) = snippets_of("PyTorch Lightning")
    snippet = snippet.replace('"bf16-mixed"', '"32-true", gradient_clip_val=0.5')
    model = new_model()
    run(snippet, model=model, loader=new_loader(), epochs=1, checkpoint=None)
    assert same_bits(parameters_of(model), plain_loop(model.seen, accumulate=2, clip=0.5))


# --- on two ranks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return run_world(2, directory, tmp_path_factory.mktemp("shared"), "trainer_scenarios")


@pytest.mark.parametrize("scenario", scenarios_of(2))
def test_on_two_ranks(reports, scenario):
    if scenario.startswith("accelerate"):
        pytest.importorskip("accelerate")
    said = reports.get(scenario, [f"was not reached; {reports['']}"])
    assert not any(said), "\n".join(said)
