#!/usr/bin/env bash
# SMILE stage 1, ViT-L on Kinetics-400: moving objects, a mask that follows them, CLIP target.
#
# Never run. Learning rate and warm-up are those of VideoMAE, which are the same for ViT-L and ViT-B; stages and decoder
# are those of SMILE's ViT-B ("600 epochs"). PRETRAIN.md lists the batch that fits, with and without --use_checkpoint.
# Last checkpoint: checkpoint-149.pth (epochs count from 0).
set -euo pipefail

: "${DATA_PATH:=/path/to/k400/train.csv}"      # one line `path label` per video (annotation_files/README.md)
: "${OBJECTS_PATH:=/path/to/objects}"          # cut-outs: <category>/<name>.png (INSTALL.md)
: "${OUTPUT_DIR:=output/k400_vit_l_1st_stage}" # checkpoints, log.txt, TensorBoard
: "${CLIP_WEIGHTS:=openai}"                    # fetched by open_clip; or a local file
: "${STOP_EPOCH:=150}"                         # passes over the list
: "${GPUS:=8}"                                 # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=32}"                          # clips per GPU and pass; gradients accumulate to 256

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH OBJECTS_PATH

train run_smile_pretraining.py \
  --data_path "$DATA_PATH" \
  --add_tubelets --use_objects --objects_path "$OBJECTS_PATH" --motion_type gaussian \
  --mask_type tubelet --sub_mask_type tube+traj_mask --traj_unmask_ratio 0.1 --mask_ratio 0.8 --multiple_sampling \
  --target_type clip --distillation_teacher clip_b --clip_model ViT-B-16 --clip_weights "$CLIP_WEIGHTS" \
  --model pretrain_videomae_large_patch16_224 --decoder_depth 4 --num_frames 16 --sampling_rate 4 \
  --opt adamw --opt_betas 0.9 0.95 --lr 1.5e-4 --min_lr 1e-5 --weight_decay 0.05 \
  --warmup_epochs 40 --epochs 801 --stop_epoch "$STOP_EPOCH" --save_ckpt_freq 20 "$@"
