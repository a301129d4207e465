"""What the fine-tuning program is given: checkpoints in every form, options, and what it says when it cannot go on."""

import os
from argparse import Namespace

import pytest
import torch
from fixtures_finetuning import CUSTOM, TRAIN, log_of, test_metrics_of
from fixtures_scripts import check_defaults

import run_smile_pretraining
from modeling_finetune import MODELS
from options_finetune import follow_checkpoint, get_args, predict_videos
from utils import RunError
from weights import load_encoder

pytest_plugins = "fixtures_finetuning"


TINY = MODELS["vit_tiny_patch16_224"]


def write_pretrained(path):
    """A pretraining checkpoint without the decoder's blocks."""
    torch.manual_seed(3)
    weights = {f"encoder.{name}": value for name, value in TINY(num_classes=0).state_dict().items()}
    weights = {name.replace("fc_norm", "norm"): value for name, value in weights.items()}
    weights |= {"mask_token": torch.zeros(1, 1, 96), "decoder.norm.weight": torch.ones(96)}
    torch.save({"model": weights, "epoch": 3, "step": 0}, path)
    return weights


# Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.encoder."])
def test_weights_are_read_under_every_prefix(prefix, tmp_path, caplog):
    """Other forms of files are in test_weights.py."""
    torch.manual_seed(1)
    source, model = TINY(num_classes=5).state_dict(), TINY(num_classes=5)
    path = tmp_path / "model.pth"
    torch.save({prefix + name: value for name, value in source.items()}, path)
    with caplog.at_level("INFO", "smile"):
        load_encoder(model, path, need_head=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.items())
    [message] = caplog.messages
    assert f"{path}: loaded {len(source)} tensors; newly initialised: none; unused: none" == message


