"""Loads the compiled extension, or remembers in words why it cannot be used."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import torch

WITH_CUDA = False
#: Of the CUDA kernels, as torch spells them: "8.0;9.0+PTX".
_archs: str | None = None
#: The module with the operators of torch.ops.maxva, without autograd: csrc/python_call.h.
operators: Any = None
_reason: str | None = None
_ANEW = "pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout)"
_FOLDER = Path(__file__).parent
SOURCE_TREE = "leave the folder of this source tree, if it hides an installed package"


def why_not() -> str | None:
    """Why the extension is not available, with what to do about it; None where it is."""
    return _reason


def _prefix(version: str, parts: int) -> str:
    return ".".join(version.split("+")[0].split(".")[:parts])


def _wrong_torch(built_for: str, built_with_cuda: str | None) -> str | None:
    """How this torch differs from the one the extension was built for; None where it fits."""
    if _prefix(built_for, 2) != _prefix(torch.__version__, 2):
        return f"the extension was built for torch {built_for}, this is torch {torch.__version__}"
    if built_with_cuda is None:
        return None
    if torch.version.cuda is None:
        return (
            f"the extension was built with CUDA {built_with_cuda}, this torch "
            f"({torch.__version__}) has no CUDA"
        )
    if _prefix(built_with_cuda, 1) != _prefix(torch.version.cuda, 1):
        return (
            f"the extension was built with CUDA {built_with_cuda}, this torch "
            f"({torch.__version__}) with CUDA {torch.version.cuda}"
        )
    return None


def _runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU can run code compiled for `archs`; True where these are names, not numbers."""
    for arch in re.split(r"[; ,]+", archs.strip()):
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if number is None:
            return True
        compiled_for = int(number[1]), int(number[2])
        alike = compiled_for[0] == capability[0] and compiled_for <= capability
        if number[3] == "a":
            alike = compiled_for == capability
        elif number[4]:  # the driver compiles it for what has come since
            alike = compiled_for <= capability
        if alike:
            return True
    return False


@functools.cache
def _why_not_on(gpu: int) -> str | None:
    capability = torch.cuda.get_device_capability(gpu)
    if _archs is None or _runs_on(_archs, capability):
        return None
    major, minor = capability
    return (
        f"the extension was built for GPUs of compute capability {_archs}, "
        f"{torch.cuda.get_device_name(gpu)} has {major}.{minor}; build it anew: "
        f'MAXVA_CUDA_ARCHS="{major}.{minor}" {_ANEW}'
    )


def why_not_cuda() -> str | None:
    """Why the CUDA kernels cannot run, on torch's current device if CUDA is in use; else None."""
    if _reason is not None:
        return _reason
    if not WITH_CUDA:
        return (
            "the extension was built without CUDA; with the CUDA toolkit and a CUDA build of "
            f"torch installed, build it anew: MAXVA_BUILD_CUDA=1 {_ANEW}"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # who only asks what there is must not find CUDA initialized afterwards: no fork then
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return _why_not_on(torch.cuda.current_device())


def _load() -> None:
    global WITH_CUDA, operators, _archs, _reason
    try:
        from maxva_kernels import _build_info
    except ImportError:
        _reason = (
            f"there is no compiled extension in {_FOLDER}; with a C++ compiler, build it: {_ANEW}"
        )
        if (_FOLDER.parent / "setup.py").is_file():
            _reason += f"; or {SOURCE_TREE}"
        return
    # checked before loading: an extension of another torch fails with an undefined symbol
    if wrong := _wrong_torch(_build_info.TORCH_VERSION, _build_info.CUDA_VERSION):
        _reason = f"{wrong}; build it anew: {_ANEW}"
        return
    try:
        operators = importlib.import_module("maxva_kernels._C")
    except ImportError as error:
        _reason = f"the extension does not load: {error}"
        return
    WITH_CUDA = operators.WITH_CUDA
    _archs = _build_info.CUDA_ARCHS
    _register_fakes()


def _check_devices(theta: list[torch.Tensor], lists: dict[str, Any]) -> None:
    # torch picks the fake wherever one tensor is on "meta", beside real ones too
    for name, tensors in lists.items():
        for i, tensor in enumerate((*theta, *tensors)):
            if tensor.device != theta[0].device:
                raise ValueError(
                    f"maxva: tensor {i % max(len(theta), 1)} of theta or {name} is on "
                    f"{tensor.device}, parameter 0 is on {theta[0].device}"
                )


def _register_fakes() -> None:
    @torch.library.register_fake("maxva::update_")
    def _(theta: list[torch.Tensor], *args: object) -> None:
        names = "g", *"muvw", "vmax", "master", "step"
        _check_devices(theta, dict(zip(names, args, strict=False)))

    @torch.library.register_fake("maxva::update_packed_")
    def _(theta: list[torch.Tensor], *args: object) -> None:
        names = "g", "packed", "scale", "maximum", "master", "step"
        _check_devices(theta, dict(zip(names, args, strict=False)))

    @torch.library.register_fake("maxva::write_control_")
    def _(*args: object) -> None:
        return None

    @torch.library.register_fake("maxva::sum_of_squares")
    def _(g: list[torch.Tensor]) -> torch.Tensor:
        return g[0].new_empty(1, dtype=torch.float64)


_load()
