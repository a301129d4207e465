#!/usr/bin/env bash
# The claims of the method, measured in the mini world: rows are ways of pretraining, columns are tests of the encoder.
#
#   bash scripts/mini/run_benchmark.sh                        all rows
#   bash scripts/mini/run_benchmark.sh ROW...                 these rows
#   bash scripts/mini/run_benchmark.sh NAME --flag VALUE...   a row of your own: stage 1 with these flags added
#
# Finished scores are kept and interrupted runs resume. JOBS rows run in parallel, one core each. Needs the environment
# of scripts/quickstart.sh, or requirements*.txt. scripts/mini/results.py makes the table.
set -euo pipefail
: "${OUT:=output/mini}"
: "${SEEDS:=0 1 2}"
: "${JOBS:=2}"
: "${EPOCHS:=4}"          # of pretraining, 200 steps each; two-stages halves them
: "${FINETUNE_EPOCHS:=8}" # of each column that fine-tunes
: "${PROBE_EPOCHS:=4}"    # of each column that probes
: "${OMP_NUM_THREADS:=1}"
export OUT SEEDS JOBS EPOCHS FINETUNE_EPOCHS PROBE_EPOCHS OMP_NUM_THREADS
ALL_ROWS=(scratch stage1 pixel-tube teacher-tube two-stages pixel-overlay-tube teacher-overlay-tube black)

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORLD=$OUT/world
WORKERS=0
source scripts/mini/common.sh

# run_row SEED ROW [flags]: pretrain, then fill the columns.
run_row() {
  local seed=$1 row=$2 folder=$OUT/seed-$1/$2 half=$((EPOCHS / 2)) column stage1 start=$SECONDS
  shift 2
  local from=(--finetune "$folder/pretraining/checkpoint-$((EPOCHS - 1)).pth")
  mkdir -p "$folder"
  demo_teacher "$OUT/teacher.pth"
  stage1=("${TEACHER[@]}" "${OVERLAY[@]}" "${TRAJECTORY[@]}")
  run() { pretrain "$folder/pretraining" "$seed" "$EPOCHS" "$@"; }
  case $row in
    scratch) from=() ;;
    pixel-tube) run --target_type pixel --mask_type tube ;;
    pixel-overlay-tube) run --target_type pixel --mask_type tube "${OVERLAY[@]}" ;;
    teacher-tube) run "${TEACHER[@]}" --mask_type tube ;;
    teacher-overlay-tube) run "${TEACHER[@]}" --mask_type tube "${OVERLAY[@]}" ;;
    black) run "${stage1[@]}" --data_path "$WORLD/pretrain/black.csv" ;;
    two-stages)
      pretrain "$folder/first" "$seed" $half "${stage1[@]}"
      from=(--finetune "$folder/pretraining/checkpoint-$((EPOCHS - half - 1)).pth")
      pretrain "$folder/pretraining" "$seed" $((EPOCHS - half)) "${TEACHER[@]}" --mask_type tube \
        --first_stage_path "$folder/first/checkpoint-$((half - 1)).pth"
      ;;
    *) run "${stage1[@]}" "$@" ;; # stage1, and rows of your own
  esac
  for column in motion object count; do
    evaluate "$folder/$column" "$column" "$seed" "$FINETUNE_EPOCHS" "${from[@]}"
  done
  if [[ $row == scratch ]]; then # probe random weights
    from=(--finetune "$folder/random.pth")
    random_weights "$folder/random.pth" "$seed"
  fi
  for column in motion object; do
    evaluate "$folder/$column-probe" "$column" "$seed" "$PROBE_EPOCHS" "${from[@]}" --attentive_probe
  done
  echo "$row, seed $seed: $((SECONDS - start)) s"
}

if [[ ${1:-} == --row ]]; then # how this script calls itself: --row SEED ROW [flags]
  mkdir -p "$OUT/seed-$2/$3"
  run_row "${@:2}" 2>&1 | tee -a "$OUT/seed-$2/$3/output.txt" | grep -E '^error|seed [0-9]+: [0-9]+ s$'
  exit "${PIPESTATUS[0]}"
fi

python scripts/mini/make_world.py "$WORLD"
rows=("${@:-${ALL_ROWS[@]}}")
if [[ ${2:-} == -* ]]; then # a row of your own
  for seed in $SEEDS; do
    printf '%s\0' "$seed"
  done | xargs -0 -P "$JOBS" -I{} bash "$0" --row {} "$@"
else
  for seed in $SEEDS; do
    for row in "${rows[@]}"; do
      printf '%s\n' "$seed $row"
    done
  done | xargs -P "$JOBS" -L 1 bash "$0" --row
fi
python scripts/mini/results.py benchmark "$OUT"
