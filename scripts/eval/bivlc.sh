#!/bin/bash
# BiVLC: captions to images and images to captions. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own bivlc "$@"
