#!/usr/bin/env bash
# SMILE in a few minutes: both stages of pretraining on real video, with a tiny student. A CPU will do.
#
# Makes a Python environment (or uses the active one), cuts demo clips and draws demo objects, runs stage 1 and
# stage 2, fine-tunes the result, and paints what pretraining did. QUICKSTART_DIR (default ./quickstart) takes
# everything. Started again, it goes on where it stopped; remove the folder to start anew. CLIP_WEIGHTS=openai or a
# file makes CLIP the real teacher.
set -euo pipefail
: "${CLIP_WEIGHTS:=random}"
: "${EPOCHS:=5}" # of each stage
: "${FINETUNE_EPOCHS:=6}"
: "${QUICKSTART_DIR:=quickstart}"

mkdir -p "$QUICKSTART_DIR"
DIR=$(cd "$QUICKSTART_DIR" && pwd)
if [[ -f $CLIP_WEIGHTS ]]; then
  CLIP_WEIGHTS=$(realpath "$CLIP_WEIGHTS")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

if [[ $CLIP_WEIGHTS == random ]]; then
  cat <<'NOTE'

  *****************************************************************************************
  *  The CLIP teacher has RANDOM weights: nothing to download, but nothing to learn from.  *
  *  This shows that the programs work. For real training set CLIP_WEIGHTS (INSTALL.md).   *
  *****************************************************************************************

NOTE
fi

if [[ ! -f $DIR/data/labelled/classes.txt ]]; then # written last
  echo "demo data: cutting clips and drawing objects"
  python scripts/make_demo_data.py --output "$DIR/data" --clips 24
fi

# What both stages share; the real recipes are in scripts/pretrain.
common=(--data_path "$DIR/data/pretrain/train.csv" --model pretrain_videomae_tiny_patch16_224 --decoder_depth 2
  --input_size 80 --num_frames 16 --sampling_rate 2 --mask_ratio 0.8 --multiple_sampling
  --target_type clip --clip_model ViT-B-16 --clip_weights "$CLIP_WEIGHTS" --teacher_size 80
  --batch_size 8 --epochs "$EPOCHS" --warmup_epochs 1 --lr 1.6e-2 --min_lr 1e-4 --save_ckpt_freq "$EPOCHS"
  --num_workers 2 --log_interval 3)
last=checkpoint-$((EPOCHS - 1)).pth

echo "stage 1: moving objects, and a mask that follows them"
python run_smile_pretraining.py "${common[@]}" --add_tubelets --use_objects --objects_path "$DIR/data/objects" \
  --mask_type tubelet --sub_mask_type tube+traj_mask --output_dir "$DIR/stage1" --log_dir "$DIR/tensorboard/stage1"

echo "stage 2: natural clips, a tube mask, starting from stage 1's weights"
python run_smile_pretraining.py "${common[@]}" --mask_type tube --first_stage_path "$DIR/stage1/$last" \
  --output_dir "$DIR/stage2" --log_dir "$DIR/tensorboard/stage2"

# A few frames of three videos are no benchmark: this shows the steps, and with a random teacher nothing more.
finetune() { # finetune FOLDER [checkpoint flags]
  local folder=$1
  shift
  python run_class_finetuning.py --data_set custom --nb_classes 3 --data_path "$DIR/data/labelled" \
    --model vit_tiny_patch16_224 --input_size 80 --num_frames 16 --sampling_rate 2 --batch_size 6 --num_workers 2 \
    --lr 6e-2 --min_lr 1e-4 --warmup_epochs 1 --epochs "$FINETUNE_EPOCHS" --val_freq "$FINETUNE_EPOCHS" --log_interval 6 \
    --save_ckpt_freq "$FINETUNE_EPOCHS" --test_num_segment 2 --test_num_crop 3 --output_dir "$folder" "$@"
}
accuracy() { python -c 'import json, sys; print(json.loads(open(sys.argv[1]).readlines()[-1])["test_acc1"])' "$1/log.txt"; }

echo "fine-tuning: stage 2's encoder on labelled clips, then the same model from scratch"
finetune "$DIR/finetuned" --finetune "$DIR/stage2/$last"
finetune "$DIR/scratch"

echo "picture"
python scripts/visualize.py --samples 1 --output "$DIR/quickstart.png" "$DIR/stage1/$last" "$DIR/stage2/$last"

note=
if [[ $CLIP_WEIGHTS == random ]]; then
  note="The teacher was random and the clips are few: expect no gain, in either direction it is chance."
fi
cat <<DONE

Test accuracy on $(wc -l <"$DIR/data/labelled/test.csv") clips of 3 classes: $(accuracy "$DIR/finetuned") % fine-tuned from stage 2, $(accuracy "$DIR/scratch") % from scratch.
$note

Done in $SECONDS s. Written:
  $DIR/stage1/$last, $DIR/stage2/$last   weights
  $DIR/stage1/log.txt, $DIR/stage2/log.txt   one JSON line an epoch
  $DIR/finetuned, $DIR/scratch   classifiers, their test scores and accuracy by class
  $DIR/tensorboard   curves: tensorboard --logdir $DIR/tensorboard
  $DIR/quickstart.png   clips, moving objects, masks, loss of every token
  $DIR/data   the demo clips, objects and lists
DONE
