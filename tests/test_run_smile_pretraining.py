"""The pretraining program as it is used: both stages, two processes, kills and signals, dry runs, wrong input.

Most runs are processes of a fork server that has imported torch already, which saves seconds each; some are started
from the command line, by python and by torchrun.
"""

import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_video import write_list
from tensorboardX.proto.event_pb2 import Event

from checkpoints import LATEST, read_checkpoint
from data_loading import ChunkSampler
from modeling_pretrain import MODELS
from optim_factory import parameter_groups
from options import build_stepper
from run_smile_pretraining import build_dataset, clips_per_video, find_problems, get_args

pytest_plugins = "fixtures_video"
ROOT = Path(__file__).resolve().parents[1]
NAME = "run_smile_pretraining.py"
STEPS, EPOCHS = 12, 2
TINY = ["--model", "pretrain_videomae_tiny_patch16_224", "--decoder_depth", "1", "--target_type", "pixel",
        "--num_frames", "4", "--sampling_rate", "2", "--input_size", "48", "--mask_ratio", "0.7", "--drop_path", "0.2",
        "--num_workers", "1", "--log_interval", "1", "--save_ckpt_freq", "1", "--max_bad_fraction", "0.5"]
TRAIN = ["--multiple_sampling", "--batch_size", "4", "--epochs", "3", "--stop_epoch", str(EPOCHS), "--warmup_epochs",
         "1", "--lr", "0.05", "--weight_decay_end", "0.1"]
LONG = ["--epochs", "200", "--stop_epoch", "200", "--save_ckpt_freq", "200"]


# Running the program --------------------------------------------------------------------------------------------


def program(argv, output):
    """Be ``python run_smile_pretraining.py ARGV``, in a process group of its own."""
    os.setpgrp()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as they do from the command line
    sys.argv = [NAME, *argv]
    runpy.run_path(str(ROOT / NAME), run_name="__main__")


class Run:
    """A started run."""

    def __init__(self, process, output):
        self.process, self.output, self.pid = process, output, process.pid

    def read(self, name):
        path = Path(f"{self.output}.{name}")
        return path.read_text() if path.exists() else ""

    def wait_for(self, text, seconds=60):
        """Until its standard output has a text."""
        end, alive = time.monotonic() + seconds, True
        while text not in self.read("out"):
            assert alive and time.monotonic() < end, self.read("out") + self.read("err")
            time.sleep(0.003)
            alive = self.process.is_alive()

    def end(self, seconds=90):
        """Its exit code and what it said."""
        self.process.join(seconds)
        self.stop()
        return SimpleNamespace(code=self.process.exitcode, out=self.read("out"), err=self.read("err"))

    def stop(self):
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the program."""
    before, started = os.environ.get("PYTHONPATH"), []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [before])])
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["run_smile_pretraining", Path(__file__).stem])
    folder = tmp_path_factory.mktemp("outputs")

    def start_one(*argv):
        output = folder / str(len(started))
        process = server.Process(target=program, args=([str(word) for word in argv], output))
        process.start()
        started.append(Run(process, output))
        return started[-1]

    yield start_one
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    for run in started:
        run.stop()


@pytest.fixture(scope="module")
def data(clips, broken, objects_folder, tmp_path_factory):
    """Options of stage 1: 50 lines, one of them unreadable, so 12 steps of 4 videos; and objects."""
    videos = [*list(clips.values()) * 9, broken["text"]][-50:]
    path = write_list(tmp_path_factory.mktemp("lists") / "train list.csv", videos)
    assert len(videos) // 4 == STEPS
    return ["--data_path", path, "--add_tubelets", "--use_objects", "--objects_path", objects_folder,
            "--mask_type", "tubelet"]


@pytest.fixture(scope="module")
def reference(start, data, tmp_path_factory):
    """A run of stage 1 that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    result = start(*TINY, *TRAIN, *data, "--update_freq", 2, "--output_dir", folder, "--log_dir", folder / "tb").end()
    assert result.code == 0, result.err
    return SimpleNamespace(folder=folder, out=result.out)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def weights_of(path):
    return read_checkpoint(path)["model"]


