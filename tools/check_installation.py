"""Imports the installed package, says what it was built with, and runs steps on what there is."""

import argparse

import torch

import maxva_kernels
from maxva_kernels import FusedLaMAdam, FusedMAdam, LaMAdam, MAdam, _extension


def step(
    optimizer_class: type[torch.optim.Optimizer], device: str = "cpu", **options: str
) -> torch.Tensor:
    """The parameter after three steps with gradients that depend on nothing but a seed."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1000, generator=generator).to(device))
    optimizer = optimizer_class([p], lr=0.1, **options)
    for _ in range(3):
        p.grad = torch.randn(1000, generator=generator).to(device)
        optimizer.step()
    return p.detach().cpu()


def main() -> None:
    """Fails where the extension is not what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--with-cuda", action="store_true", help="fail without CUDA kernels")
    with_cuda = parser.parse_args().with_cuda
    print(f"maxva-kernels {maxva_kernels.__version__} from {maxva_kernels.__path__[0]}")
    try:
        from maxva_kernels import _build_info
    except ImportError:
        print(f"without an extension; this is torch {torch.__version__}")
    else:
        print(
            f"built for torch {_build_info.TORCH_VERSION}, CUDA {_build_info.CUDA_VERSION}, "
            f"architectures {_build_info.CUDA_ARCHS}; this is torch {torch.__version__}"
        )
    for name, state in maxva_kernels.backends().items():
        print(f"  {name}: {state}")
        if state != "available":
            continue
        device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
        for fused, eager in ((FusedMAdam, MAdam), (FusedLaMAdam, LaMAdam)):
            found = step(fused, device, backend=name)
            torch.testing.assert_close(found, step(eager), rtol=0, atol=1e-5)
    if with_cuda and not _extension.WITH_CUDA:
        raise SystemExit("the extension was built without CUDA")


if __name__ == "__main__":
    main()
