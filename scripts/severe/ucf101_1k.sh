#!/usr/bin/env bash
# SEVERE, few samples: fine-tune ViT-B on 1,010 videos of UCF101 (fold 1), and test it on the whole test set.
#
# The videos are the benchmark's subset, written to train_subset.csv. The recipe is ours: that of
# scripts/finetune/finetune_ucf101_vit_b.sh.
# Validates during training, then tests the best checkpoint on 5 x 3 views, and prints its row of the table.
# SEVERE.md compares the benchmark's settings with ours.
set -euo pipefail

: "${DATA_PATH:=/path/to/ucf101}"          # folder with train.csv, val.csv, test.csv (make_lists.py ucf101 --fold 1)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe/ucf101_1k}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                             # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                       # videos per GPU and pass
: "${TOTAL_BATCH:=64}"                     # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set UCF101 --examples 1000 --model vit_base_patch16_224 --sampling_rate 4 \
  --lr 5e-4 --layer_decay 0.7 --drop_path 0.2 --fc_drop_rate 0.5 --epochs 100 --val_freq 5 "$@"
python "$ROOT/scripts/severe/severe_table.py" "ucf101_1k=$OUTPUT_DIR"
