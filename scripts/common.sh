# shellcheck shell=bash
# Sourced by the recipes in scripts/pretrain, finetune, test and severe after they set their own variables.
#
# Sets ROOT (the repository), UPDATE_FREQ (accumulation that keeps the recipe's total batch) and LAUNCH (the command that
# starts one process per GPU), and defines require_paths. Variables that are the same for all recipes; set them in the
# environment:
: "${NODES:=1}"
: "${NODE_RANK:=0}"           # of this node, from 0
: "${MASTER_ADDR:=127.0.0.1}" # of node 0
: "${MASTER_PORT:=29500}"     # a free port on node 0
: "${NUM_WORKERS:=10}"        # loader processes per GPU
: "${TOTAL_BATCH:=256}"       # clips per optimizer step, masks counted
: "${MAX_RESTARTS:=3}"        # how often torchrun restarts failed processes; the run then resumes
: "${LAUNCHER:=torchrun}"     # or srun, inside a Slurm job (scripts/slurm)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  echo "error: $*" >&2
  exit 1
}

# require_paths NAME...: stops unless the path in each of these variables exists or is on the Hugging Face hub (hf://).
require_paths() {
  local name
  for name in "$@"; do
    [[ -e ${!name} || ${!name} == hf://* ]] || die "$name=${!name}: no such file or folder (edit the top of $0, or set $name)"
  done
}

per_pass=$((GPUS * NODES * BATCH_SIZE))
((per_pass > 0 && TOTAL_BATCH % per_pass == 0)) ||
  die "GPUS $GPUS x NODES $NODES x BATCH_SIZE $BATCH_SIZE = $per_pass does not divide TOTAL_BATCH $TOTAL_BATCH"
# shellcheck disable=SC2034 # used by the recipes
UPDATE_FREQ=$((TOTAL_BATCH / per_pass))

# Use the environment that quickstart.sh made if no other is active.
if ! command -v torchrun >/dev/null && [[ -x $ROOT/.venv/bin/torchrun ]]; then
  PATH=$ROOT/.venv/bin:$PATH
fi
case $LAUNCHER in
  torchrun)
    LAUNCH=(torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
      --master_port "$MASTER_PORT" --nproc_per_node "$GPUS" --max-restarts "$MAX_RESTARTS")
    ;;
  srun) # --kill-on-bad-exit=0: each process saves its state when the job has to stop
    LAUNCH=(srun --nodes "$NODES" --ntasks-per-node "$GPUS" --kill-on-bad-exit=0 --wait=60 python -u)
    ;;
  *) die "LAUNCHER=$LAUNCHER: choose torchrun or srun" ;;
esac
command -v "${LAUNCH[0]}" >/dev/null || die "${LAUNCH[0]} is not on the PATH: activate your environment (INSTALL.md)"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
