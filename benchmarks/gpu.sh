#!/usr/bin/env bash
# Builds, tests and measures on a GPU machine in under 9 minutes; needs no network.
# JSON goes into $OUT, by default benchmarks/results. The exit status is 1 where a part failed.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-benchmarks/results}")
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
parts=()
failed=0

part() { # name, seconds, command...
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  echo "== $name: $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?
  echo "== $name: exit status $status after $((SECONDS - began)) s"
  parts+=("  \"$name\": {\"status\": $status, \"seconds\": $((SECONDS - began))}")
  ((status == 0)) || failed=1
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch sees no CUDA device here" >&2
  exit 2
fi
if command -v nvcc >/dev/null; then
  RESNET_FUSED_FORCE_CUDA=1 part build 120 "$python" -m pip install --no-build-isolation --no-deps -q -e .
fi
part tests 150 "$python" -m pytest -q -m gpu -n 0
part ops 80 "$python" benchmarks/ops.py --dtypes float16 --out "$out"
part resnet 110 "$python" benchmarks/resnet.py --dtypes float16 --batches 256 1 --out "$out"
part training 75 "$python" benchmarks/resnet.py --suite training --dtypes float16 --batches 64 --out "$out"

{
  echo "{"
  (IFS=$'\n'; echo "${parts[*]}" | sed '$!s/$/,/')
  echo "}"
} >"$out/gpu.json"
exit $failed
