"""The loop of NVIDIA's BERT pretraining script in small, with the swap of docs/nvidia_bert.md.

Kept are the order of calls and all that reaches into the optimizer: a scheduler that reads
param_groups[0]["step"] and rebinds every lr to one device tensor, scheduler before scaler before
optimizer, statistics through `_found_inf_per_device`, accumulation, float16 models with
setup_fp32_params, checkpoints, the restart in phase 2, capture of the whole step.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import maxva_kernels
from maxva_kernels import FusedLaMAdam, FusedMAdam

pytestmark = pytest.mark.usefixtures("one_thread")

BASE_LR, WARMUP, TOTAL_STEPS = 2.0**-6, 0.25, 32
CUDA = maxva_kernels.backends()["cuda"]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA != "available", reason=f"backend 'cuda': {CUDA}"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
PRECISIONS = ["fp32", "bf16 autocast", "fp16 autocast", "fp16 model"]


def scheduled(step: int) -> float:
    """Lr of a step, counted from 1."""
    progress = step / TOTAL_STEPS
    return BASE_LR * (progress / WARMUP if progress < WARMUP else (1 - progress) ** 0.5)


class PolyWarmUp(LRScheduler):
    """Warm-up and square-root decay, computed on the device from the optimizer's own count."""

    def __init__(self, optimizer: Any, device: Any) -> None:
        self.total_steps = torch.tensor(TOTAL_STEPS, device=device)
        self.warmup = torch.tensor(WARMUP, device=device)
        self.base_lr = torch.tensor(BASE_LR, device=device)
        self.first = torch.tensor(1.0, device=device)  # not in step(), which may be captured
        super().__init__(optimizer, torch.tensor(-1, device=device))

    def step(self, epoch: Any = None) -> None:
        group = self.optimizer.param_groups[0]
        self.last_epoch = group["step"] + 1 if "step" in group else self.first
        progress = self.last_epoch / self.total_steps
        rising = self.base_lr * progress / self.warmup
        lr = torch.where(progress < self.warmup, rising, self.base_lr * (1 - progress) ** 0.5)
        for group in self.optimizer.param_groups:
            group["lr"] = lr


