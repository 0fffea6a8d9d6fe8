"""What a step over DTensors costs on the host: one gloo rank, small tensors, ratio to AdamW(fused).

python bench/sharded_step.py
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from maxva_kernels import FusedMAdam

#: As many tensors as BERT-Large has; half of them have rows of two blocks of compact states.
SHAPES = [(1, 256), (16,)] * 199
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "FusedMAdam": (FusedMAdam, {}),
    "FusedMAdam, clipping": (FusedMAdam, {"max_grad_norm": 1.0}),
    "FusedMAdam, int8": (FusedMAdam, {"state_dtype": "int8", "fp32_state_below": 0}),
}
ROUNDS = 31


def sharded_parameters() -> list[Parameter]:
    """DTensors with gradients."""
    mesh = init_device_mesh("cpu", (1,))
    params = []
    for shape in SHAPES:
        p = Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
        params.append(p)
    return params


def main() -> None:
    """Times the optimizers in turns."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1")
    os.environ.setdefault("MASTER_PORT", "29533")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    optimizers = {
        name: cls(sharded_parameters(), **options) for name, (cls, options) in OPTIMIZERS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    for name, own in times.items():
        ratios = [x / y for x, y in zip(own, times["AdamW"], strict=True)]
        median = 1e3 * statistics.median(own)
        print(f"{name:22}{median:7.2f} ms{statistics.median(ratios):7.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
