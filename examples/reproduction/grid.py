"""Many runs at once: every grid point is a parameter group, every trial a coordinate of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Grid:
    """The runs of one optimizer over its grid.

    Attributes:
        points: Hyper-parameters of each grid point, as the keys of a parameter group.
        theta: All coordinates, [points, *trials]; row i is the only parameter of group i.
        grad: Gradients of `theta`; row i is the `grad` of that parameter. Fill it, then step.
        optimizer: What updates `theta`.
    """

    points: Sequence[dict[str, Any]]
    theta: Tensor
    grad: Tensor
    optimizer: Optimizer

    def state(self, point: int) -> dict[str, Any]:
        """The optimizer's state for the coordinates of one grid point."""
        (parameter,) = self.optimizer.param_groups[point]["params"]
        return self.optimizer.state[parameter]


def build_grid(
    make: Callable[[list[dict[str, Any]]], Optimizer],
    points: Sequence[dict[str, Any]],
    start: Tensor,
) -> Grid:
    """Starts one optimizer with a parameter group for each grid point.

    Args:
        make: Builds the optimizer from its parameter groups.
        points: Hyper-parameters of each grid point.
        start: Where every grid point starts, [*trials].
    """
    theta = start.expand(len(points), *start.shape).clone()
    grad = torch.zeros_like(theta)
    rows = theta.unbind()
    for row, row_grad in zip(rows, grad.unbind(), strict=True):
        row.grad = row_grad
    groups = [{"params": [row], **point} for row, point in zip(rows, points, strict=True)]
    return Grid(points, theta, grad, make(groups))
