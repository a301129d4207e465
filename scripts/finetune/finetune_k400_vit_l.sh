#!/usr/bin/env bash
# Fine-tune ViT-L on Kinetics-400.
#
# Untried. The recipe of ViT-B, which we assume for ViT-L too: 4 videos on each of 4 GPUs.
# Validates every epoch, then tests the best one (checkpoint-best.pth) on 7 x 3 views.
# Run again to resume. Options of run_class_finetuning.py may follow, for example --dry_run.
set -euo pipefail

: "${DATA_PATH:=/path/to/k400}"               # folder with train.csv, val.csv, test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_l_2nd_stage/checkpoint-149.pth}" # where pretraining ended
: "${OUTPUT_DIR:=output/finetune_k400_vit_l}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                                # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=4}"                          # videos per GPU and pass; 2 on 8 GPUs
: "${TOTAL_BATCH:=16}"                        # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set Kinetics-400 --data_path "$DATA_PATH" \
  --model vit_large_patch16_224 --finetune "$MODEL_PATH" \
  --num_frames 16 --sampling_rate 4 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" --num_sample 1 \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.75 \
  --drop_path 0.1 --fc_drop_rate 0 \
  --warmup_epochs 5 --epochs 100 --save_ckpt_freq 20 \
  --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" "$@"
