#!/bin/sh
# On a machine with a GPU and NVIDIA's compute-sanitizer: every kernel of small BUNDLES, by prompts and decoding steps.
#   sh tests/gpu/sanitize.sh .carry/tiny/gpt_oss.moec ...
# TOOLS (default: racecheck memcheck) says which of its tools. Prints what they found whole; fails where that is anything.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
folder=$(mktemp -d)
found=0
for tool in ${TOOLS:-racecheck memcheck}; do
  options=""
  if [ "$tool" = racecheck ]; then options="--racecheck-report all"; fi
  printf '#!/bin/sh\nexec "%s" --tool %s %s --error-exitcode 7 --log-file "$LOG" "%s" "$@"\n' \
    "$sanitizer" "$tool" "$options" "${PYTHON:-python3}" > "$folder/$tool"
  chmod +x "$folder/$tool"
  for bundle in "$@"; do
    echo "--- $tool $bundle"
    LOG=$folder/log PYTHON=$folder/$tool sh "$root/benchmarks/on_device.sh" benchmarks.engine_run "$bundle" --repeats 1 \
      --device cuda:0 --device-memory 1GiB --work 1x20+3 --work 2x40+3 > /dev/null || found=1
    cat "$folder/log"
    # Warnings of racecheck change no exit status.
    if grep -q "SUMMARY" "$folder/log" && grep "SUMMARY" "$folder/log" | grep -qv "SUMMARY: 0 "; then found=1; fi
  done
done
rm -rf "$folder"
exit $found
