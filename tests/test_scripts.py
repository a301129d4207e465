"""Every shell script parses, and every recipe gives a command line that its program understands.

torchrun, srun and scontrol are stubs that write down their arguments.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_class_finetuning
from modeling_finetune import SIZES
from run_smile_pretraining import get_args
from utils import EXIT_REQUEUE

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
RECIPES = sorted((SCRIPTS / "pretrain").glob("*.sh"))
NATURAL = [path for path in RECIPES if not path.stem.startswith("no_video")]
SBATCH = SCRIPTS / "slurm" / "recipe.sbatch"
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$STUB_LOG"
printf '\\n' >> "$STUB_LOG"
[[ $(basename "$0") == scontrol ]] || exit "${STUB_EXIT:-0}"
"""


@pytest.fixture
def run(tmp_path):
    """A function that runs a script with stubs and variables; gives the result and the commands it started."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("torchrun", "srun", "scontrol"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    for name in ("my train.csv", "stage1.pth"):
        (tmp_path / name).touch()
    (tmp_path / "objects").mkdir()
    log = tmp_path / "commands"
    env = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUB_LOG": str(log),
        "DATA_PATH": str(tmp_path / "my train.csv"),
        "OBJECTS_PATH": str(tmp_path / "objects"),
        "FIRST_STAGE_CKPT": str(tmp_path / "stage1.pth"),
    }

    def call(script, *options, **variables):
        log.write_text("")
        result = subprocess.run(
            ["bash", str(script), *options],
            env=env | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return result, [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    return call


def program_args(command):
    """What run_smile_pretraining.py makes of a recorded command."""
    program = next(i for i, word in enumerate(command) if word.endswith("/run_smile_pretraining.py"))
    return get_args(command[program + 1 :])


def launcher_option(command, name):
    return command[command.index(name) + 1]


@pytest.mark.parametrize(
    "script",
    [*sorted(SCRIPTS.rglob("*.sh")), *SCRIPTS.rglob("*.sbatch"), SCRIPTS.parent / ".ci/run"],
    ids=lambda path: path.name,
)
def test_script_parses_and_stops_at_errors(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    if script.name not in ("common.sh", "probe.sh", "setup_env.sh"):  # these are sourced
        assert "set -euo pipefail" in script.read_text()


def test_all_recipes_are_there():
    names = ("k400_vit_b", "k400_vit_s", "no_video_vit_s", "ssv2_vit_b")
    assert [path.stem for path in RECIPES] == [f"{name}_{stage}_stage" for name in names for stage in ("1st", "2nd")]


@pytest.mark.parametrize("kind", ["black", "noise", "image", "frame"])
@pytest.mark.parametrize("stage", ["1st", "2nd"])
def test_recipe_without_video(run, tmp_path, stage, kind):
    """As that of ViT-S in all but data and target."""
    script = SCRIPTS / "pretrain" / f"no_video_vit_s_{stage}_stage.sh"
    result, commands = run(script, BACKGROUND=kind)
    assert result.returncode == 0, result.stderr
    args = program_args(commands[0])
    _, (command,) = run(SCRIPTS / "pretrain" / f"k400_vit_s_{stage}_stage.sh")
    blank = kind in ("black", "noise")
    expected = vars(program_args(command)) | {
        "background": kind,
        "data_path": "" if blank else str(tmp_path / "my train.csv"),
        "epoch_size": 77270 if blank else 0,
        "target_type": "pixel",
        "output_dir": f"output/{script.stem}",
        "log_dir": f"output/{script.stem}",
    }
    if stage == "2nd":
        expected |= {"add_tubelets": True, "use_objects": True, "objects_path": str(tmp_path / "objects")}
    assert vars(args) == expected
    if not blank:
        result, commands = run(script, BACKGROUND=kind, DATA_PATH="/nowhere")
        assert result.returncode == 1 and commands == [] and "DATA_PATH=/nowhere: no such" in result.stderr


@pytest.mark.parametrize("recipe", NATURAL, ids=lambda path: path.stem)
def test_recipe(run, tmp_path, recipe):
    result, commands = run(recipe)
    assert result.returncode == 0, result.stderr
    (command,) = commands
    args = program_args(command)
    data, _, size, stage, _ = recipe.stem.split("_")
    assert command[0] == "torchrun" and launcher_option(command, "--nproc_per_node") == "8"
    assert args.model == f"pretrain_videomae_{ {'b': 'base', 's': 'small'}[size] }_patch16_224"
    assert args.model.split("_")[2] in SIZES
    assert args.data_path == str(tmp_path / "my train.csv") and args.output_dir == f"output/{recipe.stem}"
    assert args.sampling_rate == {"k400": 4, "ssv2": 2}[data] and args.num_frames == 16
    assert (args.target_type, args.clip_model, args.clip_weights) == ("clip", "ViT-B-16", "openai")
    assert (args.opt, args.opt_betas, args.lr, args.min_lr, args.weight_decay) == (
        "adamw",
        [0.9, 0.95],
        1.5e-4,
        1e-5,
        0.05,
    )
    assert (args.epochs, args.warmup_epochs, args.mask_ratio, args.decoder_depth) == (801, 40, 0.8, 4)
    assert args.multiple_sampling and args.clip_grad is None
    assert args.stop_epoch == (150 if recipe.stem.startswith("k400_vit_b") else 200)
    if stage == "1st":
        assert args.add_tubelets and args.use_objects and args.objects_path == str(tmp_path / "objects")
        assert (args.mask_type, args.sub_mask_type, args.traj_unmask_ratio) == ("tubelet", "tube+traj_mask", 0.1)
        assert not args.first_stage_path
    else:
        assert not args.add_tubelets and not args.use_objects and args.mask_type == "tube"
        assert args.first_stage_path == str(tmp_path / "stage1.pth")


@pytest.mark.parametrize("size", ["k400_vit_b", "k400_vit_s", "no_video_vit_s", "ssv2_vit_b"])
def test_second_stage_starts_where_the_first_one_ends(run, tmp_path, size):
    first = program_args(run(SCRIPTS / f"pretrain/{size}_1st_stage.sh")[1][0])
    result, _ = run(SCRIPTS / f"pretrain/{size}_2nd_stage.sh", FIRST_STAGE_CKPT="")  # back to the default, not there
    assert f"{first.output_dir}/checkpoint-{first.stop_epoch - 1}.pth: no such file" in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("gpus, nodes, batch", [(1, 1, 32), (4, 1, 32), (8, 1, 32), (8, 2, 16), (2, 1, 8), (1, 1, 256)])
def test_total_batch_stays_256(run, gpus, nodes, batch):
    for recipe in RECIPES[:2]:
        _, (command,) = run(recipe, GPUS=str(gpus), NODES=str(nodes), BATCH_SIZE=str(batch))
        args = program_args(command)
        assert gpus * nodes * args.batch_size * args.update_freq == 256
        assert launcher_option(command, "--nproc_per_node") == str(gpus)
        assert launcher_option(command, "--nnodes") == str(nodes)


def test_a_batch_that_does_not_fit_is_one_clear_line(run):
    result, commands = run(RECIPES[0], GPUS="3")
    assert result.returncode == 1 and commands == []
    assert result.stderr == "error: GPUS 3 x NODES 1 x BATCH_SIZE 32 = 96 does not divide TOTAL_BATCH 256\n"


def test_everything_comes_from_the_environment(run, tmp_path):
    _, (command,) = run(
        RECIPES[0],
        "--seed",
        "7",
        "--stop_epoch",
        "3",
        OUTPUT_DIR="out dir",
        CLIP_WEIGHTS="/w/ViT-B-16.pt",
        STOP_EPOCH="400",
        NODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="1234",
        MAX_RESTARTS="0",
        NUM_WORKERS="3",
        TOTAL_BATCH="512",
    )
    args = program_args(command)
    assert (args.output_dir, args.log_dir, args.clip_weights) == ("out dir", "out dir", "/w/ViT-B-16.pt")
    assert (args.seed, args.stop_epoch, args.num_workers, args.update_freq) == (7, 3, 3, 1)  # options come last and win
    for name, value in {
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
        "--master_port": "1234",
        "--max-restarts": "0",
    }.items():
        assert launcher_option(command, name) == value


@pytest.mark.parametrize("variable", ["DATA_PATH", "OBJECTS_PATH"])
def test_a_missing_path_is_named_before_anything_starts(run, variable):
    result, commands = run(RECIPES[0], **{variable: "/path/to/nothing"})
    assert result.returncode == 1 and commands == []
    assert result.stderr.startswith(f"error: {variable}=/path/to/nothing: no such file or folder")
    assert result.stderr.count("\n") == 1


def submit(run, *arguments, **variables):
    """The batch script as Slurm runs it: from the folder of sbatch, with the job's variables."""
    job = {
        "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "6",
    }
    return run(SBATCH, *arguments, **job | variables)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_slurm_runs_a_recipe_under_srun(run, recipe):
    result, (command,) = submit(run, f"pretrain/{recipe.stem}", "--seed", "5")
    args = program_args(command)
    assert result.returncode == 0 and command[0] == "srun"
    assert launcher_option(command, "--nodes") == "2" and launcher_option(command, "--ntasks-per-node") == "4"
    assert args.batch_size * args.update_freq * 8 == 256
    assert (args.num_workers, args.seed) == (6, 5)


