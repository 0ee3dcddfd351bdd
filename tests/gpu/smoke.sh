#!/bin/sh
# On a machine with a GPU: install the kit of CARRY (default: .carry) and run the tests of this folder. CARRY has the
# kit in kit/ and pytest's wheels in wheels/.
set -u
carry=${CARRY:-$PWD/.carry}
root=$(cd "$(dirname "$0")/../.." && pwd)
kit=$carry/kit
export KIT_ENV=${KIT_ENV:-/tmp/moec-kit-env}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
started=$(date +%s)
sh "$kit/install.sh" || exit 1
python=$KIT_ENV/bin/python
if [ -d "$KIT_ENV/site" ]; then
  "${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps --target "$KIT_ENV/site" "$carry"/wheels/*.whl
else
  "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check "$carry"/wheels/*.whl
fi
echo "installed in $(($(date +%s) - started)) s"
sh "$kit/run.sh" doctor
for device in cpu cuda:0; do
  echo "--- $device"
  sh "$kit/run.sh" generate "$kit/bundle" "In the beginning God" --greedy --max-new-tokens 24 --stats --device $device
done
cd "$root" || exit 1
MOEC_GPU_BUNDLE=$kit/bundle "$python" -m pytest -q -p no:cacheprovider tests/gpu --durations=5 2>&1
echo "tests ended with $? (0 is good)"
