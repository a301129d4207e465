#!/usr/bin/env bash
# Fine-tune ViT-S on Something-Something V2.
#
# We assume that ViT-B's recipe is used for ViT-S too, and 4 GPUs, as for Kinetics. The paper reports 69.1 top-1 after
# "800 epochs" of pretraining on Kinetics-400.
# Validates every epoch, then tests the best one (checkpoint-best.pth) on 2 x 3 views.
set -euo pipefail

: "${DATA_PATH:=/path/to/ssv2}"               # folder with train.csv, val.csv, test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_s_2nd_stage/checkpoint-199.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/finetune_ssv2_vit_s}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                                # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                          # videos per GPU and pass; 4 on 8 GPUs
: "${TOTAL_BATCH:=32}"                        # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set SSV2 --model vit_small_patch16_224 \
  --lr 1e-3 --layer_decay 0.7 --drop_path 0.1 --fc_drop_rate 0 --epochs 40 "$@"
