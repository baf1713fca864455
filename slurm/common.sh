# shellcheck shell=bash
# Shared by the job templates of this folder. A batch script sources it right after its #SBATCH lines; the variables that
# change its behavior stand in README.md. Nothing here knows what is trained: a template gives the words for `deepspeed` or `dstrain`.
#
# One srun task per node starts `deepspeed --no_ssh`, which starts the ranks. srun signals every process of a step, so the
# launchers ignore USR1 and leave it to the ranks, which finish their step, save and exit with REQUEUE_CODE. They ignore TERM too: it
# would end `deepspeed`, hence the task, hence at once the ranks; its child, which starts the ranks, still passes TERM on to them.

set -euo pipefail

REQUEUE_CODE=85 # dstrain: "stopped after a checkpoint, start me again"
DSTRAIN_HOME=${DSTRAIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
SECONDS_FOR_OTHERS=120 # from the end of one node's task until the other nodes, which then lack a peer, are stopped
stop_requested=
trap 'stop_requested=yes' USR1

say() { printf '== %s  %s\n' "$(date +'%F %T')" "$*"; }
die() {
  say "$*" >&2
  exit 2
}

hosts() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }
master_address() { hosts | sed -n 1p; }
master_port() { echo $((20000 + 8 * SLURM_JOB_ID % 12000)); } # as dstrain.parallel.launch_environment.master_port

ranks_per_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-0}
  echo "${DSTRAIN_RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
}

threads_per_rank() {
  local threads=$((${SLURM_CPUS_ON_NODE:-1} / $(ranks_per_node)))
  echo "${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}

# The `deepspeed` of the project's environment comes first in PATH; a container brings its own.
enter_environment() {
  local venv=${DSTRAIN_VENV:-$DSTRAIN_HOME/.venv}
  if [ -z "${DSTRAIN_CONTAINER:-}" ]; then
    [ -x "$venv/bin/deepspeed" ] || die "no deepspeed in $venv: install dstrain there, or set DSTRAIN_VENV or DSTRAIN_CONTAINER"
    export PATH=$venv/bin:$PATH
  fi
  [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  OMP_NUM_THREADS=$(threads_per_rank)
  export OMP_NUM_THREADS
}

# train_on_all_nodes RECIPE DATA RUN WORD...   trains, or resumes training, with `dstrain train`; the output lies beside RUN.
train_on_all_nodes() {
  local recipe=$1 data=$2 run=$3
  shift 3
  enter_environment
  deepspeed_on_all_nodes "${run%/}.slurm" --module dstrain train "$recipe" --data "$data" --output "$run" "$@"
}

# deepspeed_on_all_nodes LOGS WORD...   runs `deepspeed ... WORD...` on every node of the job, with the output in LOGS, then
# ends the job: done, failed (the last lines are shown), or stopped by USR1 (the job goes back into the queue).
deepspeed_on_all_nodes() {
  local logs=$1 code=0
  shift
  mkdir -p "$logs"
  local log=$logs/slurm-$SLURM_JOB_ID.log hostfile=$logs/slurm-$SLURM_JOB_ID.hostfile
  hosts | sed "s/\$/ slots=$(ranks_per_node)/" >"$hostfile"
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $(ranks_per_node) ranks each"
  say "output: $log"
  # --ntasks, because a job that is requeued with other nodes keeps the old SLURM_NTASKS.
  # shellcheck disable=SC2016  # SLURM_NODEID is expanded by each task
  run_step srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --kill-on-bad-exit=0 --wait="$SECONDS_FOR_OTHERS" --output="$log" --open-mode=append --label \
    bash -c 'trap "" USR1 TERM; exec '"${DSTRAIN_CONTAINER:-}"' deepspeed --node_rank "$SLURM_NODEID" "$@"' deepspeed \
    --log_level warning --hostfile "$hostfile" --no_ssh --num_nodes "$SLURM_JOB_NUM_NODES" --num_gpus "$(ranks_per_node)" \
    --master_addr "$(master_address)" --master_port "$(master_port)" "$@" || code=$?
  end_job "$code" "$log"
}

# one_share I/N WORD...   runs `dstrain WORD... --shard I/N` as one task, then ends the job as above. What stops it loses no finished
# part, so USR1 may end it at once.
one_share() {
  local share=$1 code=0
  shift
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): share $share on $SLURM_JOB_NODELIST"
  # shellcheck disable=SC2086  # the words before the program
  run_step srun --ntasks=1 --cpu-bind=none ${DSTRAIN_CONTAINER:-} dstrain "$@" --shard "$share" || code=$?
  end_job "$code"
}

# Runs COMMAND in the background, because bash handles a signal only while it waits; returns COMMAND's exit code.
run_step() {
  "$@" &
  step=$!
  trap 'stop_requested=yes; ask_to_stop' USR1
  [ -z "$stop_requested" ] || ask_to_stop
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  wait "$step"
}

# Asks again and again: a rank that is still starting does not listen yet.
ask_to_stop() {
  say "USR1: asking all ranks to save and stop"
  while kill -USR1 "$step"; do sleep 10; done >/dev/null 2>&1 &
}

end_job() {
  local code=$1 log=${2:-}
  if [ "$code" = 0 ]; then
    say "done"
  elif [ "$code" = "$REQUEUE_CODE" ] || [ -n "$stop_requested" ]; then
    say "stopped with exit code $code: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  else
    say "failed with exit code $code${log:+; the last lines of $log:}"
    [ -z "$log" ] || tail -n 20 "$log"
  fi
  exit "$code"
}
