#!/bin/sh
# On a machine with a GPU that reaches nothing: the tests of this folder, on this tree instead of an installed kit.
#   pip download --no-deps -d .carry/wheels pytest pluggy iniconfig packaging pygments   (before, where there is a network;
#   not needed where pytest is installed)
#   sh tests/gpu/on_device.sh BUNDLE
# BUNDLE is the shipped example for a CPU and this GPU; `moec pack` makes it there of what `moec compile --modules-only
# --target cpu-x86-64-v3 --target cuda-sm_NN` made elsewhere.
set -eu
bundle=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
tools=${TOOLS:-/tmp/moec-test-tools}
if [ ! -d "$tools" ] && ! "${PYTHON:-python3}" -c "import pytest" 2>/dev/null; then
  "${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps --target "$tools" "${CARRY:-$root/.carry}"/wheels/*.whl
fi
MOEC_GPU_BUNDLE=$bundle PYTHONPATH="$tools${PYTHONPATH:+:$PYTHONPATH}" exec sh "$root/benchmarks/on_device.sh" \
  pytest -q -p no:cacheprovider -c /dev/null --rootdir "$root" --import-mode=importlib "$root/tests/gpu"
