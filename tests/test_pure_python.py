"""MAXVA_NO_EXTENSION=1: a pure-Python wheel that imports and trains without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "tools", "pyproject.toml", "README.md", "LICENSE", "csrc", "maxva_kernels",
           "triton_kernels")  # fmt: skip

TRAIN = """
import sys, torch, maxva_kernels
report = maxva_kernels.backends()
assert "no compiled extension" in report["cpu"], report
assert sys.prefix in maxva_kernels.__file__, maxva_kernels.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
x = torch.randn(32, 4)
y = x.sum(1, keepdim=True)
for cls in (maxva_kernels.FusedMAdam, maxva_kernels.FusedLaMAdam):
    opt = cls(model.parameters(), lr=0.02, max_grad_norm=1.0, backend=sys.argv[1])
    losses = []
    for _ in range(15):
        loss = (model(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
print(report["triton"])
"""


def run(*command: object, cwd: Path, **variables: str) -> str:
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree in which an extension was built in place before."""
    folder = tmp_path_factory.mktemp("pure_python")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, tree / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, tree / name)
    (tree / "maxva_kernels" / "_build_info.py").write_text("TORCH_VERSION = '1.0'\n")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tree / "maxva_kernels" / f"_C{suffix}").write_bytes(b"not a library")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "-w", folder, tree, cwd=folder, MAXVA_NO_EXTENSION="1")  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_is_pure(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "maxva_kernels/backends.py",
        "maxva_kernels/profile/__main__.py",
        "maxva_kernels/triton_kernels/maxva_math.py",
    } <= names
    assert not [n for n in names if "_build_info" in n or n.endswith((".so", ".pyd", ".h"))]
    assert not [n for n in names if n.startswith(("triton_kernels/", "tests/", "bench/"))]


def test_installed_wheel_trains(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has torch and Triton, and nothing of this source tree."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
        .strip()
    )  # fmt: skip
    run(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index",
        wheel, cwd=tmp_path)  # fmt: skip
    # as a plain path: .pth files of an editable installation there are not read
    found = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "torch.pth").write_text("\n".join(sorted(found)))
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    run(python, script, "auto", cwd=tmp_path)
    report = run(python, script, "triton", cwd=tmp_path, TRITON_INTERPRET="1")
    assert report.strip() == "available"
