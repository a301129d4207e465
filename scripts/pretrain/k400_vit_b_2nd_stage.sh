#!/usr/bin/env bash
# SMILE stage 2, ViT-B on Kinetics-400: natural clips, tube mask, starting from stage 1's weights, CLIP target.
#
# 150 epochs after the 150 of stage 1: the paper's "600 epochs" model (it counts both masks of a clip).
# For "1200 epochs": STOP_EPOCH=200, FIRST_STAGE_CKPT=.../checkpoint-399.pth, and another OUTPUT_DIR.
# Last checkpoint: checkpoint-149.pth (epochs count from 0).
set -euo pipefail

: "${DATA_PATH:=/path/to/k400/train.csv}"            # one line `path label` per video (annotation_files/README.md)
: "${OUTPUT_DIR:=output/k400_vit_b_2nd_stage}"       # checkpoints, log.txt, TensorBoard
: "${FIRST_STAGE_CKPT:=output/k400_vit_b_1st_stage/checkpoint-149.pth}" # last checkpoint of stage 1
: "${CLIP_WEIGHTS:=openai}"                          # fetched by open_clip; or a local file
: "${STOP_EPOCH:=150}"                               # passes over the list
: "${GPUS:=8}"                                       # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=32}"                                # clips per GPU and pass; gradients accumulate to 256

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH FIRST_STAGE_CKPT

train run_smile_pretraining.py \
  --data_path "$DATA_PATH" \
  --first_stage_path "$FIRST_STAGE_CKPT" \
  --mask_type tube --mask_ratio 0.8 --multiple_sampling \
  --target_type clip --distillation_teacher clip_b --clip_model ViT-B-16 --clip_weights "$CLIP_WEIGHTS" \
  --model pretrain_videomae_base_patch16_224 --decoder_depth 4 --num_frames 16 --sampling_rate 4 \
  --opt adamw --opt_betas 0.9 0.95 --lr 1.5e-4 --min_lr 1e-5 --weight_decay 0.05 \
  --warmup_epochs 40 --epochs 801 --stop_epoch "$STOP_EPOCH" --save_ckpt_freq 20 "$@"
