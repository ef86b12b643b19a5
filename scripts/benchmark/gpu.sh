#!/bin/bash
# All GPU measurements, most useful first; each step writes its own files.
#
#   bash scripts/benchmark/gpu.sh                   all steps, except those already finished
#   bash scripts/benchmark/gpu.sh step fit          only these, even if finished
#   REHEARSE=1 bash scripts/benchmark/gpu.sh        the same on the CPU, with the smallest sizes
#
#   RESULTS   folder of the results (default: bench/gpu)
#   OUT       a second folder, which receives an archive of the results after every step (default: none)
#   SECONDS_EACH  time spent on each comparison (default: 2)
#   LIMIT     seconds after which a step is stopped; its rows until then are kept (default: 540)
#   BUDGET    total seconds; then the running step is stopped and no other starts (default: none)
#   PYTHON    an interpreter with the package and LLaVA (default: python)
#
# Run only if named: `large` (the quick start from scratch with larger models, 20 minutes or more) and `loader` (measures
# only the CPU).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

PYTHON=${PYTHON:-python}
RESULTS=${RESULTS:-bench/gpu}
LIMIT=${LIMIT:-540}
EACH=${SECONDS_EACH:-2}
BUDGET=${BUDGET:-0}
STEPS=(tests op head step fit waits profile compile pack quickstart plan eval teacher dtype cache growth images)
MORE=(large loader)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    echo "Steps: ${STEPS[*]} ${MORE[*]}"
    exit
fi
for name in "$@"; do
    [[ " ${STEPS[*]} ${MORE[*]} " == *" $name "* ]] || {
        echo "gpu.sh: no step $name; there are ${STEPS[*]} ${MORE[*]}" >&2
        exit 2
    }
done
chosen=("${@:-${STEPS[@]}}")
again=$#

bench=("$PYTHON" scripts/benchmark/run.py --seconds "$EACH")
quick=(quickstart)
large=(quickstart --gpu)
cases=(--cases 2,8,11,12)
marked=gpu
small=()
waits=()
if [[ ${REHEARSE:-0} == 1 ]]; then
    bench=("$PYTHON" scripts/benchmark/run.py --seconds 0 --device cpu --preset miniature --threads 1)
    quick=(quickstart --smoke --methods compodistill)
    large=("${quick[@]}")
    cases=()
    marked="not gpu" # those without a GPU, of the same files
    small=(-k "kernels_in_the_interpreter or chunked")
    waits=(-k "no_micro_batch_waits and kd")
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch sees no GPU. REHEARSE=1 runs the same steps on the CPU, with the smallest sizes." >&2
    exit 2
fi
mkdir -p "$RESULTS"

# suite NAME FLAGS: a benchmark's suite, its rows and its pictures.
suite() {
    local name=$1
    shift
    "${bench[@]}" --suite "$name" --output "$RESULTS/$name.csv" "$@"
}

do_step() {
    case $1 in
    # The kernels against float64, forward and backward: they come before all else.
    tests) "$PYTHON" -m pytest -q -p no:cacheprovider -m "$marked" ${small[@]+"${small[@]}"} \
        tests/test_visual_attention.py tests/test_visual_attention_triton.py ;;
    waits) "$PYTHON" -m pytest -q -p no:cacheprovider -m "$marked" ${waits[@]+"${waits[@]}"} tests/test_waits.py ;;
    op | head | teacher | dtype | cache | loader | eval | images) suite "$1" ;;
    step) if [[ ${REHEARSE:-0} == 1 ]]; then suite step; else suite step --batch 1,4,8 --length 1024,2048; fi ;;
    fit) if [[ ${REHEARSE:-0} == 1 ]]; then suite fit --limit 0.01; else suite fit --limit 48 --length 2048; fi ;;
    profile | compile | growth) suite "$1" ;;
    pack) if [[ ${REHEARSE:-0} == 1 ]]; then suite pack --batch 2; else suite pack --batch 8; fi ;;
    plan) suite plan ${cases[@]+"${cases[@]}"} --calibration "$RESULTS/calibration.json" ;;
    quickstart) "$PYTHON" scripts/miniature "${quick[@]}" --output "$RESULTS/quickstart" ;;
    large) "$PYTHON" scripts/miniature "${large[@]}" --output "$RESULTS/large" ;;
    esac
}

# What is small and worth keeping, in one file.
bring() {
    [[ -n ${OUT:-} ]] || return 0
    mkdir -p "$OUT"
    (cd "$RESULTS" && find . -maxdepth 2 -type f -size -4M \( -name '*.csv' -o -name '*.log' -o -name '*.png' -o -name '*.json' \
        -o -name '*.md' -o -name '*.txt' -o -name '*.done' \) -print0 | tar -czf - --null -T -) >"$OUT/results.tar.gz.part"
    mv "$OUT/results.tar.gz.part" "$OUT/results.tar.gz"
}

# What no step can do without.
"$PYTHON" -c 'import accelerate, llava, peft, pytest, rich, transformers' || exit 2
"$PYTHON" scripts/benchmark/run.py --help >/dev/null || exit 2
"$PYTHON" -m llava_compodistill.cli env >"$RESULTS/environment.txt" 2>&1
failed=() left=()
for name in "${chosen[@]}"; do
    if [[ -f $RESULTS/$name.done && $again == 0 ]]; then
        echo "== $name: already finished ($RESULTS/$name.log)"
        continue
    fi
    if ((BUDGET > 0 && SECONDS >= BUDGET)); then
        left+=("$name")
        continue
    fi
    echo "== $name"
    began=$SECONDS
    rm -f "$RESULTS/$name.done"
    set -m # the step is a group of processes, which is ended as one
    do_step "$name" >"$RESULTS/$name.log" 2>&1 &
    job=$!
    set +m
    why=failed
    while kill -0 "$job" 2>/dev/null; do
        if ((SECONDS - began >= LIMIT || (BUDGET > 0 && SECONDS >= BUDGET))); then
            kill -- -"$job" 2>/dev/null
            why="stopped after $((SECONDS - began)) s"
            echo "$why" >>"$RESULTS/$name.log"
            break
        fi
        sleep 1
    done
    if wait "$job"; then
        touch "$RESULTS/$name.done"
    else
        failed+=("$name")
    fi
    tail -n 40 "$RESULTS/$name.log"
    echo "   $((SECONDS - began)) s"
    if [[ -f $RESULTS/$name.csv ]]; then
        "$PYTHON" scripts/benchmark/plot.py "$RESULTS/$name.csv" --output "$RESULTS" >>"$RESULTS/$name.log" 2>&1
    fi
    bring
    if [[ $name == tests && $why == failed && " ${failed[*]} " == *" tests "* ]]; then
        echo "gpu.sh: the kernel tests failed; fix them first ($RESULTS/tests.log)." >&2
        exit 1
    fi
done
bring
if ((${#failed[@]} + ${#left[@]})); then
    ((${#failed[@]} == 0)) || echo "gpu.sh: failed or stopped: ${failed[*]}." >&2
    ((${#left[@]} == 0)) || echo "gpu.sh: no time was left for: ${left[*]}." >&2
    echo "Run gpu.sh without names to continue." >&2
    exit 1
fi
echo "All results are in $RESULTS"