def test_slurm_queues_the_job_again_only_when_the_run_asks_for_it(run):
    result, commands = submit(run, f"pretrain/{RECIPES[0].stem}", STUB_EXIT=str(EXIT_REQUEUE))
    assert result.returncode == EXIT_REQUEUE and commands[1:] == [["scontrol", "requeue", "42"]]
    for code in (0, 1):
        result, commands = submit(run, f"pretrain/{RECIPES[0].stem}", STUB_EXIT=str(code))
        assert result.returncode == code and len(commands) == 1


def test_slurm_runs_the_other_recipes_too(run, tmp_path):
    for recipe in ("finetune/finetune_ucf101_vit_b", "test/test_k400_vit_b"):
        result, (command,) = submit(
            run, recipe, DATA_PATH=str(tmp_path), MODEL_PATH=str(tmp_path), TOTAL_BATCH="32", BATCH_SIZE="4"
        )
        assert result.returncode == 0 and command[0] == "srun", result.stderr
        assert any(word.endswith("/run_class_finetuning.py") for word in command)


def test_slurm_directives_ask_for_a_warning_and_a_requeue():
    directives = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in directives and "#SBATCH --signal=USR1@120" in directives


# Fine-tuning and tests ------------------------------------------------------------------------------------------

FINETUNE, TEST = (sorted((SCRIPTS / folder).glob("*.sh")) for folder in ("finetune", "test"))
SETS = {"k400": "Kinetics-400", "ssv2": "SSV2", "ucf101": "UCF101", "hmdb51": "HMDB51", "gym99": "Gym99"}
BASE, SMALL = "vit_base_patch16_224", "vit_small_patch16_224"
# lr, layer decay, drop path, head dropout, epochs, total batch; of Kinetics and SSv2 as in the released recipes
NUMBERS = {
    "k400": (1e-3, 0.75, 0.1, 0, 100, 16),
    "ssv2": (1e-3, 0.7, 0.1, 0, 40, 32),
    "ucf101": (5e-4, 0.7, 0.2, 0.5, 100, 64),
    "hmdb51": (1e-3, 0.7, 0.2, 0.5, 50, 64),
}


