"""Conversions to Hugging Face's VideoMAE and back: bit by bit, by outputs of their own classes, by their pipeline."""

import argparse
import json
import shutil

import convert_checkpoint
import numpy as np
import pytest
import torch
from fixtures_video import decode_all
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    pipeline,
)

from modeling_finetune import SIZES, VisionTransformer, channel_stats, normalize_clips
from modeling_pretrain import PretrainVisionTransformer
from options import trained_with
from options_finetune import get_args
from utils import RunError
from weights import check_kind, load_encoder, load_strictly, model_weights, read_checkpoint

pytest_plugins = "fixtures_video"
TINY, FRAMES, SIDE = SIZES["tiny"], 8, 48
CLASSES = ["riding a bike", "a rabbit", "phoning, smiling"]
KINDS = {
    "classifier": lambda: VisionTransformer(TINY, num_classes=3, init_scale=1.0),
    "pixels": lambda: PretrainVisionTransformer(TINY, decoder_depth=2, decoder_num_classes=1536),
    "features": lambda: PretrainVisionTransformer(TINY, decoder_depth=1, decoder_num_classes=768),
}


def convert(*argv):
    convert_checkpoint.main(convert_checkpoint.get_args([str(arg) for arg in argv]))


def weights_of(path):
    return model_weights(read_checkpoint(path), path)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def randomize(model, seed=0):
    """No parameter stays at its initial, special value."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=rng) * 0.1
            value.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {kind: randomize(build()) for kind, build in KINDS.items()}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """A checkpoint of each kind as our programs write it, and the classes of the classifier."""
    folder = tmp_path_factory.mktemp("ours")
    args = argparse.Namespace(num_frames=FRAMES, input_size=SIDE)
    for kind, model in models.items():
        torch.save({"model": model.state_dict(), "epoch": 3, "args": args}, folder / f"{kind}.pth")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return folder


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    """The same as folders of transformers."""
    root = tmp_path_factory.mktemp("theirs")
    convert(files / "classifier.pth", root / "classifier", "--classes", files / "classes.txt")
    convert(files / "pixels.pth", root / "pixels")
    convert(files / "features.pth", root / "features")
    return root


@pytest.fixture(scope="module")
def clip():
    return torch.randn(2, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def mask():
    """bool [2, 36], 20 hidden in each row."""
    return torch.rand(2, 36, generator=torch.Generator().manual_seed(6)).argsort(dim=1) < 20


# ------------------------------------------------------------------------------------------------------------ to theirs


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_no_bit_changes(models, folders, tmp_path, kind):
    convert(folders / kind, tmp_path / "back.pth")
    assert same(weights_of(tmp_path / "back.pth"), models[kind].state_dict())
    kept, config = trained_with(str(tmp_path / "back.pth")), json.loads((folders / kind / "config.json").read_text())
    assert (kept["num_frames"], kept["input_size"]) == (config["num_frames"], config["image_size"])


def close(ours, theirs):
    assert ours.shape == theirs.shape and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_their_classifier_says_the_same(models, folders, clip):
    theirs = AutoModelForVideoClassification.from_pretrained(folders / "classifier")
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.label2id == {name: label for label, name in enumerate(CLASSES)}
    assert (theirs.config.num_frames, theirs.config.image_size) == (FRAMES, SIDE)
    close(models["classifier"](clip), theirs.eval()(clip.transpose(1, 2)).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_their_encoder_says_the_same(models, folders, clip, mask, kind):
    """And, of pixels, their pretraining model."""
    theirs = AutoModel.from_pretrained(folders / kind).eval()
    visible = (~mask).nonzero()[:, 1].view(2, -1)
    close(models[kind].encoder(clip, visible), theirs(clip.transpose(1, 2), mask).last_hidden_state)
    if kind == "pixels":
        theirs = AutoModelForPreTraining.from_pretrained(folders / kind).eval()
        close(models[kind](clip, mask), theirs(clip.transpose(1, 2), mask).logits)


def test_the_file_has_the_names_that_all_versions_read(folders):
    """transformers 5 renames the biases in memory, not in files."""
    for kind in KINDS:
        names = load_file(folders / kind / "model.safetensors").keys()
        assert sum(name.endswith(".q_bias") for name in names) == {"pixels": 6}.get(kind, 4)
        assert not [name for name in names if name.endswith(("query.bias", "value.bias", "key.bias"))]


def test_their_image_processor_prepares_clips_as_we_do(folders):
    frames = np.random.default_rng(0).integers(256, size=(FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(folders / "classifier")(list(frames), return_tensors="pt")
    ours = normalize_clips(torch.from_numpy(frames).permute(3, 0, 1, 2)[None], *channel_stats("imagenet", "cpu"))
    torch.testing.assert_close(theirs["pixel_values"].transpose(1, 2), ours, atol=1e-5, rtol=0)
    wide = np.random.default_rng(0).integers(256, size=(FRAMES, 60, 90, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(folders / "classifier")(list(wide), return_tensors="pt")
    assert theirs["pixel_values"].shape == (1, FRAMES, 3, SIDE, SIDE)


def test_their_pipeline_classifies_a_video(models, folders, clips):
    """Decoded by PyAV: what it says is what our model says of the frames that the pipeline takes."""
    classify = pipeline("video-classification", model=str(folders / "classifier"), device="cpu")
    if getattr(classify, "video_processor", None):  # of transformers 5; it would decode with torchcodec and FFmpeg
        classify.video_processor = None
    found = classify(str(clips["bikes.mp4"]), frame_sampling_rate=4)
    taken = np.linspace(0, 4 * FRAMES - 1, FRAMES).astype(int)
    inputs = classify.image_processor(list(decode_all(clips["bikes.mp4"])[taken]), return_tensors="pt")
    with torch.no_grad():
        scores = models["classifier"](inputs["pixel_values"].transpose(1, 2)).softmax(dim=1)[0]
    expected = pytest.approx(dict(zip(CLASSES, scores.tolist())), abs=1e-4)
    assert {entry["label"]: entry["score"] for entry in found} == expected


def test_the_plain_pipeline_classifies_a_video(folders, clips):
    classify = pipeline("video-classification", model=str(folders / "classifier"), device="cpu")
    try:
        found = classify(str(clips["bikes.mp4"]))
    except ImportError as error:
        assert "torchcodec" in str(error)
        pytest.skip("transformers 5 decodes videos with torchcodec, which is not here or finds no FFmpeg")
    assert {entry["label"] for entry in found} == set(CLASSES)
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------------------------- loaded without conversion


@pytest.mark.parametrize("form", ["folder", "file", "bin"])
def test_the_programs_load_their_files_and_folders(models, folders, tmp_path, form):
    for kind, own in (("classifier", models["classifier"]), ("pixels", models["pixels"].encoder)):
        path = folders / kind
        if form == "file":
            path /= "model.safetensors"
        elif form == "bin":  # as older versions write, in two parts
            names = sorted(load_file(path / "model.safetensors").items())
            path = tmp_path / kind
            path.mkdir()
            for number in range(2):
                torch.save(dict(names[number::2]), path / f"pytorch_model-0000{number + 1}-of-00002.bin")
        loaded, wanted = VisionTransformer(TINY, num_classes=3), own.state_dict()
        load_encoder(loaded, path, need_head=kind == "classifier")
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items() if name in wanted)
        check_kind(str(path), "blocks.0.attn.qkv.weight", "SMILE or VideoMAE")
    student = KINDS["pixels"]()
    load_strictly(student, path)
    assert same(student.state_dict(), models["pixels"].state_dict())


def test_a_folder_without_weights_is_reported(tmp_path):
    with pytest.raises(RunError, match=r"a folder without model\*.safetensors or .*; name a checkpoint file in it"):
        read_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------- to ours


def their_config(**kwargs):
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    decoder = {"decoder_hidden_size": 96, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3}
    rest = {"image_size": SIDE, "num_frames": FRAMES, "decoder_intermediate_size": 384, "layer_norm_eps": 1e-6}
    return VideoMAEConfig(**sizes | decoder | rest | kwargs)


@torch.no_grad()
@pytest.mark.parametrize("kind, suffix", [("classifier", ".pth"), ("pixels", ".safetensors")])
def test_a_model_that_they_saved(tmp_path, clip, mask, kind, suffix):
    if kind == "classifier":
        theirs, more = VideoMAEForVideoClassification(their_config(id2label=dict(enumerate(CLASSES)))), ()
    else:
        theirs, more = VideoMAEForPreTraining(their_config(use_mean_pooling=False)), (mask,)
    randomize(theirs, seed=3).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / f"ours{suffix}")
    ours = KINDS[kind]()
    ours.load_state_dict(weights_of(tmp_path / f"ours{suffix}"))
    close(ours.eval()(clip, *more), theirs(clip.transpose(1, 2), *more).logits)
    names = tmp_path / "ours.classes.txt"
    assert names.read_text().splitlines() == CLASSES if kind == "classifier" else not names.exists()


def test_an_encoder_whose_decoder_is_gone(models, folders, tmp_path):
    shutil.copytree(folders / "features", tmp_path / "theirs")
    (tmp_path / "theirs" / convert_checkpoint.DECODER).unlink()
    convert(tmp_path / "theirs", tmp_path / "encoder.pth")
    encoder = weights_of(tmp_path / "encoder.pth")
    assert same(encoder, {f"encoder.{name}": value for name, value in models["features"].encoder.state_dict().items()})
    convert(tmp_path / "encoder.pth", tmp_path / "again", "--num_frames", FRAMES, "--input_size", SIDE)
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", folders / "features"))
    assert same(again, first)


# --------------------------------------------------------------------------------------------------------- file to file


def test_safetensors_and_back(models, files, tmp_path):
    size = ["--num_frames", 4, "--input_size", 32]
    convert(files / "features.pth", tmp_path / "there.safetensors", *size)
    convert(tmp_path / "there.safetensors", tmp_path / "back.pth", *size)
    for name in ("there.safetensors", "back.pth"):
        assert same(weights_of(tmp_path / name), models["features"].state_dict())


def test_a_file_in_another_format_is_tested_as_the_first_one(files, tmp_path):
    """It keeps what a test takes from it, but no paths of the machine, and of averaged weights the average."""
    checkpoint = torch.load(files / "classifier.pth", weights_only=False)
    run = get_args("--data_set UCF101 --data_path /data --output_dir out --finetune start.pth --model_ema".split())
    vars(run).update(num_frames=FRAMES, input_size=SIDE, sampling_rate=3, nb_classes=101)
    average = {name: value + 1 for name, value in checkpoint["model"].items()}
    torch.save(checkpoint | {"args": run, "model_ema": average}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", tmp_path / "there.safetensors")
    convert(tmp_path / "there.safetensors", tmp_path / "back.pth")
    for name in ("there.safetensors", "back.pth"):
        path = str(tmp_path / name)
        kept = trained_with(path)
        assert (kept["num_frames"], kept["sampling_rate"], kept["input_size"], kept["data_set"]) == (
            FRAMES,
            3,
            SIDE,
            "UCF101",
        )
        assert not {"data_path", "output_dir", "finetune"} & kept.keys() and same(weights_of(path), average)


# ------------------------------------------------------------------------------------------------------------- refusals


def refuses(tmp_path, match, *argv):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=match):
        convert(*argv)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left


def test_a_model_that_computes_something_else_is_not_written(tmp_path):
    """Six heads leave no trace in the shapes of the weights."""
    theirs = randomize(VideoMAEForVideoClassification(their_config(num_attention_heads=6)))
    theirs.save_pretrained(tmp_path / "theirs")
    paths = tmp_path / "theirs", tmp_path / "ours.pth"
    refuses(tmp_path, "ours.pth was not written: its output differs .* more than --tolerance", *paths)
    convert(*paths, "--tolerance", "100")
    assert (tmp_path / "ours.pth").is_file()


def test_weights_that_they_would_have_to_invent(folders, tmp_path):
    folder = tmp_path / "theirs"
    VideoMAEForPreTraining(their_config(use_mean_pooling=False)).save_pretrained(folder)
    config = VideoMAEConfig.from_pretrained(folder)
    config.architectures, config.use_mean_pooling = ["VideoMAEForVideoClassification"], True
    config.save_pretrained(folder)
    refuses(tmp_path, "lacks classifier.bias", folder, tmp_path / "ours.pth")


def test_other_refusals(files, folders, tmp_path):
    source = files / "classifier.pth"
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    weights = dict(weights_of(source))
    del weights["blocks.2.attn.q_bias"]
    torch.save({"model": weights}, tmp_path / "damaged.pth")
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    refuses(tmp_path, "--classes names 2 classes, the head has 3", source, new, "--classes", tmp_path / "two.txt")
    refuses(
        tmp_path, "has its own names", folders / "classifier", tmp_path / "n.pth", "--classes", tmp_path / "two.txt"
    )
    file = tmp_path / "new.safetensors"
    refuses(tmp_path, "--classes: only a folder", source, file, "--classes", tmp_path / "two.txt")
    refuses(tmp_path, "already there", source, tmp_path / "empty")
    refuses(tmp_path, "from a folder to a file", folders / "pixels", new)
    refuses(tmp_path, "no config.json", tmp_path / "empty", tmp_path / "new.pth")
    refuses(tmp_path, "no model of this project has 0 blocks", tmp_path / "other.pth", new)
    refuses(tmp_path, "no such checkpoint", tmp_path / "missing.pth", new)
    refuses(tmp_path, "--input_size 50", source, new, "--input_size", 50)
    refuses(tmp_path, "Missing key", tmp_path / "damaged.pth", new)


def test_another_normalisation_is_reported(folders, tmp_path, capsys):
    VideoMAEForVideoClassification(their_config()).save_pretrained(tmp_path / "theirs")
    VideoMAEImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours.pth")
    assert "another normalisation than ImageNet's" in capsys.readouterr().out
