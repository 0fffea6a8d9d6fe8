#!/usr/bin/env bash
# Everything that needs a GPU, in one call and offline: builds in place for the GPU that is there,
# runs the tests marked gpu, memcheck on a small case, and the profiler.
#
#   PYTHON=python3   an interpreter whose packages are used as they are: a CUDA build of torch,
#                    setuptools, pytest, ninja, pybind11, numpy
#   PROFILE="..."    options of maxva-profile instead of those below
#   LIMIT=600        seconds for everything: the profiler's last run gets what the others have left
# Results: bench/results/<gpu>-<date>.json, .md, -trace.json and, with matplotlib, plots in a folder;
# <gpu>-<date>-compact.* of compact states
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-600}
failed=0
stage() {
  echo "== $1"
  shift
  local start=$SECONDS
  "$@" || { echo "failed: $*"; failed=1; }
  echo "   $((SECONDS - start)) s"
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' || exit 1
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())')
MAXVA_CUDA_ARCHS=$("$PYTHON" -c \
  'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
CUDA_HOME=$("$PYTHON" tools/cuda_toolkit.py) || exit 1
export MAXVA_CUDA_ARCHS CUDA_HOME MAXVA_BUILD_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
STEM=bench/results/$(echo "$GPU" | tr -cs '[:alnum:]' '-' | sed 's/-$//' | tr '[:upper:]' '[:lower:]')-$(date +%F)
echo "$GPU, sm_$MAXVA_CUDA_ARCHS, CUDA in $CUDA_HOME"

stage "build" "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps \
  --no-build-isolation --editable .
test "$failed" = 0 || exit 1
stage "installation" "$PYTHON" tools/check_installation.py --with-cuda
# only files with such tests: the others may need packages that are not there
mapfile -t TESTS < <(grep -lE 'mark\.gpu' tests/test_*.py)
# side by side where pytest-xdist is there: Triton's compiler takes most of the time; one thread
# each, as with all of them the processes wait for each other; each takes memory of the GPU
PARALLEL=()
WORKERS=$(nproc)
"$PYTHON" -c 'import xdist' 2>/dev/null &&
  PARALLEL=(-n $((WORKERS < 16 ? WORKERS : 16)) --dist worksteal)
stage "tests" timeout 240 env OMP_NUM_THREADS=1 \
  "$PYTHON" -m pytest -q -m gpu -rs "${PARALLEL[@]}" "${TESTS[@]}"
SANITIZER=$(command -v compute-sanitizer || ls "$CUDA_HOME/bin/compute-sanitizer" 2>/dev/null)
if test -n "$SANITIZER"; then
  stage "memcheck" timeout 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" \
    --tool memcheck --error-exitcode 1 "$PYTHON" tools/memcheck_case.py
else
  echo "== memcheck: compute-sanitizer is not installed"
fi
mkdir -p bench/results
PLOTS=
"$PYTHON" -c 'import matplotlib' 2>/dev/null && PLOTS=yes
# profile STEM SECONDS OPTION...: --json is written row by row, so that a run cut off is not lost
profile() {
  stage "profile ${1##*/}" timeout "$2" "$PYTHON" -m maxva_kernels.profile --device cuda \
    --json "$1.json" --markdown "$1.md" ${PLOTS:+--plots "$1"} "${@:3}"
}
# before the long one, which may be cut off
profile "$STEM-compact" 120 --models bert-large,llama-1b --seconds 2 \
  --optimizers FusedMAdam,FusedMAdam+bfloat16,FusedMAdam+int8,FusedLaMAdam+int8
PROFILE=${PROFILE:---dtypes float32,bf16-master --clip --seconds 2}
LEFT=$((LIMIT - SECONDS - 15))
# shellcheck disable=SC2086 # several options in one variable
profile "$STEM" $((LEFT < 30 ? 30 : LEFT)) $PROFILE --trace "$STEM-trace.json"
exit $failed
