#!/usr/bin/env bash
# The comparisons of configs/compare/search-*.yaml on a GPU that is there for minutes: most important first, each going on where an
# earlier session has stopped.
#   bash benchmarks/search_session.sh OUT [--key value ...]
# in the environment, from a folder with data/models/SmolLM2-135M-Instruct and data/evidence; OUT gets all cells in OUT/search, and of
# every part its table and results. Bring OUT back to the next machine, and start the same command again.
# Rehearsed on CPUs by tests/unit/scripts/test_search_session.py.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shift
MINUTES=${MINUTES:-12} WORKERS=${WORKERS:-12} # when no part begins or goes on any more; cells at a time
own=("$@")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

say() { echo "$*" | tee -a "$out/session.txt"; }
part() { # NAME COMPARISON OPTIONS...: a part of a comparison until the time is over; its table as far as it has come
  local name=$1 comparison=$2 left=$((60 * MINUTES - SECONDS)) began=$SECONDS status=0
  shift 2
  if [ $left -le 0 ]; then say "== $name: no time left"; return; fi
  local command=(python3 -m dora_dist.compare "$top/configs/compare/$comparison.yaml" --output_dir "$out/search" "$@" ${own[@]+"${own[@]}"})
  # Told to stop, workers save a checkpoint, from which the cell goes on.
  timeout --kill-after=30 "$left" "${command[@]}" --workers "$WORKERS" >> "$out/session.txt" 2>&1 < /dev/null || status=$?
  if [ $status -eq 124 ]; then
    status="cut off after $left s"
    "${command[@]}" --report >> "$out/session.txt" 2>&1 < /dev/null
  fi
  for file in results.md results.json; do [ ! -e "$out/search/$file" ] || cp "$out/search/$file" "$out/$name-$file"; done
  say "== $name: status $status, $((SECONDS - began)) s"
}

all="[0, 1, 2, 3, 4]"
part starts-rank2-one-seed search-starts --budgets "[2]" --seeds "[0]"
part controls-rank2-one-seed search-controls --budgets "[2]" --seeds "[0]"
part starts-rank2 search-starts --budgets "[2]" --seeds "$all"
part starts search-starts --budgets "[2, 8]" --seeds "$all"
part controls-rank2 search-controls --budgets "[2]" --seeds "$all"
part controls search-controls --budgets "[2, 8]" --seeds "$all"