def last_weights(folder):
    return weights_of(Path(folder) / f"checkpoint-{EPOCHS - 1}.pth")


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same_as(reference, folder):
    """Whether a run's losses and last weights are, bit by bit, those of the reference."""
    logs = [[(line["epoch"], line["train_loss"], line["train_grad_norm"], line["lr"]) for line in log_of(where)]
            for where in (reference.folder, folder)]
    return logs[0] == logs[1] and largest_difference(last_weights(reference.folder), last_weights(folder)) == 0


# An undisturbed run ---------------------------------------------------------------------------------------------


def test_what_a_run_writes(reference, broken, objects_folder):
    names = {path.name for path in reference.folder.iterdir()} - {".lock"}
    assert names == {"checkpoint-0.pth", "checkpoint-1.pth", "log.txt", "bad_clips.txt", "tb"}
    state = read_checkpoint(reference.folder / "checkpoint-1.pth")
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= state.keys() and state["epoch"] == 1
    assert state["args"].mask_ratio == 0.7 and len(state["optimizer"]["state"]) == len(state["model"])
    student = MODELS["pretrain_videomae_tiny_patch16_224"](decoder_depth=1, decoder_num_classes=1536)
    student.load_state_dict(state["model"])
    bad = [line.split("\t")[0] for line in (reference.folder / "bad_clips.txt").read_text().splitlines()]
    assert set(bad) <= {str(broken["text"]), str(objects_folder / "bar" / "broken.png")} and len(bad) == len(set(bad))
    assert bad, "in 96 draws there is a broken one"


def test_what_a_run_logs(reference):
    log = log_of(reference.folder)
    assert [line["epoch"] for line in log] == [0, 1] and all(line["steps"] == STEPS for line in log)
    for line in log:
        assert all(np.isfinite(line[name]) for name in (
            "train_loss", "train_grad_norm", "train_pred_std", "train_target_std", "lr", "weight_decay", "seconds"))
    assert 0.5 < log[1]["train_loss"] < log[0]["train_loss"] < 4  # it learns
    assert "1 process(es) x 4 clips x 2 accumulated = total batch 8, fp32 on cpu" in reference.out
    assert f"2 clips of each: {STEPS} steps an epoch" in reference.out
    assert "epochs 2 of a schedule of 3: 4 in the paper's count" in reference.out
    lines = [line for line in reference.out.splitlines() if f"/{STEPS}]" in line]
    assert len(lines) == EPOCHS * STEPS
    assert all(word in lines[3] for word in ("loss ", "lr ", "grad_norm ", "data_time ", "step_time ", "eta "))


def test_the_same_command_again_has_nothing_to_do(start, data, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.folder.glob("*.[pt]*") if path.is_file()}
    result = start(*TINY, *TRAIN, *data, "--update_freq", 2, "--output_dir", reference.folder).end()
    assert result.code == 0 and f"resuming from {reference.folder / 'checkpoint-1.pth'} at epoch 2" in result.out
    assert before == {path: path.stat().st_mtime_ns for path in before}


