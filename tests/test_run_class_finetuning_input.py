"""What the fine-tuning program is given: checkpoints in every form, options, and what it says when it cannot go on."""

import pytest
import torch
from fixtures_finetuning import CUSTOM, TRAIN, log_of, test_metrics_of
from fixtures_scripts import check_defaults
from safetensors.torch import save_file

from modeling_finetune import MODELS
from run_class_finetuning import get_args
from utils import RunError
from weights import load_encoder

pytest_plugins = "fixtures_finetuning"


def write_pretrained(path, size="tiny"):
    """A pretraining checkpoint without the decoder's blocks, as large as the encoder is."""
    torch.manual_seed(3)
    weights = MODELS[f"vit_{size}_patch16_224"](num_classes=0).state_dict()
    weights = {f"encoder.{name}": value for name, value in weights.items() if not name.startswith("fc_norm")}
    width = weights["encoder.patch_embed.proj.bias"].shape
    weights |= {
        "mask_token": torch.zeros(1, 1, 96),
        "decoder.norm.weight": torch.ones(96),
        "encoder.norm.weight": torch.ones(width),
        "encoder.norm.bias": torch.zeros(width),
    }
    torch.save({"model": weights, "epoch": 3, "step": 0}, path)
    return weights


# Checkpoints ----------------------------------------------------------------------------------------------------


