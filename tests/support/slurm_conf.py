"""Configuration files of the test cluster (Slurm 22.05)."""

from pathlib import Path

NODES = ("node1", "node2")
ADDRESSES = {"login": "10.61.0.1", "node1": "10.61.0.11", "node2": "10.61.0.12"}
GPUS = 8

# slurmd loads a plugin for control groups even where nothing uses them; a named plugin is loaded without probing.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"


def hosts() -> str:
    """Content of every machine's /etc/hosts: without 127.0.1.1, which gloo would announce to the other node."""
    return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())


def gres_conf(folder: Path) -> str:
    """The GPUs, which must be device files."""
    return f"NodeName=node[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n"


def slurm_conf(folder: Path) -> str:
    """Content of one file for all machines; ``self`` is another folder on each."""
    return f"""
ClusterName=dora
SlurmctldHost=login({ADDRESSES["login"]})
SlurmUser=root
SlurmdUser=root
# A requeued job may start when its old credential has expired: after 120 s if nothing is said; 3 was not honoured.
AuthInfo=socket={folder}/self/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/self/spool
SlurmctldPidFile={folder}/self/slurmctld.pid
SlurmdPidFile={folder}/self/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
# Nodes may claim what the host does not have.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# All shorter than a cluster would have them.
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=10
MessageTimeout=5
BatchStartTimeout=10
KillWait=5
MinJobAge=3600
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
# A job of the partition 'high' takes the place of one in 'main', which is requeued. In the grace time the job gets the
# signal that it asked for.
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-2] CPUs=64 RealMemory=64000 Gres=gpu:{GPUS} State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=1-0 DefMemPerCPU=1000 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node[1-2] MaxTime=1-0 DefMemPerCPU=1000 PriorityTier=10 PreemptMode=OFF
"""
