"""Image models as encoders of videos, against what open_clip and timm compute of single pictures themselves."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from fixtures_finetuning import CUSTOM, PLAIN, TINY, log_of, test_metrics_of
from fixtures_teacher import SMALL_CLIP, make_small_clip
from PIL import Image
from safetensors.torch import save_file

from modeling_finetune import channel_stats, normalize_clips
from modeling_image import build_encoder, find_encoder
from modeling_probe import Features
from options_finetune import find_problems, get_args
from weights import read_checkpoint

pytest_plugins = "fixtures_finetuning"


def frames_of(side, count=3):
    """uint8 frames [T, side, side, 3]."""
    return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), np.uint8)


def as_clips(frames):
    """What the programs feed a model with: [1, 3, T, H, W], ImageNet-normalised."""
    return normalize_clips(torch.from_numpy(frames).permute(3, 0, 1, 2)[None], *channel_stats("imagenet"))


def embedded(model, frames):
    """What open_clip makes of each frame, by its own preprocessing of an opened picture: [T, D]."""
    config = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    prepare = open_clip.transform.image_transform_v2(config, is_train=False)
    with torch.no_grad():
        return model.encode_image(torch.stack([prepare(Image.fromarray(frame)) for frame in frames]))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A small CLIP, and the folder with its file."""
    folder = tmp_path_factory.mktemp("clip")
    model = make_small_clip(folder)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "whole.safetensors")
    return model, folder


def test_frame_features_are_open_clips_own(small_clip):
    model, folder = small_clip
    encoder, frames = build_encoder(SMALL_CLIP, str(folder / "whole.safetensors")), frames_of(128)
    expected = embedded(model, frames)
    with torch.no_grad():
        found = encoder.forward_tokens(as_clips(frames))
    assert found.shape == (1, 3, 48) and encoder.embed_dim == 48 and encoder.num_heads == 1
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.01 and (expected[0] - expected[1]).abs().max() > 0.01
    mean = expected.mean(dim=0, keepdim=True)
    torch.testing.assert_close(Features(encoder)(as_clips(frames)), mean, atol=1e-4, rtol=0)


def test_frame_features_of_clip_vit_b_16():
    """The model of the paper's table, with weights of the same seed."""
    torch.manual_seed(0)
    model, frames = open_clip.create_model("ViT-B-16").eval(), frames_of(224, 2)
    encoder = build_encoder("open_clip/ViT-B-16", "random")
    with torch.no_grad():
        found = encoder.forward_tokens(as_clips(frames))[0]
    torch.testing.assert_close(found, embedded(model, frames), atol=1e-4, rtol=0)
    assert found.shape == (2, 512) and encoder.num_heads == 8


def test_a_file_without_the_projection_is_refused(small_clip, tmp_path):
    """A teacher does without it; the embedding is made with it."""
    model, _ = small_clip
    tower = {name: value.contiguous() for name, value in model.visual.state_dict().items() if name != "proj"}
    save_file(tower, tmp_path / "tower.safetensors")
    with pytest.raises(ValueError, match=r"weights .*tower.safetensors: of another model .*proj"):
        build_encoder(SMALL_CLIP, str(tmp_path / "tower.safetensors"))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_frame_features_are_timms_own(name, tmp_path):
    """Pooled, without classifier, of frames with the model's own statistics; other sizes are resized to its own."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = build_encoder(name, str(tmp_path / "weights.pth"))
    config = timm.data.resolve_model_data_config(model)
    side = config["input_size"][-1]
    frames = frames_of(side)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        pictures = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = model.forward_head(model.forward_features(pictures), pre_logits=True)
        torch.testing.assert_close(encoder.forward_tokens(as_clips(frames))[0], expected, atol=1e-4, rtol=0)
        grey = np.full((2, 96, 64, 3), 100, np.uint8)
        same = encoder.forward_tokens(as_clips(np.full((2, side, side, 3), 100, np.uint8)))
        torch.testing.assert_close(encoder.forward_tokens(as_clips(grey)), same, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("ViT-X", "", "model ViT-X: not a model of open_clip or timm"),
        ("timm/ViT-B-16", "", "model timm/ViT-B-16: not a model of timm"),
        ("convnext_tiny", "", "model convnext_tiny: open_clip and timm both have one"),
        ("ViT-B-16", "none.pt", "weights none.pt: no such file"),
        ("resnet18", "none.pt", "weights none.pt: no such file"),
        ("open_clip/convnext_tiny", "", "weights openai: no such file"),
    ],
)
def test_names_that_mean_nothing_are_reported(name, weights, message):
    with pytest.raises(ValueError, match=message):
        find_encoder(name, weights)
    assert find_encoder("ViT-B-16", "") == ("open_clip", "ViT-B-16", "openai")
    assert find_encoder("resnet18", "") == ("timm", "resnet18", "timm")
    assert find_encoder("timm/convnext_tiny", "random") == ("timm", "convnext_tiny", "random")


def test_an_image_model_goes_through_the_same_program(run, custom, tmp_path):
    """Probed, tested again from what was saved, and by nearest neighbours."""
    image = ["--encoder", "timm/test_vit", "--encoder_weights", "random", *TINY, "--test_num_segment", 2]
    probe = [*custom, *image, "--linear_probe", "--batch_size", 3, "--epochs", 6, "--probe_lrs", 3, "--probe_wds", 0]
    found = run(*probe, "--output_dir", tmp_path / "run", "--warmup_epochs", 0)
    assert found.code == 0, found.all
    kept = read_checkpoint(tmp_path / "run" / "checkpoint-best.pth")["model"]
    own = build_encoder("timm/test_vit", "random").state_dict()
    assert all(torch.equal(kept[f"encoder.{name}"], value) for name, value in own.items())
    found = run(*probe, "--output_dir", tmp_path / "run", "--eval")
    metrics = test_metrics_of(log_of(tmp_path / "run"))
    assert found.code == 0 and len(metrics) == 2 and metrics[0] == metrics[1] and metrics[0]["views"] == 36, found.all
    found = run(*custom, *image, "--knn", 1, "--output_dir", tmp_path / "knn")
    assert found.code == 0 and test_metrics_of(log_of(tmp_path / "knn"))[0]["acc1"] > 80, found.all  # colours


@pytest.mark.parametrize(
    "options, message",
    [
        ("--encoder test_vit", "--encoder test_vit: add --linear_probe"),
        ("--encoder ViT-X --knn 1", "--encoder_model ViT-X: not a model"),
        ("--encoder test_vit --encoder_weights random --knn 1 --finetune {b}", "omit one"),
        ("--encoder test_vit --learn head", "--encoder test_vit: add --linear_probe"),
        ("--learn head --knn 1 --finetune {b}", "--learn head fine-tunes the classifier: omit"),
        ("--learn head", "a frozen encoder needs weights"),
        ("--enable_deepspeed --opt lamb", "--opt lamb: ZeRO shards flattened weights"),
    ],
)
def test_what_does_not_go_together_is_reported(data, tmp_path, options, message):
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    words = options.format(b=tmp_path / "b.pth").split()
    [problem] = find_problems(get_args([*TINY, *PLAIN, *CUSTOM, "--data_path", str(data), *words])).found
    assert message in problem
