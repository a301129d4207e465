#!/usr/bin/env bash
# SEVERE, similar actions: fine-tune ViT-B on FX-S1, eleven leaps and jumps of Gym-99's floor exercise, and test it.
#
# The recipe is ours: Gym-99's with more epochs.
# Validates during training, then tests the best checkpoint on 5 x 3 views, and prints its row of the table.
# SEVERE.md compares the benchmark's settings with ours.
set -euo pipefail

: "${DATA_PATH:=/path/to/fx_s1}"       # folder with train.csv, val.csv, test.csv (make_lists.py finegym --part fx-s1)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe/fx_s1}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                         # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                   # videos per GPU and pass
: "${TOTAL_BATCH:=32}"                 # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set FX-S1 --model vit_base_patch16_224 --sampling_rate 4 \
  --lr 1e-3 --layer_decay 0.7 --drop_path 0.1 --fc_drop_rate 0 --epochs 100 "$@"
python "$ROOT/scripts/severe/severe_table.py" "fx_s1=$OUTPUT_DIR"
