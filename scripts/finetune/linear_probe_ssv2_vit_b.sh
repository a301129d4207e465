#!/usr/bin/env bash
# Linear probe of ViT-B on Something-Something V2: the encoder is frozen, only a linear classifier learns.
#
# The paper's model has 23.7 top-1; its recipe is not known to us, this one is ours. Ten classifiers, one for each
# learning rate and weight decay, learn side by side on the same features; the best by validation is tested
# on 2 x 3 views. With --attentive_probe in its place below, tokens are pooled by learned attention.
# Started again, it goes on where it stopped. Options of run_class_finetuning.py may follow:
# bash scripts/finetune/linear_probe_ssv2_vit_b.sh --dry_run
set -euo pipefail

: "${DATA_PATH:=/path/to/ssv2}"                   # folder with train, val and test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # where pretraining ended
: "${OUTPUT_DIR:=output/linear_probe_ssv2_vit_b}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=8}"                                    # of each node
: "${NODES:=1}"
: "${NODE_RANK:=0}"                               # of this node, from 0
: "${MASTER_ADDR:=127.0.0.1}"                     # of node 0
: "${MASTER_PORT:=29500}"                         # a free one there
: "${BATCH_SIZE:=32}"                             # videos a GPU and pass
: "${TOTAL_BATCH:=256}"                           # videos an optimizer step; gradients accumulate to it
: "${NUM_WORKERS:=10}"                            # loader processes a GPU

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set SSV2 --data_path "$DATA_PATH" \
  --model vit_base_patch16_224 --finetune "$MODEL_PATH" \
  --linear_probe --probe_lrs 3e-2 1e-2 3e-3 1e-3 3e-4 --probe_wds 0 0.05 \
  --num_frames 16 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 \
  --warmup_epochs 3 --epochs 30 --val_freq 5 --save_ckpt_freq 10 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  "$@"