def test_of_a_pretraining_checkpoint_the_encoder_is_taken(tmp_path, caplog):
    source = write_pretrained(tmp_path / "checkpoint-3.pth")
    model = TINY(num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level("INFO", "smile"):
        load_encoder(model, tmp_path / "checkpoint-3.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(("head", "fc_norm")) else source[f"encoder.{name}"])
    [message] = caplog.messages
    assert "newly initialised: fc_norm.weight, fc_norm.bias, head.weight, head.bias;" in message
    left_out = message.partition("unused: ")[2].split(", ")
    assert sorted(left_out) == ["decoder.norm.weight", "encoder.norm.bias", "encoder.norm.weight", "mask_token"]


def test_a_head_of_another_size_is_dropped(tmp_path, caplog):
    torch.save(TINY(num_classes=7).state_dict(), tmp_path / "model.pth")
    with caplog.at_level("INFO", "smile"):
        load_encoder(TINY(num_classes=5), tmp_path / "model.pth")
    assert "newly initialised: head.weight, head.bias; unused: head.weight, head.bias" in caplog.messages[0]
    with pytest.raises(RunError, match="lacks head.weight, head.bias; it is not fine-tuned for this number of classes"):
        load_encoder(TINY(num_classes=5), tmp_path / "model.pth", need_head=True)


def test_part_of_an_encoder_is_refused(tmp_path):
    weights = TINY(num_classes=5).state_dict()
    torch.save({key: weights[key] for key in weights if not key.startswith("blocks.3")}, tmp_path / "model.pth")
    with pytest.raises(RunError, match="does not fit this model: blocks.3.norm1.weight is missing in the checkpoint"):
        load_encoder(TINY(num_classes=5), tmp_path / "model.pth")


def test_weights_under_a_key_and_a_prefix_of_ones_own(run, custom, tmp_path):
    source, model, path = TINY(num_classes=3).state_dict(), TINY(num_classes=3), tmp_path / "model.pth"
    held = {f"net.{name}": value for name, value in source.items()}
    torch.save({"teacher": held, "model": {"x": torch.ones(1)}}, path)
    load_encoder(model, path, need_head=True, key="student|teacher", prefix="net.")
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    with pytest.raises(RunError, match="looked under student"):
        load_encoder(model, path, key="student")
    torch.save({"teacher": held, "epoch": 3}, path)
    named = ["--finetune", path, "--model_prefix", "net.", "--dry_run"]
    found = run(*custom, *TRAIN, *named, "--model_key", "student|teacher")
    assert found.code == 0 and "loaded 58 tensors" in found.out, found.all
    found = run(*custom, *TRAIN, *named)
    assert found.code == 1 and "--model_key names another place, there are teacher" in found.err


# What goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traps(data, broken, trained, tmp_path_factory):
    """Data folders and checkpoints with a fault each."""
    folder, train = tmp_path_factory.mktemp("traps"), (data / "train.csv").read_text()
    lines = train.splitlines()

    def copy(name, train=train, **files):
        (folder / name).mkdir()
        texts = {list_name: (data / f"{list_name}.csv").read_text() for list_name in ("val", "test")}
        for list_name, text in {"train": train, **texts, **files}.items():
            (folder / name / f"{list_name}.csv").write_text(text)

    copy("label", "\n".join([*lines[:2], "", lines[2][:-1] + "3", *lines[3:]]))  # in line 4
    copy("no_label", "\n".join([*lines[:4], lines[4][:-2]]))
    copy("missing", "\n".join([*lines[:3], "nowhere/gone.mp4 1", *lines[3:]]))
    copy("wrong_folder", val="\n".join(f"elsewhere/{i}.mp4 {i % 3}" for i in range(2000)))
    copy("no_names")
    copy("few_classes")
    (folder / "few_classes" / "classes.txt").write_text("one\ntwo\n")
    copy("unreadable", f"{broken['text']} 0\n{broken['empty']} 1\n")
    copy("no_val")
    (folder / "no_val" / "val.csv").unlink()
    write_pretrained(folder / "pretrained.pth")
    (folder / "text.pth").write_text("not a checkpoint\n" * 20)
    torch.save(TINY(num_classes=7).state_dict(), folder / "seven.pth")
    torch.save({"model": {"layer.weight": torch.zeros(3, 3)}}, folder / "other.pth")
    torch.save({"model": MODELS["vit_small_patch16_224"](num_classes=3).state_dict()}, folder / "small.pth")
    for link, path in (("data", data), ("best.pth", trained.best)):
        (folder / link).symlink_to(path)
    return folder


# Options beside those of a run in which nothing is wrong, and what the line says, in parts; {t}: the folder of traps.
FAULTS = {
    "--data_path {t}/label": "label/train.csv, line 4: label 3 is not in [0, 3)",
    "--data_path {t}/no_names --nb_classes 2": "train.csv, line 5: label 2 is not in [0, 2)",
    "--data_path {t}/no_label": "no_label/train.csv, line 5: ",
    "--data_path {t}/missing --max_bad_fraction 0.05": "missing/train.csv, line 4: "
    "no such file: nowhere/gone.mp4 (1 of 7",
    "--data_path {t}/wrong_folder --data_root /no/folder": "wrong_folder/val.csv, line 1: no such file: "
    "/no/folder/elsewhere/0.mp4 (200 of 200|--data_root",
    "--data_path {t}/no_val": "no_val/val.csv: no such list file",
    "--data_path {t}/few_classes": "classes.txt has 2 lines",
    "--data_set SSV2": "--nb_classes 3: SSV2 has 174 classes",
    "--nb_classes 0": "--data_set custom needs --nb_classes",
    "--data_set Kinetics": "--data_set: invalid choice: 'Kinetics'",
    "--model resnet50": "--model: invalid choice: 'resnet50'",
    "--finetune {t}/text.pth": "text.pth: not a readable checkpoint",
    "--finetune {t}/none.pth": "--finetune {t}/none.pth: no such file",
    "--finetune {t}/other.pth": "other.pth is not a SMILE or VideoMAE checkpoint",
    "--finetune {t}/small.pth": "small.pth does not fit this model|[384, 3, 2, 16, 16]|check --model",
    "--finetune {t}/pretrained.pth --eval": "pretrained.pth lacks fc_norm.weight|not fine-tuned",
    "--finetune {t}/seven.pth --eval": "seven.pth lacks head.weight, head.bias; it is not fine-tuned for this number",
    "--finetune {t}/pretrained.pth --predict {t}/data/train.csv": "lacks",
    "--finetune {t}/best.pth --predict {t}/text.pth": "--predict: no video could be read, the first: {t}/text.pth: ",
    "--eval": "nothing to test: give --finetune",
    "--linear_probe": "give --finetune",
    "--finetune {t}/best.pth --linear_probe --batch_size 1 --num_sample 1": "--linear_probe normalises over the batch",
    "--finetune {t}/best.pth --linear_probe --attentive_probe": "--linear_probe and --attentive_probe: choose one",
    "--finetune {t}/best.pth --knn 3 --eval": "--knn",
    "--finetune {t}/best.pth --knn -1": "--knn -1",
    "--finetune {t}/best.pth --knn 1 --data_path {t}/unreadable": "train.csv: none of its 2 videos could be read",
    "--finetune {t}/best.pth --eval --test_num_crop -1": "--test_num_crop -1",
    "--finetune {t}/best.pth --linear_probe --lr 0": "--lr",
    "--samples_per_class 3": "--samples_per_class 3: class 0",
    "--batch_size 8": "lower --batch_size",
    "--mixup 0.8 --num_sample 1": "--batch_size 3",
    "--mixup 0.8 --num_sample 1 --mixup_mode elem": "--batch_size 3",
    "--aa augmix-m5": "--aa",
    "--opt nadamax": "nadamax",
    "--opt adan": "--opt adan: cannot be used with these options here",
    "--device gpu": "--device: invalid choice: 'gpu'",
    "--finetune {t}/best.pth --eval --resume {t}/best.pth": "--resume continues training: give the weights",
    "--num_frames 5": "--num_frames 5",
    "--resume {t}/seven.pth": "seven.pth holds weights only",
    "--resume {t}/best.pth --model_ema": "--model_ema",
}


@pytest.mark.parametrize("options", FAULTS)
def test_one_clear_line(run, traps, options, tmp_path):
    words = [word.format(t=traps) for word in options.split()]
    found = run(*CUSTOM, "--data_path", traps / "data", *TRAIN, "--epochs", "2", "--output_dir", tmp_path, *words)
    assert found.code in (1, 2) and "Traceback" not in found.all, found.all
    lines = found.err.splitlines()
    [place] = [number for number, line in enumerate(lines) if "error: " in line]
    assert all(line.startswith("       ") for line in lines[place + 1 :]), found.err
    assert all(part in lines[place] for part in FAULTS[options].format(t=traps).split("|")), lines[place]


def test_processes_say_it_once(run, traps, tmp_path):
    found = run(*TRAIN, *CUSTOM, "--data_path", traps / "label", processes=2)
    assert found.codes == [1, 1] and found.all.count("error: ") == 1 and "Traceback" not in found.all, found.all


def test_a_mistake_that_another_process_alone_sees_is_reported(run, custom, tmp_path):
    """As when a folder is missing on the second node."""
    found = run(*custom, *TRAIN, processes=2, others=["--data_path", tmp_path])
    assert 0 not in found.codes and "Traceback" not in found.all, found.all
    assert found.all.count(f"error: {tmp_path}/train.csv: no such list file") == 1, found.all


def test_a_few_videos_of_many_may_be_missing(run, data, trained, tmp_path):
    """They are replaced in training, and counted as wrong in a test."""
    (tmp_path / "data").mkdir()
    for name in ("train", "val", "test"):
        lines = (data / "val.csv").read_text().splitlines() * 8
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join([*lines[:20], "gone.mp4 1", *lines[20:]]))
    few = "--epochs 1 --num_sample 1 --test_num_segment 1 --test_num_crop 1 --lr 0".split()
    paths = ["--data_path", tmp_path / "data", "--finetune", trained.best, "--output_dir", tmp_path / "run"]
    found = run(*CUSTOM, *TRAIN, *few, *paths)
    assert found.code == 0 and "counted as wrong, gone.mp4 could not be read: no such file" in found.out, found.all
    log = log_of(tmp_path / "run")
    assert test_metrics_of(log)[0]["videos"] == 49 and test_metrics_of(log)[0]["unreadable"] == 1
    assert log[0]["val_unreadable"] == 1 and log[0]["bad_clips"] in (0, 1)  # one video is left over each epoch


# The command line -----------------------------------------------------------------------------------------------


def test_defaults_are_the_recipe_of_k400():
    recipe = """model vit_base_patch16_224 data_set Kinetics-400 num_frames 16 sampling_rate 4 input_size 224
        batch_size 4 lr 1e-3 min_lr 1e-6 warmup_lr 0 warmup_epochs 5 epochs 100 opt adamw opt_betas [0.9,0.999]
        weight_decay 0.05 layer_decay 0.75 drop_path 0.1 fc_drop_rate 0 smoothing 0.1 mixup 0.8 cutmix 1.0
        mixup_switch_prob 0.5 mixup_prob 1 aa rand-m7-n4-mstd0.5-inc1 reprob 0.25 remode pixel recount 1 num_sample 1
        init_scale 0.001 clip_grad None update_freq 1""".split()
    check_defaults(get_args([]), recipe)


def test_abbreviations_are_refused():
    with pytest.raises(SystemExit):
        get_args(["--fine", "x"])


# Published command lines ----------------------------------------------------------------------------------------


def test_options_that_are_always_so_are_dropped_and_named():
    argv = "--dist_eval --world_size 4 --local-rank=3 --tubelet_size 2 --num_segments=1 --lr 5e-4 --short_side_size 256"
    args = get_args(argv.split())
    named = ["--dist_eval", "--world_size 4", "--local-rank 3", "--tubelet_size 2", "--num_segments 1"]
    assert args.not_needed == named and (args.lr, args.short_side_size) == (5e-4, 256)
    assert get_args(["--train_interpolation", "bilinear"]).not_needed == []  # an option of this program


@pytest.mark.parametrize(
    "argv, says", [("--use_cls", "class token"), ("--tubelet_size 1", "2 frames"), ("--no_save_ckpt", "")]
)
def test_options_that_would_change_results_are_refused_in_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as left:
        get_args(argv.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code != 0 and f"{argv} is not supported" in last and says in last


def test_options_of_a_checkpoint_complete_a_command_line(tmp_path):
    """Of a pretraining checkpoint the encoder's model; a data set that is given decides on the classes."""

    def completed(options, *argv):
        torch.save({"model": {}, "args": Namespace(**options)}, tmp_path / "x.pth")
        args = get_args([*argv, "--finetune", str(tmp_path / "x.pth")])
        follow_checkpoint(args)
        return args

    of_ssv2 = vars(get_args(["--data_set", "SSV2", "--num_frames", "8"]))
    args = completed(of_ssv2, "--eval")
    assert (args.data_set, args.nb_classes, args.num_frames) == ("SSV2", 0, 8)
    args = completed(of_ssv2, "--eval", "--data_set", "UCF101", "--num_frames", "16")
    assert (args.data_set, args.nb_classes, args.num_frames) == ("UCF101", 0, 16)
    args = completed(of_ssv2, "--eval", "--data_set", "custom")
    assert (args.data_set, args.nb_classes) == ("custom", 174)
    probe = ["--attentive_probe", "--probe_lrs", "0.5", "--model_ema", "--data_set", "custom", "--nb_classes", "9"]
    args = completed(vars(get_args(probe)), "--predict", "x.mp4")
    assert args.attentive_probe and args.model_ema and (args.probe_lrs, args.nb_classes) == ([0.5], 9)
    sigma = of_ssv2 | {"linear_probe": True, "linear_probe_recipe": "sigma"}  # what --learn head was called
    assert completed(sigma, "--eval").linear_probe is False
    pretrained = vars(run_smile_pretraining.get_args(["--model", "pretrain_videomae_small_patch16_224"]))
    args = completed(pretrained | {"input_size": 112}, "--knn", "5", "--data_set", "UCF101")
    assert (args.model, args.input_size, args.data_set) == ("vit_small_patch16_224", 112, "UCF101")
    foreign = {"num_frames": 8, "model": "vit_small_patch16_224", "data_set": "SSV2", "dist_url": "env://"}
    assert vars(completed(foreign, "--eval")) == vars(get_args(["--eval", "--finetune", str(tmp_path / "x.pth")]))


@pytest.mark.parametrize("name", ["a:b.mp4", "-x.mp4", "-x", " a b.mp4"])
def test_predict_takes_any_file_name(monkeypatch, tmp_path, data, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    args = get_args(["--predict", name, "--num_frames", "8"])
    videos = predict_videos(args)
    assert len(videos) == 1 and os.path.samefile(videos.path(0), tmp_path / name) and args.num_frames == 8
    assert not videos.path(0).startswith("-")


def test_predict_of_what_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "frames").mkdir()
    for name, says in ((tmp_path / "none.mp4", "no such file"), (tmp_path, "no videos in it .*.m2ts")):
        with pytest.raises(ValueError, match=f"--predict {name}: {says}"):
            predict_videos(get_args(["--predict", str(name)]))
    (tmp_path / "frames" / "1.jpg").touch()
    with pytest.raises(ValueError, match=f"--predict {tmp_path}: {tmp_path}/frames is a folder of frames"):
        predict_videos(get_args(["--predict", str(tmp_path)]))
