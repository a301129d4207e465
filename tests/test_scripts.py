"""Every shell script parses, and every recipe of pretraining gives a command line that its program understands."""

import subprocess

import pytest
from fixtures_scripts import SCRIPTS, launcher_option, program_args

from modeling_finetune import SIZES
from utils import EXIT_REQUEUE

pytest_plugins = "fixtures_scripts"
RECIPES = sorted((SCRIPTS / "pretrain").glob("*.sh"))
NATURAL = [path for path in RECIPES if not path.stem.startswith("no_video")]
SBATCH = SCRIPTS / "slurm" / "recipe.sbatch"
PREPARE = SCRIPTS / "slurm" / "prepare.sbatch"


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
    names = ("k400_vit_b", "k400_vit_l", "k400_vit_s", "no_video_vit_s", "ssv2_vit_b")
    assert [path.stem for path in RECIPES] == [f"{name}_{stage}_stage" for name in names for stage in ("1st", "2nd")]


@pytest.mark.parametrize("kind", ["black", "noise", "image", "frame"])
@pytest.mark.parametrize("stage", ["1st", "2nd"])
def test_recipe_without_video(run_script, tmp_path, stage, kind):
    """As that of ViT-S in all but data and target."""
    script = SCRIPTS / "pretrain" / f"no_video_vit_s_{stage}_stage.sh"
    result, commands = run_script(script, BACKGROUND=kind)
    assert result.returncode == 0, result.stderr
    args = program_args(commands[0])
    _, (command,) = run_script(SCRIPTS / "pretrain" / f"k400_vit_s_{stage}_stage.sh")
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
        result, commands = run_script(script, BACKGROUND=kind, DATA_PATH="/nowhere")
        assert result.returncode == 1 and commands == [] and "DATA_PATH=/nowhere: no such" in result.stderr


@pytest.mark.parametrize("recipe", NATURAL, ids=lambda path: path.stem)
def test_recipe(run_script, tmp_path, recipe):
    result, commands = run_script(recipe)
    assert result.returncode == 0, result.stderr
    (command,) = commands
    args = program_args(command)
    data, _, size, stage, _ = recipe.stem.split("_")
    assert command[0] == "torchrun" and launcher_option(command, "--nproc_per_node") == "8"
    assert args.model == f"pretrain_videomae_{ {'b': 'base', 'l': 'large', 's': 'small'}[size] }_patch16_224"
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
    assert args.stop_epoch == (150 if recipe.stem.startswith(("k400_vit_b", "k400_vit_l")) else 200)
    if stage == "1st":
        assert args.add_tubelets and args.use_objects and args.objects_path == str(tmp_path / "objects")
        assert (args.mask_type, args.sub_mask_type, args.traj_unmask_ratio) == ("tubelet", "tube+traj_mask", 0.1)
        assert not args.first_stage_path
    else:
        assert not args.add_tubelets and not args.use_objects and args.mask_type == "tube"
        assert args.first_stage_path == str(tmp_path / "stage1.pth")


@pytest.mark.parametrize("size", ["k400_vit_b", "k400_vit_l", "k400_vit_s", "no_video_vit_s", "ssv2_vit_b"])
def test_second_stage_starts_where_the_first_one_ends(run_script, tmp_path, size):
    first = program_args(run_script(SCRIPTS / f"pretrain/{size}_1st_stage.sh")[1][0])
    result, _ = run_script(
        SCRIPTS / f"pretrain/{size}_2nd_stage.sh", FIRST_STAGE_CKPT=""
    )  # back to the default, not there
    assert f"{first.output_dir}/checkpoint-{first.stop_epoch - 1}.pth: no such file" in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("gpus, nodes, batch", [(1, 1, 32), (4, 1, 32), (8, 1, 32), (8, 2, 16), (2, 1, 8), (1, 1, 256)])
def test_total_batch_stays_256(run_script, gpus, nodes, batch):
    for recipe in RECIPES[:2]:
        _, (command,) = run_script(recipe, GPUS=str(gpus), NODES=str(nodes), BATCH_SIZE=str(batch))
        args = program_args(command)
        assert gpus * nodes * args.batch_size * args.update_freq == 256
        assert launcher_option(command, "--nproc_per_node") == str(gpus)
        assert launcher_option(command, "--nnodes") == str(nodes)


def test_a_batch_that_does_not_fit_is_one_clear_line(run_script):
    result, commands = run_script(RECIPES[0], GPUS="3")
    assert result.returncode == 1 and commands == []
    assert result.stderr == "error: GPUS 3 x NODES 1 x BATCH_SIZE 32 = 96 does not divide TOTAL_BATCH 256\n"


def test_everything_comes_from_the_environment(run_script, tmp_path):
    _, (command,) = run_script(
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
def test_a_missing_path_is_named_before_anything_starts(run_script, variable):
    result, commands = run_script(RECIPES[0], **{variable: "/path/to/nothing"})
    assert result.returncode == 1 and commands == []
    assert result.stderr.startswith(f"error: {variable}=/path/to/nothing: no such file or folder")
    assert result.stderr.count("\n") == 1


def submit(run_script, *arguments, script=SBATCH, **variables):
    """The batch script as Slurm runs it: from the folder of sbatch, with the job's variables."""
    job = {
        "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "6",
    }
    return run_script(script, *arguments, **job | variables)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_slurm_runs_a_recipe_under_srun(run_script, recipe):
    result, (command,) = submit(run_script, f"pretrain/{recipe.stem}", "--seed", "5")
    args = program_args(command)
    assert result.returncode == 0 and command[0] == "srun"
    assert launcher_option(command, "--nodes") == "2" and launcher_option(command, "--ntasks-per-node") == "4"
    assert args.batch_size * args.update_freq * 8 == 256
    assert (args.num_workers, args.seed) == (6, 5)


PREPARED = ("scripts/data/resize_videos.py", "lists/a b.csv", "--output", "out")


@pytest.mark.parametrize(
    "script, arguments", [(SBATCH, (f"pretrain/{RECIPES[0].stem}",)), (PREPARE, PREPARED)], ids=["recipe", "prepare"]
)
def test_slurm_queues_the_job_again_only_when_the_run_asks_for_it(run_script, script, arguments):
    result, commands = submit(run_script, *arguments, script=script, STUB_EXIT=str(EXIT_REQUEUE))
    assert result.returncode == EXIT_REQUEUE and commands[1:] == [["scontrol", "requeue", "42"]]
    for code in (0, 1):
        result, commands = submit(run_script, *arguments, script=script, STUB_EXIT=str(code))
        assert result.returncode == code and len(commands) == 1


def test_slurm_runs_the_other_recipes_too(run_script, tmp_path):
    for recipe in ("finetune/finetune_ucf101_vit_b", "test/test_k400_vit_b"):
        result, (command,) = submit(
            run_script, recipe, DATA_PATH=str(tmp_path), MODEL_PATH=str(tmp_path), TOTAL_BATCH="32", BATCH_SIZE="4"
        )
        assert result.returncode == 0 and command[0] == "srun", result.stderr
        assert any(word.endswith("/run_class_finetuning.py") for word in command)


def test_slurm_runs_a_data_tool_in_one_process_a_node(run_script):
    _, commands = submit(run_script, *PREPARED, script=PREPARE)
    assert commands == [["srun", "--wait=0", "python", *PREPARED]]


@pytest.mark.parametrize("script", [SBATCH, PREPARE], ids=["recipe", "prepare"])
def test_slurm_directives_ask_for_a_warning_and_a_requeue(script):
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in directives and "#SBATCH --signal=USR1@120" in directives
