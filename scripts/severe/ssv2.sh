#!/usr/bin/env bash
# SEVERE, another domain: fine-tune ViT-B on Something-Something V2, and test it.
#
# The recipe of the released model (scripts/finetune/finetune_ssv2_vit_b.sh), pretrained on Kinetics-400.
# Validates during training, then tests the best checkpoint on 2 x 3 views, and prints its row of the table.
# SEVERE.md compares the benchmark's settings with ours.
set -euo pipefail

: "${DATA_PATH:=/path/to/ssv2}"       # folder with train.csv, val.csv, test.csv (make_lists.py ssv2)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe/ssv2}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                        # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                  # videos per GPU and pass
: "${TOTAL_BATCH:=32}"                # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set SSV2 --model vit_base_patch16_224 \
  --lr 1e-3 --layer_decay 0.7 --drop_path 0.1 --fc_drop_rate 0 --epochs 40 "$@"
python "$ROOT/scripts/severe/severe_table.py" "ssv2=$OUTPUT_DIR"
