#!/usr/bin/env bash
# A throw-away Slurm on this machine for the tests: munge, a controller and two nodes, each of two processors and one
# GPU that is none. Needs root and Debian's packages, which it installs; no systemd, no cgroups.
#
#   slurm_up.sh up DIR      prints the line that points Slurm's commands at it; everything it writes is in DIR; exit
#                           status 3 where Slurm cannot be had
#   slurm_up.sh node DIR N  starts the daemon of node N again
#   slurm_up.sh down DIR    cancels the jobs, ends the daemons
#   slurm_up.sh install DIR PACKAGE...  packages of Debian's, without the daemons that they would start; DIR gets the log
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
D=$2
export SLURM_CONF=$D/slurm.conf

install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "$* not installed; root with apt-get can do it" >&2; exit 3; }
  local policy=/usr/sbin/policy-rc.d ours=0  # keeps the packages from starting daemons of their own
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; ours=1; }
  apt-get update -qq >/dev/null 2>&1 || true
  local status=0
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$D/apt.log" 2>&1 || status=3
  ((ours)) && rm -f $policy
  ((status == 0)) || { echo "Debian's $* cannot be had: $(tail -n 1 "$D/apt.log")" >&2; exit 3; }
}

configure() {  # $1: the first of four free ports
  local memory; memory=$(awk '/MemTotal/{print int($2/1024)}' /proc/meminfo)
  cat >"$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: two minutes by default, or where this is under 5.
AuthInfo=socket=$D/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/slurmctld.log
SlurmdLogFile=$D/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0,sched_interval=1,requeue_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=5
MaxArraySize=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=10
GresTypes=gpu
NodeName=n0 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(($1 + 1)) CPUs=2 RealMemory=$memory Gres=gpu:1
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(($1 + 2)) CPUs=2 RealMemory=$memory Gres=gpu:1
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE GraceTime=300 PriorityTier=1
PartitionName=urgent Nodes=n0,n1 MaxTime=INFINITE PriorityTier=2
C
  printf 'NodeName=n%d Name=gpu File=%s/gpu0\n' 0 "$D" 1 "$D" >"$D/gres.conf"
  [ -e "$D/gpu0" ] || mknod "$D/gpu0" c 1 3
}

case $1 in
install)
  install "${@:3}"
  ;;
up)
  [ "$(id -u)" = 0 ] || { echo "only root can start Slurm's daemons" >&2; exit 3; }
  mkdir -p "$D"/state "$D"/spool
  chmod 755 "$D"
  command -v munged slurmctld slurmd sbatch >/dev/null || install slurmctld slurmd slurm-client munge
  configure "$(python3 -c 'import random; print(random.randrange(20000, 30000, 4))')"
  head -c 1024 /dev/urandom >"$D/munge.key"
  chmod 400 "$D/munge.key"
  munged --force --key-file="$D/munge.key" --socket="$D/munge.socket" --pid-file="$D/munge.pid" \
    --log-file="$D/munge.log" --seed-file="$D/munge.seed"
  slurmctld -f "$SLURM_CONF"
  for n in 0 1; do slurmd -N n$n -f "$SLURM_CONF"; done
  for _ in $(seq 600); do
    [ "$(sinfo -h -N -p main -o %T 2>/dev/null | grep -cx idle)" = 2 ] && { echo "SLURM_CONF=$SLURM_CONF"; exit 0; }
    sleep 0.1
  done
  echo "Slurm did not come up: $(tail -n 1 "$D/slurmctld.log")" >&2
  exit 1
  ;;
node)
  slurmd -N "n$3" -f "$SLURM_CONF"
  ;;
down)
  timeout 5 scancel --full --signal=KILL -u "$(id -u)" 2>/dev/null || true
  timeout 5 scancel -u "$(id -u)" 2>/dev/null || true
  for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  # munge last: the others sign with it
  for file in "$D"/slurmd.*.pid "$D/slurmctld.pid" "$D/munge.pid"; do
    pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
  done
  ;;
esac
