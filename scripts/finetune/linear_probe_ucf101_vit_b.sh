#!/usr/bin/env bash
# Linear probe of ViT-B on UCF101: the encoder is frozen, only a linear classifier is trained.
#
# The paper reports 83.8 top-1; its recipe is unknown. scripts/probe.sh explains RECIPE and ENCODER.
set -euo pipefail

: "${DATA_PATH:=/path/to/ucf101}"                 # folder with train, val and test.csv (annotation_files/README.md)
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${RECIPE:=ours}"                               # ours or sigma: see scripts/probe.sh
: "${ENCODER:=}"                                  # an image model instead of MODEL_PATH, such as ViT-B-16
: "${OUTPUT_DIR:=output/linear_probe_ucf101_vit_b}" # checkpoints, log.txt, TensorBoard, scores of the test
: "${GPUS:=8}"                                    # per node; for several nodes see scripts/common.sh

source "$(dirname "${BASH_SOURCE[0]}")/../probe.sh"
probe --data_set UCF101 --sampling_rate 4 "$@"
