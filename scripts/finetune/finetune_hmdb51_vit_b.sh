#!/usr/bin/env bash
# Fine-tune ViT-B on HMDB51.
#
# We do not know the recipe of the paper. This one is ours: Kinetics' with what is usual for small sets in
# VideoMAE's family (layer decay 0.7, drop path 0.2, dropout 0.5 before the head), a total batch of 64,
# lr 1e-3 and 50 epochs. None of these numbers was tuned for SMILE.
# Validates every epoch, then tests the best one (checkpoint-best.pth) on 5 x 3 views.
# Run again to resume. Options of run_class_finetuning.py may follow, for example --dry_run.
set -euo pipefail

: "${DATA_PATH:=/path/to/hmdb51}"               # folder with train.csv, val.csv, test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # where pretraining ended
: "${OUTPUT_DIR:=output/finetune_hmdb51_vit_b}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                                  # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=8}"                            # videos per GPU and pass
: "${TOTAL_BATCH:=64}"                          # videos per optimizer step; gradients accumulate to it

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set HMDB51 --data_path "$DATA_PATH" \
  --model vit_base_patch16_224 --finetune "$MODEL_PATH" \
  --num_frames 16 --sampling_rate 4 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" --num_sample 1 \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.7 \
  --drop_path 0.2 --fc_drop_rate 0.5 \
  --warmup_epochs 5 --epochs 50 --save_ckpt_freq 20 \
  --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" "$@"
