#!/usr/bin/env bash
# ViT-S without natural video, stage 1: moving objects over another background, a mask that follows them.
#
# BACKGROUND is black, noise (one uniform noise image per clip), image (from the folder DATA_PATH) or frame (the middle
# frame of each video of the list DATA_PATH). The paper's table is for ViT-S with the pixel target. It gives neither
# schedule nor epoch size: these are k400_vit_s's schedule and Mini-Kinetics' number of clips. We do not know whether
# the paper's table includes a second stage.
# Last checkpoint: checkpoint-199.pth (epochs count from 0).
set -euo pipefail

: "${BACKGROUND:=noise}"                       # black, noise, image or frame
: "${DATA_PATH:=}"                             # folder for image, list for frame; unused for black and noise
: "${EPOCH_SIZE:=77270}"                       # clips per epoch, for black and noise
: "${OBJECTS_PATH:=/path/to/objects}"          # cut-outs: <category>/<name>.png (INSTALL.md)
: "${OUTPUT_DIR:=output/no_video_vit_s_1st_stage}" # checkpoints, log.txt, TensorBoard
: "${STOP_EPOCH:=200}"                         # passes over the list
: "${GPUS:=8}"                                 # per node; for several nodes see scripts/common.sh
: "${BATCH_SIZE:=32}"                          # clips per GPU and pass; gradients accumulate to 256

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths OBJECTS_PATH
case $BACKGROUND in
  image | frame)
    require_paths DATA_PATH
    SOURCE=(--data_path "$DATA_PATH")
    ;;
  *) SOURCE=(--epoch_size "$EPOCH_SIZE") ;;
esac

train run_smile_pretraining.py \
  --background "$BACKGROUND" "${SOURCE[@]}" \
  --add_tubelets --use_objects --objects_path "$OBJECTS_PATH" --motion_type gaussian \
  --mask_type tubelet --sub_mask_type tube+traj_mask --traj_unmask_ratio 0.1 --mask_ratio 0.8 --multiple_sampling \
  --target_type pixel \
  --model pretrain_videomae_small_patch16_224 --decoder_depth 4 --num_frames 16 \
  --opt adamw --opt_betas 0.9 0.95 --lr 1.5e-4 --min_lr 1e-5 --weight_decay 0.05 \
  --warmup_epochs 40 --epochs 801 --stop_epoch "$STOP_EPOCH" --save_ckpt_freq 20 "$@"
