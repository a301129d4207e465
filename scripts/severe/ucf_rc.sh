#!/usr/bin/env bash
# SEVERE, another task: train ViT-B to count repetitions (UCFRep), and test it on the val set.
#
# The schedule is the benchmark's. Validates on val after each epoch, then tests the best checkpoint on val, and prints
# its row of the table.
# SEVERE.md compares the benchmark's settings with ours.
set -euo pipefail

: "${DATA_PATH:=/path/to/ucfrep}"       # annotations: folder with train/*.mat and val/*.mat (ucf526_annotations.zip)
: "${DATA_ROOT:=/path/to/UCF-101}"      # the videos of UCF101, <class>/<name>.avi
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe/ucf_rc}" # checkpoints, log.txt, TensorBoard, counts of the test
: "${GPUS:=4}"                          # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                    # training segments per GPU and pass
: "${TOTAL_BATCH:=32}"                  # segments per optimizer step; gradients accumulate to it
: "${NUM_WORKERS:=4}"                   # loader processes per GPU

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH DATA_ROOT MODEL_PATH

train run_repetition_counting.py \
  --data_path "$DATA_PATH" --data_root "$DATA_ROOT" \
  --model vit_base_patch16_224 --finetune "$MODEL_PATH" \
  --opt adam --opt_betas 0.9 0.999 --lr 4e-4 --min_lr 4e-4 --weight_decay 1e-3 --layer_decay 1 \
  --num_frames 16 --epochs 100 --save_ckpt_freq 20 "$@"
python "$ROOT/scripts/severe/severe_table.py" "ucf_rc=$OUTPUT_DIR"
