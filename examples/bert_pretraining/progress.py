"""What a run shows while it goes on: the progress bar and TensorBoard's log."""

from __future__ import annotations

import sys
from pathlib import Path

from model import GROUPS
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Progress:
    """Shows the steps of a run from the step after `step` on.

    Args:
        folder: TensorBoard's folder.
        step: Steps done already; what the log has about later ones is about to be repeated.
        steps: Steps of the whole run.
        shown: False to show and write nothing.
    """

    def __init__(self, folder: Path, step: int, steps: int, shown: bool) -> None:
        self._log = (
            SummaryWriter(str(folder), purge_step=step + 1 if step else None) if shown else None
        )
        quiet = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            mininterval=quiet,
            dynamic_ncols=True,
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._log:
            self._log.close()

    def evaluated(self, step: int, mlm: float, nsp_accuracy: float) -> None:
        """Shows held-out figures."""
        if self._log:
            self._log.add_scalar("loss/held_out_mlm", mlm, step)
            self._log.add_scalar("accuracy/held_out_nsp", nsp_accuracy, step)
            self._bar.write(f"step {step:>6}: held-out MLM loss {mlm:.4f}", file=sys.stdout)

    def stepped(
        self,
        step: int,
        loss: float,
        mlm: float,
        lr: float,
        speed: float,
        optimizer_ms: float,
        waited: float,
        told: list[dict[str, float]],
    ) -> None:
        """Shows a training step.

        Args:
            step: Number of the step.
            loss: MLM + NSP.
            mlm: Masked-LM loss.
            lr: Learning rate.
            speed: Sequences per second.
            optimizer_ms: Milliseconds of the optimizer.
            waited: Share of the step that was spent waiting for data.
            told: Telemetry.
        """
        if not self._log:
            return
        scalars = {
            "loss/train": loss,
            "loss/train_mlm": mlm,
            "lr": lr,
            "speed/sequences_per_second": speed,
            "speed/optimizer_ms": optimizer_ms,
            "speed/share_waiting_for_data": waited,
        }
        for group, values in zip(GROUPS, told, strict=False):
            tag = group.replace(" ", "_")
            scalars.update((f"{name}/{tag}", value) for name, value in values.items())
        for name, value in scalars.items():
            self._log.add_scalar(name, value, step)
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, lr {lr:.2e}, {speed:.0f} seq/s, optimizer {optimizer_ms:.1f} ms, "
            f"idle for data {waited:.1%}",
            refresh=False,
        )
        self._bar.update()
