"""Shared by the tests of docs/trainers.md: its snippets, a model that takes notes, a plain loop."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from maxva_kernels import FusedMAdam

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "trainers.md"
BATCH, BATCHES = 4, 8


@functools.cache
def snippets_of(heading: str) -> list[str]:
    """The code blocks below a heading of docs/trainers.md."""
    section = re.search(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S
    )
    assert section, f"{DOCUMENT} has no section {heading!r}"
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S)


def run(snippet: str, **given: Any) -> dict[str, Any]:
    """Executes a snippet; returns its names."""
    names = {"__name__": "snippet", **given}
    exec(compile(snippet, str(DOCUMENT), "exec"), names)
    return names


class Model(nn.Module):
    """Takes notes of every batch, so that a plain loop can be given the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 9)])
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 1)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def init_weights(self) -> None:
        for module in (*self.layers, self.norm, self.head):
            module.reset_parameters()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append((inputs, labels))
        hidden = inputs
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        output = self.head(self.norm(hidden)).squeeze(-1)
        return {"loss": nn.functional.mse_loss(output.float(), labels)}

    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As Trainer makes them: no decay of biases and of norms."""
        decayed = [layer.weight for layer in (*self.layers, self.head)]
        others = [p for p in self.parameters() if all(p is not q for q in decayed)]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]


def new_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def examples(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Labels so large that the gradients have to be clipped at 1."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(BATCH * BATCHES, 6, generator=generator)
    return inputs, 10 * torch.randn(BATCH * BATCHES, generator=generator)


def new_loader(seed: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(seed)), batch_size=BATCH)


def new_dataset() -> list[dict[str, Tensor]]:
    return [{"inputs": x, "labels": y} for x, y in zip(*examples(), strict=True)]


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def plain_loop(
    seen: list[tuple[Tensor, Tensor]],
    *,
    start: Model | None = None,
    optimizer: Callable[[Model], Any] = lambda model: FusedMAdam(
        model.parameters(), lr=1e-3, max_grad_norm=1.0
    ),
    accumulate: int = 1,
    factor: Callable[[int], float] = lambda step: 0.9**step,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    """Trains `start`, or a new_model(), on given batches; returns its parameters.

    Under float16 a GradScaler is used, whose first steps overflow.
    """
    device = seen[0][0].device
    model = (start or new_model()).to(device)
    opt = optimizer(model)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    for step, batches in enumerate(_chunks(seen, accumulate)):
        for group in opt.param_groups:
            group["lr"] = 1e-3 * factor(step)
        for inputs, labels in batches:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss = model(inputs, labels)["loss"]
            scaler.scale(loss / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return parameters_of(model)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    assert len(items) % size == 0
    return (items[i : i + size] for i in range(0, len(items), size))
