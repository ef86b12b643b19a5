#!/bin/bash
# Reefknot: hallucinated relations, three tasks. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own reefknot "$@"
