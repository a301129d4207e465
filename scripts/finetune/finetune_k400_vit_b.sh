#!/usr/bin/env bash
# Fine-tune ViT-B on Kinetics-400.
#
# The recipe of the released model: 4 videos on each of 4 GPUs. The paper reports 83.1 top-1 after "600 epochs" of
# pretraining and 83.4 after "1200".
# Validates every epoch, then tests the best one (checkpoint-best.pth) on 7 x 3 views.
set -euo pipefail

: "${DATA_PATH:=/path/to/k400}"               # folder with train.csv, val.csv, test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/finetune_k400_vit_b}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                                # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=4}"                          # videos per GPU and pass; 2 on 8 GPUs
: "${TOTAL_BATCH:=16}"                        # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set Kinetics-400 --model vit_base_patch16_224 --sampling_rate 4 \
  --lr 1e-3 --layer_decay 0.75 --drop_path 0.1 --fc_drop_rate 0 --epochs 100 "$@"
