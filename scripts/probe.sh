# shellcheck shell=bash
# Sourced by scripts/finetune/linear_probe_*.sh before common.sh.
#
# Of RECIPE and ENCODER it makes PROBE (options) and SOURCE_PATHS (variables whose paths must exist), and sets
# BATCH_SIZE and TOTAL_BATCH unless they are given.
#   ours   Ten classifiers, one for each learning rate and weight decay, learn side by side after a BatchNorm on the
#          same features of crops and flips; the best by validation is tested.
#   sigma  SIGMA's, the only one of this family that is published: the final LayerNorm and one classifier learn, with
#          all augmentation of fine-tuning; 24 videos on each of 8 GPUs, 2 passes a step, 2 augmentations of each video.
# ENCODER names an image model of open_clip or timm that takes the place of MODEL_PATH, such as ViT-B-16 for CLIP's: a
# video is the mean of its frames' features. With --attentive_probe in place of --linear_probe, tokens are pooled by
# learned attention.
: "${ENCODER_WEIGHTS:=}"                          # of ENCODER; empty: openai, or timm's own

case $RECIPE in
  ours)
    : "${BATCH_SIZE:=32}" "${TOTAL_BATCH:=256}"
    PROBE=(--linear_probe --probe_lrs 3e-2 1e-2 3e-3 1e-3 3e-4 --probe_wds 0 0.05 --warmup_epochs 3 --val_freq 5)
    ;;
  sigma)
    : "${BATCH_SIZE:=24}" "${TOTAL_BATCH:=384}"
    PROBE=(--learn head --num_sample 2 --weight_decay 0.05 --drop_path 0.1
      --warmup_epochs 5 --warmup_lr 1e-6 --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0
      --smoothing 0.1)
    ;;
  *)
    echo "error: RECIPE=$RECIPE: choose ours or sigma" >&2
    exit 1
    ;;
esac
if [[ -n $ENCODER ]]; then
  PROBE+=(--encoder "$ENCODER" --encoder_weights "$ENCODER_WEIGHTS")
  SOURCE_PATHS=(DATA_PATH)
else
  PROBE+=(--finetune "$MODEL_PATH")
  # shellcheck disable=SC2034 # the recipes use it
  SOURCE_PATHS=(DATA_PATH MODEL_PATH)
fi
