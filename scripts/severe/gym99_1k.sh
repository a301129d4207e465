#!/usr/bin/env bash
# SEVERE, few samples: fine-tune ViT-B on 1,089 videos of Gym-99, and test it on the whole val set.
#
# The videos are the benchmark's subset, written to train_subset.csv. The recipe is ours: Gym-99's with more epochs.
# Validates during training, then tests the best checkpoint on 5 x 3 views, and prints its row of the table.
# SEVERE.md compares the benchmark's settings with ours.
set -euo pipefail

: "${DATA_PATH:=/path/to/gym99}"          # folder with train.csv, val.csv, test.csv (make_lists.py finegym --part gym99)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe/gym99_1k}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                            # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                      # videos per GPU and pass
: "${TOTAL_BATCH:=32}"                    # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set Gym99 --examples 1000 --model vit_base_patch16_224 --sampling_rate 4 \
  --lr 1e-3 --layer_decay 0.7 --drop_path 0.1 --fc_drop_rate 0 --epochs 100 --val_freq 5 "$@"
python "$ROOT/scripts/severe/severe_table.py" "gym99_1k=$OUTPUT_DIR"
