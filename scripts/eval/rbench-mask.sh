#!/bin/bash
# R-Bench, instance level: subject and object are marked by masks. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own rbench-mask "$@"
