#!/usr/bin/env bash
# Everything that a GPU must decide, on a machine that has one and no network:
#
#   make gpu-bundle                              before, where there is a network: wheels into build/gpu/wheels
#   OUT=results tests/gpu/run_all.sh [STEP...]   there: tests sanitizers benchmarks, or those named
#
# Each step is held to its time and the next one runs whatever became of it. $OUT receives summary.json (name, exit
# status, seconds) and results.tar.gz (every log, JUnit XML, the benchmarks' JSON), both brought up to date after each
# step. Exit status: 0 where every step passed, 1 where one did not, 2 where there is no GPU.
# GPU_PYTHON is an interpreter with torch (default: python3); what build/gpu/wheels holds goes before its own packages.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${GPU_PYTHON:-python3}
out=${OUT:-build/gpu/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
logs=$stage/results
mkdir "$logs"

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "this needs a GPU, and torch sees none")' || exit 2

# Away from the checkout, whose own entropy_rl_ext would be found before the installed one.
cp -r tests benchmarks pyproject.toml "$stage"
if compgen -G 'build/gpu/wheels/*.whl' > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$stage/site" build/gpu/wheels/*.whl || exit 1
  export PYTHONPATH=$stage/site${PYTHONPATH:+:$PYTHONPATH}
fi
cd "$stage"

failed=0
rows=()
# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 status begin=$SECONDS
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "$@" > "$logs/$name.log" 2>&1
  status=$?
  tail -n 3 "$logs/$name.log"
  [ $status = 0 ] || { failed=1; echo "== $name FAILED with status $status"; }
  rows+=("{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begin))}")
  (IFS=,; echo "[${rows[*]}]") > "$out/summary.json"
  tar -czf "$out/results.tar.gz" -C "$stage" results
}

tests() {
  step build_info 60 "$python" -c "import entropy_rl_ext as e; i = e.build_info(); print(i); assert i['cuda'], 'a build without CUDA'"
  step tests 300 "$python" -m pytest tests/ops tests/gpu tests/test_registration.py --device cuda -q --junitxml "$logs/tests.xml"
}
sanitizers() {
  for tool in memcheck racecheck synccheck initcheck; do
    # torch's allocator carves tensors out of large segments, and the tools see only those: an access past the end of a
    # tensor, or a read of memory that the previous tensor wrote, would pass. Without it each tensor is an allocation.
    step "$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool $tool --error-exitcode 1 "$python" tests/gpu/sanitize.py
  done
}
benchmarks() {
  for file in benchmarks/bench_*.py; do
    op=${file#benchmarks/bench_}
    op=${op%.py}
    step "bench_$op" 120 "$python" -m benchmarks --device cuda --op "$op" --json "$logs/benchmarks"
  done
}

nvidia-smi > "$logs/nvidia-smi.log" 2>&1
for name in "${@:-tests sanitizers benchmarks}"; do
  for part in $name; do
    case $part in
      tests | sanitizers | benchmarks) $part ;;
      *) echo "unknown step $part: tests, sanitizers or benchmarks"; exit 1 ;;
    esac
  done
done
cat "$out/summary.json"
exit $failed
