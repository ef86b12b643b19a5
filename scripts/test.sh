#!/bin/bash
# Sets up both environments, then runs the linter and the tests against the built and installed wheel. Nothing needs to
# be installed but Python 3.10-3.13. Arguments go to pytest: bash scripts/test.sh -k layer_matching
#
#   --all          with the long forms of tests (the marker `long`), as continuous integration does; the first argument
#
#   TEST_WORKERS   pytest processes: the number of cores, at most 4
#   TEST_ENVS      environments to test in: ".venv .venv-llava"
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

MARKS="not long"
if [[ ${1:-} == --all ]]; then
    MARKS=
    shift
fi

STARTED=$SECONDS
CORES=$(getconf _NPROCESSORS_ONLN)
TEST_WORKERS=${TEST_WORKERS:-$((CORES < 4 ? CORES : 4))}
read -r -a TEST_ENVS <<<"${TEST_ENVS:-.venv .venv-llava}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the pytest processes use the cores
export TOKENIZERS_PARALLELISM=false
# test_packaging.py fails when the source folder is tested instead of the installed wheel.
export COMPODISTILL_SOURCE=$ROOT

SUMMARY=()
STATUS=0

result() { # NAME STATUS TEXT
    SUMMARY+=("$1: $3")
    [[ $2 == 0 ]] || STATUS=1
}

install_current() {
    local install=("$ROOT/.venv/bin/python" -m pip install -qq --no-compile)
    install_env "$ROOT/.venv" "${PINS_CURRENT[@]}"
    # Triton's kernels are tested in its interpreter and compiled, both without a GPU. CUDA builds of torch bring Triton
    # along; for others it is a wheel of 200 MB for Linux, and those tests are skipped where it cannot be had.
    "${install[@]}" --no-deps "$TRITON_PIN" || say "no $TRITON_PIN here: its tests are skipped"
    "${install[@]}" --no-deps "$BITS_PIN" || say "no $BITS_PIN here: its tests are skipped"
    "${install[@]}" --no-deps "$LIGER_PIN" || say "no $LIGER_PIN here: its tests are skipped"
    { "${install[@]}" "${LMMS_NEEDS[@]}" && "${install[@]}" --no-deps "$LMMS_PIN"; } ||
        say "no $LMMS_PIN here: its tests are skipped"
}

# pip uses one core: the environments are installed side by side.
lock_environments
ensure_venv "$ROOT/.venv"
build_wheel "$ROOT/.venv/bin/python"
SECOND=
if [[ " ${TEST_ENVS[*]} " == *" .venv-llava "* ]]; then
    install_env "$ROOT/.venv-llava" "${PINS_LLAVA[@]}" &
    SECOND=$!
fi
install_current
[[ -z $SECOND ]] || wait "$SECOND" || die "the environment .venv-llava could not be installed."
unlock_environments
say "environments ready after $((SECONDS - STARTED)) s"

RUFF=$ROOT/.venv/bin/ruff
lint=0
(cd "$ROOT" && "$RUFF" check setup.py llava_compodistill scripts tests) || lint=1
(cd "$ROOT" && "$RUFF" format --check setup.py llava_compodistill scripts tests) || lint=1
result ruff $lint "$( ((lint)) && echo FAILED || echo ok)"

# From an empty folder, so that no import can find the sources.
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/empty"

only=(${MARKS:+-m "$MARKS"})
for name in "${TEST_ENVS[@]}"; do
    python=$ROOT/$name/bin/python
    version=$("$python" -c 'import importlib.metadata as m; print(m.version("transformers"))')
    say "pytest in $name (transformers $version)"
    status=0
    (
        cd "$WORK/empty"
        PATH=$ROOT/$name/bin:$PATH "$ROOT/$name/bin/pytest" -c "$ROOT/pyproject.toml" --rootdir "$ROOT" \
            -p no:cacheprovider -n "$TEST_WORKERS" --dist loadfile --no-loadscope-reorder --durations 10 \
            "${only[@]}" "$ROOT/tests" "$@"
    ) 2>&1 | tee "$WORK/log" || status=${PIPESTATUS[0]}
    counts=$(grep -E '^=+ .*(passed|failed|error|no tests ran).* =+$' "$WORK/log" | tail -n 1 | tr -d '=' | xargs || true)
    # 5: nothing was left to run, which is no failure when the first environment has run it.
    [[ $status != 5 || $name == "${TEST_ENVS[0]}" ]] || status=0
    result "$name, transformers $version" "$status" "${counts:-pytest stopped with status $status}"
    only=(-m "${MARKS:+$MARKS and }not once") # what does not depend on transformers is tested in the first alone
done

printf -v text '; %s' "${SUMMARY[@]}"
echo "scripts/test.sh: $( ((STATUS)) && echo FAILED || echo PASSED) in $((SECONDS - STARTED)) s (${text#; })"
exit $STATUS
