#!/usr/bin/env bash
# Linear probe of ViT-B on Gym-99: the encoder is frozen, only a linear classifier learns.
#
# The paper reports 30.2 top-1; its recipe is unknown. scripts/probe.sh explains RECIPE and ENCODER.
# Run again to resume. Options of run_class_finetuning.py may follow, for example --dry_run.
set -euo pipefail

: "${DATA_PATH:=/path/to/gym99}"                  # folder with train, val and test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # where pretraining ended
: "${RECIPE:=ours}"                               # ours or sigma: see scripts/probe.sh
: "${ENCODER:=}"                                  # an image model in place of MODEL_PATH, such as ViT-B-16
: "${OUTPUT_DIR:=output/linear_probe_gym99_vit_b}"  # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=8}"                                    # per node; for several nodes see scripts/common.sh

source "$(dirname "${BASH_SOURCE[0]}")/../probe.sh"

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set Gym99 --data_path "$DATA_PATH" \
  --model vit_base_patch16_224 "${PROBE[@]}" \
  --num_frames 16 --sampling_rate 4 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 \
  --epochs 30 --save_ckpt_freq 10 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" "$@"
