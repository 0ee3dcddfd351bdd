#!/bin/sh
# Build llama_cpp_run with llama.cpp's source, for the processor and the Hopper GPU of this machine.
#   sh benchmarks/peers/llama_cpp/build.sh SOURCE BUILD
# Needs nvcc with cuBLAS, cmake and ninja; CMAKE_OPTIONS are more options, CUDA=OFF builds for the processor alone. Of flash
# attention the kernels for DeepSeek's latents are kept, of quantized products those of Q4_0 and Q8_0: the others take most
# of the compiling and none of what is measured.
set -eu
source=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$2/left-out"
build=$(cd "$2" && pwd)
for file in "$source"/ggml/src/ggml-cuda/template-instances/*.cu; do
  case $file in
    *mmq-instance-q4_0.cu | *mmq-instance-q8_0.cu | *fattn-mma*-ncols2_16.cu) ;;
    *fattn-vec*) : > "$file" ;; # it has to be there
    *mmq-instance* | *fattn*) mv "$file" "$build/left-out/" ;;
  esac
done
# shellcheck disable=SC2086 # options are words
cmake -S "$here" -B "$build" -G Ninja -DLLAMA_CPP="$source" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA="${CUDA:-ON}" \
  -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES=90-real -DGGML_NATIVE=ON ${CMAKE_OPTIONS:-} \
  > "$build/configure.log" 2>&1 || { tail -30 "$build/configure.log"; exit 1; }
slowest=llama.cpp/ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/mmvq.cu.o
[ "${CUDA:-ON}" = ON ] || slowest=
# shellcheck disable=SC2086 # empty or one word
ninja ${JOBS:+-j "$JOBS"} -C "$build" $slowest llama_cpp_run > "$build/build.log" 2>&1 || { tail -40 "$build/build.log"; exit 1; }
strip "$build/llama_cpp_run"
ls -l "$build/llama_cpp_run"
