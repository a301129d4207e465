"""What the shell scripts make of variables, paths, options and Slurm; test_commands.py has their command lines."""

from pathlib import Path

import pytest
from fixtures_scripts import FINETUNE, PRETRAIN, SCRIPTS, TEST, launcher_option, program_args

from utils import EXIT_REQUEUE

pytest_plugins = "fixtures_scripts"
PROBES = [path for path in FINETUNE if path.stem.startswith("linear_probe")]
TUNE = FINETUNE[0]
by_name = {"ids": lambda value: value.stem if isinstance(value, Path) else value}


def args_of(run_script, script, *options, **variables):
    """What the program makes of a script's command, and the command."""
    result, commands = run_script(script, *options, **variables)
    assert result.returncode == 0 and len(commands) == 1, result.stderr
    return program_args(commands[0]), commands[0]


def refused(run_script, script, **variables):
    """The line that a script ends with, before anything starts."""
    result, commands = run_script(script, **variables)
    assert result.returncode == 1 and commands == [] and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_scripts_stop_at_errors():
    for script in [*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch"), SCRIPTS.parent / ".ci/run"]:
        if script.name not in ("common.sh", "probe.sh", "setup_env.sh"):  # these are sourced
            assert "set -euo pipefail" in script.read_text(), script


@pytest.mark.parametrize("kind", ["black", "noise", "image", "frame"])
@pytest.mark.parametrize("stage", ["1st", "2nd"])
def test_recipe_without_video(run_script, tmp_path, stage, kind):
    """As that of ViT-S in all but data and target."""
    script = SCRIPTS / "pretrain" / f"no_video_vit_s_{stage}_stage.sh"
    args, _ = args_of(run_script, script, BACKGROUND=kind)
    blank = kind in ("black", "noise")
    expected = vars(args_of(run_script, SCRIPTS / "pretrain" / f"k400_vit_s_{stage}_stage.sh")[0]) | {
        "background": kind,
        "given": args.given,  # which options were named: not the same ones
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
        assert "DATA_PATH=/nowhere: no such" in refused(run_script, script, BACKGROUND=kind, DATA_PATH="/nowhere")


STARTS = [path for path in PRETRAIN if "2nd" in path.stem] + FINETUNE + TEST


@pytest.mark.parametrize("script", STARTS, **by_name)
def test_scripts_start_where_another_one_ends(run_script, script):
    """The default is what the other script leaves behind; what is not there is named."""
    variable = "FIRST_STAGE_CKPT" if script in PRETRAIN else "MODEL_PATH"
    path = Path(refused(run_script, script, **{variable: ""}).removeprefix("error: ").split(": no such file")[0])
    source = path.parent.name
    if script in TEST:
        assert path.name == "checkpoint-best.pth" and source == script.stem.replace("test_", "finetune_")
    else:
        first, _ = args_of(run_script, SCRIPTS / "pretrain" / f"{source}.sh")
        assert path.name == f"checkpoint-{first.stop_epoch - 1}.pth"
        assert first.model.removeprefix("pretrain_videomae_").split("_")[0] in args_of(run_script, script)[0].model
        assert script not in PRETRAIN or source == script.stem.replace("2nd", "1st")


@pytest.mark.parametrize("script", [PRETRAIN[0], *FINETUNE, *TEST], **by_name)
def test_a_missing_path_is_named_before_anything_starts(run_script, script):
    for variable in ("DATA_PATH", "OBJECTS_PATH" if script in PRETRAIN else "MODEL_PATH"):
        said = refused(run_script, script, **{variable: "/path/to/nothing"})
        assert said.startswith(f"error: {variable}=/path/to/nothing: no such file or folder")


@pytest.mark.parametrize("script", [*PRETRAIN[:2], *FINETUNE], **by_name)
def test_the_total_batch_stays(run_script, script):
    totals = set()
    for gpus, nodes, batch in ((1, 1, 2), (4, 1, 4), (8, 1, 2), (2, 2, 4)):
        args, command = args_of(run_script, script, GPUS=str(gpus), NODES=str(nodes), BATCH_SIZE=str(batch))
        totals.add(gpus * nodes * args.batch_size * args.update_freq)
        assert args.batch_size == batch and launcher_option(command, "--nproc_per_node") == str(gpus)
        assert launcher_option(command, "--nnodes") == str(nodes)
    assert len(totals) == 1 and (script not in PRETRAIN or totals == {256})


def test_a_batch_that_does_not_fit_is_one_clear_line(run_script):
    for script, gpus, said in (
        (PRETRAIN[0], "3", "GPUS 3 x NODES 1 x BATCH_SIZE 32 = 96 does not divide TOTAL_BATCH 256"),
        (SCRIPTS / "finetune/finetune_k400_vit_b.sh", "8", "8 x NODES 1 x BATCH_SIZE 4 = 32 does not divide"),
    ):
        assert said in refused(run_script, script, GPUS=gpus)


@pytest.mark.parametrize("script", [PRETRAIN[0], FINETUNE[1], TEST[1]], **by_name)
def test_everything_comes_from_the_environment_and_options_win(run_script, script):
    launch = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "GPUS": "2"}
    more = {"OUTPUT_DIR": "out dir", "NUM_WORKERS": "3", "STOP_EPOCH": "9", "MAX_RESTARTS": "0", "TOTAL_BATCH": "512"}
    options = "--seed 7 --stop_epoch 3 --input_size 112".split()
    args, command = args_of(run_script, script, *options, CLIP_WEIGHTS="/w/x.pt", BATCH_SIZE="4", **launch, **more)
    assert (args.output_dir, args.num_workers) == ("out dir", 3)
    assert args.eval if script in TEST else (args.log_dir, args.update_freq) == ("out dir", 32)
    assert (args.seed, args.stop_epoch, args.input_size) == (7, 3, 112)
    assert script != PRETRAIN[0] or args.clip_weights == "/w/x.pt"
    names = "--nnodes --node_rank --master_addr --master_port --nproc_per_node --max-restarts".split()
    assert [launcher_option(command, name) for name in names] == [*launch.values(), "0"]


@pytest.mark.parametrize("script", PROBES, **by_name)
def test_linear_probes_of_sigma_and_of_image_models(run_script, tmp_path, script):
    """An image model takes the same options but the weights, and no checkpoint has to be there."""
    video, _ = args_of(run_script, script)
    names = {"ENCODER": "ViT-B-16", "ENCODER_WEIGHTS": "clip.pt", "MODEL_PATH": "/nowhere"}
    image, _ = args_of(run_script, script, **names)
    assert video.linear_probe and not video.encoder and video.finetune == str(tmp_path / "my model.pth")
    changed = {"encoder": "ViT-B-16", "encoder_weights": "clip.pt", "finetune": "", "given": image.given}
    assert vars(image) == vars(video) | changed
    sigma, command = args_of(run_script, script, RECIPE="sigma")
    gpus = int(launcher_option(command, "--nproc_per_node"))
    assert sigma.learn == "head" and not sigma.linear_probe
    assert gpus * sigma.batch_size * sigma.update_freq == 384  # 24 x 8 x 2, as published
    assert refused(run_script, script, RECIPE="mine") == "error: RECIPE=mine: choose ours or sigma\n"


# Slurm ----------------------------------------------------------------------------------------------------------


SBATCH = SCRIPTS / "slurm" / "recipe.sbatch"
PREPARE = SCRIPTS / "slurm" / "prepare.sbatch"
PREPARED = ("scripts/data/resize_videos.py", "lists/a b.csv", "--output", "out")
JOB = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}


