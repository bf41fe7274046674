#!/usr/bin/env bash
# Environment, linters, type checker, and all tests, or those of pytest's arguments.    bash launch/test.sh [arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
ensure_environment "[dev]"

ruff check .
ruff format --check .
mypy
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
if [ $# -gt 0 ]; then
  python -m pytest "$@"
else
  # Unit tests are one process each and share the cores; the others start processes of their own.
  cores=$(nproc) status=0
  python -m pytest tests/unit --numprocesses $((cores < 8 ? cores : 8)) --dist loadfile || status=$?
  python -m pytest tests --ignore tests/unit || status=$?
  exit $status
fi
