#!/bin/bash
# Everything that is measured on a GPU, in the order of what it is worth, each step with files of its own.
#
#   bash scripts/benchmark/gpu.sh                   all steps; those that have ended are not made again
#   bash scripts/benchmark/gpu.sh step fit          these alone, also again
#   REHEARSE=1 bash scripts/benchmark/gpu.sh        the same on the CPU, with the smallest sizes
#
#   OUT       folder of the results: gpu-results
#   SECONDS_EACH  time spent on each comparison: 2
#   LIMIT     seconds after which a step is stopped; its rows until then are kept: 540
#   PYTHON    an interpreter with the package and LLaVA: python
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

PYTHON=${PYTHON:-python}
OUT=${OUT:-gpu-results}
LIMIT=${LIMIT:-540}
EACH=${SECONDS_EACH:-2}
STEPS=(tests op head step fit profile compile pack quickstart eval plan teacher dtype cache growth loader images)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    echo "Steps: ${STEPS[*]}"
    exit
fi
for name in "$@"; do
    [[ " ${STEPS[*]} " == *" $name "* ]] || {
        echo "gpu.sh: no step $name; there are ${STEPS[*]}" >&2
        exit 2
    }
done
chosen=("${@:-${STEPS[@]}}")
again=$#

bench=("$PYTHON" scripts/benchmark/run.py --seconds "$EACH")
quick=(quickstart --gpu)
marked=gpu
small=()
if [[ ${REHEARSE:-0} == 1 ]]; then
    bench=("$PYTHON" scripts/benchmark/run.py --seconds 0 --device cpu --preset miniature --threads 1)
    quick=(quickstart --smoke --methods compodistill)
    marked="not gpu" # those without a GPU, of the same files
    small=(-k "kernels_in_the_interpreter or chunked or test_waits")
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch sees no GPU. REHEARSE=1 runs the same steps on the CPU, with the smallest sizes." >&2
    exit 2
fi
mkdir -p "$OUT"

# suite NAME FLAGS: a benchmark's suite, its rows and its pictures.
suite() {
    local name=$1
    shift
    "${bench[@]}" --suite "$name" --output "$OUT/$name.csv" "$@"
}

do_step() {
    case $1 in
    # The kernels against float64, forward and backward, and what waits for the device. They come before all else.
    tests) "$PYTHON" -m pytest -q -p no:cacheprovider -m "$marked" ${small[@]+"${small[@]}"} \
        tests/test_visual_attention.py tests/test_visual_attention_triton.py tests/test_waits.py ;;
    op | head | teacher | dtype | cache | loader | eval | images) suite "$1" ;;
    step) if [[ ${REHEARSE:-0} == 1 ]]; then suite step; else suite step --batch 1,4,8 --length 1024,2048; fi ;;
    fit) if [[ ${REHEARSE:-0} == 1 ]]; then suite fit --limit 0.01; else suite fit --limit 48 --length 2048; fi ;;
    profile | compile | growth) suite "$1" ;;
    pack) if [[ ${REHEARSE:-0} == 1 ]]; then suite pack --batch 2; else suite pack --batch 8; fi ;;
    plan) suite plan --calibration "$OUT/calibration.json" ;;
    quickstart) "$PYTHON" scripts/miniature "${quick[@]}" --output "$OUT/quickstart" ;;
    esac
}

failed=()
for name in "${chosen[@]}"; do
    if [[ -f $OUT/$name.done && $again == 0 ]]; then
        echo "== $name: ended before ($OUT/$name.log)"
        continue
    fi
    echo "== $name"
    began=$SECONDS
    set -m # the step is a group of processes, which is ended as one
    do_step "$name" >"$OUT/$name.log" 2>&1 &
    job=$!
    set +m
    while kill -0 "$job" 2>/dev/null; do
        ((SECONDS - began < LIMIT)) || {
            kill -- -"$job" 2>/dev/null
            echo "stopped after $LIMIT s" >>"$OUT/$name.log"
            break
        }
        sleep 1
    done
    if wait "$job"; then
        touch "$OUT/$name.done"
    else
        failed+=("$name")
    fi
    tail -n 40 "$OUT/$name.log"
    echo "   $((SECONDS - began)) s"
    if [[ $name == tests && " ${failed[*]} " == *" tests "* ]]; then
        echo "gpu.sh: the kernels' tests failed: mend them first ($OUT/tests.log)." >&2
        exit 1
    fi
    [[ ! -f $OUT/$name.csv ]] || "$PYTHON" scripts/benchmark/plot.py "$OUT/$name.csv" --output "$OUT" >>"$OUT/$name.log" 2>&1
done
"$PYTHON" -m llava_compodistill.cli env >"$OUT/environment.txt" 2>&1
if ((${#failed[@]})); then
    echo "gpu.sh: failed or stopped: ${failed[*]}. The same command goes on with them." >&2
    exit 1
fi
echo "All in $OUT"
