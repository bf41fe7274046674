#!/usr/bin/env bash
# The first process of one machine of the test cluster, in namespaces of its own; started by cluster.py.
#   machine.sh login|NODE FOLDER ADDRESS
# When it ends, the kernel ends everything else on the machine.
set -euo pipefail
name=$1 folder=$2 address=$3
own=$folder/machines/$name

hostname "$name"
mkdir -p "$own/spool"
# The same path on every machine is another folder on each, since slurm.conf is the same for all.
mount --bind "$own" "$folder/self"
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
# A fresh sysfs: the interfaces of this network namespace, and none of the host's control groups.
mount -t sysfs sysfs /sys
ip link set lo up
(
  umask 022 # munged refuses a log file that others may write
  exec munged --foreground --key-file="$folder/munge.key" --socket="$folder/self/munge.sock" \
    --pid-file="$folder/self/munged.pid" --seed-file="$folder/self/munged.seed" --log-file="$folder/self/munged.log"
) &
until [ -S "$folder/self/munge.sock" ]; do
  kill -0 $! || exit 1
  sleep 0.02
done
export SLURM_CONF=$folder/etc/slurm.conf
if [ "$name" = login ]; then
  ip link add switch type bridge stp_state 0 forward_delay 0
  ip address add "$address/24" dev switch
  ip link set switch up
  slurmctld -D -c &
else
  until ip link show cable > /dev/null 2>&1; do sleep 0.02; done # cluster.py plugs it in
  ip address add "$address/24" dev cable
  ip link set cable up
  slurmd -D &
fi
wait $!
