"""Weights by name (hf://owner/repo/file), with huggingface_hub's own cache and a server; entry points of torch.hub."""

import hashlib
import importlib
import os
import subprocess
import sys
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from fixtures_video import ROOT, in_child

import modeling_finetune
import modeling_pretrain
from utils import RunError
from weights import local_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO, FILE, CONTENT = "some-one/weights", "finetune/ssv2/model.pth", b"weights, more or less"

# -------------------------------------------------------------------------------------------------------- hf:// names


def contents(paths, env):
    """What is at each path, or why it is not found. huggingface_hub reads its variables when it is imported."""
    os.environ.update(env)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("huggingface_hub", "weights")]:
        del sys.modules[name]
    find, found = importlib.import_module("weights").local_path, []
    for path in paths:
        try:
            found.append(Path(find(path)).read_text())
        except RunError as error:
            found.append(f"error {error}")
    return found


def look_up(*paths, **env):
    """The same in a process of its own."""
    found, error = in_child(contents, paths, {"NO_PROXY": "127.0.0.1"} | {key: str(env[key]) for key in env})
    assert error is None, error
    return found


@pytest.fixture
def cache(tmp_path):
    """A cache as huggingface_hub lays it out, with one file of one commit."""
    repo, name = tmp_path / "hub" / "models--some-one--weights", hashlib.sha256(CONTENT).hexdigest()
    link = repo / "snapshots" / COMMIT / FILE
    for folder in (repo / "refs", repo / "blobs", link.parent):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs" / name).write_bytes(CONTENT)
    link.symlink_to(os.path.relpath(repo / "blobs" / name, link.parent))
    return tmp_path / "hub"


def test_what_is_in_the_cache_needs_no_network(cache):
    names = [f"{REPO}/{FILE}", f"{REPO}@{COMMIT}/{FILE}", f"{REPO}/finetune/other.pth", "no-one/nothing/x.pth"]
    found = look_up(*(f"hf://{name}" for name in names), HF_HUB_CACHE=cache, HF_HUB_OFFLINE=1)
    same, by_commit, missing, other = found
    assert same == by_commit == CONTENT.decode()
    assert missing.startswith(f"error hf://{REPO}/finetune/other.pth is not in {cache} and cannot be fetched")
    assert f"https://huggingface.co/{REPO}/resolve/main/finetune/other.pth" in missing  # what to download
    assert "models--no-one--nothing" in other  # and where to put it


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    def do_GET(self):
        known = self.path == f"/{REPO}/resolve/main/{FILE}"
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(CONTENT) if known else 0))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header(*(("ETag", '"0a1b"') if known else ("X-Error-Code", "EntryNotFound")))
        self.end_headers()
        if known and self.command == "GET":
            self.wfile.write(CONTENT)

    do_HEAD = do_GET

    def log_message(self, *args):
        """Say nothing."""


