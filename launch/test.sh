#!/usr/bin/env bash
# Environment, linters, type checker, and tests: the fast lane, the parts of the full lane that CI_FULL names, or those of
# pytest's arguments.    [CI_FULL=slurm,faults] [VERSIONS=2026-05] bash launch/test.sh [arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
# Whether CI_FULL names a part of the full lane.
with_part() {
  case ",${CI_FULL:-}," in
    *,"$1",* | *,all,*) ;;
    *) return 1 ;;
  esac
}
# Only their parts need these. The kernels for GPUs bring Triton along, a gigabyte.
extras=dev
if with_part kernels; then extras+=,gpu; fi
if with_part trackers; then extras+=,mlflow,trackio,wandb; fi
if with_part evaluate; then extras+=,evaluate; fi
if with_part trl; then extras+=,trl; fi
if with_part docs; then extras+=,docs; fi
if with_part served; then
  extras+=,served
  # pip builds llama.cpp: the library alone, without its programs.
  export CMAKE_ARGS="${CMAKE_ARGS:--DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF}"
fi
ensure_environment "[$extras]"

# Their findings depend on versions, and are those of today's.
if [ -z "${VERSIONS:-}" ]; then
  ruff check .
  ruff format --check .
  # Status 2 is no finding: its workers have seconds to start (mypy 2.4), which a machine under load may not give them.
  mypy --num-workers auto || {
    status=$?
    [ "$status" -eq 2 ] || exit "$status"
    mypy
  }
fi
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
if [ $# -eq 0 ]; then
  # Files share the cores, in their own order: the longest first.
  cores=$(nproc)
  set -- --numprocesses $((cores < 8 ? cores : 8)) --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