def submit(run_script, *arguments, script=SBATCH, **variables):
    """The batch script as Slurm runs it: from the folder of sbatch, with the job's variables."""
    job = JOB | {"SLURM_SUBMIT_DIR": str(SCRIPTS.parent)}
    return run_script(script, *arguments, **job | variables)


@pytest.mark.parametrize("recipe", [*PRETRAIN, FINETUNE[-6], TEST[1]], **by_name)
def test_slurm_runs_a_recipe_under_srun(run_script, recipe):
    batch = {"BATCH_SIZE": "4", "TOTAL_BATCH": "256"}
    result, (command,) = submit(run_script, f"{recipe.parent.name}/{recipe.stem}", "--seed", "5", **batch)
    args = program_args(command)
    assert result.returncode == 0 and command[0] == "srun", result.stderr
    assert launcher_option(command, "--nodes") == "2" and launcher_option(command, "--ntasks-per-node") == "4"
    assert (args.num_workers, args.seed) == (6, 5)
    assert recipe in TEST or args.batch_size * args.update_freq * 8 == 256


@pytest.mark.parametrize(
    "script, arguments", [(SBATCH, (f"pretrain/{PRETRAIN[0].stem}",)), (PREPARE, PREPARED)], ids=["recipe", "prepare"]
)
def test_slurm_queues_the_job_again_only_when_the_run_asks_for_it(run_script, script, arguments):
    for code, requeued in ((EXIT_REQUEUE, [["scontrol", "requeue", "42"]]), (0, []), (1, [])):
        result, commands = submit(run_script, *arguments, script=script, STUB_EXIT=str(code))
        assert result.returncode == code and commands[1:] == requeued


def test_slurm_runs_a_data_tool_in_one_process_a_node(run_script):
    _, commands = submit(run_script, *PREPARED, script=PREPARE)
    assert commands == [["srun", "--wait=0", "python", *PREPARED]]


@pytest.mark.parametrize("script", [SBATCH, PREPARE], ids=["recipe", "prepare"])
def test_slurm_directives_ask_for_a_warning_and_a_requeue(script):
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in directives and "#SBATCH --signal=USR1@120" in directives
