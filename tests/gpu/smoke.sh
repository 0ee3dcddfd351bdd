#!/bin/sh
# On a machine with a GPU, from the repository's root: install the kit in .carry/kit and run the tests of this folder.
set -u
kit=$PWD/.carry/kit
export KIT_ENV=/tmp/moec-kit-env
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
started=$(date +%s)
sh "$kit/install.sh" || exit 1
python=$KIT_ENV/bin/python
"$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check .carry/wheels/*.whl 2>/dev/null ||
  "${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps --target "$KIT_ENV/site" .carry/wheels/*.whl
echo "installed in $(($(date +%s) - started)) s"
sh "$kit/run.sh" doctor
sh "$kit/run.sh" generate "$kit/bundle" "In the beginning God" --greedy --max-new-tokens 24 --stats
sh "$kit/run.sh" generate "$kit/bundle" "In the beginning God" --greedy --max-new-tokens 24 --stats --device cuda:0
MOEC_GPU_BUNDLE=$kit/bundle "$python" -m pytest -q -p no:cacheprovider tests/gpu --durations=5 2>&1
echo "tests: $? (0 is good)"
