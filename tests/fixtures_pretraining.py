"""The pretraining program for the tests: ways to run it, data, and one undisturbed run of stage 1 in a session.

A pytest plugin (``pytest_plugins = "fixtures_pretraining"``). No test here: PYTEST_DONT_REWRITE.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import index_shards
import pack_videos
import pytest
from fixtures_video import write_list

from weights import read_checkpoint

pytest_plugins = ("fixtures_video", "fixtures_programs")
NAME = "run_smile_pretraining.py"
STEPS, EPOCHS = 12, 2
TINY = """--model pretrain_videomae_tiny_patch16_224 --decoder_depth 1 --target_type pixel --num_frames 4
    --sampling_rate 2 --input_size 48 --mask_ratio 0.7 --drop_path 0.2 --num_workers 1
    --log_interval 1 --save_ckpt_freq 1 --max_bad_fraction 0.5""".split()
TRAIN = f"""--multiple_sampling --batch_size 4 --epochs 3 --stop_epoch {EPOCHS} --warmup_epochs 1 --lr 0.05
    --weight_decay_end 0.1""".split()


@pytest.fixture(scope="session")
def start(start_program):
    """Start the program."""
    return lambda *argv, **how: start_program(NAME, *argv, **how)


@pytest.fixture(scope="session")
def data_args(clips, broken, objects_folder, tmp_path_factory):
    """Options of stage 1: 50 lines, one of them unreadable, so 12 steps of 4 videos; and objects."""
    videos = [*list(clips.values()) * 9, broken["text"]][-50:]
    path = write_list(tmp_path_factory.mktemp("lists") / "train list.csv", videos)
    assert len(videos) // 4 == STEPS
    stage1 = "--add_tubelets --use_objects --mask_type tubelet".split()
    return ["--data_path", path, *stage1, "--objects_path", objects_folder]


@pytest.fixture(scope="session")
def shard_args(data_args, tmp_path_factory):
    """The same options, with videos and objects in tar files."""
    folder, args = tmp_path_factory.mktemp("shards"), [str(word) for word in data_args]
    listed, objects = (args[args.index(flag) + 1] for flag in ("--data_path", "--objects_path"))
    subprocess.run(["tar", "-cf", folder / "objects.tar", "-C", objects, "."], check=True)
    pack_videos.main([listed, "--output", str(folder), "--shard_size", "50KB"])
    index_shards.main([str(folder / "objects.tar")])
    changed = {listed: folder / Path(listed).name, objects: folder / "objects.tar"}
    return [str(changed.get(word, word)) for word in args]


@pytest.fixture(scope="session")
def reference(start, data_args, tmp_path_factory):
    """A run of stage 1 that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    folders = ["--output_dir", folder, "--log_dir", folder / "tb"]
    result = start(*TINY, *TRAIN, *data_args, "--update_freq", 2, *folders).end()
    assert result.code == 0, result.err
    return SimpleNamespace(folder=folder, out=result.out)


def weights_of(path):
    return read_checkpoint(path)["model"]


def last_weights(folder):
    return weights_of(Path(folder) / f"checkpoint-{EPOCHS - 1}.pth")
