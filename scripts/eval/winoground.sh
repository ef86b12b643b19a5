#!/bin/bash
# Winoground: the same words in another order. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own winoground "$@"
