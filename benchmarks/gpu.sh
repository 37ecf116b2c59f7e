#!/usr/bin/env bash
# Measures on a GPU machine without network: PART=1 (the default) to 7, each in under 9 minutes.
# Every result goes into $OUT, by default benchmarks/results, as soon as it is there. Run again after a cut, what is
# done is kept and what was cut goes on; with another commit all runs anew. The exit status is 1 where a step failed.
set -u
cd "$(dirname "$0")/.."
part=${PART:-1}
out=$(realpath -m "${OUT:-benchmarks/results}")
python=${PYTHON:-python}
done=$out/.done
mkdir -p "$done"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
commit=$(git rev-parse HEAD 2>/dev/null || echo none)
failed=0

step() { # name, seconds, command...
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  if [[ $(cat "$done/$name" 2>/dev/null) == "$commit" ]]; then
    echo "== $name: kept"
    return
  fi
  echo "== $name, at most $limit s: $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?
  echo "== $name: exit status $status after $((SECONDS - began)) s"
  if ((status == 0)); then echo "$commit" >"$done/$name"; else failed=1; fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch sees no CUDA device here" >&2
  exit 2
fi
bench=("$python" -m resnet_fused bench --resume)
resnet=("$python" benchmarks/resnet.py --resume --out "$out")
graphs=(torchvision-nhwc+graph torchvision-compile+graph resnet_fused+graph)
modes=(torchvision-nhwc torchvision-compile resnet_fused resnet_fused+{activations,blocks})
case $part in
  1)
    step device 20 "$python" benchmarks/device.py "$out/device.json"
    step doctor 40 bash -c "set -o pipefail; '$python' -m resnet_fused doctor 2>&1 | tee '$out/doctor.txt'"
    command -v nvcc >/dev/null &&
      RESNET_FUSED_FORCE_CUDA=1 step build 120 "$python" -m pip install --no-build-isolation --no-deps -q -e .
    step parity 60 "${bench[@]}" --suite parity --model resnet18,resnet50 --json "$out/parity.json"
    step ops 60 "${bench[@]}" --suite ops --dtype float16 --json "$out/ops.json"
    step inference 120 "${resnet[@]}" --dtypes float16 --batches 1 32 256
    step training 90 "${resnet[@]}" --suite training --dtypes float16 --batches 256
    ;;
  2)
    step tests 300 "$python" -m pytest -q -m gpu -n 0
    step roofline 100 "$python" benchmarks/roofline.py --batches 1 32 256 --out "$out"
    step roofline-training 60 "$python" benchmarks/roofline.py --suite training --out "$out"
    step fit 60 "${bench[@]}" --suite training --fit 24GiB --json "$out/fit.json"
    ;;
  3)
    step models 520 "${resnet[@]}" --models resnet50 resnet18 resnext50_32x4d --dtypes bfloat16 --batches 1 32 256 \
      --rounds 7 --variants torchvision-nhwc torchvision-compile resnet_fused resnet_fused+deploy "${graphs[@]}"
    ;;
  4)
    step training-modes 520 "${resnet[@]}" --suite training --dtypes bfloat16 --batches 64 256 --rounds 5 \
      --variants "${modes[@]}"
    ;;
  5)
    step autotune 520 "${resnet[@]}" --dtypes bfloat16 --batches 128 --rounds 7 \
      --variants torchvision-nhwc torchvision-max-autotune resnet_fused resnet_fused+graph
    ;;
  6)
    if ! command -v compute-sanitizer >/dev/null; then
      echo "gpu.sh: compute-sanitizer is not on PATH" >&2
      exit 1
    fi
    for tool in memcheck racecheck; do
      step "$tool" 260 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu -n 0 \
        tests/test_gpu.py -k "(within_budget or every_tile) and (join or 3x3 or 1x1) and cuda and not resnet50"
    done
    ;;
  7)
    for model in cifar_resnet20 cifar_plain20 cifar_resnet56 cifar_plain56; do
      step "$model" 130 "$python" -m resnet_fused train --recipe cifar --model "$model" --dtype bf16 \
        --iterations "${ITERATIONS:-4000}" --out "$out/$model"
    done
    ;;
  *)
    echo "gpu.sh: PART must be 1 (the first to run), 2 (tests, roofline), 3 (models), 4 (training), 5 (autotune)," \
      "6 (sanitizer) or 7 (CIFAR-10), got $part" >&2
    exit 2
    ;;
esac
exit $failed
