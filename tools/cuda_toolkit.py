"""Finds the CUDA toolkit; `python tools/cuda_toolkit.py` prints its root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def _is_root(root: Path) -> bool:
    return (root / "bin" / "nvcc").is_file() and (root / "include" / "cuda_runtime.h").is_file()


def _root_by_nvcc(nvcc: str) -> Path | None:
    """What nvcc itself says: the one on PATH may be a wrapper script somewhere else."""
    run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def find_cuda_home() -> Path | None:
    """The root of the toolkit: CUDA_HOME, that of the nvcc on PATH, or /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if given := os.environ.get(variable):
            return Path(given) if _is_root(Path(given)) else None
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda")]
    if nvcc:
        candidates.insert(0, Path(nvcc).resolve().parent.parent)
        if root := _root_by_nvcc(nvcc):
            candidates.insert(0, root)
    return next((root for root in candidates if _is_root(root)), None)


def nvcc_version(root: Path) -> str:
    """The toolkit's version, such as "13.0"."""
    run = subprocess.run(
        [root / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    )
    found = re.search(r"release (\d+\.\d+)", run.stdout)
    return found[1] if found else "unknown"


def torch_arch_list(archs: str) -> str:
    """Architectures such as "80;90;120+PTX" as torch spells them: "8.0;9.0;12.0+PTX"."""
    names = []
    for arch in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise ValueError(f"MAXVA_CUDA_ARCHS={archs!r}: {arch!r} is not like 90 or 120+PTX")
        names.append(f"{match[1]}.{match[2]}{match[3] or ''}")
    return ";".join(names)


#: Compiled for unless MAXVA_CUDA_ARCHS says otherwise; code of 8.0 runs on 8.x, and so on.
DEFAULT_ARCHS = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))


def default_archs(root: Path, visible: Iterable[tuple[int, int]] = ()) -> str:
    """What this toolkit can compile for of DEFAULT_ARCHS and of visible GPUs that these leave out.

    The last one's PTX is kept, too, for GPUs to come.
    """
    run = subprocess.run(
        [root / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    known = {divmod(int(arch), 10) for arch in re.findall(r"compute_(\d+)", run.stdout)}
    archs = set(DEFAULT_ARCHS) & known
    for major, minor in set(visible) & known:
        if not any((major, k) in archs for k in range(minor + 1)):
            archs.add((major, minor))
    return ";".join(f"{major}.{minor}" for major, minor in sorted(archs)) + "+PTX"


def visible_gpus(cuda: Any) -> list[tuple[int, int]]:
    """What torch.cuda says of the GPUs; none where one cannot be used (a driver too old, busy)."""
    try:
        return [cuda.get_device_capability(gpu) for gpu in range(cuda.device_count())]
    except Exception as error:
        print(f"building for the usual GPUs, as those here do not answer: {error}")
        return []


if __name__ == "__main__":
    home = find_cuda_home()
    if home is None:
        sys.exit("no CUDA toolkit found: install one, or set CUDA_HOME to its root")
    print(home)
