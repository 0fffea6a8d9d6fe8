"""Fused MaxVA optimizers for PyTorch: MAdam and LaMAdam (Zhu et al.) in one memory pass."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from maxva_kernels.backends import backends
from maxva_kernels.convert import load_reference_state
from maxva_kernels.optimizers import FusedLaMAdam, FusedMAdam, LaMAdam, MAdam

try:
    __version__ = _version("maxva-kernels")
except _NotInstalled:
    raise ImportError(
        "maxva-kernels is not installed, this is its source tree: "
        "pip install --no-build-isolation --editable . (in a checkout)"
    ) from None
__all__ = [
    "FusedLaMAdam",
    "FusedMAdam",
    "LaMAdam",
    "MAdam",
    "__version__",
    "backends",
    "load_reference_state",
]
