#!/bin/bash
# R-Bench: hallucinated relations, yes/no. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own rbench "$@"