# Two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(data, reference, tmp_path_factory):
    """The reference run over again from the command line, over Gloo and with half the accumulation."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / NAME,
               *TINY, *TRAIN, *data, "--update_freq", 1, "--output_dir", folder, "--log_dir", folder / "tb"]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=200,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(folder=folder, out=result.stdout)


def test_two_processes_reach_the_weights_of_one(reference, two_processes):
    """The same clips, masks, drop path and second masks, so the same weights."""
    assert "2 process(es) x 4 clips x 1 accumulated = total batch 8" in two_processes.out
    first, last = weights_of(reference.folder / "checkpoint-0.pth"), last_weights(reference.folder)
    assert largest_difference(first, last) > 1e-3
    assert largest_difference(last_weights(two_processes.folder), last) < 1e-5
    for one, two in zip(log_of(reference.folder), log_of(two_processes.folder), strict=True):
        assert one["lr"] == two["lr"] and one["bad_clips"] == two["bad_clips"]
        for name in ("train_loss", "train_grad_norm", "train_pred_std", "train_target_std"):
            assert one[name] == pytest.approx(two[name], rel=0.05 if "std" in name else 1e-4), name  # std: of one pass
    assert (two_processes.folder / "bad_clips.txt").read_text().count("text.mp4\t") == 1


def read_events(folder):
    """(step, name, value) of all scalars below a folder: records of length, checksum, event, checksum."""
    found = []
    for path in Path(folder).iterdir():
        stream = io.BytesIO(path.read_bytes())
        while header := stream.read(12):
            event = Event.FromString(stream.read(struct.unpack("<Q", header[:8])[0]))
            stream.read(4)
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_every_step(two_processes):
    events = read_events(two_processes.folder / "tb")
    for name in ("loss", "lr", "grad_norm", "pred_std", "target_std", "data_time", "step_time"):
        assert [step for step, tag, _ in events if tag == name] == list(range(EPOCHS * STEPS)), name
    losses = [value for _, tag, value in events if tag == "loss"]
    assert np.mean(losses[:STEPS]) == pytest.approx(log_of(two_processes.folder)[0]["train_loss"], rel=1e-5)


# Kills and signals ----------------------------------------------------------------------------------------------


def stopped(start, number, text, folder, *command):
    """A run that got a signal when it had said a text; started anew if it was through before the signal came."""
    for _ in range(4):
        run = start(*command)
        run.wait_for(text)
        try:
            os.kill(run.pid, number)
        except ProcessLookupError:
            pass
        result = run.end()
        if result.code != 0 and (number == signal.SIGKILL or (folder / LATEST).exists()):
            break
        shutil.rmtree(folder)
    return result


def test_a_killed_run_goes_on_as_if_it_had_not_been(start, data, reference, tmp_path):
    command = [*TINY, *TRAIN, *data, "--update_freq", 2, "--output_dir", tmp_path]
    result = stopped(start, signal.SIGKILL, f"epoch 1 [2/{STEPS}]", tmp_path, *command)
    assert result.code == -signal.SIGKILL and len(log_of(tmp_path)) == 1
    again = start(*command).end()
    assert again.code == 0 and f"{tmp_path / 'checkpoint-0.pth'} at epoch 1, step 0" in again.out
    assert same_as(reference, tmp_path)


def test_a_run_killed_in_mid_epoch_goes_on_from_the_latest_file(start, data, reference, tmp_path):
    command = [*TINY, *TRAIN, *data, "--update_freq", 2, "--output_dir", tmp_path, "--save_ckpt_steps", 5]
    stopped(start, signal.SIGKILL, f"epoch 0 [8/{STEPS}]", tmp_path, *command)
    again = start(*command).end()
    assert again.code == 0 and re.search(rf"{LATEST} at epoch 0, step (5|10)\n", again.out)
    assert same_as(reference, tmp_path)


def test_a_run_that_is_told_to_stop_saves_itself_and_goes_on_exactly(start, data, reference, tmp_path):
    command = [*TINY, *TRAIN, *data, "--output_dir", tmp_path]
    result = stopped(start, signal.SIGTERM, f"epoch 1 [2/{STEPS}]", tmp_path, *command, "--update_freq", 2)
    assert result.code == 85 and "Traceback" not in result.err and "error: " not in result.err
    state = read_checkpoint(tmp_path / LATEST)
    assert state["epoch"] == 1 and 2 <= state["step"] < STEPS
    assert f"told to stop: saved at epoch 1, step {state['step']}" in result.out
    other = start(*command, "--update_freq", 1).end()
    assert other.code == 1 and "lies inside an epoch with 4 videos a step, now there are 2" in other.err
    again = start(*command, "--update_freq", 2).end()
    assert again.code == 0 and f"{LATEST} at epoch 1, step {state['step']}" in again.out
    assert same_as(reference, tmp_path) and not (tmp_path / LATEST).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_is_survived(start, data, tmp_path, number):
    """As Slurm, torchrun and Ctrl-C send it: to the loader's workers too."""
    run = start(*TINY, *TRAIN, *data, "--output_dir", tmp_path, *LONG, "--num_workers", 2)
    run.wait_for("epoch 1 [2/")
    os.killpg(run.pid, number)
    result = run.end()
    assert result.code == 85 and "told to stop: saved at epoch" in result.out, result.err[-500:]


