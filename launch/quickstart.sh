#!/usr/bin/env bash
# From a fresh clone to a tuned adapter: environment, backbone and data, training under ZeRO-2, summary.
#   bash launch/quickstart.sh [--section.key value ...]     (the arguments go to dora-dist quickstart)
# Two CPU processes where there is no GPU, one process per GPU where there are some.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
ensure_environment ""

dora-dist quickstart --output .cache/quickstart --output_dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