def test_what_is_new_is_fetched_into_the_cache(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": tmp_path, "HF_HUB_OFFLINE": 0}
        found, missing = look_up(f"hf://{REPO}/{FILE}", f"hf://{REPO}/finetune/other.pth", **env)
    finally:
        server.shutdown()
        server.server_close()
    assert found == CONTENT.decode()
    assert (tmp_path / "models--some-one--weights" / "snapshots" / COMMIT / FILE).read_bytes() == CONTENT
    assert missing.startswith(f"error hf://{REPO}/finetune/other.pth: cannot be fetched (404")


@pytest.mark.parametrize("path", ["", "openai", "checkpoint-3.pth", "/a/b c.safetensors", "a/hf://b/c/d"])
def test_other_paths_stay_as_they_are(path):
    assert local_path(path) == path


@pytest.mark.parametrize("path", "hf:// hf://model.pth hf://owner/repo hf://owner/repo/ hf:owner/repo/x.pth".split())
def test_what_is_no_name_of_a_file_is_reported(path):
    with pytest.raises(RunError, match="write hf://owner/repo/path"):
        local_path(path)


# ----------------------------------------------------------------------------------------------------------- torch.hub

CLASSIFIER, STUDENT = "vit_tiny_patch16_224", "pretrain_videomae_tiny_patch16_224"


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A fine-tuned and a pretrained checkpoint, and their models."""
    folder, models = tmp_path_factory.mktemp("checkpoints"), {}
    torch.manual_seed(0)
    models["finetuned"] = modeling_finetune.MODELS[CLASSIFIER](num_classes=5, init_scale=1.0)
    models["pretrained"] = modeling_pretrain.MODELS[STUDENT](decoder_depth=2, decoder_num_classes=40)
    for name, model in models.items():
        torch.save({"model": model.state_dict(), "epoch": 3}, folder / f"{name}.pth")
    return {name: (str(folder / f"{name}.pth"), model) for name, model in models.items()}


def test_every_model_has_an_entry_point_and_nothing_else():
    models = modeling_finetune.MODELS | modeling_pretrain.MODELS
    with torch.device("meta"):
        for name, build in models.items():
            shapes = {key: value.shape for key, value in load(name).state_dict().items()}
            assert shapes == {key: value.shape for key, value in build().state_dict().items()}
    hubconf = importlib.import_module("hubconf")
    seen = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert seen == models.keys()
    assert all(hubconf.__dict__[name].__doc__ for name in seen)  # what torch.hub.help shows
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


def test_sizes_come_from_the_checkpoint(files):
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, False] * 4] * 2)
    path, model = files["finetuned"]
    with torch.no_grad():
        assert torch.equal(load(CLASSIFIER, checkpoint=path)(clips), model(clips))
        path, student = files["pretrained"]
        assert torch.equal(load(STUDENT, checkpoint=path)(clips, mask), student(clips, mask))


def test_a_classifier_takes_a_pretrained_encoder(files):
    path, student = files["pretrained"]
    weights = student.encoder.state_dict()
    for kwargs, shape in (({}, (1, 192)), ({"num_classes": 3}, (1, 3))):
        model = load(CLASSIFIER, checkpoint=path, **kwargs)
        assert model(torch.zeros(1, 3, 4, 32, 32)).shape == shape
        assert all(torch.equal(value, weights[key]) for key, value in model.blocks.state_dict(prefix="blocks.").items())


def test_another_number_of_classes_means_a_new_head(files):
    path, model = files["finetuned"]
    loaded = load(CLASSIFIER, checkpoint=path, num_classes=9)
    assert loaded.head.bias.shape == (9,) and torch.equal(loaded.fc_norm.weight, model.fc_norm.weight)


def test_it_knows_how_it_was_trained(files, tmp_path):
    """The clips; and where weights were averaged, the average is what was tested."""
    path, model = files["finetuned"]
    clip = {"num_frames": 8, "sampling_rate": 1, "input_size": 64, "data_set": "SSV2"}
    args = Namespace(**clip, model_ema=True, max_bad_fraction=0.0)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"model": other, "model_ema": model.state_dict(), "args": args}, tmp_path / "x.pth")
    loaded = load(CLASSIFIER, checkpoint=str(tmp_path / "x.pth"))
    assert loaded.trained_with == clip and load(CLASSIFIER, checkpoint=path).trained_with == {}
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_weights_of_another_model_are_refused(files):
    for name, kind in ((STUDENT, "finetuned"), ("vit_small_patch16_224", "finetuned")):
        with pytest.raises(Exception, match="does not fit this model"):  # its RunError is of torch.hub's own import
            load(name, checkpoint=files[kind][0])


# ------------------------------------------------------------------------------------- in the middle of other programs

BESIDE = """
import os, sys
names = sys.argv[1].split()
def mine():
    for name in names:
        assert __import__(name).mine == name
if sys.argv[2] == "before":
    mine()
import torch
for _ in range(2):
    model = torch.hub.load(os.path.relpath(sys.argv[3]), "vit_tiny_patch16_224", source="local", checkpoint=sys.argv[4])
    os.chdir("..")
mine()
torch.save(model, "whole.pth")
clips = torch.zeros(1, 3, 2, 32, 32)
assert torch.equal(torch.load("whole.pth", weights_only=False)(clips), model(clips))
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_programs_may_have_files_of_the_same_names(files, tmp_path, order):
    """All of the names here, imported before or after; the model is loaded twice, from two working directories."""
    names = [path.stem for path in ROOT.glob("*.py") if path.stem != "hubconf"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"mine = {name!r}")
    (tmp_path / "below").mkdir()
    (tmp_path / "own.py").write_text(BESIDE)
    argv = [sys.executable, "../own.py", " ".join(names), order, ROOT, files["finetuned"][0]]
    process = subprocess.run(argv, cwd=tmp_path / "below", capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


THREADS = """
import sys, threading
import torch
def load():
    path, name, checkpoint = sys.argv[1:]
    loaded.append(torch.hub.load(path, name, source="local", checkpoint=checkpoint).head.bias.tolist())
loaded, before = [], list(sys.path)
threads = [threading.Thread(target=load) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(loaded) == 6 and all(bias == loaded[0] for bias in loaded)
assert [path for path in sys.path if path in {*before, sys.argv[1]}] == before and "utils" not in sys.modules
"""


def test_threads_may_load_at_the_same_time(files):
    argv = [sys.executable, "-c", THREADS, ROOT, CLASSIFIER, files["finetuned"][0]]
    process = subprocess.run(argv, capture_output=True, text=True, cwd="/")
    assert process.returncode == 0, process.stderr


LITTLE = """
import signal, sys
for name in ("fcntl", "resource", "tensorboardX", "decord", "cv2", "av", "open_clip", "deepspeed", "scipy"):
    sys.modules[name] = None
del signal.SIGUSR1  # as on Windows
import torch
model = torch.hub.load(sys.argv[1], sys.argv[2], source="local", checkpoint=sys.argv[3])
print(model(torch.zeros(1, 3, 2, 32, 32)).shape)
print(*[name for name in sys.modules if name.startswith("smile_")])
"""


def test_inference_needs_neither_decoders_nor_locks(files):
    argv = [sys.executable, "-c", LITTLE, ROOT, CLASSIFIER, files["finetuned"][0]]
    process = subprocess.run(argv, capture_output=True, text=True, cwd="/")
    shape, loaded = process.stdout.splitlines() or [process.stderr, ""]
    assert shape == "torch.Size([1, 5])"
    assert loaded == "smile_utils smile_weights smile_modeling_finetune smile_modeling_pretrain"