def test_a_worker_that_is_killed_ends_the_run_with_one_line(start, data, tmp_path):
    """For example by the kernel, out of memory; wherever the main process happens to be."""
    run = start(*TINY, *TRAIN, *data, "--output_dir", tmp_path, *LONG)
    run.wait_for("epoch 0 [3/")
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert workers
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    result = run.end()
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and len(lines) == 1 and "data loader" in lines[0] and ".mp4" in lines[0], result.err[-1000:]
    assert "Traceback" not in result.err


# Stage 2 --------------------------------------------------------------------------------------------------------


def test_stage_2_starts_with_the_weights_of_stage_1(start, data, reference, tmp_path):
    """With a learning rate of 0 they are still there at the end, next to an optimizer that has made 12 steps."""
    command = [*TINY, *data[:2], "--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0,
               "--output_dir", tmp_path, "--first_stage_path", reference.folder / "checkpoint-1.pth"]
    result = start(*command).end()
    assert result.code == 0 and f"tensors from {reference.folder / 'checkpoint-1.pth'}" in result.out
    state = read_checkpoint(tmp_path / "checkpoint-0.pth")
    assert largest_difference(state["model"], last_weights(reference.folder)) == 0 and state["epoch"] == 0
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {STEPS}
    assert log_of(tmp_path)[0]["train_loss"] > 0
    assert "resuming wins" in start(*command).end().out  # its own checkpoint goes before stage 1's


def test_stage_2_trains(start, data, reference, tmp_path):
    result = start(*TINY, *TRAIN, *data[:2], "--output_dir", tmp_path, "--mask_type", "tube",
                   "--first_stage_path", reference.folder / "checkpoint-1.pth", "--stop_epoch", 1).end()
    assert result.code == 0, result.err
    assert largest_difference(weights_of(tmp_path / "checkpoint-0.pth"), last_weights(reference.folder)) > 1e-4


# Dry runs -------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_writes_nothing(start, data, reference, tmp_path):
    result = start(*TINY, *TRAIN, *data, "--dry_run", "--output_dir", tmp_path / "run", "--log_dir",
                   tmp_path / "tb").end()
    assert result.code == 0 and "dry run: one step went well" in result.out and list(tmp_path.iterdir()) == []
    assert result.out.count("loss ") == 1
    before = contents(reference.folder)
    result = start(*TINY, *TRAIN, *data, "--update_freq", 2, "--dry_run", "--stop_epoch", 3, "--output_dir",
                   reference.folder, "--log_dir", reference.folder / "tb").end()
    assert result.code == 0 and "dry run" in result.out and contents(reference.folder) == before


# Wrong input ----------------------------------------------------------------------------------------------------


def argv_of(data, *more):
    """Options of a run, later ones win."""
    return [str(word) for word in (*TINY, *TRAIN, *data, *more)]


WRONG = {
    "no list": (["--data_path", "{t}/none.csv"], "{t}/none.csv: no such list file"),
    "empty list": (["--data_path", "{t}/empty.csv"], "{t}/empty.csv: the list is empty"),
    "no label": (["--data_path", "{t}/label.csv"], "{t}/label.csv, line 2: 'b.mp4' is not `path label`"),
    "no objects folder": (["--objects_path", "{t}/none"], "--objects_path {t}/none: no such folder"),
    "objects folder not given": (["--objects_path", ""], "--objects_path"),
    "no objects": (["--objects_path", "{t}/empty"], "{t}/empty: no object images"),
    "no objects list": (["--objects_list", "{t}/none.txt"], "{t}/none.txt"),
    "mask ratio 0": (["--mask_ratio", "0"], "--mask_ratio 0.0"),
    "mask ratio 1": (["--mask_ratio", "1"], "--mask_ratio 1.0"),
    "mask ratio 1.5": (["--mask_ratio", "1.5"], "--mask_ratio 1.5"),
    "mask ratio -0.5": (["--mask_ratio", "-0.5"], "--mask_ratio -0.5"),
    "mask ratio nan": (["--mask_ratio", "nan"], "--mask_ratio nan"),
    "mask ratio that hides nothing": (["--mask_ratio", "0.1"], "--mask_ratio 0.1"),
    "input size": (["--input_size", "50"], "--input_size 50 is not divisible by the patch size 16"),
    "frames": (["--num_frames", "5"], "--num_frames 5 is not divisible by the tubelet size 2"),
    "stage 1 path": (["--first_stage_path", "{t}/none.pth"], "--first_stage_path {t}/none.pth"),
    "stage 1 path is no checkpoint": (["--first_stage_path", "{t}/label.csv"], "{t}/label.csv"),
    "resume": (["--resume", "{t}/none.pth"], "--resume {t}/none.pth"),
    "odd batch": (["--batch_size", "5"], "--batch_size 5 is not a multiple of the 2 clips"),
    "batch 0": (["--batch_size", "0"], "--batch_size 0"),
    "update_freq 0": (["--update_freq", "0"], "--update_freq 0: must be at least 1"),
    "sampling rate 0": (["--sampling_rate", "0"], "--sampling_rate 0: must be at least 1"),
    "no epochs": (["--epochs", "0"], "--epochs 0: must be at least 1"),
    "seed": (["--seed", "-1"], "--seed -1"),
    "workers": (["--num_workers", "-1"], "--num_workers -1"),
    "decoder depth": (["--decoder_depth", "-1"], "--decoder_depth -1"),
    "unmask ratio": (["--traj_unmask_ratio", "1.5"], "--traj_unmask_ratio 1.5"),
    "scales": (["--scales", "0"], "--scales 0"),
    "output is a file": (["--output_dir", "{t}/label.csv"], "--output_dir {t}/label.csv"),
    "teacher": (["--target_type", "dino_v1"], "--target_type dino_v1 needs --distillation_teacher dino_s or dino_b"),
}


