"""The scripts of fine-tuning, probes, tests and SEVERE give command lines that run_class_finetuning.py understands."""

from pathlib import Path

import pytest
from fixtures_scripts import SCRIPTS, launcher_option, program_args

import run_class_finetuning

pytest_plugins = "fixtures_scripts"
FINETUNE, TEST = (sorted((SCRIPTS / folder).glob("*.sh")) for folder in ("finetune", "test"))
SETS = {"k400": "Kinetics-400", "ssv2": "SSV2", "ucf101": "UCF101", "hmdb51": "HMDB51", "gym99": "Gym99"}
BASE, LARGE, SMALL = (f"vit_{size}_patch16_224" for size in ("base", "large", "small"))
# lr, layer decay, drop path, head dropout, epochs, total batch; of Kinetics and SSv2 as in the released recipes
NUMBERS = {
    "k400": (1e-3, 0.75, 0.1, 0, 100, 16),
    "ssv2": (1e-3, 0.7, 0.1, 0, 40, 32),
    "ucf101": (5e-4, 0.7, 0.2, 0.5, 100, 64),
    "hmdb51": (1e-3, 0.7, 0.2, 0.5, 50, 64),
}


def finetune_args(run_script, tmp_path, script, *options, **variables):
    """What run_class_finetuning.py makes of a script's command, and the command."""
    paths = {"DATA_PATH": str(tmp_path / "my data"), "MODEL_PATH": str(tmp_path / "my model.pth")}
    (tmp_path / "my data").mkdir(exist_ok=True)
    (tmp_path / "my model.pth").touch()
    result, commands = run_script(script, *options, **paths | variables)
    assert result.returncode == 0 and len(commands) == 1, result.stderr
    (command,) = commands
    program = next(i for i, word in enumerate(command) if word.endswith("/run_class_finetuning.py"))
    args = run_class_finetuning.get_args(command[program + 1 :])
    assert (args.data_path, args.finetune) == (paths["DATA_PATH"], paths["MODEL_PATH"])
    return args, command


def test_all_fine_tuning_scripts_are_there():
    models = ["hmdb51_vit_b", "k400_vit_b", "k400_vit_l", "k400_vit_s", "ssv2_vit_b", "ssv2_vit_s", "ucf101_vit_b"]
    assert [path.stem for path in FINETUNE] == [
        *(f"finetune_{name}" for name in models),
        *(f"linear_probe_{name}_vit_b" for name in ("gym99", "hmdb51", "k400", "ssv2", "ucf101")),
    ]
    assert [path.stem for path in TEST] == [f"test_{name}" for name in models]


@pytest.mark.parametrize("script", [*FINETUNE, *TEST], ids=lambda path: path.stem)
def test_fine_tuning_script(run_script, tmp_path, script):
    args, command = finetune_args(run_script, tmp_path, script)
    data, _, size = script.stem.split("_")[-3:]
    assert command[0] == "torchrun" and args.output_dir == f"output/{script.stem}"
    assert args.data_set == SETS[data] and args.model == {"b": BASE, "l": LARGE, "s": SMALL}[size]
    assert args.num_frames == 16 and args.input_size == 224 and (args.sampling_rate == 4 or data == "ssv2")
    assert not args.nb_classes and not args.test_num_segment and not args.test_num_crop  # those of the data set
    assert args.eval == (script in TEST) and args.linear_probe == script.stem.startswith("linear")
    gpus = int(launcher_option(command, "--nproc_per_node"))
    if script.stem.startswith("finetune"):
        lr, layer_decay, drop_path, dropout, epochs, total = NUMBERS[data]
        assert (args.lr, args.layer_decay, args.drop_path, args.fc_drop_rate) == (lr, layer_decay, drop_path, dropout)
        assert args.epochs == epochs and gpus * args.batch_size * args.update_freq * args.num_sample == total
        assert (args.min_lr, args.warmup_epochs, args.weight_decay, args.opt_betas) == (1e-6, 5, 0.05, [0.9, 0.999])
        assert (args.smoothing, args.mixup, args.cutmix, args.mixup_switch_prob) == (0.1, 0.8, 1, 0.5)
        assert args.opt == "adamw" and (args.aa, args.reprob, args.remode) == ("rand-m7-n4-mstd0.5-inc1", 0.25, "pixel")
    elif args.linear_probe:
        assert gpus * args.batch_size * args.update_freq == 256 and len(args.probe_lrs) * len(args.probe_wds) == 10