def finetune_args(run, tmp_path, script, *options, **variables):
    """What run_class_finetuning.py makes of a script's command, and the command."""
    paths = {"DATA_PATH": str(tmp_path / "my data"), "MODEL_PATH": str(tmp_path / "my model.pth")}
    (tmp_path / "my data").mkdir(exist_ok=True)
    (tmp_path / "my model.pth").touch()
    result, commands = run(script, *options, **paths | variables)
    assert result.returncode == 0 and len(commands) == 1, result.stderr
    (command,) = commands
    program = next(i for i, word in enumerate(command) if word.endswith("/run_class_finetuning.py"))
    args = run_class_finetuning.get_args(command[program + 1 :])
    assert (args.data_path, args.finetune) == (paths["DATA_PATH"], paths["MODEL_PATH"])
    return args, command


def test_all_fine_tuning_scripts_are_there():
    models = ["hmdb51_vit_b", "k400_vit_b", "k400_vit_s", "ssv2_vit_b", "ssv2_vit_s", "ucf101_vit_b"]
    assert [path.stem for path in FINETUNE] == [
        *(f"finetune_{name}" for name in models),
        *(f"linear_probe_{name}_vit_b" for name in ("gym99", "hmdb51", "k400", "ssv2", "ucf101")),
    ]
    assert [path.stem for path in TEST] == [f"test_{name}" for name in models]


