#!/bin/bash
# What docs/cuda.md wants of a device, in one run of under eight minutes: builds the library, runs the driver against the
# scalar oracle, times the kernels and a denoising step, solves layers of Dream 7B's shapes, and puts compute-sanitizer on
# it; with Bun also the product's tests and benches. Needs a checkout, a driver, and the CUDA toolkit with its host
# compiler. What the goals need comes first. Prints everything, at the end each goal as met, missed or not run; status 1
# where a step failed.
#
#     kernels/tests/cuda/device.sh             all of it; Dream 7B's time is estimated from two of its 28 layers
#     kernels/tests/cuda/device.sh whole       the whole of Dream 7B instead of timings, sanitizer, tests and benches
#     kernels/tests/cuda/device.sh rehearse    under the emulator at small sizes, without a device or nvcc: no figures
#     kernels/tests/cuda/device.sh oracle      builds the oracle and nothing else: that its sources need no more is the gate's
cd "$(dirname "$0")/../../.." || exit 2
kind=${1:-all} work=$(mktemp -d) failed=0 limit_of_all=460 times=1
[ "$kind" = whole ] && limit_of_all=900
[ "$kind" = rehearse ] && limit_of_all=3600 times=10 # wherever it is
log=$work/log
trap 'rm -rf "$work"' EXIT
step() { # NAME SECONDS COMMAND...: the most that it may take, of what is left of the whole
  local name=$1 limit=$((times * $2)) begin=$SECONDS status left=$((limit_of_all - SECONDS))
  shift 2
  [ "$left" -gt 5 ] || { echo "== $name: no time left"; failed=1; return 1; }
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" 2>&1 | tail -n 80 | tee -a "$log"
  status=${PIPESTATUS[0]}
  echo "-- $name: status $status, $((SECONDS - begin)) s"
  [ "$status" = 0 ] || failed=1
  return "$status"
}
goal() { printf 'GOAL %-64s wanted %s, got %s: %s\n' "$@" | tee -a "$log"; } # WHAT WANTED GOT OUTCOME

# The oracle alone: no instruction set beyond the compiler's default.
build_oracle() {
  cc -std=c11 -O2 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC -pthread -shared -Wl,-z,defs \
    $(find kernels/cpu -name '*.c' ! -path '*/isa/*' ! -name '*avx*' ! -name '*neon*' ! -name '*simd128*') \
    -o "$work/liboracle.so" -lm
}
export -f build_oracle
[ "$kind" = oracle ] && { build_oracle; exit; }

if [ "$kind" = rehearse ]; then
  compiler=c++ flags="-std=c++17 -O1 -ffp-contract=off -Wno-unknown-pragmas -Ikernels/tests/emulator -fPIC -fvisibility=hidden"
  language="-x c++" small=small sizes="--layers 1 --hidden 64" words=8
else
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -2
  toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
  export LD_LIBRARY_PATH=$toolkit/lib64:/usr/local/cuda/lib64:$LD_LIBRARY_PATH # cuBLAS, for comparison
  compiler=nvcc language="" small="" sizes="--layers 2" words=128
  flags="-O3 -std=c++17 -cudart=static -fmad=false -arch=${ARCH:-native} -Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden"
fi
[ "$kind" = whole ] && sizes="--layers 28 --vocabulary 152064"

# The oracle, the library's parts and the driver, side by side.
export compiler flags language work
build_all() {
  local each=()
  build_oracle &
  each+=($!)
  for source in $(find kernels/cuda -name '*.cu') kernels/tests/cuda.cu; do
    $compiler $flags $language -c "$source" -o "$work/$(echo "$source" | tr / -).o" &
    each+=($!)
  done
  for process in "${each[@]}"; do wait "$process" || return 1; done
  local exclude=-Xlinker=--exclude-libs=ALL
  [ "$compiler" = nvcc ] || exclude=""
  $compiler $flags -shared $exclude "$work"/kernels-cuda-*.o -o "$work/libcuda_kernels.so" -ldl &&
    $compiler $flags "$work/kernels-tests-cuda.cu.o" "$work/liboracle.so" "$work/libcuda_kernels.so" -o "$work/driver" -lm -ldl
}
export -f build_all
step "build" 240 bash -c build_all || exit 1
export LD_LIBRARY_PATH=$work:$LD_LIBRARY_PATH
step "driver" 60 "$work/driver" 1 quick
[ "$kind" = whole ] || step "timings" 90 "$work/driver" bench $small

export PATH=$PWD/node_modules/.bin:$PATH ARROWQUANT_CUDA_LIBRARY=$work/libcuda_kernels.so
dream="Dream 7B, best, 4096 positions, seconds"
if command -v bun > /dev/null; then
  for i in $(seq 32); do # 32 records of so many tokens
    echo "{\"text\": \"$(seq -s ' ' -f 'w%g' $((4 + i)) $((3 + i + words)))\"}"
  done > "$work/records.jsonl"
  step "a checkpoint of Dream 7B's shapes" 120 bun run scripts/make_checkpoint.ts "$work/dream" $sizes --tokenizer &&
    begin=$SECONDS &&
    step "best, 2 bits" 400 bun run scripts/quantize.ts "$work/dream" "$work/dream-2" --bits 2 --solver best --group-size 64 \
      --calibrate "$work/records.jsonl" --samples 32 --backend cuda && {
    took=$((SECONDS - begin))
    [ "$kind" = whole ] || { took=$((14 * took)) dream="$dream (14 times that of two layers)"; }
    outcome=missed
    [ "$took" -le 360 ] && outcome=met
    [ "$kind" = rehearse ] && outcome="small sizes, no figure"
    goal "$dream" 360 "$took" "$outcome"
  }
else
  echo "skipped: the product's runs, tests and benches, there is no bun"
fi
if [ "$kind" = all ]; then
  clean="met"
  for tool in memcheck racecheck initcheck synccheck; do
    step "compute-sanitizer $tool" 40 compute-sanitizer --tool $tool --error-exitcode 9 "$work/driver" 2 100 || clean="missed"
  done
  command -v compute-sanitizer > /dev/null && goal "compute-sanitizer, steps without a finding" 4 "$clean" "$clean"
  if command -v bun > /dev/null; then
    step "the product's tests" 45 bun test --timeout 45000 tests/native/cuda_test.ts
    step "bench, kernels" 30 bun run scripts/bench.ts --suite kernels --backend cuda
    step "bench, solver-speed" 60 bun run scripts/bench.ts --suite solver-speed --backend cuda --parts kernels --shapes 3584x3584
  fi
fi

echo "== goals"
for name in "Dream 7B, best" "round to nearest" "dequantizing, 4 bits" "dequantizing, 2 bits" "clip search" \
  "products of one token, weights of 4 bits" "products of one token, weights of 2 bits" "products of 4096 tokens" \
  "second moments" "a denoising step, 16 bits" "a denoising step, 4 bits" "a denoising step, 2 bits" "compute-sanitizer"; do
  grep -a "^GOAL $name" "$log" | tail -n 1 | grep . || echo "GOAL $name: not run"
done
echo "== $SECONDS s in all"
exit $failed
