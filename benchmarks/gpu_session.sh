#!/usr/bin/env bash
# What to measure on a GPU that is there for ten minutes: most important first, every part under a time limit, a table last.
#   bash benchmarks/gpu_session.sh OUT        in the environment, from the top folder; OUT gets six small files at most
# Rehearsed on CPUs:  SHAPE=8b-tiny DEVICE=cpu ROUNDS=2 PATIENCE=5 MINUTES=30 bash benchmarks/gpu_session.sh OUT
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
SHAPE=${SHAPE:-8b} DEVICE=${DEVICE:-cuda} ROUNDS=${ROUNDS:-8} # how the parts measure
PATIENCE=${PATIENCE:-1} MINUTES=${MINUTES:-10}                # factor of all limits; when no part begins or goes on any more
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if [ "$DEVICE" = cpu ]; then export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=-1; fi
: > "$out/session.txt" && : > "$out/table.txt"

part() { # NAME SECONDS COMMAND...: run it under its limit; log to session.txt, its last lines that match $show to table.txt
  local name=$1 limit=$((PATIENCE * $2)) left=$((60 * MINUTES - SECONDS)) began=$SECONDS status=0
  shift 2
  if [ $left -lt $limit ]; then limit=$left; fi
  if [ $limit -le 0 ]; then say "== $name: no time left"; return; fi
  timeout --kill-after=10 "$limit" "$@" > "$scratch/log" 2>&1 < /dev/null || status=$?
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then status="cut off after $limit s"; fi
  say "== $name: status $status, $((SECONDS - began)) s"
  { echo "== $name: $*"; tr '\r' '\n' < "$scratch/log" | tail -n 150; } >> "$out/session.txt"
  grep -E "${show:-.}" "$scratch/log" | tail -n 12 | cut -c -170 | tee -a "$out/table.txt"
}
say() { echo "$*" | tee -a "$out/table.txt"; }
has() { python3 -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
compare() { # NAME SECONDS OPTIONS...: the benchmark of a step; figures and profiles are kept
  local name=$1 limit=$2; shift 2
  show='^shape|^8b|error' part "$name" "$limit" python3 -m dora_dist.benchmark --device "$DEVICE" --shapes "$SHAPE" --rounds "$ROUNDS" \
    --warmup 2 --output "$scratch/$name" "$@"
  for file in "$scratch/$name"/*.json; do [ ! -e "$file" ] || { cat "$file"; echo; } >> "$out/benchmarks.json"; done
  for file in "$scratch/$name"/profile*; do [ ! -e "$file" ] || { echo "== $name"; cut -c -200 "$file"; } >> "$out/profiles.txt"; done
}
estimate() { # ROWS CHECKPOINTING: what the estimate says of the same step
  show='^estimate' part "estimate-$1-checkpointing-$2" 40 bash -c "python3 -m dora_dist.estimate $scratch/run/run.yaml --json --device cuda \
    --distributed.engine none --adapter.dropout 0 --training.gradient_checkpointing $2 --training.per_device_train_batch_size $1 |
    python3 -c 'import json, sys; print(\"estimate, peak MiB\", json.load(sys.stdin)[\"peak_bytes\"] / 2**20)'"
}

{ date; git log -1 --format=%h; nvidia-smi; python3 -m pip list; } >> "$out/session.txt" 2>&1 || true
liger=() && if [ "$DEVICE" = cuda ] && has liger_kernel; then liger=(peft-liger); else say "peft-liger: left out, liger-kernel or a GPU is missing"; fi
cards=$(python3 -c "import torch; print(torch.cuda.device_count())")

if [ "$cards" -ge 2 ]; then show='passed|failed|Error' part "all $cards cards over NCCL" 150 python3 -m pytest -q tests/gpu -k "every_gpu or all_gpus"; fi
main=(floor peft-lora ${liger[@]+"${liger[@]}"} dynamic dynamic-pruned)
for rows in 1 4; do compare "step-$rows-rows" 110 --batch $rows --profile dynamic --contestants "${main[@]}"; done
beside=(python3 benchmarks/run_beside_trl.py "$scratch/run")
mkdir "$scratch/run" && show='error' part "make a base" 60 "${beside[@]}" make --shape "$SHAPE" --device "$DEVICE"
show='^\{|^error' part "run, this project" 100 "${beside[@]}" ours
show='^\{|Error' part "a base in shards" 100 python3 benchmarks/sharded_step.py "$scratch/run/model"
if has trl; then show='^\{|Error' part "run, TRL" 100 "${beside[@]}" trl; else say "run, TRL: left out, trl is not installed"; fi
compare "memory" 60 --batch 4 --checkpointing both --contestants peft-lora dynamic --rounds 1
for checkpointing in false true; do estimate 4 $checkpointing; done
show='passed|failed|skipped|Error' part "tests" 150 python3 -m pytest -q -rs tests/gpu
compare "dropout" 60 --dropout 0.05 --contestants peft-lora dynamic
compare "adalora" 60 --contestants peft-lora peft-adalora
grep -h '^{"what"' "$out/session.txt" > "$out/runs.jsonl"
echo && echo "The table, in $out/table.txt:" && cat "$out/table.txt"