@pytest.mark.parametrize("script", [*FINETUNE, *TEST], ids=lambda path: path.stem)
def test_fine_tuning_script(run, tmp_path, script):
    args, command = finetune_args(run, tmp_path, script)
    data, _, size = script.stem.split("_")[-3:]
    assert command[0] == "torchrun" and args.output_dir == f"output/{script.stem}"
    assert args.data_set == SETS[data] and args.model == {"b": BASE, "s": SMALL}[size]
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
def test_severe_script(run, tmp_path, cell):
    """What SEVERE.md says of the recipes; that the scripts run is in test_severe.py."""
    args, command = finetune_args(run, tmp_path, SCRIPTS / "severe" / f"{cell}.sh")
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
def test_linear_probe_by_sigmas_recipe(run, tmp_path, script):
    """AdamW at 1e-3 for 256 videos, 24 x 8 x 2 of them a step, 30 epochs, 2 augmentations; the rest as fine-tuning."""
    args, command = finetune_args(run, tmp_path, script, RECIPE="sigma")
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
    result, commands = run(script, RECIPE="mine", DATA_PATH=str(tmp_path), MODEL_PATH=str(tmp_path))
    assert result.returncode == 1 and commands == [] and result.stderr == "error: RECIPE=mine: choose ours or sigma\n"


@pytest.mark.parametrize("script", PROBES, ids=lambda path: path.stem)
def test_linear_probe_of_an_image_model(run, tmp_path, script):
    """The same options but the weights, and no checkpoint has to be there."""
    video, command = finetune_args(run, tmp_path, script)
    (tmp_path / "my data").mkdir(exist_ok=True)
    names = {"ENCODER": "ViT-B-16", "ENCODER_WEIGHTS": "clip.pt", "MODEL_PATH": "/nowhere"}
    result, commands = run(script, DATA_PATH=str(tmp_path / "my data"), **names)
    assert result.returncode == 0, result.stderr
    program = next(i for i, word in enumerate(command) if word.endswith("/run_class_finetuning.py"))
    args = run_class_finetuning.get_args(commands[0][program + 1 :])
    assert vars(args) == vars(video) | {"finetune": "", "encoder": "ViT-B-16", "encoder_weights": "clip.pt"}


@pytest.mark.parametrize("script", FINETUNE, ids=lambda path: path.stem)
def test_the_total_batch_of_fine_tuning_stays(run, tmp_path, script):
    totals = set()
    for gpus, nodes, batch in ((1, 1, 2), (4, 1, 4), (8, 1, 2), (2, 2, 4)):
        args, command = finetune_args(run, tmp_path, script, GPUS=str(gpus), NODES=str(nodes), BATCH_SIZE=str(batch))
        totals.add(gpus * nodes * args.batch_size * args.update_freq)
        assert args.batch_size == batch and launcher_option(command, "--nnodes") == str(nodes)
    assert len(totals) == 1


