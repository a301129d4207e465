#!/usr/bin/env bash
# Fine-tune ViT-B on HMDB51.
#
# We do not know the paper's recipe. Ours is Kinetics' with the usual settings of VideoMAE and its successors for small
# data sets (layer decay 0.7, drop path 0.2, dropout 0.5 before the head), a total batch of 64, lr 1e-3 and 50 epochs.
# None of these numbers was tuned for SMILE.
# Validates every epoch, then tests the best one (checkpoint-best.pth) on 5 x 3 views.
set -euo pipefail

: "${DATA_PATH:=/path/to/hmdb51}"               # folder with train.csv, val.csv, test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/finetune_hmdb51_vit_b}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                                  # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                            # videos per GPU and pass
: "${TOTAL_BATCH:=64}"                          # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set HMDB51 --model vit_base_patch16_224 --sampling_rate 4 \
  --lr 1e-3 --layer_decay 0.7 --drop_path 0.2 --fc_drop_rate 0.5 --epochs 50 "$@"
