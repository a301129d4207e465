#!/usr/bin/env bash
# Test the claims of the method in the mini world: rows are ways of pretraining, columns are evaluations of the encoder.
#
#   bash scripts/mini/run_benchmark.sh                        all rows
#   bash scripts/mini/run_benchmark.sh ROW...                 these rows
#   bash scripts/mini/run_benchmark.sh NAME --flag VALUE...   a row of your own: stage 1 with these flags added
#
# Finished scores are kept and interrupted runs resume. On a GPU all rows of a seed run in parallel, else two. Needs the
# environment of scripts/quickstart.sh, or requirements*.txt. scripts/mini/results.py makes the table.
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and prints
[[ -z ${OUT:-} ]] || OUT=$(realpath -m "$OUT")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ALL_ROWS=(scratch pixel-tube pixel-two-stages teacher-tube two-stages two-stages-tube stage1 pixel-overlay-tube
  teacher-overlay-tube black teacher)
rows=("${@:-${ALL_ROWS[@]}}")
[[ ${2:-} == -* ]] && rows=("$1") # a row of your own
if [[ ${1:-} != --row ]]; then    # a row inherits these variables
  read -r gpu cores bf16 < <(python -c 'import os, torch, optim_factory
print(int(torch.cuda.is_available()), len(os.sched_getaffinity(0)), int(optim_factory.has_bf16_instructions()))')
fi
: "${OUT:=output/mini}"
: "${SEEDS:=0 1 2}"
: "${SIDE:=112}" # of the clips, pixels
: "${WORLD_OPTIONS:=--tasks motion object count --pretrain_clips 600 --test_clips 800}" # of make_world.py
: "${TESTS:=motion motion-few motion-probe object-few object-probe count}"             # columns; also composition
: "${OMP_NUM_THREADS:=1}"
if [[ ${gpu:-} == 1 ]]; then
  : "${SIZE:=small}" "${STEPS:=2220}" "${JOBS:=${#rows[@]}}" # of the student; of pretraining; rows side by side
  : "${WORKERS:=$(((2 * cores + JOBS - 1) / JOBS))}"         # loader processes of each row
else
  : "${SIZE:=tiny}" "${STEPS:=1500}" "${JOBS:=2}" "${WORKERS:=0}"
  [[ ${bf16:-} != 1 ]] || : "${PRECISION:=bf16}" # half the time
fi
export OUT SEEDS SIDE TESTS OMP_NUM_THREADS SIZE STEPS JOBS WORKERS PRECISION

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORLD=$OUT/world
source scripts/mini/common.sh

# run_row SEED ROW [flags]: pretrain, then fill the columns.
run_row() {
  local seed=$1 row=$2 folder=$OUT/seed-$1/$2 column from start=$SECONDS
  shift 2
  mkdir -p "$folder"
  demo_teacher "$OUT/teacher.pth"
  run() { pretrain "$folder/pretraining" "$seed" "$STEPS" "$@"; }
  stages() { # stages TARGET... -- MASK...: half of the steps with objects, half without
    local target=()
    while [[ $1 != -- ]]; do target+=("$1") && shift; done
    pretrain "$folder/first" "$seed" $((STEPS / 2)) "${target[@]}" "${OVERLAY[@]}" "${@:2}"
    pretrain "$folder/pretraining" "$seed" $((STEPS / 2)) "${target[@]}" --mask_type tube --first_stage_path "$CHECKPOINT"
  }
  local stage1=("${TEACHER[@]}" "${OVERLAY[@]}" "${TRAJECTORY[@]}")
  case $row in
    scratch | teacher) CHECKPOINT='' ;;
    pixel-tube) run --target_type pixel --mask_type tube ;;
    pixel-overlay-tube) run --target_type pixel --mask_type tube "${OVERLAY[@]}" ;;
    pixel-two-stages) stages --target_type pixel -- "${TRAJECTORY[@]}" ;;
    teacher-tube) run "${TEACHER[@]}" --mask_type tube ;;
    teacher-overlay-tube) run "${TEACHER[@]}" --mask_type tube "${OVERLAY[@]}" ;;
    two-stages) stages "${TEACHER[@]}" -- "${TRAJECTORY[@]}" ;;
    two-stages-tube) stages "${TEACHER[@]}" -- --mask_type tube ;;
    black) run "${stage1[@]}" --data_path "$WORLD/pretrain/black.csv" ;;
    *) run "${stage1[@]}" "$@" ;; # stage1, and rows of your own
  esac
  for column in $TESTS; do
    from=(${CHECKPOINT:+--finetune "$CHECKPOINT"})
    if [[ $row == scratch && $column == *-probe ]]; then
      random_weights "$folder/random.pth" "$seed"
      from=(--finetune "$folder/random.pth")
    elif [[ $row == teacher ]]; then # its own features of single frames
      [[ $column == *-probe ]] || continue
      from=(--encoder tf_efficientnet_lite0 --encoder_weights "$OUT/teacher.pth")
    fi
    evaluate "$folder/$column" "$column" "$seed" "${from[@]}"
  done
  echo "$row, seed $seed: $((SECONDS - start)) s"
}

if [[ ${1:-} == --row ]]; then # how this script calls itself: --row SEED ROW [flags]
  mkdir -p "$OUT/seed-$2/$3"
  run_row "${@:2}" 2>&1 | tee -a "$OUT/seed-$2/$3/output.txt" | grep -E '^error|seed [0-9]+: [0-9]+ s$'
  exit "${PIPESTATUS[0]}"
fi

# Says a minute after the start how long all rows will take: pretraining is about half of a row.
foretell() {
  local time='' seeds
  read -ra seeds <<<"$SEEDS"
  sleep 60 >/dev/null 2>&1
  until [[ $time ]]; do
    sleep 5 >/dev/null 2>&1
    time=$(grep -ho 'step_time [0-9.]*' "$OUT"/seed-*/*/output.txt 2>/dev/null | tail -n 1 | cut -d' ' -f2) || true
  done
  awk -v time="$time" -v rounds=$(((${#seeds[@]} * ${#rows[@]} + JOBS - 1) / JOBS)) -v steps="$STEPS" \
    'BEGIN { printf "about %.0f minutes if no row is done yet\n", 2 * time * steps * rounds / 60 }'
}

# shellcheck disable=SC2086 # several options
python scripts/mini/make_world.py "$WORLD" --side "$SIDE" $WORLD_OPTIONS
foretell &
trap 'kill $! 2>/dev/null || true' EXIT
if [[ ${2:-} == -* ]]; then # a row of your own
  for seed in $SEEDS; do
    printf '%s\0' "$seed"
  done | xargs -0 -P "$JOBS" -I{} bash scripts/mini/run_benchmark.sh --row {} "$@"
else
  for seed in $SEEDS; do
    for row in "${rows[@]}"; do
      printf '%s\n' "$seed $row"
    done
  done | xargs -P "$JOBS" -L 1 bash scripts/mini/run_benchmark.sh --row
fi
python scripts/mini/results.py benchmark "$OUT"
