#!/usr/bin/env bash
# One rank, as a task of srun:   srun ... bash slurm/rank.sh [arguments of dora_dist.train, or of DORA_MODULE]
# Sets what a launcher would set, from the variables that Slurm gives to a task. There is no launcher in between: it would
# turn exit status 75 into 1, and die of SIGUSR1.
container=()
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
set -euo pipefail # not before: what a site sources may read unset variables

# tasks_on_node NODE "2(x3),1": how many tasks the node with this number has.
tasks_on_node() {
  local node=$1 group count nodes
  for group in ${2//,/ }; do
    count=${group%%(*} nodes=1
    [ "$group" = "$count" ] || nodes=${group#*(x} nodes=${nodes%)}
    [ "$node" -ge "$nodes" ] || { echo "$count"; return; }
    node=$((node - nodes))
  done
}

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
LOCAL_WORLD_SIZE=$(tasks_on_node "$SLURM_NODEID" "$SLURM_STEP_TASKS_PER_NODE")
export LOCAL_WORLD_SIZE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# As `accelerate launch --config_file launch/zero2_multinode.yaml` does (accelerate 1.15, prepare_deepspeed_cmd_env), or,
# for ddp, launch/ddp_gpu.yaml.
export ACCELERATE_MIXED_PRECISION=no
if [ "${DORA_ENGINE:-zero2}" = ddp ]; then
  unset ACCELERATE_USE_DEEPSPEED
else
  export ACCELERATE_USE_DEEPSPEED=true
  export ACCELERATE_DEEPSPEED_CONFIG_FILE=launch/zero2.json
  export ACCELERATE_CONFIG_DS_FIELDS=deepspeed_config_file,deepspeed_multinode_launcher
fi

echo "rank $RANK of $WORLD_SIZE: $(hostname), local rank $LOCAL_RANK of $LOCAL_WORLD_SIZE, restart ${SLURM_RESTART_COUNT:-0}"
# Until the program takes them, these signals would end it with a status that says nothing.
trap '' TERM USR1
exec "${container[@]}" python -m "${DORA_MODULE:-dora_dist.train}" "$@"
