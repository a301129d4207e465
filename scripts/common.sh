# shellcheck shell=bash
# Sourced by the recipes in scripts/pretrain, finetune, test and severe after they set their own variables. Options after
# a recipe are passed to its program (for example --dry_run); running a recipe again resumes it.
#
# Variables of all recipes; set them in the environment:
: "${NODES:=1}"
: "${NODE_RANK:=0}"           # index of this node
: "${MASTER_ADDR:=127.0.0.1}" # of node 0
: "${MASTER_PORT:=29500}"     # a free port on node 0
: "${NUM_WORKERS:=10}"        # loader processes per GPU
: "${LAUNCHER:=torchrun}"     # or srun, inside a Slurm job (scripts/slurm)
# TOTAL_BATCH: samples per optimizer step: clips, with each of their masks counted (pretraining), videos (fine-tuning), or
# segments (counting). Default 256, unless the recipe sets another.
# MAX_RESTARTS: how often torchrun restarts failed processes, which then resume. Default 3, for tests 0.

unset CDPATH # with it, cd may go elsewhere, and prints
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Use the environment that quickstart.sh made if no other is active.
if ! command -v torchrun >/dev/null && [[ -x $ROOT/.venv/bin/torchrun ]]; then
  PATH=$ROOT/.venv/bin:$PATH
fi

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

# launch PROGRAM OPTION...: starts one process per GPU.
launch() {
  local command program=$ROOT/$1
  shift
  case $LAUNCHER in
    torchrun)
      command=(torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
        --master_port "$MASTER_PORT" --nproc_per_node "$GPUS" --max-restarts "${MAX_RESTARTS:-3}")
      ;;
    srun) # --kill-on-bad-exit=0: each process saves its state when the job has to stop
      command=(srun --nodes "$NODES" --ntasks-per-node "$GPUS" --kill-on-bad-exit=0 --wait=60 python -u)
      ;;
    *) die "LAUNCHER=$LAUNCHER: choose torchrun or srun" ;;
  esac
  command -v "${command[0]}" >/dev/null || die "${command[0]} is not on the PATH: activate your environment (INSTALL.md)"
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "${command[@]}" "$program" --output_dir "$OUTPUT_DIR" --num_workers "$NUM_WORKERS" "$@"
}

# train PROGRAM OPTION...: accumulates gradients to the recipe's total batch.
train() {
  local program=$1 per_pass=$((GPUS * NODES * BATCH_SIZE))
  shift
  : "${TOTAL_BATCH:=256}"
  ((per_pass > 0 && TOTAL_BATCH % per_pass == 0)) ||
    die "GPUS $GPUS x NODES $NODES x BATCH_SIZE $BATCH_SIZE = $per_pass does not divide TOTAL_BATCH $TOTAL_BATCH"
  launch "$program" --batch_size "$BATCH_SIZE" --update_freq $((TOTAL_BATCH / per_pass)) --log_dir "$OUTPUT_DIR" "$@"
}

# finetune OPTION...: fine-tunes a classifier, validates it, and tests the best checkpoint.
finetune() {
  require_paths DATA_PATH MODEL_PATH
  train run_class_finetuning.py --data_path "$DATA_PATH" --finetune "$MODEL_PATH" --num_frames 16 --num_sample 1 \
    --opt adamw --opt_betas 0.9 0.999 --min_lr 1e-6 --weight_decay 0.05 --warmup_epochs 5 --save_ckpt_freq 20 \
    --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 "$@"
}

# evaluate OPTION...: tests a fine-tuned classifier; the number of GPUs does not change the result.
evaluate() {
  require_paths DATA_PATH MODEL_PATH
  : "${MAX_RESTARTS:=0}" # a failed test would fail again
  launch run_class_finetuning.py --eval --data_path "$DATA_PATH" --finetune "$MODEL_PATH" "$@"
}
