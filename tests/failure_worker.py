"""What `test_failure.py` kills: a small network trained with the example's checkpoints and groups.

BERT would take ten times as long to start. The launcher is torchrun's; it imports torch once and
forks. The first processes also train undisturbed, for comparison. Files in the folder say how far
they are (`events`, `process-<restart>-<rank>`) and let them go on (`go-<restart>`, and `finish`
before the last step).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "bert_pretraining"))

import checkpoint
from parallel import Ranks, full_state, load_full_state, wrap

from maxva_kernels import FusedLaMAdam, FusedMAdam

STEPS = 40
CHECKPOINT_EVERY = 3
WIDTH, BATCH = 192, 8
OPTIMIZERS = {"ddp": FusedMAdam, "fsdp2": FusedLaMAdam}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().sum()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def train(ranks: Ranks, mode: str, out: Path, events: Path | None) -> None:
    """Trains to the last step, from the newest checkpoint in `out` on where there is one."""
    torch.manual_seed(0)
    model = Network()
    module = wrap(model, list(model.layers), mode, torch.device("cpu"))
    # As pretrain.py does: DDP sums in its final order from its second backward pass on.
    module(torch.zeros(1, WIDTH)).backward()
    module.zero_grad()
    optimizer = OPTIMIZERS[mode](model.parameters(), lr=1e-3, max_grad_norm=1.0)
    tensors: dict[str, Any] = {"model": {}, "optimizer": {}}

    def read() -> tuple[int, list[float]]:
        if not checkpoint.checkpoints(out):
            return 0, []
        state, _, _ = checkpoint.load_latest(out)
        tensors.update(model=state["model"], optimizer=state["optimizer"])
        return state["step"], state["losses"]

    def tell(event: str) -> None:
        if events and ranks.first:
            with events.open("a") as file:
                file.write(f"{event}\n")

    done, losses = ranks.from_first(read)
    if done:
        load_full_state(model, optimizer, *tensors.values())
    tell(f"start {done}")
    for step in range(done + 1, STEPS + 1):
        if step == STEPS and events:
            ranks.from_first(lambda: wait_for(events.with_name("finish")))
        examples = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
        share = BATCH // ranks.size
        loss = module(examples[ranks.rank * share :][:share]) * (ranks.size / BATCH)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += ranks.sums(loss.item() / ranks.size)
        tell(f"step {step}")
        if step % CHECKPOINT_EVERY == 0 or step == STEPS:
            model_state, optimizer_state = full_state(model, optimizer)
            state = {
                "step": step,
                "losses": losses,
                "model": model_state,
                "optimizer": optimizer_state,
            }
            ranks.from_first(lambda state=state: checkpoint.save(out, state["step"], state))
            tell(f"saved {step}")


def work(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with Ranks() as ranks:
        if restart == "0":
            train(ranks, mode, folder / "undisturbed", None)
        (folder / f"process-{restart}-{ranks.rank}").write_text(str(os.getpid()))
        wait_for(folder / f"go-{restart}")
        train(ranks, mode, folder / "run", folder / "events")
        ranks.wait()


def main(folder: str, mode: str, processes: str, restarts: str) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=int(restarts),
        monitor_interval=0.02,
        start_method="fork",
    )
    elastic_launch(config, work)(Path(folder), mode)


if __name__ == "__main__":
    main(*sys.argv[1:])
