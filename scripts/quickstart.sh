#!/usr/bin/env bash
# SMILE on two CPU cores: both stages of pretraining on small synthetic data, and an evaluation.
#
# Makes a Python environment (or uses the active one), cuts clips from real videos, draws objects, pretrains with a small
# image network as the teacher, and compares fine-tuning from stage 2 with training from scratch on two tasks: how
# an object moves, and how often it passes. All output goes to QUICKSTART_DIR (default ./quickstart). Run again to
# resume; remove the folder to start over. SEED=1 selects another seed; CLIP_WEIGHTS=openai (or a file) uses CLIP as the
# teacher, which is slower.
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and prints
: "${CLIP_WEIGHTS:=}"
: "${SEED:=0}"
: "${STAGE1_STEPS:=600}"
: "${STAGE2_STEPS:=200}"
: "${FINETUNE_EPOCHS:=5}" # on motion
: "${COUNT_EPOCHS:=3}"
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
  TEACHER=(--target_type clip --clip_model ViT-B-16 --clip_weights "$CLIP_WEIGHTS" --teacher_size "$SIDE")
else
  demo_teacher "$DIR/teacher.pth"
fi

echo "the world: cutting clips and drawing objects"
# shellcheck disable=SC2086 # several options
python scripts/mini/make_world.py "$WORLD" --side "$SIDE" --tasks motion count --seed "$SEED" $WORLD_OPTIONS

plan "$DIR/stage1" "$STAGE1_STEPS"
stage1=$CHECKPOINT
plan "$DIR/stage2" "$STAGE2_STEPS"
stage2=$CHECKPOINT

# What the second core does meanwhile: training from scratch and, once stage 2 is done, counting and pictures.
second_core() {
  evaluate "$DIR/scratch" motion "$SEED" --num_workers 0
  FINETUNE_EPOCHS=$COUNT_EPOCHS evaluate "$DIR/count-scratch" count "$SEED" --num_workers 0
  until [[ -f $stage2 ]]; do kill -0 $$ 2>/dev/null; sleep 1; done # ends with this script, even if that is killed
  FINETUNE_EPOCHS=$COUNT_EPOCHS evaluate "$DIR/count" count "$SEED" --num_workers 0 --finetune "$stage2"
  python run_visualization.py --samples 1 --output_dir "$DIR/pictures" --resume "$stage1" "$stage2"
}

echo "in the background: both tasks from scratch, later counting and pictures (output: $DIR/second_core.txt)"
set -m # a process group of its own, to be ended with this script
second_core </dev/null >"$DIR/second_core.txt" 2>&1 &
set +m
trap 'kill -- "-$!" 2>/dev/null || true' EXIT
finish() { wait $! || { tail -n 3 "$DIR/second_core.txt" >&2; exit 1; }; }

echo "stage 1: moving objects, and a mask that follows them"
pretrain "$DIR/stage1" "$SEED" "$STAGE1_STEPS" "${TEACHER[@]}" "${OVERLAY[@]}" "${TRAJECTORY[@]}"

echo "stage 2: natural clips, a tube mask, starting from stage 1's weights"
pretrain "$DIR/stage2" "$SEED" "$STAGE2_STEPS" "${TEACHER[@]}" --mask_type tube --first_stage_path "$stage1"
[[ -f $stage2 ]] || { echo "error: no $stage2: free disk space, or remove $DIR if STAGE2_STEPS was another" >&2; exit 1; }

kill -0 $! 2>/dev/null || finish # it may have failed
echo "fine-tuning on motion, from stage 2's encoder"
evaluate "$DIR/finetuned" motion "$SEED" --num_workers 0 --finetune "$stage2"

finish

python scripts/mini/results.py quickstart "$DIR" | tee "$DIR/results.md"
cat <<DONE

Done in $SECONDS s, $installed of them for the environment. Written:
  $DIR/results.md   the table above
  $stage1, $stage2   weights
  $DIR/stage1/log.txt, $DIR/stage2/log.txt   one JSON line an epoch
  $DIR/finetuned, $DIR/scratch, $DIR/count, $DIR/count-scratch   test scores and accuracy by class
  $DIR/second_core.txt   what the runs in the background printed
  $DIR/pictures   clips, moving objects, masks, features and errors, also as movies
  $WORLD   clips, objects and lists
DONE
