#!/bin/bash
# SADE: compositional matching, six categories. Flags: llava-compodistill eval --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own sade "$@"