@pytest.fixture
def wrong_files(tmp_path):
    (tmp_path / "empty.csv").write_text("\n")
    (tmp_path / "label.csv").write_text("a.mp4 0\nb.mp4\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_input_is_told_by_its_name(case, data, wrong_files):
    options, message = ([word.format(t=wrong_files) for word in part] if isinstance(part, list)
                        else part.format(t=wrong_files) for part in WRONG[case])
    problems = find_problems(get_args(argv_of(data, *options)))
    assert len(problems) == 1 and message in problems[0] and "\n" not in problems[0]


def test_right_input_has_no_problems(data, objects_folder, tmp_path):
    (tmp_path / "objects.txt").write_text("disc/0.png\nbar/1.png\n")
    assert find_problems(get_args(argv_of(data))) == []
    assert find_problems(get_args(argv_of(data, "--objects_list", tmp_path / "objects.txt"))) == []
    assert find_problems(get_args(argv_of(data[:2], "--output_dir", tmp_path / "a" / "b"))) == []
    assert find_problems(get_args(argv_of(data[:2], "--mask_type", "tubelet"))) == [
        "--mask_type tubelet follows pasted objects: add --add_tubelets"]


def test_all_problems_are_told_at_once_on_the_command_line(wrong_files):
    command = [sys.executable, NAME, *TINY, "--data_path", wrong_files / "label.csv", "--mask_ratio", "1.2",
               "--add_tubelets", "--use_objects", "--objects_path", wrong_files / "none", "--first_stage_path", "x.pth",
               "--output_dir", wrong_files / "run"]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and lines[0].startswith("error: ") and len(lines) == 4
    for word in ("label.csv, line 2", "--mask_ratio 1.2", "--objects_path", "--first_stage_path x.pth"):
        assert sum(word in line for line in lines) == 1
    assert not (wrong_files / "run").exists()


LATER = {
    "another size": (["--model", "pretrain_videomae_small_patch16_224", "--first_stage_path", "{ref}"],
                     "checkpoint-1.pth does not fit this model: .*check --model"),
    "another depth": (["--decoder_depth", "2", "--first_stage_path", "{ref}"],
                      "does not fit this model.*check --model"),
    "resume of another size": (["--model", "pretrain_videomae_small_patch16_224", "--resume", "{ref}"],
                               "checkpoint-1.pth is of another run"),
    "resume from weights": (["--resume", "{t}/weights.pth"], "weights.pth holds weights only"),
    "too few videos": (["--batch_size", "80", "--update_freq", "2"], "50 videos are fewer than the 80.*--batch_size"),
    "optimizer": (["--opt", "adamx"], "--opt.*adamx|adamx.*--opt"),
    "teacher model": (["--target_type", "clip", "--clip_model", "ViT-X"], "--clip_model ViT-X: not among"),
    "teacher weights": (["--target_type", "clip", "--clip_weights", "none.pt"], "--clip_weights none.pt: no such file"),
}


@pytest.mark.parametrize("case", LATER)
def test_what_is_found_while_building_is_one_line_too(case, start, data, reference, tmp_path):
    torch.save({"model": last_weights(reference.folder)}, tmp_path / "weights.pth")
    options, message = LATER[case]
    options = [word.format(ref=reference.folder / "checkpoint-1.pth", t=tmp_path) for word in options]
    result = start(*argv_of(data, *options)).end()
    assert result.code == 1 and re.fullmatch(rf"error: .*({message}).*\n", result.err), result.err[-1000:]


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more, total, steps", [
    ([], 8, 50 // 8), (["--multiple_sampling"], 8, 50 // 4), (["--update_freq", "3"], 24, 50 // 24),
    (["--multiple_sampling", "--update_freq", "2", "--num_sample", "2"], 16, 50 // 4), (["--warmup_steps", "9"], 8, 6),
])
def test_rates_follow_the_released_recipe_in_real_steps(data, more, total, steps):
    """lr x total batch / 256, linear warm-up from 0, cosine; per optimizer step that is made."""
    args = get_args([*(str(word) for word in data), *TINY, "--batch_size", "8", "--epochs", "7", "--warmup_epochs", "2",
                     "--weight_decay_end", "0.2", *more])
    chunk = args.batch_size // clips_per_video(args)
    assert ChunkSampler(len(build_dataset(args)), chunk, args.update_freq).steps_per_epoch == steps
    model = torch.nn.Linear(2, 2)
    stepper = build_stepper(args, model, parameter_groups(model, 0.05), torch.device("cpu"), total, steps)
    warmup = 9 if "--warmup_steps" in more else 2 * steps
    base, final = 1.5e-4 * total / 256, 1e-5 * total / 256
    i = np.arange(7 * steps - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    rates = np.concatenate([np.linspace(0, base, warmup), cosine])
    decays = 0.2 + 0.5 * (0.05 - 0.2) * (1 + np.cos(np.pi * np.arange(7 * steps) / (7 * steps)))
    shown = [stepper.schedule(step) for step in range(7 * steps)]
    np.testing.assert_allclose([row["lr"] for row in shown], rates, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose([row["weight_decay"] for row in shown], decays, rtol=1e-9)


def test_defaults_are_the_recipe_of_the_paper():
    args = get_args(["--data_path", "x"])
    recipe = {
        "opt": "adamw", "opt_betas": [0.9, 0.95], "opt_eps": 1e-8, "weight_decay": 0.05, "lr": 1.5e-4, "min_lr": 1e-5,
        "warmup_epochs": 40, "warmup_lr": 0, "epochs": 801, "batch_size": 32, "mask_ratio": 0.8, "decoder_depth": 4,
        "num_frames": 16, "sampling_rate": 4, "input_size": 224, "traj_unmask_ratio": 0.1, "clip_grad": None,
        "motion_type": "gaussian", "scales": [32, 48, 56, 64, 96, 128], "num_rois": 2, "sub_mask_type":
        "tube+traj_mask", "teacher_norm": "imagenet", "clip_model": "ViT-B-16", "clip_weights": "openai"}
    assert {name: getattr(args, name) for name in recipe} == recipe


FLAGS = """data_path mask_type sub_mask_type target_type distillation_teacher mask_ratio traj_unmask_ratio model
decoder_depth batch_size num_frames sampling_rate opt opt_betas warmup_epochs save_ckpt_freq epochs add_tubelets
use_objects motion_type scales log_dir output_dir objects_path multiple_sampling first_stage_path input_size drop_path
opt_eps clip_grad weight_decay weight_decay_end lr warmup_lr min_lr warmup_steps use_checkpoint seed resume auto_resume
no_auto_resume start_epoch num_workers pin_mem device""".split()


def test_help_knows_every_flag_of_the_released_script_in_groups(capsys):
    with pytest.raises(SystemExit) as exit_:
        get_args(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and all(re.search(rf"--{flag}\b", text) for flag in FLAGS)
    for group in ("data", "overlay", "mask", "model", "teacher", "optimizer", "run"):
        assert re.search(rf"^{group}\b.*:$", text, re.MULTILINE), group
