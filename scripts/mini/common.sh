# shellcheck shell=bash disable=SC2034 # variables are used by the scripts that source this file
# Sourced by scripts/quickstart.sh and run_benchmark.sh: functions that train and test models in the mini world.
# Set WORLD (folder of make_world.py) and WORKERS (loader processes per run) first.

MODEL=tiny_patch16_224
CLIPS=(--input_size 64 --num_frames 8 --num_workers "$WORKERS")
declare -A CLASSES=([motion]=8 [object]=20 [count]=4)

# The teacher is a small image network from a Python package; at 64 px its fourth stage has the student's 4 x 4 grid.
demo_teacher() { # demo_teacher FILE: writes the file and sets TEACHER
  [[ -f $1 ]] || python scripts/mini/demo_teacher.py "$1"
  TEACHER=(--target_type timm --teacher_model tf_efficientnet_lite0 --teacher_weights "$1" --teacher_stage -2
    --teacher_size 64 --teacher_norm own)
}

OVERLAY=(--add_tubelets --use_objects --objects_path "$WORLD/objects")
TRAJECTORY=(--mask_type tubelet --sub_mask_type tube+traj_mask)

# pretrain FOLDER SEED EPOCHS [flags]: skips a finished run. A step has 4 videos x 4 clips x 2 masks.
pretrain() {
  local folder=$1 seed=$2 epochs=$3
  shift 3
  [[ -f $folder/checkpoint-$((epochs - 1)).pth ]] && return
  python run_smile_pretraining.py --data_path "$WORLD/pretrain/train.csv" "${CLIPS[@]}" --sampling_rate 2 \
    --model "pretrain_videomae_$MODEL" --decoder_depth 2 --mask_ratio 0.9 --multiple_sampling --num_sample 4 \
    --batch_size 32 --lr 4.8e-3 --min_lr 4.8e-5 --warmup_steps 60 --epochs "$epochs" \
    --save_ckpt_freq "$epochs" --save_ckpt_minutes 0 --log_interval 100 --seed "$seed" --output_dir "$folder" "$@"
}

# evaluate FOLDER TASK SEED EPOCHS [flags]: fine-tune (or --attentive_probe) and test; skips a finished run.
evaluate() {
  local folder=$1 task=$2 seed=$3 epochs=$4
  shift 4
  grep -qs test_acc1 "$folder/log.txt" && return
  python run_class_finetuning.py --data_set custom-unmirrored --nb_classes "${CLASSES[$task]}" \
    --data_path "$WORLD/$task" "${CLIPS[@]}" --sampling_rate 1 --model "vit_$MODEL" --batch_size 16 --lr 1.6e-2 \
    --warmup_epochs 1 --epochs "$epochs" --init_scale 1 --drop_path 0 --crop_area 0.7 --aa '' --mixup 0 --cutmix 0 --reprob 0 --probe_lrs 3e-2 1e-2 --probe_wds 0.05 \
    --disable_eval_during_finetuning --test_num_segment 1 --test_num_crop 1 --save_ckpt_freq "$epochs" \
    --save_ckpt_minutes 0 --log_interval 25 --seed "$seed" --output_dir "$folder" "$@"
  rm -f "$folder"/checkpoint-*.pth # only the scores are needed
}

# random_weights FILE SEED: writes an untrained encoder, to be probed.
random_weights() {
  [[ -f $1 ]] || python -c 'import sys, torch; from modeling_pretrain import MODELS
torch.manual_seed(int(sys.argv[2])); torch.save({"model": MODELS[sys.argv[3]]().state_dict()}, sys.argv[1])' \
    "$1" "$2" "pretrain_videomae_$MODEL"
}
