# shellcheck shell=bash disable=SC2034 # variables are used by the scripts that source this file
# Sourced by scripts/quickstart.sh and run_benchmark.sh: functions that train and test models in the mini world.
# Set WORLD (folder of make_world.py) and WORKERS (loader processes per run) first.

# Keep glibc from returning large freed blocks to the system: on a CPU, the page faults of getting them again cost a
# fifth of a step (stage 1 of the quickstart, alone on one core: 0.326 s a step without this line, 0.258 with it).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296

: "${SIDE:=64}"   # of the clips, pixels: --side of make_world.py
: "${SIZE:=tiny}" # of the student: tiny or small
case $SIZE in      # videos a step (4 clips of each, 2 masks a clip), labelled clips a step, epochs
  tiny) VIDEOS=4 DECODER_DEPTH=2 WARM_UP=60 LABELLED=16 EPOCHS=(8 4) ;;
  small) VIDEOS=16 DECODER_DEPTH=4 WARM_UP=100 LABELLED=32 EPOCHS=(10 6) ;;
  *) echo "error: SIZE=$SIZE: choose tiny or small" >&2 && exit 2 ;;
esac
: "${FINETUNE_EPOCHS:=${EPOCHS[0]}}" # on all labelled clips
: "${PROBE_EPOCHS:=${EPOCHS[1]}}"
FEW=(16 24)                           # on 50 labelled clips a class of motion, and on 10 a class of object
MODEL=${SIZE}_patch16_224
CLIPS=(--input_size "$SIDE" --num_frames 8 --num_workers "$WORKERS" --precision "${PRECISION:-auto}")
declare -A CLASSES=([motion]=8 [object]=20 [count]=4 [composition]=4)

# The teacher is a small image network from a Python package; its fourth stage has the student's grid, SIDE / 16.
demo_teacher() { # demo_teacher FILE: writes the file and sets TEACHER
  [[ -f $1 ]] || python scripts/mini/demo_teacher.py "$1"
  TEACHER=(--target_type timm --teacher_model tf_efficientnet_lite0 --teacher_weights "$1" --teacher_stage -2
    --teacher_size "$SIDE" --teacher_norm own)
}

OVERLAY=(--add_tubelets --use_objects --objects_path "$WORLD/objects")
TRAJECTORY=(--mask_type tubelet --sub_mask_type tube+traj_mask)

# scaled RATE BATCH: the value of --lr (for 256 clips) that gives RATE with BATCH clips a step.
scaled() { awk "BEGIN { print $1 * 256 / $2 }"; }

# plan FOLDER STEPS: sets PRETRAIN_EPOCHS (STEPS in whole epochs) and CHECKPOINT (its last) of a pretraining run.
plan() {
  PRETRAIN_EPOCHS=$(($2 * VIDEOS / $(wc -l <"$WORLD/pretrain/train.csv")))
  PRETRAIN_EPOCHS=$((PRETRAIN_EPOCHS > 0 ? PRETRAIN_EPOCHS : 1))
  CHECKPOINT=$1/checkpoint-$((PRETRAIN_EPOCHS - 1)).pth
}

# pretrain FOLDER SEED STEPS [flags]: skips a finished run, sets CHECKPOINT. STEPS is rounded to whole epochs.
pretrain() {
  local folder=$1 seed=$2 batch=$((VIDEOS * 8))
  plan "$folder" "$3"
  shift 3
  [[ -f $CHECKPOINT ]] && return
  python run_smile_pretraining.py --data_path "$WORLD/pretrain/train.csv" "${CLIPS[@]}" --sampling_rate 2 \
    --model "pretrain_videomae_$MODEL" --decoder_depth "$DECODER_DEPTH" --mask_ratio 0.9 --multiple_sampling \
    --num_sample 4 --batch_size "$batch" --lr "$(scaled 6e-4 "$batch")" --min_lr "$(scaled 6e-6 "$batch")" \
    --warmup_steps "$WARM_UP" --epochs "$PRETRAIN_EPOCHS" --save_ckpt_freq "$PRETRAIN_EPOCHS" --save_ckpt_minutes 0 \
    --log_interval 100 --seed "$seed" --output_dir "$folder" "$@"
}

# evaluate FOLDER COLUMN SEED [flags]: fine-tune or probe, and test; skips a finished run. COLUMN is a task of the world,
# to be learned from all labelled clips, or a task and -few or -probe.
evaluate() {
  local folder=$1 column=$2 seed=$3 task=${2%-*} how=(--epochs "$FINETUNE_EPOCHS")
  shift 3
  grep -qs test_acc1 "$folder/log.txt" && return
  case $column in
    *-probe) how=(--epochs "$PROBE_EPOCHS" --attentive_probe --probe_lrs 3e-2 1e-2 --probe_wds 0.05) ;;
    motion-few) how=(--epochs "${FEW[0]}" --samples_per_class 50) ;;
    object-few) how=(--epochs "${FEW[1]}" --samples_per_class 10) ;;
    *-few) echo "error: $column: only motion and object have a column with few labels" >&2 && return 2 ;;
  esac
  python run_class_finetuning.py --data_set custom-unmirrored --nb_classes "${CLASSES[$task]}" --data_path "$WORLD/$task" \
    "${CLIPS[@]}" --sampling_rate 1 --model "vit_$MODEL" --batch_size "$LABELLED" --lr "$(scaled 1e-3 "$LABELLED")" \
    --warmup_epochs 1 --init_scale 1 --drop_path 0 --crop_area 0.7 --aa '' --mixup 0 --cutmix 0 --reprob 0 "${how[@]}" \
    --disable_eval_during_finetuning --test_num_segment 1 --test_num_crop 1 --save_ckpt_freq 100 --save_ckpt_minutes 0 \
    --log_interval 25 --seed "$seed" --output_dir "$folder" "$@"
  rm -f "$folder"/checkpoint-*.pth # only the scores are needed
}

# random_weights FILE SEED: writes an untrained encoder, to be probed.
random_weights() {
  [[ -f $1 ]] || python -c 'import sys, torch; from modeling_pretrain import MODELS
torch.manual_seed(int(sys.argv[2])); torch.save({"model": MODELS[sys.argv[3]]().state_dict()}, sys.argv[1])' \
    "$1" "$2" "pretrain_videomae_$MODEL"
}
