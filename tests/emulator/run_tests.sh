#!/usr/bin/env bash
# run_tests.sh BIN quick|full: the tests on the emulated device. BIN is the folder with the python and pytest of the CUDA
# environment. JOBS tests run at a time, by default one a core; logs go to build/emulator/logs.
set -uo pipefail
cd "$(dirname "$0")/../.."
bin=$1
logs=build/emulator/logs
rm -rf "$logs"
mkdir -p "$logs"
export CUDAEMU_LAUNCHES=$PWD/$logs/launches

# add NAME COMMAND...: adds a test.
tests=()
add() {
  local name=$1
  shift
  tests+=("$name tests/emulator/run.sh $*")
}
op_tests="$bin/pytest -p emulated -p no:cacheprovider -q --device cuda"

full() {
  add check "$bin/python tests/emulator/check.py --cases 300 --seconds 120"
  add check_shuffled "$bin/python tests/emulator/check.py --cases 300 --seconds 30 --threads 7 --error 2.4e-7"
  for file in tests/ops/test_*.py; do add "$(basename "$file" .py)" "$op_tests $file"; done
  add gpu "--graphs $op_tests tests/gpu"
  common
}
quick() {
  add check "$bin/python tests/emulator/check.py --cases 60 --seconds 10"
  common
}
common() {
  add sanitize "$bin/python tests/emulator/device.py tests/gpu/sanitize.py"
  add emulator "$bin/pytest -q -p no:cacheprovider tests/emulator --ignore tests/emulator/test_kernels.py"
}

# Runs one test of the list, and prints its log where it fails.
run() {
  local name=${1%% *} begin=$SECONDS status=0
  ${1#* } > "$logs/$name.log" 2>&1 || status=$?
  echo "$name: $((SECONDS - begin)) s, status $status: $(tail -n 1 "$logs/$name.log")"
  [ $status = 0 ] || cat "$logs/$name.log"
  return $status
}
export -f run
export logs

"$2"
status=0
printf '%s\n' "${tests[@]}" | xargs -P "${JOBS:-$(nproc)}" -d '\n' -I{} bash -c 'run "$1"' _ {} || status=1
tests/emulator/run.sh "$bin/pytest" -q -p no:cacheprovider tests/emulator/test_kernels.py || status=1
exit $status
