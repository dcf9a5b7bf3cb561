#!/usr/bin/env bash
# run_tests.sh BIN quick|full: the tests on the emulated device. BIN is the folder with the python and pytest of the CUDA
# environment. JOBS tests run at a time, by default one a core; logs go to build/emulator/logs.
set -uo pipefail
cd "$(dirname "$0")/../.."
bin=$1
logs=build/emulator/logs
launches=$logs/launches
rm -rf "$logs"
mkdir -p "$logs"

# add NAME ARGUMENTS...: adds a test, by the arguments of run.sh.
tests=()
add() {
  local name=$1
  shift
  tests+=("$name tests/emulator/run.sh $*")
}
pytest="$bin/pytest -q -p no:cacheprovider"
on_device="$pytest -p emulated --device cuda"

quick() {  # the longest first
  add gpu "--graphs $on_device tests/gpu -k 'not 1024'"
  add check "$bin/python tests/emulator/check.py --cases 40"
  ops
  common
}
full() {
  add gpu "--graphs $on_device tests/gpu"
  add global_top_mask "$on_device tests/ops/test_global_top_mask.py"
  add check "$bin/python tests/emulator/check.py --cases 300"
  add check_shuffled "$bin/python tests/emulator/check.py --cases 20 --threads 7 --error 2.4e-7"
  ops
  common
}
# The tests of the ops, without those of global_top_mask, which take longest, and test_simd.py, which stays on the CPU.
ops() {
  local file
  for file in tests/ops/test_*.py; do
    case $file in
      */test_simd.py | */test_global_top_mask.py) ;;
      # It runs out of memory, and expects the words of PyTorch's allocator.
      */test_arguments.py) add "$(basename "$file" .py)" "--graphs $on_device $file" ;;
      *) add "$(basename "$file" .py)" "$on_device $file" ;;
    esac
  done
}
common() {
  add every_kernel "env CUDAEMU_LAUNCHES=$launches $bin/python tests/emulator/device.py tests/gpu/sanitize.py"
  add emulator "$pytest tests/emulator --ignore tests/emulator/test_kernels.py"
}

# Runs one test. The log of one that fails is printed at the end, where it is seen.
run() {
  local name=${1%% *} begin=$SECONDS status=0
  eval "${1#* }" > "$logs/$name.log" 2>&1 || status=$?
  echo "$name: $((SECONDS - begin)) s, status $status: $(tail -n 1 "$logs/$name.log")"
  [ $status = 0 ] || echo "$name" >> "$logs/failed"
}
export -f run
export logs

"$2"
status=0
printf '%s\n' "${tests[@]}" | xargs -P "${JOBS:-$(nproc)}" -d '\n' -I{} bash -c 'run "$1"' _ {} || status=1
# It reads which kernels the others launched.
run "kernels tests/emulator/run.sh env CUDAEMU_LAUNCHES=$launches $pytest tests/emulator/test_kernels.py"
[ -e "$logs/failed" ] || exit $status
while read -r name; do
  echo "---- $name failed:"
  tail -n 200 "$logs/$name.log"
done < "$logs/failed"
exit 1