SEVERE = {  # data set, lr, layer decay, head dropout, epochs, total batch, frames apart
    "ssv2": ("SSV2", 1e-3, 0.7, 0, 40, 32, 4),
    "gym99": ("Gym99", 1e-3, 0.7, 0, 40, 32, 4),
    "ucf101_1k": ("UCF101", 5e-4, 0.7, 0.5, 100, 64, 4),
    "gym99_1k": ("Gym99", 1e-3, 0.7, 0, 100, 32, 4),
    "fx_s1": ("FX-S1", 1e-3, 0.7, 0, 100, 32, 4),
    "ub_s1": ("UB-S1", 1e-3, 0.7, 0, 100, 32, 4),
    "charades": ("Charades", 1e-3, 0.75, 0.5, 50, 16, 16),
}


@pytest.mark.parametrize("cell", SEVERE)
def test_severe_script(run_script, tmp_path, cell):
    """What SEVERE.md says of the recipes; that the scripts run is in test_severe.py."""
    args, command = finetune_args(run_script, tmp_path, SCRIPTS / "severe" / f"{cell}.sh")
    gpus = int(launcher_option(command, "--nproc_per_node"))
    total = gpus * args.batch_size * args.update_freq * args.num_sample
    numbers = (args.lr, args.layer_decay, args.fc_drop_rate, args.epochs, total, args.sampling_rate)
    assert (args.data_set, *numbers) == SEVERE[cell] and args.model == BASE
    assert args.examples == (1000 if cell.endswith("_1k") else 0) and args.output_dir == f"output/severe/{cell}"
    several = cell == "charades"
    assert (args.mixup, args.cutmix, args.smoothing) == ((0, 0, 0) if several else (0.8, 1, 0.1))
    assert not args.nb_classes and not args.test_num_segment and not args.test_num_crop and not args.combine_views


PROBES = [path for path in FINETUNE if path.stem.startswith("linear_probe")]


@pytest.mark.parametrize("script", PROBES, ids=lambda path: path.stem)
def test_linear_probe_by_sigmas_recipe(run_script, tmp_path, script):
    """AdamW at 1e-3 for 256 videos, 24 x 8 x 2 of them a step, 30 epochs, 2 augmentations; the rest as fine-tuning."""
    args, command = finetune_args(run_script, tmp_path, script, RECIPE="sigma")
    assert args.linear_probe and args.linear_probe_recipe == "sigma" and not args.encoder
    gpus = int(launcher_option(command, "--nproc_per_node"))
    assert (gpus, args.batch_size, args.update_freq, args.num_sample) == (8, 24, 2, 2)
    assert (args.opt, args.opt_betas, args.lr, args.min_lr, args.weight_decay) == (
        "adamw",
        [0.9, 0.999],
        1e-3,
        1e-6,
        0.05,
    )
    assert (args.epochs, args.warmup_epochs, args.warmup_lr, args.drop_path) == (30, 5, 1e-6, 0.1)
    assert (args.aa, args.reprob, args.mixup, args.cutmix, args.smoothing) == (
        "rand-m7-n4-mstd0.5-inc1",
        0.25,
        0.8,
        1,
        0.1,
    )
    result, commands = run_script(script, RECIPE="mine", DATA_PATH=str(tmp_path), MODEL_PATH=str(tmp_path))
    assert result.returncode == 1 and commands == [] and result.stderr == "error: RECIPE=mine: choose ours or sigma\n"


