"""The fine-tuning program as it is used: training, resuming, testing, probing, and what it says when it cannot.

Most runs are processes of a fork server that has imported torch already, which saves seconds each; some are started
from the command line, by python and by torchrun.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_video import source_frames, write_mp4
from safetensors.torch import save_file

from checkpoints import load_encoder
from modeling_finetune import MODELS
from utils import RunError

pytest_plugins = "fixtures_video"
ROOT = Path(__file__).resolve().parents[1]
NAME = "run_class_finetuning.py"
TINY = ["--model", "vit_tiny_patch16_224", "--input_size", "32", "--num_frames", "4", "--sampling_rate", "2",
        "--num_workers", "0", "--log_interval", "1"]
PLAIN = ["--aa", "", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--smoothing", "0", "--drop_path", "0"]
TRAIN = [*TINY, *PLAIN, "--batch_size", "3", "--num_sample", "4", "--lr", "0.02", "--layer_decay", "1",
         "--init_scale", "1", "--warmup_epochs", "1", "--test_num_segment", "2", "--test_num_crop", "3"]
EPOCHS = 20
METRICS = ("acc1", "class_acc1", "acc5", "class_acc5", "videos", "views", "unreadable")


# Running the program --------------------------------------------------------------------------------------------


def program(argv, output, env):
    """Be ``python run_class_finetuning.py ARGV``."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [NAME, *argv]
    runpy.run_path(str(ROOT / NAME), run_name="__main__")


@pytest.fixture(scope="module")
def server():
    """Context whose processes have imported what the program imports."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [before])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_class_finetuning", "run_smile_pretraining", Path(__file__).stem])
    context.Process(target=os.getpid).start()  # starts the server
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


@pytest.fixture
def run(server, tmp_path):
    """Run the program to its end, in one or more processes: code, and the first one's stdout and stderr."""
    def run(*argv, processes=1, start_only=False):
        env = [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(free.getsockname()[1])}
            env = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        outputs = [tmp_path / f"rank{rank}" for rank in range(processes)]
        started = [server.Process(target=program, args=([str(a) for a in argv], output, e))
                   for output, e in zip(outputs, env)]
        for process in started:
            process.start()
        if start_only:
            return started[0]
        for process in started:
            process.join(120)
            if process.exitcode is None:
                process.kill()
        texts = [output.with_suffix(suffix).read_text() for output in outputs for suffix in (".out", ".err")]
        codes = [process.exitcode for process in started]
        return SimpleNamespace(code=max(codes, key=abs), out=texts[0], err=texts[1], codes=codes, all="".join(texts))
    return run


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def same_curves(one, other, but=(), **tolerance):
    """Logs of two runs, apart from what the clock says."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", *but}:
            assert a[name] == (pytest.approx(b[name], **tolerance) if tolerance else b[name]), (a["epoch"], name)


def test_metrics_of(log):
    return [{name: line[f"test_{name}"] for name in METRICS} for line in log if "test_acc1" in line]


test_metrics_of.__test__ = False


# Data and a trained model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(broken, tmp_path_factory):
    """Two clips of each of three videos to train and validate on; the test list has an unreadable one besides."""
    folder, lines = tmp_path_factory.mktemp("a data set"), []
    for label, source in enumerate(("bikes", "bigbuckbunny", "carphone_pristine")):
        for part in range(2):
            path = folder / f"{source} {part}.mp4"
            write_mp4(path, source_frames(source, 40 * part, 24, (80, 64)))
            lines.append(f"{path} {label}\n")
    (folder / "train.csv").write_text("".join(lines))
    (folder / "val.csv").write_text("".join(lines))
    (folder / "test.csv").write_text("".join([*lines[:3], f"{broken['text']} 1\n", *lines[3:]]))
    (folder / "classes.txt").write_text("riding a bike\na rabbit\nphoning\n")
    return folder


@pytest.fixture(scope="module")
def custom(data):
    return ["--data_set", "custom", "--nb_classes", "3", "--data_path", data]


@pytest.fixture(scope="module")
def trained(server, custom, tmp_path_factory):
    """A run to its end: folder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [*custom, *TRAIN, "--epochs", EPOCHS, "--output_dir", folder / "run", "--save_ckpt_freq", "100"]
    process = server.Process(target=program, args=([str(a) for a in argv], folder / "text", {}))
    process.start()
    process.join(200)
    text = (folder / "text.out").read_text() + (folder / "text.err").read_text()
    assert process.exitcode == 0, text
    return SimpleNamespace(folder=folder / "run", text=text, best=folder / "run" / "checkpoint-best.pth")


