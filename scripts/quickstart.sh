#!/bin/bash
# Sets up .venv and distils a small student from a larger teacher on the miniature world; nothing needs to be
# installed but Python 3.10-3.13. Arguments are passed on: bash scripts/quickstart.sh --help
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env "$ROOT/.venv" "${PINS_CURRENT[@]}"
# Every core, unless the environment says otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}
cd "$ROOT"
exec "$ROOT/.venv/bin/python" "$ROOT/scripts/miniature" quickstart "$@"