@pytest.mark.parametrize("script", PROBES, ids=lambda path: path.stem)
def test_linear_probe_of_an_image_model(run_script, tmp_path, script):
    """The same options but the weights, and no checkpoint has to be there."""
    video, command = finetune_args(run_script, tmp_path, script)
    (tmp_path / "my data").mkdir(exist_ok=True)
    names = {"ENCODER": "ViT-B-16", "ENCODER_WEIGHTS": "clip.pt", "MODEL_PATH": "/nowhere"}
    result, commands = run_script(script, DATA_PATH=str(tmp_path / "my data"), **names)
    assert result.returncode == 0, result.stderr
    program = next(i for i, word in enumerate(command) if word.endswith("/run_class_finetuning.py"))
    args = run_class_finetuning.get_args(commands[0][program + 1 :])
    image = {"finetune": "", "encoder": "ViT-B-16", "encoder_weights": "clip.pt", "given": args.given}
    assert vars(args) == vars(video) | image


@pytest.mark.parametrize("script", FINETUNE, ids=lambda path: path.stem)
def test_the_total_batch_of_fine_tuning_stays(run_script, tmp_path, script):
    totals = set()
    for gpus, nodes, batch in ((1, 1, 2), (4, 1, 4), (8, 1, 2), (2, 2, 4)):
        args, command = finetune_args(
            run_script, tmp_path, script, GPUS=str(gpus), NODES=str(nodes), BATCH_SIZE=str(batch)
        )
        totals.add(gpus * nodes * args.batch_size * args.update_freq)
        assert args.batch_size == batch and launcher_option(command, "--nnodes") == str(nodes)
    assert len(totals) == 1


@pytest.mark.parametrize("script", [*FINETUNE, *TEST], ids=lambda path: path.stem)
def test_what_fine_tuning_starts_from(run_script, tmp_path, script):
    """The default is what another script leaves behind; what is not there is named."""
    result, commands = run_script(script, DATA_PATH=str(tmp_path), MODEL_PATH="")
    assert result.returncode == 1 and commands == [] and result.stderr.count("\n") == 1
    path = Path(result.stderr.removeprefix("error: MODEL_PATH=").split(": no such file")[0])
    source = path.parent.name
    if script in TEST:
        assert path.name == "checkpoint-best.pth" and source == script.stem.replace("test_", "finetune_")
    else:
        (command,) = run_script(SCRIPTS / "pretrain" / f"{source}.sh")[1]
        assert path.name == f"checkpoint-{program_args(command).stop_epoch - 1}.pth"
        assert (
            program_args(command).model.split("_")[2]
            == finetune_args(run_script, tmp_path, script)[0].model.split("_")[1]
        )
    result, commands = run_script(script, DATA_PATH="/path/to/nothing", MODEL_PATH=str(tmp_path))
    assert result.returncode == 1 and commands == [] and "DATA_PATH=/path/to/nothing: no such" in result.stderr


def test_options_of_fine_tuning_come_last_and_variables_from_the_environment(run_script, tmp_path):
    for script in (FINETUNE[1], TEST[1]):
        args, command = finetune_args(
            run_script,
            tmp_path,
            script,
            *"--seed 7 --input_size 112".split(),
            OUTPUT_DIR="out dir",
            NODES="2",
            NODE_RANK="1",
            MASTER_ADDR="10.0.0.1",
            MASTER_PORT="1234",
            GPUS="2",
            NUM_WORKERS="3",
        )
        assert (args.output_dir, args.seed, args.input_size, args.num_workers) == ("out dir", 7, 112, 3)
        for name, value in {
            "--nnodes": "2",
            "--node_rank": "1",
            "--master_addr": "10.0.0.1",
            "--master_port": "1234",
            "--nproc_per_node": "2",
        }.items():
            assert launcher_option(command, name) == value
    result, commands = run_script(FINETUNE[1], GPUS="8", MODEL_PATH=str(tmp_path))
    assert result.returncode == 1 and commands == []
    assert result.stderr == "error: GPUS 8 x NODES 1 x BATCH_SIZE 4 = 32 does not divide TOTAL_BATCH 16\n"