class SmallBert(nn.Module):
    """One-hot words: an nn.Embedding adds gradients up by atomics, in no fixed order, on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Linear(40, 16, bias=False)
        self.LayerNorm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        words = nn.functional.one_hot(tokens, 40).to(self.embeddings.weight.dtype)
        return self.decoder(torch.tanh(self.LayerNorm(self.embeddings(words))))


class Run:
    """What the script keeps between its functions."""

    def __init__(self, device: str, precision: str, cls: Any = FusedMAdam, saved: Any = None):
        torch.manual_seed(0)
        self.device, self.precision = torch.device(device), precision
        self.model = SmallBert().to(device)
        if precision == "fp16 model":
            self.model.half()
        if saved:
            self.model.load_state_dict(saved["model"])
        named = list(self.model.named_parameters())
        exempt = ("bias", "LayerNorm")
        groups = [
            {"params": [p for n, p in named if not any(e in n for e in exempt)]},
            {"params": [p for n, p in named if any(e in n for e in exempt)], "weight_decay": 0.0},
        ]
        self.optimizer = cls(
            groups, lr=BASE_LR, weight_decay=0.1, max_grad_norm=1.0, master_weights=True,
            capturable=True,
        )  # fmt: skip
        self.scheduler = PolyWarmUp(self.optimizer, device)
        self.scaler = torch.amp.GradScaler(
            device, init_scale=2.0**10, enabled="fp16" in precision, growth_interval=10**6
        )
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        self.optimizer.setup_fp32_params()
        self.lr_seen: list[Tensor] = []
        self.overflow_seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor]) -> None:
        dtypes = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
        dtype = dtypes.get(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            scores = self.model(batch["tokens"])
            loss = nn.functional.cross_entropy(scores.float(), batch["labels"])
        self.scaler.scale(loss * batch["factor"]).backward()

    def optimizer_step(self) -> None:
        self.scheduler.step()
        self.scaler.step(self.optimizer)
        self.lr_seen.append(self.optimizer.param_groups[0]["lr"].clone())
        if self.scaler.is_enabled():
            found = self.scaler._found_inf_per_device(self.optimizer)
            self.overflow_seen.append(found[self.model.decoder.weight.device].clone())
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, begin: int, end: int, accumulate: int = 1, overflow_at: int = -1) -> None:
        for t in range(begin, end):
            for part in range(accumulate):
                batch = make_batch(t * accumulate + part, self.device)
                if t == overflow_at:
                    batch["factor"].fill_(float("inf"))
                self.training_step(batch)
            self.optimizer_step()

    def saved(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "scaler")
        return {part: getattr(self, part).state_dict() for part in parts}

    def everything(self) -> list[Tensor]:
        found = [torch.as_tensor(group["step"]).reshape(()) for group in self.groups()]
        for p in self.model.parameters():
            found += [p.detach(), *self.optimizer.state[p].values()]
        return [x.cpu() for x in found]

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def make_batch(seed: int, device: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (64,), generator=generator)
    batch = {"tokens": tokens, "labels": (7 * tokens + 3) % 40, "factor": torch.ones(())}
    return {name: x.to(device) for name, x in batch.items()}


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cls", [FusedMAdam, FusedLaMAdam])
def test_the_schedule_advances_with_the_steps_that_were_taken(
    cls: Any, precision: str, device: str
) -> None:
    """Warm-up, its end and the decay; a step that overflowed is scheduled again."""
    run = Run(device, precision, cls)
    overflows = run.scaler.is_enabled()
    run.train(0, 14, overflow_at=5 if overflows else -1)
    steps = [*range(1, 7), 6, *range(7, 14)] if overflows else range(1, 15)
    torch.testing.assert_close(
        torch.stack([x.reshape(()) for x in run.lr_seen]).cpu(),
        torch.tensor([scheduled(t) for t in steps]),
        rtol=1e-6, atol=0,
    )  # fmt: skip
    if overflows:
        assert [float(x) for x in run.overflow_seen] == [float(t == 5) for t in range(14)]
        assert run.scaler.get_scale() == 2.0**9
    assert [int(group["step"]) for group in run.groups()] == [13 if overflows else 14] * 2
    assert run.groups()[0]["lr"] is run.groups()[1]["lr"]


def test_without_the_group_step_the_schedule_would_stand_still() -> None:
    """Why the key exists: nothing complains, and lr stays where warm-up begins."""
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=BASE_LR)
    scheduler = PolyWarmUp(optimizer, "cpu")
    for _ in range(5):
        p.grad = torch.ones(3)
        scheduler.step()
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(scheduled(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns_with_accumulated_gradients(precision: str, device: str) -> None:
    run = Run(device, precision)

    def loss() -> float:
        batch = make_batch(1000, device)
        with torch.no_grad():
            scores = run.model(batch["tokens"]).float()
        return float(nn.functional.cross_entropy(scores, batch["labels"]))

    before = loss()
    run.train(0, 20, accumulate=3)
    assert loss() < 0.8 * before
    assert run.optimizer.state[run.model.decoder.weight]["step"] == 20


def test_it_is_the_optimizer_called_by_hand() -> None:
    """Scheduler, scaler and rebound lr change no bit of what plain calls compute."""
    run, plain = Run("cpu", "fp32"), Run("cpu", "fp32")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.train(0, 12)
    for t in range(12):
        plain.training_step(make_batch(t, "cpu"))
        for group in plain.groups():
            group["lr"] = float(run.lr_seen[t])
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    for a, b in zip(run.everything(), plain.everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resumed_from_a_checkpoint_as_if_never_stopped(precision: str, device: str) -> None:
    run = Run(device, precision)
    run.train(0, 4)
    saved = through_a_file(run.saved())
    run.train(4, 9)
    resumed = Run(device, precision, saved=saved)
    resumed.train(4, 9)
    if precision == "fp16 model":  # kept from the file: setup_fp32_params would have rounded it
        master = saved["optimizer"]["state"][0]["master_param"]
        assert not torch.equal(master, master.half().float())
    for a, b in zip(run.everything(), resumed.everything(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(run.lr_seen[4:], resumed.lr_seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "fp16 model"])
def test_phase_2_restarts_the_schedule_and_nothing_else(precision: str, device: str) -> None:
    """The script zeroes step and fills lr in the loaded dict, which therefore holds tensors."""
    run = Run(device, precision)
    run.train(0, 10)
    saved = through_a_file(run.saved())
    for group in saved["optimizer"]["param_groups"]:
        if device == "cpu":  # where a GPU would have saved a tensor
            assert type(group["step"]) is int
            group["step"] = torch.tensor([group["step"]], dtype=torch.int32)
        group["step"].zero_()
        group["lr"].fill_(0.125)
    states = copy.deepcopy(saved["optimizer"]["state"])
    phase_2 = Run(device, precision, saved=saved)
    assert [int(group["step"]) for group in phase_2.groups()] == [0, 0]
    assert [float(group["lr"]) for group in phase_2.groups()] == [0.125] * 2
    params = [p for group in phase_2.groups() for p in group["params"]]
    for index, p in enumerate(params):
        for key, value in states[index].items():
            assert torch.equal(phase_2.optimizer.state[p][key], value), key
    phase_2.train(10, 12)
    torch.testing.assert_close(
        [float(x) for x in phase_2.lr_seen], [scheduled(1), scheduled(2)], rtol=1e-6, atol=0
    )
    assert all(phase_2.optimizer.state[p]["step"] == 12 for p in params)  # bias correction goes on


@pytest.mark.gpu
@pytest.mark.skipif(CUDA != "available", reason=f"backend 'cuda': {CUDA}")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cls", [FusedMAdam, FusedLaMAdam])
def test_the_whole_step_in_one_graph(cls: Any, precision: str) -> None:
    """Forward, backward, schedule, scaler and step, replayed; lr and skips arise on the device."""
    run, captured = Run("cuda", precision, cls), Run("cuda", precision, cls)
    overflow_at = 17 if run.scaler.is_enabled() else -1
    run.train(0, 11)
    static = make_batch(0, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(11):
            for name, value in make_batch(t, "cuda").items():
                static[name].copy_(value)
            captured.training_step(static)
            captured.optimizer_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.training_step(static)
        captured.optimizer_step()
    lr, seen = captured.groups()[0]["lr"], []
    for t in range(11, 24):
        run.train(t, t + 1, overflow_at=overflow_at)
        for name, value in make_batch(t, "cuda").items():
            static[name].copy_(value)
        if t == overflow_at:
            static["factor"].fill_(float("inf"))
        graph.replay()
        seen.append(lr.clone().reshape(()))
    torch.testing.assert_close(
        torch.stack(seen), torch.stack([x.reshape(()) for x in run.lr_seen[11:]]), rtol=0, atol=0
    )
    assert len({float(x) for x in seen}) == len(seen) - (overflow_at > 0)
    for p, q in zip(captured.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    assert int(captured.groups()[0]["step"]) == 24 - (overflow_at > 0)


def test_a_checkpoint_of_the_script_s_lamb_is_a_warm_start() -> None:
    """It keeps Adam's moments per parameter, lr and step as device tensors per group."""
    run = Run("cpu", "fp32")
    adam = torch.optim.Adam([p for group in run.groups() for p in group["params"]])
    for t in range(3):
        run.training_step(make_batch(t, "cpu"))
        adam.step()
        adam.zero_grad()
    saved = adam.state_dict()
    for values in saved["state"].values():
        del values["step"]
    lamb_groups = [
        {
            "lr": torch.full((1,), 0.5),
            "step": torch.tensor([3], dtype=torch.int32),
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "params": group["params"],
        }
        for group in run.optimizer.state_dict()["param_groups"]
    ]
    maxva_kernels.load_reference_state(
        run.optimizer, {"state": saved["state"], "param_groups": lamb_groups}
    )
    for p in run.model.parameters():
        state, adams = run.optimizer.state[p], adam.state[p]
        assert state["step"] == 3
        vhat = state["exp_avg_sq"] / state["maxva_weight"]
        torch.testing.assert_close(vhat, adams["exp_avg_sq"] / (1 - 0.999**3))
        assert torch.equal(state["exp_avg"], adams["exp_avg"])
    assert [group["step"] for group in run.groups()] == [3, 3]
    run.train(3, 4)
    assert float(run.lr_seen[0]) == pytest.approx(scheduled(4))
