# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: Python environments in this checkout, made once and kept up to date.
#
#   .venv         current transformers; the quick start and the tests
#   .venv-llava   LLaVA's own generation (transformers 4.37.2); the tests
#
# PYTHON chooses the interpreter (3.10 to 3.13). The package index is the one pip is configured for.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# pip stays silent but for errors (-qq below): its warnings about extra indexes fill pages. It compiles nothing
# (--no-compile): Python compiles the modules that are imported, a small part of torch and transformers.
export PIP_DISABLE_PIP_VERSION_CHECK=1
# A PYTHONPATH or a user site from outside would shadow what is installed here; and what is not compiled when it is
# installed has to be kept when it is compiled.
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
export PYTHONNOUSERSITE=1

# torch comes first and by its exact version, so that no later package brings another one. Neither torchvision nor timm
# is needed, and both replace a CPU build of torch by a CUDA one.
TORCH_PIN="torch==2.13.0"
LLAVA_PIN="llava-torch==1.2.2.post1"
# The combinations that are tested; setup.py itself asks for lower bounds only.
# shellcheck disable=SC2034 # used by the scripts that source this file
PINS_CURRENT=(transformers==5.18.0 accelerate==1.15.0 peft==0.21.2 deepspeed==0.19.8)
# shellcheck disable=SC2034
PINS_LLAVA=(transformers==4.37.2 accelerate==0.30.1 peft==0.9.0 deepspeed==0.19.8)
# What CUDA builds of TORCH_PIN ask for. Only the tests need it elsewhere.
# shellcheck disable=SC2034
TRITON_PIN="triton==3.7.1"
# It has kernels for CPUs, with which the tests quantise.
# shellcheck disable=SC2034
BITS_PIN="bitsandbytes==0.50.2"
# Its kernels are tested in Triton's interpreter.
# shellcheck disable=SC2034
LIGER_PIN="liger-kernel==0.8.5"
# lmms-eval asks for torchvision and much else that its core does without; these are what it imports. It reaches into
# filelock._api, which filelock 4 no longer has.
# shellcheck disable=SC2034
LMMS_PIN="lmms_eval==0.7.3"
# shellcheck disable=SC2034
LMMS_NEEDS=(datasets==5.2.0 evaluate sacrebleu loguru tenacity pytz "filelock<4")

say() { echo "== $*" >&2; }

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# A Python of a supported version that can make virtual environments. Version managers put names on the PATH that do
# not run, so every candidate is tried.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.10 python3.13 python3 python; do
        if "$candidate" -c '
import ensurepip, sys, venv
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        [[ $candidate != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is no Python 3.10 to 3.13 with venv."
    done
    die "no Python 3.10 to 3.13 with venv found. Install one (on Debian and Ubuntu: apt install python3 \
python3-venv), or set PYTHON to one."
}

# digest: a hash of standard input, with what every system with Python has.
digest() { "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

# ensure_venv DIR: a virtual environment that runs, with build tools.
ensure_venv() {
    local dir=$1
    if "$dir/bin/python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null &&
        "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    say "creating ${dir##*/} with $("$python" --version)"
    "$python" -m venv --clear "$dir"
}

# build_wheel PYTHON: the wheel of this checkout, built when a source has changed. Sets WHEEL and WHEEL_HASH.
build_wheel() {
    local python=$1 folder=$ROOT/.venv/compodistill-wheel
    local name sources=()
    for name in setup.py pyproject.toml README.md LICENSE llava_compodistill scripts patches; do
        [[ ! -e $ROOT/$name ]] || sources+=("$name")
    done
    WHEEL_HASH=$(
        cd "$ROOT"
        {
            git rev-parse HEAD 2>/dev/null || true # the wheel records its commit
            find "${sources[@]}" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
                while IFS= read -r -d '' file; do
                    printf '%s\n' "$file"
                    cat "$file"
                done
        } | digest "$python"
    )
    if [[ $(cat "$folder/hash" 2>/dev/null) != "$WHEEL_HASH" ]]; then
        say "building the wheel"
        "$python" -m pip install -qq --no-compile "setuptools>=64" wheel
        # build/ keeps modules that have been deleted since, and setuptools would pack them.
        rm -rf "$folder" "$ROOT/build"
        (cd "$ROOT" && "$python" -m pip wheel -qq --no-deps --no-build-isolation -w "$folder" .)
        rm -rf "$ROOT/build"
        echo "$WHEEL_HASH" >"$folder/hash"
    fi
    WHEEL=$(echo "$folder"/llava_compodistill-*.whl)
    [[ -f $WHEEL ]] || die "no wheel in $folder: remove that folder and try again."
}

# lock_environments, unlock_environments: two commands at once would install into each other's environment; the second
# waits. (The lock is on a file that exists anyway, and goes with the process.)
lock_environments() {
    exec 8<"$ROOT/setup.py"
    ! command -v flock >/dev/null || flock 8
}

unlock_environments() { exec 8<&-; }

# setup_env DIR PINS...: the environment with this package installed from its wheel.
setup_env() {
    lock_environments
    ensure_venv "$ROOT/.venv"
    build_wheel "$ROOT/.venv/bin/python"
    install_env "$@"
    unlock_environments
}

# install_env DIR PINS...: what setup_env does once the wheel is built, under a lock that the caller holds.
install_env() {
    local dir=$1 python=$1/bin/python stamp
    shift
    ensure_venv "$dir"
    stamp=$(printf '%s\n' "$TORCH_PIN" "$LLAVA_PIN" "$@" | cat - "$ROOT/setup.py" | digest "$python")
    if [[ $(cat "$dir/compodistill-stamp" 2>/dev/null) != "$stamp" ]]; then
        say "installing packages into ${dir##*/}: $TORCH_PIN $* (a few minutes the first time)"
        "$python" -m pip install -qq --no-compile "$TORCH_PIN"
        "$python" -m pip install -qq --no-compile "$TORCH_PIN" "$@" "${WHEEL}[dev,tensorboard]"
        # LLaVA pins torch 2.1 and a web server; it needs neither.
        "$python" -m pip install -qq --no-compile --no-deps "$LLAVA_PIN"
        rm -f "$dir/compodistill-wheel-hash"
        echo "$stamp" >"$dir/compodistill-stamp"
    fi
    if [[ $(cat "$dir/compodistill-wheel-hash" 2>/dev/null) != "$WHEEL_HASH" ]]; then
        say "installing $(basename "$WHEEL") into ${dir##*/}"
        "$python" -m pip install -qq --no-compile --no-deps --force-reinstall "$WHEEL"
        echo "$WHEEL_HASH" >"$dir/compodistill-wheel-hash"
    fi
}
