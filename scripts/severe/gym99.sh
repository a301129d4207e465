#!/usr/bin/env bash
# SEVERE, another domain: fine-tune ViT-B on Gym-99, and test it.
#
# The recipe is ours, that of Something-Something V2: a set of the same kind, where motion is what matters.
# Validates during training, then tests the best checkpoint on 5 x 3 views, and prints the cell's row.
# SEVERE.md: what is the benchmark's, what is ours. Run again to resume. Options may follow, such as --dry_run.
set -euo pipefail

: "${DATA_PATH:=/path/to/gym99}"       # folder with train.csv, val.csv, test.csv (make_lists.py finegym --part gym99)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # where pretraining ended
: "${OUTPUT_DIR:=output/severe/gym99}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                         # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                   # videos per GPU and pass
: "${TOTAL_BATCH:=32}"                 # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set Gym99 --data_path "$DATA_PATH" \
  --model vit_base_patch16_224 --finetune "$MODEL_PATH" \
  --num_frames 16 --sampling_rate 4 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" --num_sample 1 \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.7 \
  --drop_path 0.1 --fc_drop_rate 0 \
  --warmup_epochs 5 --epochs 40 --save_ckpt_freq 20 \
  --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --smoothing 0.1 --mixup 0.8 --cutmix 1.0 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" "$@"
python "$ROOT/scripts/severe/severe_table.py" "gym99=$OUTPUT_DIR"
