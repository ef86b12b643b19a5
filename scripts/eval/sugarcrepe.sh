#!/bin/bash
# SugarCrepe: which of two captions, seven kinds of change. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own sugarcrepe "$@"
