#!/usr/bin/env bash
# Builds, tests and measures on a GPU machine, each SUITE in under 9 minutes; needs no network.
# JSON goes into $OUT, by default benchmarks/results. The exit status is 1 where a part failed.
set -u
cd "$(dirname "$0")/.."
suite=${SUITE:-all}
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
if [[ $suite != autotune ]] && command -v nvcc >/dev/null; then
  RESNET_FUSED_FORCE_CUDA=1 part build 120 "$python" -m pip install --no-build-isolation --no-deps -q -e .
fi
resnet=("$python" benchmarks/resnet.py --out "$out")
graphs=(torchvision-nhwc+graph torchvision-compile+graph resnet_fused+graph)
case $suite in
  all)
    part tests 140 "$python" -m pytest -q -m gpu -n 0
    part ops 60 "$python" benchmarks/ops.py --dtypes float16 --out "$out"
    part roofline 40 "$python" benchmarks/roofline.py --out "$out"
    part roofline-training 40 "$python" benchmarks/roofline.py --suite training --out "$out"
    part resnet 70 "${resnet[@]}" --dtypes float16 --batches 256 1
    part training 60 "${resnet[@]}" --suite training --dtypes float16 --batches 64
    ;;
  models)
    part roofline 100 "$python" benchmarks/roofline.py --batches 1 32 256 --out "$out"
    part models 400 "${resnet[@]}" --models resnet50 resnet18 --dtypes float16 --batches 1 32 256 --rounds 7 \
      --variants torchvision-nhwc torchvision-compile resnet_fused resnet_fused-{triton,cudnn,cuda} "${graphs[@]}"
    ;;
  autotune)
    part autotune 530 "${resnet[@]}" --dtypes float16 --batches 256 --rounds 7 \
      --variants torchvision-nhwc torchvision-max-autotune resnet_fused resnet_fused+graph
    ;;
  training)
    part training 400 "${resnet[@]}" --suite training --dtypes bfloat16 float16 --batches 64 256 --rounds 5 \
      --variants torchvision-nhwc torchvision-compile resnet_fused resnet_fused+{activations,blocks}
    ;;
  sanitizer)
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        part "$tool" 250 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu -n 0 \
          tests/test_gpu.py -k "(within_budget or every_tile) and (join or 3x3 or 1x1) and cuda and not resnet50"
      done
    else
      echo "gpu.sh: compute-sanitizer is not on PATH" >&2
      failed=1
    fi
    ;;
  cifar)
    for model in cifar_resnet20 cifar_plain20 cifar_resnet56 cifar_plain56; do
      part "$model" 125 "$python" -m resnet_fused train --recipe cifar --model "$model" --dtype bf16 \
        --iterations "${ITERATIONS:-4000}" --out "$out/$model"
    done
    ;;
  *)
    echo "gpu.sh: SUITE must be all, models, autotune, training, sanitizer or cifar, got $suite" >&2
    exit 2
    ;;
esac

{
  echo "{"
  (IFS=$'\n'; echo "${parts[*]}" | sed '$!s/$/,/')
  echo "}"
} >"$out/gpu-$suite.json"
exit $failed
