"""A few small steps of every kernel, for compute-sanitizer: odd sizes, misaligned gradients."""

import itertools

import torch

from maxva_kernels import FusedLaMAdam, FusedMAdam

SHAPES = ((0,), (1,), (3,), (5,), (8193,), (0, 7), (1027,), (3, 130), (65, 256))


def main() -> None:
    """Runs three steps of every combination; the sanitizer judges."""
    options = [
        {},
        {"amsgrad": True, "max_grad_norm": 1.0},
        {"trust_ratio": True, "weight_decay": 0.1, "skip_nonfinite": True},
        {"master_weights": True},
        {"state_dtype": "int8", "fp32_state_below": 0, "amsgrad": True, "collect_stats": True},
        {"state_dtype": "bfloat16", "fp32_state_below": 0, "trust_ratio": True},
    ]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    classes = (FusedMAdam, FusedLaMAdam)
    for optimizer_class, option, dtype in itertools.product(classes, options, dtypes):
        params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=dtype)) for s in SHAPES]
        optimizer = optimizer_class(params, backend="cuda", **option)
        optimizer.grad_scale = torch.tensor(2.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(p)
            optimizer.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
