#!/bin/sh
# On a machine with a GPU and NVIDIA's compute-sanitizer: every kernel of small BUNDLES, by prompts and decoding steps.
#   sh tests/gpu/sanitize.sh .carry/tiny/gpt_oss.moec ...
# TOOLS (default: racecheck memcheck) says which of its tools, WAYS (default: all three) how: "resident", or with a quarter
# of the experts on the GPU and the others over the "link" or with "help" of the CPU. Prints what they found whole; fails
# where that is anything.
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
  for way in ${WAYS:-resident link help}; do
    case $way in
      resident) options="--device-memory 1GiB" ;;
      link) options="--step-tokens 64 --share 0.25 --cpu-threads 0" ;;
      help) options="--step-tokens 64 --share 0.25 --cpu-threads 2" ;;
    esac
    for bundle in "$@"; do
      echo "--- $tool $way $bundle"
      # shellcheck disable=SC2086 # options are words
      LOG=$folder/log PYTHON=$folder/$tool sh "$root/benchmarks/on_device.sh" benchmarks.support.engine_run "$bundle" --repeats 1 \
        --device cuda:0 $options --work 1x20+3 --work 2x40+3 > "$folder/said" 2>&1 || { found=1; tail -5 "$folder/said"; }
      cat "$folder/log"
      # Warnings of racecheck change no exit status.
      if grep "SUMMARY" "$folder/log" | grep -qv "SUMMARY: 0 "; then found=1; fi
      grep -q "SUMMARY" "$folder/log" || found=1
    done
  done
done
rm -rf "$folder"
exit $found
