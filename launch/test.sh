#!/usr/bin/env bash
# Environment, linters, type checker, all tests.    bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
ensure_environment "[dev]"

ruff check .
ruff format --check .
mypy
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
python -m pytest "$@"
