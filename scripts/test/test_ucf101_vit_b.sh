#!/usr/bin/env bash
# Test a fine-tuned ViT-B on UCF101: 5 x 3 views of each video, top-1 and top-5.
set -euo pipefail

: "${DATA_PATH:=/path/to/ucf101}"           # folder with test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/finetune_ucf101_vit_b/checkpoint-best.pth}" # a fine-tuned model
: "${OUTPUT_DIR:=output/test_ucf101_vit_b}" # log.txt, test_predictions.npz, test_per_class.csv
: "${GPUS:=4}"                              # per node; for several nodes see scripts/common.sh

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
evaluate --data_set UCF101 --model vit_base_patch16_224 "$@"
