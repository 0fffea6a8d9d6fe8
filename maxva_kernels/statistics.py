"""What `optimizer.stats()` tells: sums that the update's pass leaves on the device, read on demand.

Nothing here is read back to the host, or sent to other ranks, before somebody asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maxva_kernels.batch import SKIP, Batch, Statistic
from maxva_kernels.sharding import Sharding


@dataclass
class _Table:
    """The sums of one batch: float64 [parameters, len(Statistic)] on its device."""

    params: list[Tensor]
    group_of: list[int]
    sums: Tensor


class StepStatistics:
    """The last unskipped step's sums, and how many steps were skipped."""

    def __init__(self) -> None:
        self._tables: list[_Table] = []
        self._skipped: Tensor | None = None

    def attach(self, batches: list[Batch], collecting: list[bool]) -> None:
        """Gives every batch with a collecting group the table that its update is to fill.

        A table serves as long as its parameters stay the same, so that a skipped step leaves what
        the one before has found and a captured graph fills what is read later.

        Args:
            batches: of this step, with the optimizer's own parameters (DTensors, where sharded).
            collecting: for each of the optimizer's groups, whether it collects.
        """
        known = {tuple(map(id, table.params)): table for table in self._tables}
        self._tables = []
        for batch in batches:
            if not any(collecting[group] for group in batch.groups):
                continue
            table = known.get(tuple(map(id, batch.theta)))
            if table is None or table.sums.device != batch.device:
                sums = torch.full(
                    (len(batch.theta), len(Statistic)),
                    math.nan,
                    dtype=torch.float64,
                    device=batch.device,
                )
                table = _Table(list(batch.theta), [], sums)
            table.group_of = [
                group
                for group, size in zip(batch.groups, batch.group_sizes, strict=True)
                for _ in range(size)
            ]
            batch.statistics = table.sums
            self._tables.append(table)

    def count_skip(self, controls: dict[torch.device, tuple[Any, ...]]) -> None:
        """Counts the step if its control blocks, which agree, say that it was skipped."""
        control = next((c for c, _ in controls.values() if c is not None), None)
        if control is None:
            return
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.float64, device=control.device)
        self._skipped = self._skipped.to(control.device)
        self._skipped += control[SKIP]

    def read(self, collecting: list[bool], sharding: Sharding) -> list[dict[str, float]]:
        """What MaxVA.stats returns. Waits for the device, and for other ranks where sharded."""
        whole = [(table.params, table.sums.clone()) for table in self._tables]
        sharding.sum_statistics(whole)
        totals = torch.zeros(len(collecting), 1 + len(Statistic), dtype=torch.float64)
        for table, (_, sums) in zip(self._tables, whole, strict=True):
            rows = torch.empty(len(table.params), 1 + len(Statistic), dtype=torch.float64)
            rows[:, 0] = torch.tensor([p.numel() for p in table.params])
            rows[:, 1:] = sums.cpu()
            totals.index_add_(0, torch.tensor(table.group_of), rows)
        totals = sharding.sum_over_norm_group(totals)
        skipped = 0 if self._skipped is None else int(self._skipped)
        return [
            _described(row, skipped) if collects else {}
            for row, collects in zip(totals.tolist(), collecting, strict=True)
        ]


def _described(row: list[float], skipped: int) -> dict[str, float]:
    count, sums = row[0], row[1:]
    means = [x / count if count else math.nan for x in sums]
    return {
        "mean_beta": 1 - means[Statistic.ONE_MINUS_BETA],
        "share_at_beta_min": means[Statistic.AT_BETA_MIN],
        "share_at_beta_max": means[Statistic.AT_BETA_MAX],
        "mean_step_size": means[Statistic.STEP_SIZE],
        "grad_norm": math.sqrt(sums[Statistic.GRADIENT_SQUARES]) if count else math.nan,
        "skipped_steps": skipped,
    }
