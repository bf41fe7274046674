# Sourced by the batch scripts of this folder, on the first node of the job: one srun, and what its end means.
# shellcheck shell=bash

PREEMPTED=75 # exit status of a run that goes on when it is started again: dora_dist/console/errors.py
ABORTED=134 # of a process that has ended itself by SIGABRT
FIRST_PORT=${DORA_FIRST_PORT:-10240} # above those of Slurm; the last is below the ephemeral ones (32768 and up)
PORTS_PER_JOB=16
JOBS_WITH_OWN_PORTS=1400

# fail MESSAGE: a mistake of the user ends the job with 2, as it does in dora_dist.
fail() {
  echo "error: $1" >&2
  exit 2
}

# choose_port JOB: a port that nothing on this host uses. Jobs whose numbers are less than JOBS_WITH_OWN_PORTS apart look
# among different ports, so that two that start at the same moment cannot choose the same one.
choose_port() {
  local first=$((FIRST_PORT + $1 % JOBS_WITH_OWN_PORTS * PORTS_PER_JOB)) port
  for ((port = first; port < first + PORTS_PER_JOB; port++)); do
    port_in_use "$port" || { echo "$port"; return; }
  done
  fail "ports $first to $((port - 1)), those of job $1, are all in use on $(hostname); set DORA_FIRST_PORT, now $FIRST_PORT"
}

# port_in_use PORT: as local port of any connection or listener. Not by connecting: that would miss other addresses.
port_in_use() {
  local line
  printf -v line '^ *[0-9]+: [0-9A-F]+:%04X ' "$1"
  cat /proc/net/tcp /proc/net/tcp6 2> /dev/null | grep -qE "$line"
}

# What Slurm calls this job. The number of one element of an array is also that of the whole array.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-$SLURM_JOB_ID}

# job_field NAME: one field of what Slurm says about this job.
job_field() {
  scontrol --oneliner show job "$this_job" | tr ' ' '\n' | sed -n "s/^$1=//p"
}

# run_ranks ARGUMENTS: dora_dist.train as one task per rank; then this script ends with its exit status, and the job is
# requeued if the run was told to stop and the job may be requeued.
run_ranks() {
  local logs=${DORA_LOGS:-runs/slurm}/$SLURM_JOB_NAME-$SLURM_JOB_ID restarts=${SLURM_RESTART_COUNT:-0} options
  [ "$restarts" -le "${DORA_MAX_RESTARTS:-20}" ] || {
    echo "error: this job was started again $restarts times, but DORA_MAX_RESTARTS is ${DORA_MAX_RESTARTS:-20}" >&2
    exit 1
  }
  case ${DORA_ENGINE:-zero2} in
    zero2 | ddp) ;;
    *) fail "DORA_ENGINE is $DORA_ENGINE, but must be zero2 or ddp" ;;
  esac
  mkdir -p "$logs"
  read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_PORT=$(choose_port "$SLURM_JOB_ID") || exit
  export MASTER_ADDR MASTER_PORT
  echo "start $restarts: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT, logs $logs/"

  options=(
    # The first rank to exit must not have the others killed, whose exit status would hide its own; ranks that are left
    # hanging by one that failed get this long: more than distributed.silent_seconds, after which they end by themselves.
    --kill-on-bad-exit=0 --wait=120
    --output="$logs/rank-%t.log" --open-mode=append
    # sbatch --export=NONE would be handed on.
    --export=ALL
    # srun does not take it from the job since Slurm 22.05.
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
  )
  notice="" reports=$(nccl_reports "$logs")
  trap 'notice=USR1' USR1
  trap 'notice=TERM' TERM
  srun "${options[@]}" "${srun_options[@]}" bash slurm/rank.sh "$@" &
  wait_for_ranks $!
  end_job $? $(($(nccl_reports "$logs") - reports))
}

# nccl_reports FOLDER: how many times ranks have said so far, in their logs there, that NCCL has lost another process.
nccl_reports() {
  cat "$1"/rank-*.log 2> /dev/null | grep -cE 'ncclRemoteError|remote process exited' || true
}

# wait_for_ranks SRUN: its exit status. Once this script has a notice, srun gets SIGUSR1, which it passes to all ranks: not
# SIGTERM, at which it kills them. Again and again, because a rank ignores it until it has read its configuration.
wait_for_ranks() {
  # Not `wait` alone: a signal just before it would not end it.
  while kill -0 "$1" 2> /dev/null; do
    [ -z "$notice" ] || kill -USR1 "$1" 2> /dev/null
    sleep 1
  done
  wait "$1"
}

# end_job STATUS REPORTS: requeue if that is what the status asks for, and what NCCL has reported since the start; exit with it.
end_job() {
  local status=$1
  if ! goes_on "$status" "$2"; then
    [ "$status" = 0 ] || echo "the run ended with status $status: not requeued" >&2
  elif [ "$(job_field Requeue)" != 1 ]; then
    echo "stopped with status $status; submit the same command again to resume (or submit with --requeue)" >&2
  elif [ "$(job_field JobState)" != RUNNING ]; then
    echo "stopped with status $status: Slurm is ending this job, so it is not requeued from here" >&2
  else
    echo "stopped with status $status: requeueing" >&2
    scontrol requeue "$this_job"
  fi
  exit "$status"
}

# goes_on STATUS REPORTS: because a signal asked for the end, whether or not there was time for a checkpoint: a run that was
# killed after a notice goes on from the newest complete one. Without a notice a rank may have been killed for its memory.
# Or because a rank was lost, and NCCL's watchdog has aborted the others (SIGABRT) before they could end with 75.
goes_on() {
  [ "$1" = "$PREEMPTED" ] || { [ -n "$notice" ] && [ "$1" -gt 128 ]; } || { [ "$1" = "$ABORTED" ] && [ "$2" -gt 0 ]; }
}

srun_options=()
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
