# Settings of your cluster. Copy this file to slurm/site.sh, which is not tracked, and keep what you need:
#   cp slurm/site.example.sh slurm/site.sh
# It is read three times: by you before sbatch (source slurm/site.sh), by the batch script, and by every task.
# shellcheck shell=bash disable=SC2034  # the variables are used by the files that source this one

# --- What sbatch needs. Its input variables (man sbatch) win over the #SBATCH lines, and lose to the command line.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_TIMELIMIT=24:00:00

# --- The environment of the ranks. A .venv in the repository is activated before this, if there is one.
# module load cuda
# source /path/to/other/venv/bin/activate
# export HF_HOME=/shared/huggingface
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0     # where the first interface is not the one between nodes

# --- GeForce RTX 40xx with a driver before 550.40.07: NCCL must do without P2P and InfiniBand there. `accelerate launch` sets both by
# itself; these scripts use no launcher, and accelerate ends with NotImplementedError where they are missing.
# export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1

# --- A container: what python is started with, or options of srun (pyxis). Neither has been tried by us.
# container=(apptainer exec --nv --bind "$PWD" /shared/images/dora-dist.sif)
# srun_options=(--container-image=/shared/images/dora-dist.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

# --- The engine, where it is not zero2: ddp, with --distributed.engine ddp beside it.
# export DORA_ENGINE=ddp

# --- Logs of the ranks, on a file system that all nodes share. The default is runs/slurm.
# export DORA_LOGS=/shared/logs

# --- How often one job may be started again: by itself after a preemption, or by Slurm after the loss of a node.
# export DORA_MAX_RESTARTS=20

# --- The first of the 22400 ports among which jobs look for one to meet at.
# export DORA_FIRST_PORT=10240
