#!/usr/bin/env bash
# The SEVERE benchmark: fine-tune and test a pretrained ViT-B in each of the eight cells, and print the table.
#
#   SSV2=/data/ssv2 UCF101=/data/ucf101 MODEL_PATH=checkpoint-149.pth GPUS=4 bash scripts/severe/run_all.sh
#
# Runs the cells one after the other. Cells without a data folder are skipped, and a failed cell does not stop the others;
# both are listed at the end. Run again to skip finished cells and resume the others. The table is also written to
# OUTPUT_DIR/severe.csv and drawn in OUTPUT_DIR/severe.png. Variables of the cells' scripts (GPUS, BATCH_SIZE, ...) come
# from the environment; options after the script are passed to all programs: bash scripts/severe/run_all.sh --seed 1
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and prints

# Folders with train.csv, val.csv, test.csv: SEVERE.md has the commands that write them.
: "${SSV2:=/path/to/ssv2}"
: "${GYM99:=/path/to/gym99}"         # for two cells
: "${FX_S1:=/path/to/fx_s1}"
: "${UB_S1:=/path/to/ub_s1}"
: "${UCF101:=/path/to/ucf101}"       # fold 1
: "${CHARADES:=/path/to/charades}"
: "${UCF_RC:=/path/to/ucfrep}"       # annotations: train/*.mat, val/*.mat
: "${UCF_RC_VIDEOS:=/path/to/UCF-101}" # the videos of UCF101, <class>/<name>.avi
: "${MODEL_PATH:=output/k400_vit_b_2nd_stage/checkpoint-149.pth}" # checkpoint of pretraining
: "${OUTPUT_DIR:=output/severe}"     # a folder for each cell, and the table
: "${CELLS:=ssv2 gym99 ucf101_1k gym99_1k fx_s1 ub_s1 ucf_rc charades}"
: "${CLASS_OPTIONS:=}"               # more options of run_class_finetuning.py alone
: "${COUNT_OPTIONS:=}"               # more options of run_repetition_counting.py alone
declare -A FOLDERS=([ssv2]=SSV2 [gym99]=GYM99 [ucf101_1k]=UCF101 [gym99_1k]=GYM99 [fx_s1]=FX_S1 [ub_s1]=UB_S1
  [ucf_rc]="UCF_RC UCF_RC_VIDEOS" [charades]=CHARADES)

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/../common.sh"
require_paths MODEL_PATH
[[ $MODEL_PATH == hf://* ]] || MODEL_PATH=$(realpath "$MODEL_PATH")

weights=
if [[ $MODEL_PATH != hf://* ]]; then
  weights=$(cd "$ROOT" && python -c 'import sys; from utils import run_main; from weights import fingerprint
run_main(lambda: print(fingerprint(sys.argv[1])))' "$MODEL_PATH")
fi

# record_of CELL [options]: prints the model and the options of a cell, which model_path.txt holds when it is finished.
record_of() {
  local own=$CLASS_OPTIONS
  [[ $1 != ucf_rc ]] || own=$COUNT_OPTIONS
  shift
  echo "$MODEL_PATH${weights:+ ($weights)}${own:+ $own}${*:+ $*}"
}

for cell in $CELLS; do
  [[ -n ${FOLDERS[$cell]:-} ]] || die "CELLS: no cell $cell; there are ${!FOLDERS[*]}"
  model=$OUTPUT_DIR/$cell/model_path.txt # of a finished cell
  wanted=$(record_of "$cell" "$@")
  [[ ! -e $model || $(<"$model") == "$wanted" ]] ||
    die "$OUTPUT_DIR/$cell is of $(<"$model"), not of $wanted: choose another OUTPUT_DIR (or remove $model)"
done

stopped=0 # by Ctrl-C; torchrun does not return EXIT_REQUEUE
trap 'stopped=1' INT

has_test() {
  grep -qsE '"test_(acc1|map|mae)"' "$1/log.txt"
}

# run_cell CELL [options]: runs its script unless it is done; sets `note` if there is no result.
run_cell() {
  local cell=$1 folder=$OUTPUT_DIR/$1 name code=0 options
  shift
  note=
  if [[ -e $folder/model_path.txt ]] && has_test "$folder"; then
    echo "$cell: done, in $folder"
    return
  fi
  for name in ${FOLDERS[$cell]}; do
    [[ -d ${!name} ]] || note="left out, $name=${!name}: no such folder"
  done
  if [[ -n $note ]]; then
    echo "$cell: $note"
    return
  fi
  name=${FOLDERS[$cell]%% *}
  options=$CLASS_OPTIONS
  [[ $cell != ucf_rc ]] || options=$COUNT_OPTIONS
  mkdir -p "$folder"
  echo "$cell: ${!name}, output in $folder"
  # shellcheck disable=SC2086 # several options
  DATA_PATH=${!name} DATA_ROOT=$UCF_RC_VIDEOS OUTPUT_DIR=$folder MODEL_PATH=$MODEL_PATH \
    bash "$HERE/$cell.sh" $options "$@" 2>&1 | (trap '' INT TERM && exec tee "$folder/output.txt") ||
    code=${PIPESTATUS[0]}
  if ((code == 0)) && has_test "$folder"; then
    record_of "$cell" "$@" >"$folder/model_path.txt"
  fi
  if ((code == 85 || stopped)); then # utils.EXIT_REQUEUE
    echo "$cell: stopped by a signal; run the same command to resume"
    exit 85
  fi
  if ((code != 0)); then
    note="failed, $(grep -m1 -o 'error: .*' "$folder/output.txt" || echo "code $code, see $folder/output.txt")"
    echo "$cell: $note"
  fi
}

notes=() runs=() failed=0
for cell in $CELLS; do
  run_cell "$cell" "$@"
  runs+=("$cell=$OUTPUT_DIR/$cell")
  if [[ -n $note ]]; then
    notes+=("$cell: $note")
  fi
  if [[ $note == failed* ]]; then
    failed=1
  fi
done
mkdir -p "$OUTPUT_DIR"
echo
python "$HERE/severe_table.py" "${runs[@]}" --csv "$OUTPUT_DIR/severe.csv" --picture "$OUTPUT_DIR/severe.png"
if ((${#notes[@]})); then
  printf '\nwithout a result:\n'
  printf '  %s\n' "${notes[@]}"
fi
exit $failed
