#!/bin/sh
# On a machine with torch and a GPU that reaches nothing: run a benchmark with what the kit brings.
#   sh benchmarks/on_device.sh benchmarks.ceilings
#   sh benchmarks/on_device.sh benchmarks.kernels .carry/modules/deepseek-v2-lite
# KIT (default .carry/kit, made by `moec kit`) has wheels; those that torch's environment lacks go to SITE. moec itself
# is this tree. Results go to $OUT/results where OUT is set.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
kit=${KIT:-$root/.carry/kit}
site=${SITE:-/tmp/moec-site}
python=${PYTHON:-python3}
if [ ! -d "$site" ]; then
  missing=$("$python" -I - "$kit"/wheels/*.whl <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
for wheel in sys.argv[1:]:
    name = Path(wheel).name.split("-")[0]
    try:
        distribution(name)
    except PackageNotFoundError:
        if name != "moec":
            print(wheel)
PYTHON
  )
  new=$(mktemp -d "$site.XXXXXX")
  if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # one word a wheel
    "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check --target "$new" $missing
  fi
  # Whoever comes first makes it; others that began beside it take theirs away.
  mv -T "$new" "$site" 2>/dev/null || rm -rf "$new"
fi
if [ -n "${OUT:-}" ]; then
  export BENCHMARK_RESULTS="${BENCHMARK_RESULTS:-$OUT/results}"
fi
cd "$root"
PYTHONPATH="$root/src:$root:$site${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m "$@"
