# shellcheck shell=bash
# Sourced by scripts/finetune/linear_probe_*.sh: defines `probe`, which takes RECIPE and ENCODER into account.
#
# RECIPE=ours   Trains ten linear classifiers, one for each learning rate and weight decay, on BatchNorm of the frozen
#               features, augmented with crops and flips. Tests the classifier with the best validation accuracy.
# RECIPE=sigma  SIGMA's recipe, the only published one of this family: trains the final LayerNorm and one classifier with
#               the augmentation of fine-tuning: 8 GPUs x 24 videos x 2 passes, 2 augmentations of each video.
# ENCODER       An image model of open_clip or timm to probe instead of MODEL_PATH, for example ViT-B-16 for CLIP; video
#               features are the mean over frames. Only with RECIPE=ours.
# Add --attentive_probe to pool tokens with learned attention instead of their mean.
: "${ENCODER_WEIGHTS:=}" # of ENCODER; empty: openai for CLIP, else timm's default
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# probe OPTION...: trains classifiers on frozen features, and tests the best.
probe() {
  local encoder=(--encoder "$ENCODER" --encoder_weights "$ENCODER_WEIGHTS") options
  case $RECIPE in
    ours)
      : "${BATCH_SIZE:=32}"
      options=(--linear_probe --probe_lrs 3e-2 1e-2 3e-3 1e-3 3e-4 --probe_wds 0 0.05 --warmup_epochs 3 --val_freq 5)
      ;;
    sigma)
      : "${BATCH_SIZE:=24}" "${TOTAL_BATCH:=384}"
      options=(--learn head --num_sample 2 --weight_decay 0.05 --drop_path 0.1
        --warmup_epochs 5 --warmup_lr 1e-6 --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0
        --smoothing 0.1)
      ;;
    *) die "RECIPE=$RECIPE: choose ours or sigma" ;;
  esac
  require_paths DATA_PATH
  if [[ -z $ENCODER ]]; then
    require_paths MODEL_PATH
    encoder=(--finetune "$MODEL_PATH")
  fi
  train run_class_finetuning.py --data_path "$DATA_PATH" --model vit_base_patch16_224 --num_frames 16 \
    "${encoder[@]}" "${options[@]}" --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 \
    --epochs 30 --save_ckpt_freq 10 "$@"
}
