#!/usr/bin/env bash
# SEVERE, another task: fine-tune ViT-B to recognise all actions in a video of Charades, and test it.
#
# 16 frames with a stride of 16 span 10 s, like the benchmark's 32 frames with a stride of 8. The rest is our recipe:
# Kinetics' with dropout 0.5 before the head, and without Mixup, CutMix and label smoothing, which need a single label.
# Validates during training, then tests the best checkpoint on 10 x 3 views, and prints its row of the table.
# SEVERE.md compares the benchmark's settings with ours.
set -euo pipefail

: "${DATA_PATH:=/path/to/charades}"       # folder with train.csv, val.csv, test.csv (make_lists.py charades)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe/charades}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                            # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=4}"                      # videos per GPU and pass
: "${TOTAL_BATCH:=16}"                    # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune --data_set Charades --model vit_base_patch16_224 --sampling_rate 16 \
  --lr 1e-3 --layer_decay 0.75 --drop_path 0.1 --fc_drop_rate 0.5 --epochs 50 --smoothing 0 --mixup 0 --cutmix 0 "$@"
python "$ROOT/scripts/severe/severe_table.py" "charades=$OUTPUT_DIR"
