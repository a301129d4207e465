#!/usr/bin/env bash
# SMILE on two CPU cores: both stages of pretraining in a small world, and an evaluation.
#
# Makes a Python environment (or uses the active one), cuts clips from real videos, draws objects, pretrains with a small
# image network as the teacher, and compares fine-tuning from stage 2 with training from scratch, and probes on frozen
# encoders. All output goes to QUICKSTART_DIR (default ./quickstart). Run again to resume; remove the folder to start
# over. SEED=1 gives another run; CLIP_WEIGHTS=openai (or a file) uses CLIP as the teacher, which is slower.
set -euo pipefail
: "${CLIP_WEIGHTS:=}"
: "${SEED:=0}"
: "${STAGE1_EPOCHS:=3}" # 200 steps each
: "${STAGE2_EPOCHS:=1}"
: "${FINETUNE_EPOCHS:=8}"
: "${PROBE_EPOCHS:=4}"
: "${WORLD_OPTIONS:=--val_clips 40}" # of scripts/mini/make_world.py
: "${QUICKSTART_DIR:=quickstart}"
: "${OMP_NUM_THREADS:=1}" # threads per run; the matrices are too small for more
export OMP_NUM_THREADS

mkdir -p "$QUICKSTART_DIR"
DIR=$(cd "$QUICKSTART_DIR" && pwd)
if [[ -f $CLIP_WEIGHTS ]]; then
  CLIP_WEIGHTS=$(realpath "$CLIP_WEIGHTS")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
installed=$SECONDS

WORLD=$DIR/world
WORKERS=1
source scripts/mini/common.sh
if [[ -n $CLIP_WEIGHTS ]]; then
  TEACHER=(--target_type clip --clip_model ViT-B-16 --clip_weights "$CLIP_WEIGHTS" --teacher_size 64)
else
  demo_teacher "$DIR/teacher.pth"
fi

echo "the world: cutting clips and drawing objects"
# shellcheck disable=SC2086 # several options
python scripts/mini/make_world.py "$WORLD" --tasks motion object --seed "$SEED" $WORLD_OPTIONS

echo "stage 1: moving objects, and a mask that follows them"
pretrain "$DIR/stage1" "$SEED" "$STAGE1_EPOCHS" "${TEACHER[@]}" "${OVERLAY[@]}" "${TRAJECTORY[@]}"
stage1=$DIR/stage1/checkpoint-$((STAGE1_EPOCHS - 1)).pth

echo "stage 2: natural clips, a tube mask, starting from stage 1's weights"
pretrain "$DIR/stage2" "$SEED" "$STAGE2_EPOCHS" "${TEACHER[@]}" --mask_type tube --first_stage_path "$stage1"
stage2=$DIR/stage2/checkpoint-$((STAGE2_EPOCHS - 1)).pth

# The four scores: two runs in parallel, one core each.
random_weights "$DIR/random.pth" "$SEED"
score() { evaluate "$DIR/$1" "$2" "$SEED" "${@:3}" --num_workers 0; }
beside() { # beside NAME TASK EPOCHS [flags]: in the background, quietly
  score "$@" >"$DIR/$1.txt" 2>&1 &
}
joined() { # joined NAME
  wait $! || { tail -n 3 "$DIR/$1.txt" >&2; exit 1; }
}

echo "fine-tuning on motion: stage 2's encoder, and beside it the same model from scratch (its output: $DIR/scratch.txt)"
beside scratch motion "$FINETUNE_EPOCHS"
score finetuned motion "$FINETUNE_EPOCHS" --finetune "$stage2"
joined scratch

echo "attentive probes on objects: stage 2's frozen encoder, and beside it random weights ($DIR/probe-random.txt)"
beside probe-random object "$PROBE_EPOCHS" --attentive_probe --finetune "$DIR/random.pth"
score probe object "$PROBE_EPOCHS" --attentive_probe --finetune "$stage2"
joined probe-random

echo "picture"
python run_visualization.py --samples 1 --output_dir "$DIR/pictures" --resume "$stage1" "$stage2"

python scripts/mini/results.py quickstart "$DIR" | tee "$DIR/results.md"
cat <<DONE

Done in $SECONDS s, $installed of them for the environment. Written:
  $DIR/results.md   the table above
  $stage1, $stage2   weights
  $DIR/stage1/log.txt, $DIR/stage2/log.txt   one JSON line an epoch
  $DIR/finetuned, $DIR/scratch, $DIR/probe, $DIR/probe-random   test scores and accuracy by class
  $DIR/pictures   clips, moving objects, masks, features and errors, also as movies
  $WORLD   clips, objects and lists
DONE
