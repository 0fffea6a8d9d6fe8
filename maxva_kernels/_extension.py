"""Loads the compiled extension, or remembers in words why it cannot be used."""

from __future__ import annotations

import importlib

import torch

WITH_CUDA = False
_reason: str | None = None


def why_not() -> str | None:
    """Why the extension is not available, with what to do about it; None where it is."""
    return _reason


def _version_prefix(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> None:
    global WITH_CUDA, _reason
    try:
        from maxva_kernels._build_info import TORCH_VERSION
    except ImportError:
        _reason = (
            "this installation has no compiled extension; reinstall with a C++ compiler: "
            "pip install --no-build-isolation maxva-kernels"
        )
        return
    # checked before loading: an extension of another torch fails with an undefined symbol
    if _version_prefix(TORCH_VERSION) != _version_prefix(torch.__version__):
        _reason = (
            f"the extension was built for torch {TORCH_VERSION}, this is torch "
            f"{torch.__version__}; reinstall it: pip install --no-build-isolation "
            f"--force-reinstall --no-deps maxva-kernels"
        )
        return
    try:
        extension = importlib.import_module("maxva_kernels._C")
    except ImportError as error:
        _reason = f"the extension does not load: {error}"
        return
    WITH_CUDA = extension.WITH_CUDA
    _register_fakes()


def _register_fakes() -> None:
    @torch.library.register_fake("maxva::update_")
    def _(*args: object) -> None:
        return None

    @torch.library.register_fake("maxva::write_control_")
    def _(*args: object) -> None:
        return None

    @torch.library.register_fake("maxva::sum_of_squares")
    def _(g: list[torch.Tensor]) -> torch.Tensor:
        return g[0].new_empty(1, dtype=torch.float64)


_load()
