#!/usr/bin/env bash
# Test a fine-tuned ViT-B on UCF101: 5 x 3 views of each video, top-1 and top-5.
#
# The number of GPUs does not change the result. Options may follow: --test_num_segment 1 --test_num_crop 1
set -euo pipefail

: "${DATA_PATH:=/path/to/ucf101}"           # folder with test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/finetune_ucf101_vit_b/checkpoint-best.pth}" # a fine-tuned model
: "${OUTPUT_DIR:=output/test_ucf101_vit_b}" # log.txt, test_predictions.npz, test_per_class.csv
: "${GPUS:=4}"                              # per node; for several nodes see scripts/common.sh
: "${MAX_RESTARTS:=0}"                      # a test that failed would fail again
BATCH_SIZE=1 TOTAL_BATCH=$((GPUS * ${NODES:=1})) # asked for by common.sh; nothing is trained

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --eval --data_set UCF101 --data_path "$DATA_PATH" \
  --model vit_base_patch16_224 --finetune "$MODEL_PATH" \
  --num_frames 16 --sampling_rate 4 --num_workers "$NUM_WORKERS" \
  --output_dir "$OUTPUT_DIR" "$@"