def wrapped(form, weights, path):
    """Write weights as others do."""
    prefix = form if form.endswith(".") else ""
    weights = {prefix + name: value for name, value in weights.items()}
    if form == "safetensors":
        save_file(weights, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    torch.save(weights if form == "plain" else {"module" if form == "module key" else "model": weights}, path)
    return path


@pytest.mark.parametrize(
    "form", ["model key", "module key", "module.", "backbone.", "encoder.", "module.encoder.", "plain", "safetensors"]
)
def test_weights_are_read_in_every_form(form, tmp_path, caplog):
    torch.manual_seed(1)
    source = MODELS["vit_tiny_patch16_224"](num_classes=5).state_dict()
    path = wrapped(form, source, tmp_path / "model.pth")
    model = MODELS["vit_tiny_patch16_224"](num_classes=5)
    with caplog.at_level("INFO", "smile"):
        load_encoder(model, path, need_head=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.items())
    [message] = caplog.messages
    assert f"{path}: loaded {len(source)} tensors; new here: none; left out: none" == message


def test_of_a_pretraining_checkpoint_the_encoder_is_taken(tmp_path, caplog):
    source = write_pretrained(tmp_path / "checkpoint-3.pth")
    model = MODELS["vit_tiny_patch16_224"](num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level("INFO", "smile"):
        load_encoder(model, tmp_path / "checkpoint-3.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(("head", "fc_norm")) else source[f"encoder.{name}"])
    [message] = caplog.messages
    assert "new here: fc_norm.weight, fc_norm.bias, head.weight, head.bias;" in message
    assert message.endswith("left out: mask_token, decoder.norm.weight, encoder.norm.weight, encoder.norm.bias")


def test_a_head_of_another_size_is_dropped(tmp_path, caplog):
    torch.save(MODELS["vit_tiny_patch16_224"](num_classes=7).state_dict(), tmp_path / "model.pth")
    with caplog.at_level("INFO", "smile"):
        load_encoder(MODELS["vit_tiny_patch16_224"](num_classes=5), tmp_path / "model.pth")
    assert "new here: head.weight, head.bias; left out: head.weight, head.bias" in caplog.messages[0]
    with pytest.raises(RunError, match="lacks head.weight, head.bias; it is not fine-tuned for this number of classes"):
        load_encoder(MODELS["vit_tiny_patch16_224"](num_classes=5), tmp_path / "model.pth", need_head=True)


def test_part_of_an_encoder_is_refused(tmp_path):
    weights = MODELS["vit_tiny_patch16_224"](num_classes=5).state_dict()
    part = {name: value for name, value in weights.items() if not name.startswith("blocks.3")}
    torch.save(part, tmp_path / "model.pth")
    with pytest.raises(RunError, match="lacks blocks.3"):
        load_encoder(MODELS["vit_tiny_patch16_224"](num_classes=5), tmp_path / "model.pth")


def test_weights_under_a_key_of_their_own_start_a_training(run, custom, tmp_path):
    weights = MODELS["vit_tiny_patch16_224"](num_classes=5).state_dict()
    torch.save({"net": {f"student.{name}": value for name, value in weights.items()}, "epoch": 3}, tmp_path / "a.pth")
    named = ["--finetune", tmp_path / "a.pth", "--model_prefix", "student."]
    found = run(*custom, *TRAIN, *named, "--model_key", "ema|net", "--dry_run")
    assert found.code == 0 and "loaded 56 tensors" in found.out, found.all
    found = run(*custom, *TRAIN, *named, "--dry_run")
    assert found.code == 1 and "--model_key names another place, there are net" in found.err


# What goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traps(data, clips, trained, tmp_path_factory):
    """Data folders and checkpoints with a fault each."""
    folder, train = tmp_path_factory.mktemp("traps"), (data / "train.csv").read_text()
    lines = train.splitlines()

    def copy(name, train=train, **files):
        (folder / name).mkdir()
        texts = {list_name: (data / f"{list_name}.csv").read_text() for list_name in ("val", "test")}
        for list_name, text in {"train": train, **texts, **files}.items():
            (folder / name / f"{list_name}.csv").write_text(text)

    copy("label", "\n".join([*lines[:2], "", lines[2][:-1] + "3", *lines[3:]]))  # in line 4
    copy("no label", "\n".join([*lines[:4], lines[4][:-2]]))
    copy("missing", "\n".join([*lines[:3], "nowhere/gone.mp4 1", *lines[3:]]))
    copy("wrong folder", val="\n".join(f"elsewhere/{i}.mp4 {i % 3}" for i in range(2000)))
    copy("no names")
    copy("few classes")
    (folder / "few classes" / "classes.txt").write_text("one\ntwo\n")
    copy("no val")
    (folder / "no val" / "val.csv").unlink()
    write_pretrained(folder / "pretrained.pth")
    (folder / "text.pth").write_text("not a checkpoint\n" * 20)
    torch.save(MODELS["vit_tiny_patch16_224"](num_classes=7).state_dict(), folder / "seven.pth")
    torch.save({"model": {"layer.weight": torch.zeros(3, 3)}}, folder / "other.pth")
    torch.save({"model": MODELS["vit_small_patch16_224"](num_classes=3).state_dict()}, folder / "small.pth")
    return folder


# options, what the line says; {t}: traps, {d}: a data folder in which nothing is wrong, {b}: a trained model
FAULTS = {
    "label out of range": ([*CUSTOM, "--data_path", "{t}/label"], "label/train.csv, line 4: label 3 is not in [0, 3)"),
    "nb_classes against the list": (
        ["--data_set", "custom", "--nb_classes", "2", "--data_path", "{t}/no names"],
        "train.csv, line 5: label 2 is not in [0, 2)",
    ),
    "no label": ([*CUSTOM, "--data_path", "{t}/no label"], "no label/train.csv, line 5: "),
    "missing video": (
        [*CUSTOM, "--data_path", "{t}/missing"],
        "missing/train.csv, line 4: no such file: nowhere/gone.mp4 (1 of 7",
    ),
    "wrong folder": (
        [*CUSTOM, "--data_path", "{t}/wrong folder", "--data_root", "/no/folder"],
        "wrong folder/val.csv, line 1: no such file: /no/folder/elsewhere/0.mp4 (200 of 200",
        "--data_root",
    ),
    "missing list": ([*CUSTOM, "--data_path", "{t}/no val"], "no val/val.csv: no such list file"),
    "nb_classes against the data set": (
        ["--data_set", "SSV2", "--nb_classes", "3", "--data_path", "{d}"],
        "--nb_classes 3: SSV2 has 174 classes",
    ),
    "nb_classes against classes.txt": ([*CUSTOM, "--data_path", "{t}/few classes"], "classes.txt has 2 lines"),
    "no nb_classes": (["--data_set", "custom", "--data_path", "{d}"], "--data_set custom needs --nb_classes"),
    "unknown data set": (["--data_set", "Kinetics", "--data_path", "{d}"], "--data_set: invalid choice: 'Kinetics'"),
    "unknown model": ([*CUSTOM, "--data_path", "{d}", "--model", "resnet50"], "--model: invalid choice: 'resnet50'"),
    "a text file": (
        [*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/text.pth"],
        "text.pth: not a readable checkpoint",
    ),
    "no file": ([*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/none.pth"], "--finetune {t}/none.pth: no such file"),
    "another network": (
        [*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/other.pth"],
        "other.pth is not a SMILE or VideoMAE checkpoint",
    ),
    "another size": (
        [*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/small.pth"],
        "small.pth does not fit this model",
        "[384, 3, 2, 16, 16]",
        "check --model",
    ),
    "eval without a head": (
        [*CUSTOM, "--data_path", "{d}", "--eval", "--finetune", "{t}/pretrained.pth"],
        "pretrained.pth lacks fc_norm.weight",
        "not fine-tuned",
    ),
    "eval with another head": (
        [*CUSTOM, "--data_path", "{d}", "--eval", "--finetune", "{t}/seven.pth"],
        "seven.pth lacks head.weight, head.bias; it is not fine-tuned for this number of",
    ),
    "predict without a head": ([*CUSTOM, "--predict", "{d}/train.csv", "--finetune", "{t}/pretrained.pth"], "lacks"),
    "predict of no video": (
        [*CUSTOM, "--predict", "{t}/pretrained.pth", "--finetune", "{b}"],
        "--predict: no video could be read, the first: {t}/pretrained.pth: ",
    ),
    "nothing to test": ([*CUSTOM, "--data_path", "{d}", "--eval"], "nothing to test: give --finetune"),
    "probe without weights": ([*CUSTOM, "--data_path", "{d}", "--linear_probe"], "give --finetune"),
    "two probes": (
        [*CUSTOM, "--data_path", "{d}", "--linear_probe", "--attentive_probe", "--finetune", "{b}"],
        "--linear_probe and --attentive_probe: choose one",
    ),
    "neighbours and eval": ([*CUSTOM, "--data_path", "{d}", "--knn", "3", "--eval", "--finetune", "{b}"], "--knn"),
    "fewer than no neighbours": ([*CUSTOM, "--data_path", "{d}", "--knn", "-1", "--finetune", "{b}"], "--knn -1"),
    "fewer than no views": (
        [*CUSTOM, "--data_path", "{d}", "--eval", "--finetune", "{b}", "--test_num_crop", "-1"],
        "--test_num_crop -1",
    ),
    "probes at rate 0": ([*CUSTOM, "--data_path", "{d}", "--linear_probe", "--finetune", "{b}", "--lr", "0"], "--lr"),
    "too many shots": ([*CUSTOM, "--data_path", "{d}", "--samples_per_class", "3"], "--samples_per_class 3: class 0"),
    "too large a batch": ([*CUSTOM, "--data_path", "{d}", "--batch_size", "8"], "lower --batch_size"),
    "mixing an odd batch": ([*CUSTOM, "--data_path", "{d}", "--mixup", "0.8", "--num_sample", "1"], "--batch_size 3"),
    "mixing elements of an odd batch": (
        [*CUSTOM, "--data_path", "{d}", "--mixup", "0.8", "--num_sample", "1", "--mixup_mode", "elem"],
        "--batch_size 3",
    ),
    "unknown augmentation": ([*CUSTOM, "--data_path", "{d}", "--aa", "augmix-m5"], "--aa"),
    "unknown optimizer": ([*CUSTOM, "--data_path", "{d}", "--opt", "nadamax"], "nadamax"),
    "a frame too few": ([*CUSTOM, "--data_path", "{d}", "--num_frames", "5"], "--num_frames 5"),
    "resume from weights": (
        [*CUSTOM, "--data_path", "{d}", "--resume", "{t}/seven.pth"],
        "seven.pth holds weights only",
    ),
    "resume with a new average": ([*CUSTOM, "--data_path", "{d}", "--resume", "{b}", "--model_ema"], "--model_ema"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_clear_line(run, traps, data, trained, fault, tmp_path):
    options, *said = FAULTS[fault]

    def fill(text):
        return text.replace("{t}", str(traps)).replace("{d}", str(data)).replace("{b}", str(trained.best))

    found = run(*TRAIN, "--epochs", "2", "--output_dir", tmp_path / "run", *map(fill, options))
    assert found.code in (1, 2) and "Traceback" not in found.all, found.all
    errors = [line for line in found.err.splitlines() if "error: " in line]
    after = found.err.splitlines()[found.err.splitlines().index(errors[0]) + 1 :] if errors else []
    assert len(errors) == 1 and all(line.startswith("       ") for line in after), found.err
    assert all(fill(part) in errors[0] for part in said), errors[0]


def test_several_faults_are_told_at_once(run, data, tmp_path):
    found = run(*TRAIN, "--data_path", data, *CUSTOM, "--num_frames", "5", "--finetune", "none.pth", "--val_freq", "0")
    assert found.code == 1 and "Traceback" not in found.all
    assert all(flag in found.err for flag in ("--num_frames 5", "--finetune none.pth", "--val_freq 0"))


def test_processes_say_it_once(run, traps, tmp_path):
    found = run(*TRAIN, *CUSTOM, "--data_path", traps / "label", processes=2)
    assert found.codes == [1, 1] and found.all.count("error: ") == 1 and "Traceback" not in found.all, found.all


def test_a_mistake_that_another_process_alone_sees_is_told(run, custom, tmp_path):
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
    assert args.not_needed == [
        "--dist_eval",
        "--world_size 4",
        "--local-rank 3",
        "--tubelet_size 2",
        "--num_segments 1",
    ]
    assert (args.lr, args.short_side_size) == (5e-4, 256)
    assert get_args(["--train_interpolation", "bilinear"]).not_needed == []  # an option of this program


@pytest.mark.parametrize(
    "argv, says", [("--use_cls", "class token"), ("--tubelet_size 1", "2 frames"), ("--no_save_ckpt", "")]
)
def test_options_that_would_change_results_are_refused_in_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as left:
        get_args(argv.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code != 0 and f"{argv} is not supported" in last and says in last


def test_weights_under_a_key_and_a_prefix_of_ones_own(tmp_path):
    source = MODELS["vit_tiny_patch16_224"](num_classes=5).state_dict()
    path = tmp_path / "model.pth"
    torch.save(
        {"teacher": {f"net.{name}": value for name, value in source.items()}, "model": {"x": torch.ones(1)}}, path
    )
    model = MODELS["vit_tiny_patch16_224"](num_classes=5)
    load_encoder(model, path, need_head=True, key="student|teacher", prefix="net.")
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    with pytest.raises(RunError, match="looked under student"):
        load_encoder(model, path, key="student")
