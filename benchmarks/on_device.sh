#!/bin/sh
# On a machine with torch and a GPU that reaches nothing: run a benchmark with what the kit brings.
#   sh benchmarks/on_device.sh benchmarks.ceilings
#   sh benchmarks/on_device.sh benchmarks.kernels .carry/modules/deepseek-v2-lite
# KIT (default .carry/kit, made by `moec kit`) has the wheels that torch's environment lacks; they go to SITE. What
# torch's environment has is not replaced. Results go to $OUT/results where OUT is set.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
kit=${KIT:-$root/.carry/kit}
site=${SITE:-/tmp/moec-site}
python=${PYTHON:-python3}
if [ ! -d "$site" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check --target "$site.new" "$kit"/wheels/*.whl
  # The source of this tree is what is measured, and numpy is torch's.
  rm -rf "$site.new/moec" "$site.new"/numpy*
  mv "$site.new" "$site"
fi
if [ -n "${OUT:-}" ]; then
  export BENCHMARK_RESULTS="${BENCHMARK_RESULTS:-$OUT/results}"
fi
cd "$root"
PYTHONPATH="$root/src:$root:$site${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m "$@"