def read(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def write_pretrained(path, size="tiny"):
    """A pretraining checkpoint without the decoder's blocks, as large as the encoder is."""
    torch.manual_seed(3)
    weights = MODELS[f"vit_{size}_patch16_224"](num_classes=0).state_dict()
    weights = {f"encoder.{name}": value for name, value in weights.items() if not name.startswith("fc_norm")}
    width = weights["encoder.patch_embed.proj.bias"].shape
    weights |= {"mask_token": torch.zeros(1, 1, 96), "decoder.norm.weight": torch.ones(96),
                "encoder.norm.weight": torch.ones(width), "encoder.norm.bias": torch.zeros(width)}
    torch.save({"model": weights, "epoch": 3, "step": 0}, path)
    return weights


# Training -------------------------------------------------------------------------------------------------------


def test_it_overfits_a_tiny_set(trained, broken):
    log = log_of(trained.folder)
    assert [line.get("epoch") for line in log] == [*range(EPOCHS), None]
    assert log[0]["train_loss"] > 0.8 and np.mean([line["train_loss"] for line in log[-6:-1]]) < 0.4
    assert log[EPOCHS - 1]["val_acc1"] == 100 and all(line["steps"] == 2 for line in log[:EPOCHS])
    [metrics] = test_metrics_of(log)
    assert (metrics["videos"], metrics["views"], metrics["unreadable"]) == (7, 36, 1)
    assert metrics["acc1"] > 70 and metrics["acc5"] == pytest.approx(600 / 7)
    assert f"counted as wrong, {broken['text']} could not be read" in trained.text and "Traceback" not in trained.text
    with np.load(trained.folder / "test_predictions.npz") as file:
        assert file["video"][3] == str(broken["text"]) and np.isnan(file["scores"][3]).all()
    assert (trained.folder / "test_per_class.csv").read_text().splitlines()[2].startswith("1,a rabbit,3,")


def test_a_killed_run_goes_on_where_it_was(run, custom, trained, tmp_path):
    """The curve is that of the undisturbed run, and the best epoch so far is remembered."""
    best, folder = read(trained.best), tmp_path / "killed"
    options = ["--epochs", EPOCHS, "--output_dir", folder, "--save_ckpt_freq", "100", "--save_ckpt_steps", "1"]
    process, kill_at = run(*custom, *TRAIN, *options, start_only=True), best["best"]["epoch"] + 2
    deadline = time.monotonic() + 100
    while not (folder / "log.txt").exists() or len(log_of(folder)) < kill_at:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and kill_at <= len(log_of(folder)) < EPOCHS
    assert not list(folder.glob("checkpoint-1*.pth"))
    assert read(folder / "checkpoint-latest.pth")["epoch"] > best["best"]["epoch"]  # so the best is not found anew
    again = run(*custom, *TRAIN, *options)
    assert again.code == 0 and "resuming from" in again.out, again.all
    same_curves(log_of(folder), log_of(trained.folder))
    ours = read(folder / "checkpoint-best.pth")
    assert ours["best"] == best["best"] and ours["epoch"] == best["epoch"] == best["best"]["epoch"]
    assert all(torch.equal(ours["model"][name], value) for name, value in best["model"].items())
    last, theirs = (read(where / f"checkpoint-{EPOCHS - 1}.pth") for where in (folder, trained.folder))
    assert all(torch.equal(last["model"][name], value) for name, value in theirs["model"].items())
    assert last["best"] == best["best"]


def test_two_processes_train_as_one_that_accumulates(run, custom, tmp_path):
    """With all augmentation: RandAugment, erasing, Mixup, drop path. And both test the best weights."""
    options = [*custom, *TINY, "--batch_size", "2", "--lr", "0.1", "--epochs", "2", "--warmup_epochs", "1",
               "--test_num_segment", "1", "--num_sample", "2", "--init_scale", "1", "--reprob", "0.9"]
    one = run(*options, "--update_freq", "2", "--output_dir", tmp_path / "one")
    two = run(*options, "--output_dir", tmp_path / "two", processes=2)
    assert one.code == 0 and two.codes == [0, 0], one.all + two.all
    logs = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    same_curves(*logs, but=["train_acc1"], rel=1e-3, abs=1e-4)
    assert "total batch 8 clips, 1 steps an epoch" in one.out and "total batch 8 clips, 1 steps an epoch" in two.out
    weights = [read(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-4, rtol=1e-2, msg=name)
    same_curves(*logs, rel=1e-3, abs=1e-4)  # train_acc1 too is of all clips of a step


def test_all_processes_test_the_best_weights_that_the_first_one_wrote(run, custom, tmp_path):
    """A large file, written just before."""
    folder, small = tmp_path / "run", ["--model", "vit_small_patch16_224", "--num_sample", "1"]
    found = run(*custom, *TRAIN, *small, "--epochs", "1", "--output_dir", folder, processes=2)
    assert found.codes == [0, 0] and len(test_metrics_of(log_of(folder))) == 1, found.all


def test_an_average_of_the_weights_is_validated_and_tested(run, custom, trained, tmp_path):
    folder = tmp_path / "ema"
    options = [*custom, *TRAIN, "--finetune", trained.best, "--model_ema", "--model_ema_decay", "0.5", "--lr", "1e-3",
               "--epochs", "2", "--output_dir", folder]
    assert (found := run(*options)).code == 0, found.all
    best = read(folder / "checkpoint-best.pth")
    assert best["model"].keys() == best["model_ema"].keys()
    assert any(not torch.equal(best["model"][name], value) for name, value in best["model_ema"].items())
    again = run(*custom, *TRAIN, "--eval", "--model_ema", "--finetune", folder / "checkpoint-best.pth",
                "--output_dir", folder)
    metrics = test_metrics_of(log_of(folder))
    assert again.code == 0 and len(metrics) == 2 and metrics[0] == metrics[1]


def test_it_stops_early_and_always_validates_the_last_epoch(run, custom, trained, tmp_path):
    tuned = [*custom, *TRAIN, "--finetune", trained.best, "--lr", "1e-6", "--min_lr", "0"]
    found = run(*tuned, "--epochs", "9", "--patience", "2", "--output_dir", tmp_path / "patience")
    assert found.code == 0 and [line.get("epoch") for line in log_of(tmp_path / "patience")] == [0, 1, 2, None]
    found = run(*tuned, "--epochs", "9", "--stop_epoch", "3", "--val_freq", "2", "--output_dir", tmp_path / "stopped")
    log = log_of(tmp_path / "stopped")
    assert found.code == 0 and ["val_acc1" in line for line in log] == [False, True, True, False], found.all


def test_a_run_shorter_than_val_freq_still_ends_with_a_test(run, custom, tmp_path):
    folder = tmp_path / "run"
    found = run(*custom, *TRAIN, "--epochs", "9", "--stop_epoch", "1", "--val_freq", "2", "--output_dir", folder)
    assert found.code == 0 and len(test_metrics_of(log_of(folder))) == 1, found.all


def test_without_an_output_folder_it_trains_and_tests_all_the_same(run, custom, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = run(*custom, *TRAIN, "--epochs", "1")
    assert found.code == 0 and "test: acc1" in found.out, found.all
    assert {path.name for path in tmp_path.iterdir()} == {"rank0.out", "rank0.err"}


def test_few_shot_lists_are_drawn_by_the_seed_and_kept(run, custom, tmp_path):
    few = ["--samples_per_class", "1", "--epochs", "1", "--stop_epoch", "1"]
    lists = []
    for seed, name in ((0, "a"), (0, "b")):
        found = run(*custom, *TRAIN, *few, "--seed", seed, "--output_dir", tmp_path / name)
        assert found.code == 0 and "total batch 12 clips, 1 steps an epoch" in found.out, found.all
        lists.append((tmp_path / name / "train_subset.csv").read_text())
    assert lists[0] == lists[1] and sorted(line.split()[-1] for line in lists[0].splitlines()) == ["0", "1", "2"]


def test_a_dry_run_writes_nothing(run, custom, tmp_path):
    found = run(*custom, *TRAIN, "--epochs", "2", "--dry_run", "--output_dir", tmp_path / "dry")
    assert found.code == 0 and "dry run" in found.out and not (tmp_path / "dry").exists(), found.all


# Testing --------------------------------------------------------------------------------------------------------


def command_line(*argv, cwd, launcher=()):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([sys.executable, *launcher, ROOT / NAME, *map(str, argv)], cwd=cwd, text=True, timeout=200,
                          capture_output=True, env={**env, "OMP_NUM_THREADS": "1"})


def test_processes_that_do_not_divide_the_list_find_the_same(run, custom, trained, tmp_path):
    """7 videos by 1, 2 and 3 processes, the last by torchrun: the same metrics and scores to the last digit."""
    metrics, scores = [], []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        argv = [*custom, *TRAIN, "--eval", "--finetune", trained.best, "--output_dir", folder]
        if processes < 3:
            assert (found := run(*argv, processes=processes)).code == 0, found.all
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
            found = command_line(*argv, cwd=tmp_path, launcher=launcher)
            assert found.returncode == 0, found.stdout + found.stderr
        metrics += test_metrics_of(log_of(folder))
        with np.load(folder / "test_predictions.npz") as file:
            scores.append({name: file[name] for name in file})
    assert len(metrics) == 3 and metrics[0] == metrics[1] == metrics[2] and metrics[0]["videos"] == 7
    for other in scores[1:]:
        for name, value in scores[0].items():
            np.testing.assert_array_equal(value, other[name])


def test_eval_is_the_test_after_training(run, custom, trained, tmp_path):
    """By --finetune, or from the folder alone."""
    named = run(*custom, *TRAIN, "--eval", "--finetune", trained.best, "--output_dir", tmp_path / "a")
    assert named.code == 0 and test_metrics_of(log_of(tmp_path / "a")) == test_metrics_of(log_of(trained.folder))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint-best.pth").write_bytes(trained.best.read_bytes())
    found = run(*custom, *TRAIN, "--eval", "--output_dir", tmp_path / "b")
    assert found.code == 0 and test_metrics_of(log_of(tmp_path / "b")) == test_metrics_of(log_of(trained.folder))


def test_the_protocols_of_k400_and_ssv2(run, data, tmp_path):
    for data_set, classes, views in (("Kinetics-400", 400, 21), ("SSV2", 174, 6)):
        folder = tmp_path / data_set
        folder.mkdir()
        torch.save({"model": MODELS["vit_tiny_patch16_224"](num_classes=classes).state_dict()}, folder / "model.pth")
        (folder / "test.csv").write_text((data / "test.csv").read_text())
        found = run("--data_set", data_set, "--data_path", folder, *TINY, "--eval", "--finetune", folder / "model.pth",
                    "--output_dir", folder)
        assert found.code == 0, found.all
        with np.load(folder / "test_predictions.npz") as file:
            assert file["view_scores"].shape == (7, views, classes)
        assert test_metrics_of(log_of(folder))[0]["views"] == 6 * views


@pytest.mark.parametrize("size, frames", [(48, 4), (32, 8)])
def test_another_input_than_the_checkpoints(run, custom, trained, tmp_path, size, frames):
    other = ["--input_size", size, "--num_frames", frames]
    found = run(*custom, *TRAIN, *other, "--eval", "--finetune", trained.best, "--output_dir", tmp_path / "run")
    assert found.code == 0 and test_metrics_of(log_of(tmp_path / "run"))[0]["acc1"] > 40, found.all


def test_predict_prints_the_likeliest_classes(custom, trained, data, tmp_path):
    argv = [*custom, *TRAIN, "--finetune", trained.best, "--predict"]
    found = command_line(*argv, data / "carphone_pristine 0.mp4", cwd=tmp_path)
    rows = [line.split("  ", 1) for line in found.stdout.splitlines() if line[:2] in ("0.", "1.")]
    assert found.returncode == 0 and len(rows) == 3 and rows[0][1] == "phoning", found.stdout + found.stderr
    assert {row[1] for row in rows} == {"riding a bike", "a rabbit", "phoning"}
    values = [float(row[0]) for row in rows]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=2e-4)


def test_predict_prints_five_of_many_and_needs_no_lists(run, clips, tmp_path):
    torch.save({"module": MODELS["vit_tiny_patch16_224"](num_classes=174).state_dict()}, tmp_path / "model.pth")
    found = run("--data_set", "SSV2", *TINY, "--finetune", tmp_path / "model.pth", "--predict", clips["bikes.mp4"])
    rows = [line.split() for line in found.out.splitlines() if line.startswith("0.")]
    assert found.code == 0 and len(rows) == 5 and len({int(label) for _, label in rows}) == 5, found.all


# Frozen evaluation ----------------------------------------------------------------------------------------------


def test_neighbours_of_a_trained_encoder_are_of_the_same_class(run, custom, trained, tmp_path):
    for k in (1, 3):
        folder = tmp_path / str(k)
        found = run(*custom, *TRAIN, "--knn", k, "--finetune", trained.best, "--output_dir", folder)
        assert found.code == 0, found.all
        [metrics] = test_metrics_of(log_of(folder))
        assert metrics["videos"] == 7 and metrics["unreadable"] == 1
        if k == 1:  # test videos are training videos
            assert metrics["acc1"] == pytest.approx(600 / 7)


def test_neighbours_among_few_videos(run, custom, trained, data, tmp_path):
    """One of all training videos is left, so that all answers are its class."""
    found = run(*custom, *TRAIN, "--knn", 3, "--num_train_videos", "1", "--finetune", trained.best,
                "--output_dir", tmp_path / "few")
    assert found.code == 0, found.all
    [(_, label)] = [line.rsplit(" ", 1) for line in (tmp_path / "few" / "train_subset.csv").read_text().splitlines()]
    table = (tmp_path / "few" / "test_per_class.csv").read_text().splitlines()[1:]
    assert all(float(row.split(",")[3]) == 0 for row in table if row.split(",")[0] != label)
    assert any(float(row.split(",")[3]) > 0 for row in table if row.split(",")[0] == label)


def test_no_training_video_can_be_read(run, trained, broken, data, tmp_path):
    for name in ("val.csv", "test.csv"):
        (tmp_path / name).write_text((data / name).read_text())
    (tmp_path / "train.csv").write_text(f"{broken['text']} 0\n{broken['empty']} 1\n")
    found = run(*CUSTOM, "--data_path", tmp_path, "--data_root", data, *TRAIN, "--knn", 1, "--finetune", trained.best)
    assert found.code == 1 and "train.csv: none of its 2 videos could be read" in found.all
    assert "Traceback" not in found.all


@pytest.mark.parametrize("kind, rates", [("--linear_probe", ("3", "1e-7")), ("--attentive_probe", ("0.1", "1e-9"))])
def test_probes_learn_and_leave_the_encoder_alone(run, custom, trained, tmp_path, kind, rates):
    probe = [*custom, *TRAIN, kind, "--probe_lrs", *rates[::-1], "--probe_wds", "0", "0.05",
             "--output_dir", tmp_path / "run"]
    found = run(*probe, "--finetune", trained.best, "--epochs", "10")
    assert found.code == 0, found.all
    log = log_of(tmp_path / "run")
    scores = [line for line in log if "val_acc1" in line]
    best = max(scores, key=lambda line: line["val_acc1"])
    assert best["val_acc1"] == 100 and best["val_probe_lr"] == float(rates[0]) and best["val_probe_wd"] in (0, 0.05)
    kept, source = read(tmp_path / "run" / "checkpoint-best.pth")["model"], read(trained.best)["model"]
    for name, value in source.items():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(kept[f"encoder.{name}"], value), name
    assert len({name.split(".")[1] for name in kept if name.startswith("probes.")}) == 4
    again = run(*probe, "--eval", "--epochs", "10")  # from the folder's best
    metrics = test_metrics_of(log_of(tmp_path / "run"))
    assert again.code == 0 and len(metrics) == 2 and metrics[0] == metrics[1], again.all


# Checkpoints ----------------------------------------------------------------------------------------------------


def wrapped(form, weights, path):
    """Write weights as others do."""
    prefix = {"module.": "module.", "backbone.": "backbone.", "encoder.": "encoder.",
              "module.encoder.": "module.encoder."}.get(form, "")
    weights = {prefix + name: value for name, value in weights.items()}
    if form == "safetensors":
        save_file(weights, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    torch.save(weights if form == "plain" else {"module" if form == "module key" else "model": weights}, path)
    return path


@pytest.mark.parametrize("form", ["model key", "module key", "module.", "backbone.", "encoder.", "module.encoder.",
                                  "plain", "safetensors"])
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
    assert message.endswith("left out: norm.weight, norm.bias")


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
    copy("wrong root", val="\n".join(f"elsewhere/{i}.mp4 {i % 3}" for i in range(2000)))
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


CUSTOM = ["--data_set", "custom", "--nb_classes", "3"]
# options, what the line says; {t}: traps, {d}: a data folder in which nothing is wrong, {b}: a trained model
FAULTS = {
    "label out of range": ([*CUSTOM, "--data_path", "{t}/label"], "label/train.csv, line 4: label 3 is not in [0, 3)"),
    "nb_classes against the list": (["--data_set", "custom", "--nb_classes", "2", "--data_path", "{t}/no names"],
                                    "train.csv, line 5: label 2 is not in [0, 2)"),
    "no label": ([*CUSTOM, "--data_path", "{t}/no label"], "no label/train.csv, line 5: "),
    "missing video": ([*CUSTOM, "--data_path", "{t}/missing"],
                      "missing/train.csv, line 4: no such file: nowhere/gone.mp4 (1 of 7"),
    "wrong root": ([*CUSTOM, "--data_path", "{t}/wrong root", "--data_root", "/no/root"],
                   "wrong root/val.csv, line 1: no such file: /no/root/elsewhere/0.mp4 (200 of 200", "--data_root"),
    "missing list": ([*CUSTOM, "--data_path", "{t}/no val"], "no val/val.csv: no such list file"),
    "nb_classes against the data set": (["--data_set", "SSV2", "--nb_classes", "3", "--data_path", "{d}"],
                                        "--nb_classes 3: SSV2 has 174 classes"),
    "nb_classes against classes.txt": ([*CUSTOM, "--data_path", "{t}/few classes"], "classes.txt has 2 lines"),
    "no nb_classes": (["--data_set", "custom", "--data_path", "{d}"], "--data_set custom needs --nb_classes"),
    "unknown data set": (["--data_set", "Kinetics", "--data_path", "{d}"], "--data_set: invalid choice: 'Kinetics'"),
    "unknown model": ([*CUSTOM, "--data_path", "{d}", "--model", "resnet50"], "--model: invalid choice: 'resnet50'"),
    "a text file": ([*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/text.pth"],
                    "text.pth: not a readable checkpoint"),
    "no file": ([*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/none.pth"], "--finetune {t}/none.pth: no such file"),
    "another network": ([*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/other.pth"],
                        "other.pth is not a SMILE or VideoMAE checkpoint"),
    "another size": ([*CUSTOM, "--data_path", "{d}", "--finetune", "{t}/small.pth"],
                     "small.pth does not fit this model", "[384, 3, 2, 16, 16]", "check --model"),
    "eval without a head": ([*CUSTOM, "--data_path", "{d}", "--eval", "--finetune", "{t}/pretrained.pth"],
                            "pretrained.pth lacks fc_norm.weight", "not fine-tuned"),
    "eval with another head": ([*CUSTOM, "--data_path", "{d}", "--eval", "--finetune", "{t}/seven.pth"],
                               "seven.pth lacks head.weight, head.bias; it is not fine-tuned for this number of"),
    "predict without a head": ([*CUSTOM, "--predict", "{d}/train.csv", "--finetune", "{t}/pretrained.pth"], "lacks"),
    "predict of no video": ([*CUSTOM, "--predict", "{d}/train.csv", "--finetune", "{b}"], "--predict {d}/train.csv: "),
    "nothing to test": ([*CUSTOM, "--data_path", "{d}", "--eval"], "nothing to test: give --finetune"),
    "probe without weights": ([*CUSTOM, "--data_path", "{d}", "--linear_probe"], "give --finetune"),
    "two probes": ([*CUSTOM, "--data_path", "{d}", "--linear_probe", "--attentive_probe", "--finetune", "{b}"],
                   "--linear_probe and --attentive_probe: choose one"),
    "neighbours and eval": ([*CUSTOM, "--data_path", "{d}", "--knn", "3", "--eval", "--finetune", "{b}"], "--knn"),
    "fewer than no neighbours": ([*CUSTOM, "--data_path", "{d}", "--knn", "-1", "--finetune", "{b}"], "--knn -1"),
    "fewer than no views": ([*CUSTOM, "--data_path", "{d}", "--eval", "--finetune", "{b}", "--test_num_crop", "-1"],
                            "--test_num_crop -1"),
    "probes at rate 0": ([*CUSTOM, "--data_path", "{d}", "--linear_probe", "--finetune", "{b}", "--lr", "0"], "--lr"),
    "too many shots": ([*CUSTOM, "--data_path", "{d}", "--samples_per_class", "3"], "--samples_per_class 3: class 0"),
    "too large a batch": ([*CUSTOM, "--data_path", "{d}", "--batch_size", "8"], "lower --batch_size"),
    "mixing an odd batch": ([*CUSTOM, "--data_path", "{d}", "--mixup", "0.8", "--num_sample", "1"], "--batch_size 3"),
    "mixing elements of an odd batch": ([*CUSTOM, "--data_path", "{d}", "--mixup", "0.8", "--num_sample", "1",
                                         "--mixup_mode", "elem"],
                                        "--batch_size 3"),
    "unknown augmentation": ([*CUSTOM, "--data_path", "{d}", "--aa", "augmix-m5"], "--aa"),
    "unknown optimizer": ([*CUSTOM, "--data_path", "{d}", "--opt", "nadamax"], "nadamax"),
    "a frame too few": ([*CUSTOM, "--data_path", "{d}", "--num_frames", "5"], "--num_frames 5"),
    "resume from weights": ([*CUSTOM, "--data_path", "{d}", "--resume", "{t}/seven.pth"],
                            "seven.pth holds weights only"),
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
    after = found.err.splitlines()[found.err.splitlines().index(errors[0]) + 1:] if errors else []
    assert len(errors) == 1 and all(line.startswith("       ") for line in after), found.err
    assert all(fill(part) in errors[0] for part in said), errors[0]


def test_several_faults_are_told_at_once(run, data, tmp_path):
    found = run(*TRAIN, "--data_path", data, *CUSTOM, "--num_frames", "5", "--finetune", "none.pth", "--val_freq", "0")
    assert found.code == 1 and "Traceback" not in found.all
    assert all(flag in found.err for flag in ("--num_frames 5", "--finetune none.pth", "--val_freq 0"))


def test_processes_say_it_once(run, traps, tmp_path):
    found = run(*TRAIN, *CUSTOM, "--data_path", traps / "label", processes=2)
    assert found.codes == [1, 1] and found.all.count("error: ") == 1 and "Traceback" not in found.all, found.all


def test_a_few_videos_of_many_may_be_missing(run, data, trained, tmp_path):
    """They are replaced in training, and counted as wrong in a test."""
    (tmp_path / "data").mkdir()
    for name in ("train", "val", "test"):
        lines = (data / "val.csv").read_text().splitlines() * 8
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join([*lines[:20], "gone.mp4 1", *lines[20:]]))
    few = ["--epochs", "1", "--num_sample", "1", "--test_num_segment", "1", "--test_num_crop", "1"]
    found = run(*CUSTOM, *TRAIN, *few, "--data_path", tmp_path / "data", "--finetune", trained.best, "--lr", "0",
                "--output_dir", tmp_path / "run")
    assert found.code == 0 and "counted as wrong, gone.mp4 could not be read: no such file" in found.out, found.all
    log = log_of(tmp_path / "run")
    assert test_metrics_of(log)[0]["videos"] == 49 and test_metrics_of(log)[0]["unreadable"] == 1
    assert log[0]["val_unreadable"] == 1 and log[0]["bad_clips"] in (0, 1)  # one video is left over each epoch


# The command line -----------------------------------------------------------------------------------------------


def test_defaults_are_the_recipe_of_k400():
    """the recipe."""
    args = importlib.import_module("run_class_finetuning").get_args([])
    expected = {
        "model": "vit_base_patch16_224", "data_set": "Kinetics-400", "num_frames": 16, "sampling_rate": 4,
        "input_size": 224, "batch_size": 4, "lr": 1e-3, "min_lr": 1e-6, "warmup_lr": 0, "warmup_epochs": 5,
        "epochs": 100, "opt": "adamw", "opt_betas": [0.9, 0.999], "weight_decay": 0.05, "layer_decay": 0.75,
        "drop_path": 0.1, "fc_drop_rate": 0, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5,
        "mixup_prob": 1, "aa": "rand-m7-n4-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1,
        "num_sample": 1, "init_scale": 0.001, "clip_grad": None, "update_freq": 1}
    assert {name: getattr(args, name) for name in expected} == expected


def test_abbreviations_are_refused():
    with pytest.raises(SystemExit):
        importlib.import_module("run_class_finetuning").get_args(["--fine", "x"])