@pytest.mark.parametrize("script", [*FINETUNE, *TEST], ids=lambda path: path.stem)
def test_what_fine_tuning_starts_from(run, tmp_path, script):
    """The default is what another script leaves behind; what is not there is named."""
    result, commands = run(script, DATA_PATH=str(tmp_path), MODEL_PATH="")
    assert result.returncode == 1 and commands == [] and result.stderr.count("\n") == 1
    path = Path(result.stderr.removeprefix("error: MODEL_PATH=").split(": no such file")[0])
    source = path.parent.name
    if script in TEST:
        assert path.name == "checkpoint-best.pth" and source == script.stem.replace("test_", "finetune_")
    else:
        (command,) = run(SCRIPTS / "pretrain" / f"{source}.sh")[1]
        assert path.name == f"checkpoint-{program_args(command).stop_epoch - 1}.pth"
        assert program_args(command).model.split("_")[2] == finetune_args(run, tmp_path, script)[0].model.split("_")[1]
    result, commands = run(script, DATA_PATH="/path/to/nothing", MODEL_PATH=str(tmp_path))
    assert result.returncode == 1 and commands == [] and "DATA_PATH=/path/to/nothing: no such" in result.stderr


def test_options_of_fine_tuning_come_last_and_variables_from_the_environment(run, tmp_path):
    for script in (FINETUNE[1], TEST[1]):
        args, command = finetune_args(
            run,
            tmp_path,
            script,
            "--seed",
            "7",
            "--input_size",
            "112",
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
    result, commands = run(FINETUNE[1], GPUS="8", MODEL_PATH=str(tmp_path))
    assert result.returncode == 1 and commands == []
    assert result.stderr == "error: GPUS 8 x NODES 1 x BATCH_SIZE 4 = 32 does not divide TOTAL_BATCH 16\n"


# The environment ------------------------------------------------------------------------------------------------

V100 = "constraints-v100.txt"


@pytest.fixture
def set_up(run, tmp_path):
    """Source setup_env.sh where python only notes what it is asked: what was said, and the arguments of pip install."""
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    (env / "bin" / "python").write_text(STUB)
    (env / "bin" / "python").chmod(0o755)
    (tmp_path / "script").write_text(f"set -euo pipefail; source {SCRIPTS / 'setup_env.sh'}")

    def call(cards="", **variables):
        if cards:  # as the real one prints them
            stub = f"""#!/bin/sh\n[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && printf '{cards}'"""
            (tmp_path / "bin" / "nvidia-smi").write_text(stub)
            (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
        result, commands = run(tmp_path / "script", VIRTUAL_ENV=str(env), **variables)
        assert result.returncode == 0, result.stderr
        installs = [command for command in commands if command[1:4] == ["-m", "pip", "install"]]
        return result.stdout, installs[0] if installs else []

    return call


@pytest.mark.parametrize(
    "cards, old",
    [
        ("7.0\\n" * 8, True),
        ("6.0\\n", True),
        ("9.0\\n7.0\\n", True),
        ("7.5\\n8.0\\n", False),
        ("12.0\\n", False),
        ("NVIDIA-SMI has failed\\n", False),
    ],
)
def test_the_gpu_picks_the_versions(set_up, cards, old):
    said, install = set_up(cards)
    assert (install[-2:] == ["-c", str(SCRIPTS.parent / V100)]) == old and ("-c" in install) == old
    assert (V100 in said and "older than compute capability 7.5" in said) == old
    assert set_up(cards) == ("", [])  # the second time there is nothing to do


def test_constraints_are_part_of_what_is_installed(set_up):
    said, install = set_up("7.0\\n", CONSTRAINTS="")
    assert "-c" not in install and V100 not in said
    path = str(SCRIPTS.parent / V100)
    said, install = set_up(CONSTRAINTS=path)
    assert install[-2:] == ["-c", path] and path in said
    assert set_up()[1] == []  # the same for the same GPU, by itself


def test_constraints_that_are_not_there(run, tmp_path):
    (tmp_path / "script").write_text(f"set -euo pipefail; source {SCRIPTS / 'setup_env.sh'}")
    result, _ = run(tmp_path / "script", VIRTUAL_ENV=sys.prefix, CONSTRAINTS="missing.txt")
    assert result.returncode != 0 and result.stderr == "error: CONSTRAINTS=missing.txt: no such file\n"
