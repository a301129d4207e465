#!/usr/bin/env bash
# SEVERE, another domain: fine-tune ViT-B on Something-Something V2, and test it.
#
# The recipe of the released model (scripts/finetune/finetune_ssv2_vit_b.sh), from Kinetics-400.
# SEVERE.md says what is the benchmark's and what is not.
# Validates as it trains, then tests the best weights (checkpoint-best.pth) on 2 x 3 views, and prints the cell's row.
# Started again, it goes on where it stopped. Options of run_class_finetuning.py may follow:
# bash scripts/severe/ssv2.sh --dry_run
set -euo pipefail

: "${DATA_PATH:=/path/to/ssv2}"       # folder with train.csv, val.csv, test.csv (make_lists.py ssv2)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # where pretraining ended
: "${OUTPUT_DIR:=output/severe/ssv2}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=4}"                        # of each node
: "${NODES:=1}"
: "${NODE_RANK:=0}"                   # of this node, from 0
: "${MASTER_ADDR:=127.0.0.1}"         # of node 0
: "${MASTER_PORT:=29500}"             # a free one there
: "${BATCH_SIZE:=8}"                  # videos a GPU and pass
: "${TOTAL_BATCH:=32}"                # videos an optimizer step; gradients accumulate to it
: "${NUM_WORKERS:=10}"                # loader processes a GPU

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
require_paths DATA_PATH MODEL_PATH

"${LAUNCH[@]}" "$ROOT/run_class_finetuning.py" \
  --data_set SSV2 --data_path "$DATA_PATH" \
  --model vit_base_patch16_224 --finetune "$MODEL_PATH" \
  --num_frames 16 --num_workers "$NUM_WORKERS" \
  --batch_size "$BATCH_SIZE" --update_freq "$UPDATE_FREQ" --num_sample 1 \
  --opt adamw --opt_betas 0.9 0.999 --lr 1e-3 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.7 \
  --drop_path 0.1 --fc_drop_rate 0 \
  --warmup_epochs 5 --epochs 40 --save_ckpt_freq 20 \
  --aa rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --smoothing 0.1 --mixup 0.8 --cutmix 1.0 \
  --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  "$@"
python "$ROOT/scripts/severe/severe_table.py" "ssv2=$OUTPUT_DIR"
