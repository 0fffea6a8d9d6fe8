#!/usr/bin/env bash
# Builds dist/maxva_kernels-*.whl with CUDA, GPU present or not, and imports it in a clean
# environment from another folder.
#
#   PYTHON=python3.12          the interpreter that the environment is made with
#   VENV_WHEEL=.venv-wheel     where it lies; reused where it has the torch asked for
#   TORCH_CUDA='torch==2.12.1' a CUDA build of torch, with pip options if need be
#   CUDA_HOME=/usr/local/cuda  the toolkit; else that of the nvcc on PATH
#   MAXVA_CUDA_ARCHS="80;90+PTX"   GPU architectures; else those of setup.py
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV_WHEEL=${VENV_WHEEL:-.venv-wheel}
TORCH_CUDA=${TORCH_CUDA:-torch==2.12.1}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

test -x "$VENV_WHEEL/bin/python" || "$PYTHON" -m venv "$VENV_WHEEL"
PY=$VENV_WHEEL/bin/python
PIP="$PY -m pip --disable-pip-version-check"
# shellcheck disable=SC2086  # TORCH_CUDA may hold options
$PIP install --quiet $TORCH_CUDA
$PIP install --quiet "setuptools>=64" wheel "ninja>=1.11" "pybind11>=2.13,<4"

CUDA_HOME=$("$PY" tools/cuda_toolkit.py)
export CUDA_HOME MAXVA_BUILD_CUDA=1 PATH="$PWD/$VENV_WHEEL/bin:$PATH"
test "${VENV_WHEEL#/}" = "$VENV_WHEEL" || PATH="$VENV_WHEEL/bin:$PATH"

# build/lib*: else modules that are gone would come back from an earlier build
rm -rf build/wheel build/wheel-check build/lib* build/bdist*
$PIP wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
mkdir -p dist
cp build/wheel/maxva_kernels-*.whl dist/

# a clean environment that sees the first one's torch, so that it is not downloaded twice
"$PY" -m venv build/wheel-check
CHECK=$PWD/build/wheel-check/bin/python
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
packages "$PY" > "$(packages "$CHECK")/torch.pth"
"$CHECK" -m pip --disable-pip-version-check install --quiet --no-index --no-deps \
  --force-reinstall build/wheel/maxva_kernels-*.whl
SCRIPT=$PWD/tools/check_installation.py
cd /
"$CHECK" "$SCRIPT" --with-cuda
