# shellcheck shell=bash
# Sourced by scripts/pretrain/*.sh once their variables are set.
#
# Sets ROOT (the repository), UPDATE_FREQ (accumulation that keeps the total batch of the recipe) and LAUNCH (the
# command that starts one process a GPU), and defines require_paths. More variables, all from the environment:
: "${TOTAL_BATCH:=256}"   # clips an optimizer step, masks counted
: "${MAX_RESTARTS:=3}"    # times torchrun starts the processes again after a failure; the run then resumes
: "${LAUNCHER:=torchrun}" # or srun, inside a Slurm job (scripts/slurm)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  echo "error: $*" >&2
  exit 1
}

# require_paths NAME...: the files or folders that these variables name must exist, unless they lie on the hub.
require_paths() {
  local name
  for name in "$@"; do
    [[ -e ${!name} || ${!name} == hf://* ]] || die "$name=${!name}: no such file or folder (edit the top of $0, or set $name)"
  done
}

per_pass=$((GPUS * NODES * BATCH_SIZE))
((per_pass > 0 && TOTAL_BATCH % per_pass == 0)) ||
  die "GPUS $GPUS x NODES $NODES x BATCH_SIZE $BATCH_SIZE = $per_pass does not divide TOTAL_BATCH $TOTAL_BATCH"
# shellcheck disable=SC2034 # the recipes use it
UPDATE_FREQ=$((TOTAL_BATCH / per_pass))

# The environment that quickstart.sh made, if no other is active.
if ! command -v torchrun >/dev/null && [[ -x $ROOT/.venv/bin/torchrun ]]; then
  PATH=$ROOT/.venv/bin:$PATH
fi
case $LAUNCHER in
  torchrun)
    LAUNCH=(torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
      --master_port "$MASTER_PORT" --nproc_per_node "$GPUS" --max-restarts "$MAX_RESTARTS")
    ;;
  srun) # Without --kill-on-bad-exit, so that every process gets to save itself when the job has to stop.
    LAUNCH=(srun --nodes "$NODES" --ntasks-per-node "$GPUS" --kill-on-bad-exit=0 --wait=60 python -u)
    ;;
  *) die "LAUNCHER=$LAUNCHER: choose torchrun or srun" ;;
esac
command -v "${LAUNCH[0]}" >/dev/null || die "${LAUNCH[0]} is not on the PATH: activate your environment (INSTALL.md)"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
