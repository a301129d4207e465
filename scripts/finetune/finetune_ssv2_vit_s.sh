#!/usr/bin/env bash
# Fine-tune ViT-S on Something-Something V2.
#
# The recipe of ViT-B, which we assume for ViT-S too; that there were 4 GPUs, as for Kinetics, is our assumption.
# The released model reached 69.1 top-1, pretrained for "800 epochs".
# Validates every epoch, then tests the best one (checkpoint-best.pth) on 2 x 3 views.
# Run again to resume. Options of run_class_finetuning.py may follow, for example --dry_run.
set -euo pipefail

: "${DATA_PATH:=/path/to/ssv2}"               # folder with train.csv, val.csv, test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_s_2nd_stage/checkpoint-199.pth}" # where pretraining ended
: "${OUTPUT_DIR:=output/finetune_ssv2_vit_s}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                                # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                          # videos per GPU and pass; 4 on 8 GPUs
: "${TOTAL_BATCH:=32}"                        # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set SSV2 --data_path "$DATA_PATH" \
  --model vit_small_patch16_224 --finetune "$MODEL_PATH" \
  --num_frames 16 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" --num_sample 1 \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.7 \
  --drop_path 0.1 --fc_drop_rate 0 \
  --warmup_epochs 5 --epochs 40 --save_ckpt_freq 20 \
  --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" "$@"
