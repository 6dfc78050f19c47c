#!/bin/bash
# What docs/cuda.md wants of a device, in one run of under eight minutes: builds the library, runs the driver against the
# scalar oracle, puts compute-sanitizer on it, times the kernels, and, where there is Bun, tests and measures the product.
# Needs a checkout, a driver, and the CUDA toolkit with its host compiler. Prints everything; status 1 where a step failed.
cd "$(dirname "$0")/../../.." || exit 2
work=$(mktemp -d) failed=0
trap 'rm -rf "$work"' EXIT
step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status left=$((460 - SECONDS))
  shift 2
  [ "$left" -gt 5 ] || { echo "== $name: no time left"; failed=1; return 1; }
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name"
  timeout -k 5 "$limit" "$@" 2>&1 | tail -n 60
  status=${PIPESTATUS[0]}
  echo "-- $name: status $status, $((SECONDS - begin)) s"
  [ "$status" = 0 ] || failed=1
  return "$status"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
nvcc --version | tail -2
toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
export LD_LIBRARY_PATH=$toolkit/lib64:/usr/local/cuda/lib64:$LD_LIBRARY_PATH # cuBLAS, for comparison
flags="-O3 -std=c++17 -cudart=static -fmad=false -arch=${ARCH:-native} -Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden"

# The oracle alone: no instruction set beyond the compiler's default.
sources=$(find kernels/cpu -name '*.c' ! -path '*/isa/*' ! -name 'avx*' ! -name 'neon*' ! -name 'simd128*')
step "build the oracle" 120 cc -std=c11 -O2 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC -pthread -shared \
  $sources -o "$work/liboracle.so" -lm || exit 1
compile_all() { # FOLDER FLAGS...
  local folder=$1 each=()
  shift
  for source in $(find kernels/cuda -name '*.cu'); do
    nvcc "$@" -c "$source" -o "$folder/$(basename "$source" .cu).o" &
    each+=($!)
  done
  for process in "${each[@]}"; do wait "$process" || return 1; done
}
export -f compile_all
step "compile the library" 200 bash -c 'compile_all "$@"' compile "$work" $flags || exit 1
step "link the library" 60 nvcc $flags -shared -Xlinker=--exclude-libs=ALL "$work"/*.o -o "$work/libcuda_kernels.so" -ldl || exit 1
step "build the driver" 200 nvcc $flags kernels/tests/cuda.cu "$work/liboracle.so" "$work/libcuda_kernels.so" -o "$work/driver" -lm -ldl || exit 1

step "driver" 60 "$work/driver" 1 quick
step "timings" 60 "$work/driver" bench
for tool in memcheck racecheck initcheck; do
  step "compute-sanitizer $tool" 45 compute-sanitizer --tool $tool --error-exitcode 9 "$work/driver" 2 100
done

export PATH=$PWD/node_modules/.bin:$PATH ARROWQUANT_CUDA_LIBRARY=$work/libcuda_kernels.so
if command -v bun > /dev/null; then
  step "the product's tests" 45 bun test --timeout 45000 tests/native/cuda_test.ts
  step "bench, kernels" 45 bun run scripts/bench.ts --suite kernels --backend cuda
  step "bench, solver-speed" 60 bun run scripts/bench.ts --suite solver-speed --backend cuda --parts kernels --shapes 3584x3584
else
  echo "skipped: the product's tests and benches, there is no bun"
fi
echo "== $SECONDS s in all"
exit $failed
