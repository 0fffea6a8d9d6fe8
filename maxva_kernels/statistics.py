"""What `optimizer.stats()` tells: sums that the update leaves on the device, read on demand.

    attach (before the update: where it leaves its sums) -> record (after it: what the last step
    that was not skipped found, a row per parameter) -> read

Nothing is read back to the host, or sent to other ranks, before somebody asks.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from maxva_kernels.batch import SKIP, Batch, Statistic
from maxva_kernels.sharding import Sharding

Controls = dict[torch.device, tuple[Any, ...]]


class StepStatistics:
    """The last unskipped step's sums, and how many steps were skipped.

    Rows stay where they are, so that a captured graph goes on filling what is read.
    """

    def __init__(self) -> None:
        # per device: float64 [parameters of the optimizer, len(Statistic)], NaN without a gradient
        self._rows: dict[torch.device, Tensor] = {}
        # whose rows these are; no weak references, with which torch could not swap their contents
        self._params: list[Tensor] = []
        self._skipped: dict[torch.device, Tensor] = {}
        # per device: which rows the batches of a step fill, and the same on the device
        self._places: dict[torch.device, tuple[list[int], Tensor]] = {}
        self._captured: list[Tensor] = []  # what a graph reads and nobody else holds

    def attach(self, batches: list[Batch], params: list[Tensor], capturing: bool) -> None:
        """Gives every batch a table that its update is to fill; `params` are the optimizer's.

        Raises:
            RuntimeError: a graph is being captured, and the step before it had other gradients;
                every replay would begin the statistics anew.
        """
        same = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        if not same and not capturing:
            self._params = params
            for rows_of_others in self._rows.values():
                rows_of_others.fill_(math.nan)
        for device in dict.fromkeys(batch.device for batch in batches):
            filled = [i for batch in batches if batch.device == device for i in batch.parameters]
            rows, place = self._rows.get(device), self._places.get(device)
            fits = rows is not None and len(rows) >= len(params) and (same or not capturing)
            if fits and place is not None and place[0] == filled:
                if capturing:
                    self._captured.append(place[1])
                continue
            if capturing:
                raise RuntimeError(
                    "collect_stats has no place for these parameters' statistics yet while a CUDA "
                    "graph is being captured. Run a step with the same gradients before the capture"
                )
            if rows is None or len(rows) < len(params):
                if rows is not None:
                    self._captured.append(rows)
                self._rows[device] = _unknown(len(params), device)
                self._skipped.setdefault(device, torch.zeros_like(self._rows[device][0, 0]))
            self._places[device] = filled, _on_device(filled, device)
        for batch in batches:
            batch.statistics = torch.empty(
                len(batch.theta), len(Statistic), dtype=torch.float64, device=batch.device
            )

    def record(self, batches: list[Batch], controls: Controls) -> None:
        """Takes over what the update has found, unless the step was skipped."""
        for device, rows in self._rows.items():
            here = (batch.statistics for batch in batches if batch.device == device)
            tables = [table for table in here if table is not None]
            found = torch.full_like(rows, math.nan)
            if tables:
                found.index_copy_(0, self._places[device][1], torch.cat(tables))
            control = controls.get(device, (None,))[0]
            if control is not None:
                skip = control[SKIP] != 0
                found = torch.where(skip, rows, found)
                self._skipped[device] += skip
            rows.copy_(found)

    def read(
        self, param_groups: list[dict[str, Any]], collecting: list[bool], sharding: Sharding
    ) -> list[dict[str, float]]:
        """What MaxVA.stats returns. Waits for the device, and for other ranks where sharded."""
        group_of = {p: k for k, group in enumerate(param_groups) for p in group["params"]}
        tables = [rows.clone() for rows in self._rows.values()]
        sharding.sum_statistics([(self._params[: len(rows)], rows) for rows in tables])
        totals = torch.zeros(
            len(param_groups), 1 + len(Statistic), dtype=torch.float64, device="cpu"
        )
        for rows in tables:
            values = rows.cpu()
            known = (~values[:, Statistic.ONE_MINUS_BETA].isnan()).nonzero().flatten().tolist()
            for i in known:
                p = self._params[i]
                if p in group_of:  # else removed since
                    totals[group_of[p], 0] += p.numel()
                    totals[group_of[p], 1:] += values[i]
        totals = sharding.sum_over_norm_group(totals)
        skipped = max((int(count) for count in self._skipped.values()), default=0)
        return [
            _described(row, skipped) if collects else {}
            for row, collects in zip(totals.tolist(), collecting, strict=True)
        ]


def _unknown(num_parameters: int, device: torch.device) -> Tensor:
    shape = num_parameters, len(Statistic)
    return torch.full(shape, math.nan, dtype=torch.float64, device=device)


def _on_device(indices: list[int], device: torch.device) -> Tensor:
    """Copied without waiting."""
    pinned = device.type == "cuda"
    host = torch.tensor(indices, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return host.to(device, non_blocking=True)


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
