"""Teachers against the libraries their encoders come from (open_clip, timm), captured up to the final norm, and targets
against hand-written formulas. Weights are random: what is checked is that every file form gives the same network.
"""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from fixtures_teacher import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, SMALL_CLIP, make_small_clip, random_clips
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_finetune import NORMS
from modeling_teacher import FrameTeacher, PixelTarget, build_teacher, normalize_features

OPENAI_EXTRAS = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
OPENAI_EXTRAS = {name: torch.tensor(value) for name, value in OPENAI_EXTRAS.items()}


def tokens_after_ln_post(visual, frames):
    """What leaves `ln_post` in open_clip's own forward pass, class token dropped."""
    caught = []
    handle = visual.ln_post.register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        visual(frames)
    handle.remove()
    return caught[0][:, 1:]


# ------------------------------------------------------------------------------------------------- CLIP's file forms


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """open_clip gives it GELU."""
    return make_small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip_tokens(clip_model):
    """Expected tokens of frames 0 and 2 of the clip, by activation, with the same weights."""
    quick = VisionTransformer(128, 16, 64, layers=2, heads=2, mlp_ratio=4.0, output_dim=48, act_layer=QuickGELU)
    quick.load_state_dict(clip_model.visual.state_dict())
    frames = random_clips(4, side=128)[0, :, ::2].transpose(0, 1)
    towers = {"gelu": clip_model.visual, "quick_gelu": quick.eval()}
    tokens = {name: tokens_after_ln_post(tower, frames) for name, tower in towers.items()}
    assert (tokens["gelu"] - tokens["quick_gelu"]).abs().max() > 0.01  # the test can tell them apart
    return tokens


@pytest.fixture
def weight_file(tmp_path):
    """Names a large file, which is deleted after the test."""
    yield str(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").unlink()


class OpenAIArchive(nn.Module):
    """What OpenAI's downloads hold: the whole model in fp16, three numbers beside it, traced."""

    def __init__(self, model):
        super().__init__()
        self.visual = copy.deepcopy(model.visual)  # is cast to fp16 later
        self.token_embedding = nn.Embedding(8, 512)
        self.text_projection = nn.Parameter(torch.zeros(8, 8))
        for name, value in OPENAI_EXTRAS.items():
            self.register_buffer(name, value)

    def forward(self, image):
        return self.visual(image)


def tower_state(model):
    """Image tower, bare keys, without projection, as SMILE's release."""
    return {key: value.half() for key, value in model.visual.state_dict().items() if key != "proj"}


def whole_state(model):
    """Whole model, in half precision."""
    return {key: value.half().clone() for key, value in model.state_dict().items()}


def write_jit(model, path):
    archive = torch.jit.trace(OpenAIArchive(model).eval(), torch.zeros(1, 3, 128, 128), check_trace=False)
    for parameter in archive.parameters():
        parameter.data = parameter.data.half()
    archive.save(path)


def write_wrapped(model, path):
    state = {f"module.{key}": value for key, value in whole_state(model).items()}
    torch.save({"epoch": 32, "name": "run", "state_dict": state}, path)


FORMS = {
    "ViT-B-16.pt": (write_jit, "quick_gelu"),
    "openai.pth": (lambda model, path: torch.save({**whole_state(model), **OPENAI_EXTRAS}, path), "quick_gelu"),
    "open_clip.pt": (lambda model, path: torch.save(whole_state(model), path), "gelu"),
    "epoch_32.pt": (write_wrapped, "gelu"),
    "vision.pth": (lambda model, path: torch.save(tower_state(model), path), "quick_gelu"),
    "open_clip.safetensors": (lambda model, path: save_file(whole_state(model), path), "gelu"),
    "vision.safetensors": (lambda model, path: save_file(tower_state(model), path), "quick_gelu"),
}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_clip_tokens_equal_open_clip(name, clip_model, clip_tokens, tmp_path):
    write, activation = FORMS[name]
    write(clip_model, str(tmp_path / name))
    teacher = build_teacher("clip", SMALL_CLIP, str(tmp_path / name), "imagenet", (8, 8))
    tokens = teacher.tokens(random_clips(4, side=128))
    assert tokens.shape == (1, 2 * 64, 64) and teacher.out_dim == 64
    torch.testing.assert_close(tokens.view(2, 64, 64), clip_tokens[activation], atol=1e-4, rtol=1e-4)


def test_clip_computes_every_product_in_the_open():
    """Fused into one operation, as nn.MultiheadAttention does it, products are neither compiled nor counted."""
    teacher = build_teacher("clip", "ViT-S-16", "random", "imagenet", (2, 2), 32)
    with FlopCounterMode(display=False) as counter:
        teacher.tokens(random_clips(2, side=32))
    patches = 4 * 3 * 16**2 * 384
    blocks = 12 * 5 * 12 * 384**2  # layers, tokens, and 3 + 1 + 4 + 4 products of the width's square
    assert counter.get_total_flops() == pytest.approx(2 * (patches + blocks), rel=0.01)  # attention: 0.002


def test_smiles_file_is_a_teacher(weight_file):
    """ViT-B/16, 151 tensors by their bare names, without the projection."""
    with torch.device("meta"):
        tower = VisionTransformer(224, 16, 768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512)
    state = {name: torch.rand(value.shape).half() for name, value in tower.state_dict().items() if name != "proj"}
    names = "class_embedding conv1.weight ln_pre.bias ln_post.weight transformer.resblocks.11.mlp.c_proj.weight".split()
    assert len(state) == 151 and state["positional_embedding"].shape == (197, 768) and set(names) < state.keys()
    torch.save(state, weight_file)
    teacher = build_teacher("clip", "ViT-B-16", weight_file, "imagenet", (14, 14))
    held = teacher.tower.state_dict()
    assert teacher.out_dim == 768 and all(torch.equal(held[name], state[name].float()) for name in names)


@torch.no_grad()
def test_clip_at_another_image_size(clip_model, tmp_path):
    """Positions are interpolated as open_clip does: bicubic, antialiased. PIL's bicubic is the same filter."""
    torch.save(tower_state(clip_model), tmp_path / "vision.pth")
    teacher = build_teacher("clip", SMALL_CLIP, str(tmp_path / "vision.pth"), "imagenet", (4, 4), image_size=64)
    old, ours = clip_model.visual.positional_embedding.numpy(), teacher.tower.positional_embedding.numpy()
    maps = [Image.fromarray(np.ascontiguousarray(part)) for part in old[1:].T.reshape(64, 8, 8)]
    resized = np.stack([image.resize((4, 4), Image.Resampling.BICUBIC) for image in maps], axis=-1)
    np.testing.assert_allclose(ours[1:].reshape(4, 4, 64), resized, atol=1e-4)
    np.testing.assert_array_equal(ours[0], old[0])
    frames = random_clips(2, side=64)
    expected = tokens_after_ln_post(teacher.tower, frames[:, :, 0])
    assert expected.shape == (1, 16, 64)
    torch.testing.assert_close(teacher.tokens(frames), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- bad weight files


def bad_file(kind, path):
    """Files that are no weights of an image tower."""
    contents = {
        "no tower": {"cls_token": torch.zeros(1, 1, 384), "blocks.0.norm1.weight": torch.zeros(384)},
        "tensor": torch.zeros(3),
        "object": {"state_dict": np.array([print], dtype=object)},
        "cut": {"conv1.weight": torch.zeros(768, 3, 16, 16)},
    }
    if kind in contents:
        torch.save(contents[kind], path)
    elif kind != "missing":
        path.write_bytes({"text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "empty": b""}[kind])
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize("kind", ["text", "empty", "no tower", "tensor", "object", "cut", "missing"])
@pytest.mark.parametrize(
    "suffix, target, model",
    [(".pt", "clip", "ViT-S-16"), (".safetensors", "clip", "ViT-S-16"), (".pth", "dino_v1", "dino_s")],
)
def test_bad_weights_are_named(tmp_path, kind, suffix, target, model):
    path = tmp_path / f"weights{suffix}"
    bad_file(kind, path)
    with pytest.raises(ValueError, match=f"weights {path}"):
        build_teacher(target, model, str(path), "imagenet", (14, 14))


@pytest.mark.parametrize("kind", ["patch 32", "deeper", "shallower"])
def test_weights_of_another_clip_model_are_refused(clip_model, tmp_path, kind):
    state, path = tower_state(clip_model), str(tmp_path / "other.pth")
    if kind == "patch 32":
        state["conv1.weight"] = torch.zeros(64, 3, 32, 32)
    elif kind == "deeper":
        state["transformer.resblocks.2.ln_1.weight"] = torch.zeros(64)
    else:
        state = {key: value for key, value in state.items() if ".1." not in key}
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"weights {path}: of another model"):
        build_teacher("clip", SMALL_CLIP, path, "imagenet", (8, 8))
    with pytest.raises(ValueError, match="model ViT-Q-99"):
        build_teacher("clip", "ViT-Q-99", path, "imagenet", (8, 8))


# ------------------------------------------------------------------------------------------------------ frames, grids


def small_tower(image_size=56, patch_size=14):
    torch.manual_seed(0)
    return VisionTransformer(image_size, patch_size, width=32, layers=2, heads=2, mlp_ratio=4.0, output_dim=16)


def small_teacher(norm="imagenet", image_size=64, patch_size=16, grid=(4, 4), **kwargs):
    return FrameTeacher(small_tower(image_size, patch_size), (image_size, image_size), NORMS[norm], grid, **kwargs)


def frames_fed(teacher, clips):
    """What the first layer of the encoder is given."""
    caught = []
    handle = teacher.tower.conv1.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    teacher(clips)
    handle.remove()
    return torch.cat(caught).clone()


def bilinear(maps, out_h, out_w):
    """[h, w, D] → [out_h, out_w, D]; pixel centres at .5, edges repeated."""
    h, w, _ = maps.shape
    result = np.zeros((out_h, out_w, maps.shape[2]))
    for i in range(out_h):
        for j in range(out_w):
            y, x = max((i + 0.5) * h / out_h - 0.5, 0), max((j + 0.5) * w / out_w - 0.5, 0)
            top, left = int(y), int(x)
            for row, wy in ((top, 1 - (y - top)), (min(top + 1, h - 1), y - top)):
                for column, wx in ((left, 1 - (x - left)), (min(left + 1, w - 1), x - left)):
                    result[i, j] += wy * wx * maps[row, column]
    return result


@pytest.mark.parametrize("grid", [(7, 5), (2, 3), (3, 8)])
@torch.no_grad()
def test_other_token_grid_is_resized_bilinearly(grid):
    """Patch 14 on 56 px: 4 × 4 tokens."""
    teacher, clips = small_teacher(image_size=56, patch_size=14, grid=grid), random_clips(4, side=56, batch=2)
    tokens = teacher.tokens(clips)
    assert tokens.shape == (2, 2 * grid[0] * grid[1], 32)
    for b in range(2):
        own = tokens_after_ln_post(teacher.tower, clips[b, :, ::2].transpose(0, 1)).view(2, 4, 4, 32).numpy()
        expected = np.concatenate([bilinear(own[step], *grid).reshape(-1, 32) for step in range(2)])
        np.testing.assert_allclose(tokens[b], expected, atol=1e-5)


@pytest.mark.parametrize("side", [32, 96])
def test_frames_of_another_size_are_resized(side):
    """PIL's bilinear filter is antialiased too."""
    teacher, clips = small_teacher(), random_clips(2, side=side) + 0.1 * torch.randn(1, 3, 2, side, side)
    images = [Image.fromarray(channel.numpy()) for channel in clips[0, :, 0]]
    expected = np.stack([image.resize((64, 64), Image.Resampling.BILINEAR) for image in images])
    np.testing.assert_allclose(frames_fed(teacher, clips)[0], expected, atol=1e-4)


def test_frames_fed_under_each_norm():
    clips = random_clips(4, side=64, batch=2)
    frames = clips[:, :, ::2].transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(frames_fed(small_teacher("imagenet"), clips), frames, atol=1e-6, rtol=0)
    expected = torch.empty_like(frames)
    for c in range(3):
        pixels = frames[:, c] * IMAGENET_STD[c] + IMAGENET_MEAN[c]
        expected[:, c] = (pixels - CLIP_MEAN[c]) / CLIP_STD[c]
    torch.testing.assert_close(frames_fed(small_teacher("clip"), clips), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_towers_that_open_clip_takes_from_timm():
    torch.manual_seed(0)
    tower = TimmModel("vit_tiny_patch16_224", embed_dim=8, image_size=224, pool="", proj="linear")
    teacher, clips = FrameTeacher(tower, (224, 224), NORMS["imagenet"], (14, 14)), random_clips(4)
    expected = tower.trunk.forward_features(clips[0, :, ::2].transpose(0, 1))[:, 1:]  # one class token
    torch.testing.assert_close(teacher.tokens(clips).view(2, 196, 192), expected, atol=1e-5, rtol=0)


def test_only_the_first_frame_of_each_tubelet_counts():
    teacher, clips = small_teacher(), random_clips(8, side=64, batch=2)
    others = clips.clone()
    others[:, :, 1::2] = 5.0
    assert torch.equal(teacher(clips), teacher(others))
    assert teacher(clips).shape == (2, 4 * 16, 32)


def test_targets_are_the_normalised_tokens():
    """Of a teacher that is frozen and stays in eval mode."""
    teacher, clips = small_teacher(), random_clips(6, side=64, batch=2)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    tokens, targets = teacher.tokens(clips).double().numpy(), teacher(clips)
    expected = (tokens - tokens.mean(axis=1, keepdims=True)) / (tokens.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(targets, expected, atol=1e-4)
    assert targets.dtype == torch.float32 and not targets.requires_grad


def test_targets_are_fp32_under_autocast():
    teacher, clips = small_teacher(), random_clips(4, side=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for target in (teacher(clips), PixelTarget()(clips)):
            assert target.dtype == torch.float32
            torch.testing.assert_close(target.std(dim=1).mean(), torch.tensor(1.0), atol=0.02, rtol=0)


# -------------------------------------------------------------------------------------------------------------- DINO


@torch.no_grad()
def test_dino_tokens_equal_timm(weight_file):
    torch.manual_seed(1)
    dino = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0).eval()
    torch.save(dino.state_dict(), weight_file)
    teacher, clips = build_teacher("dino_v1", "dino_s", weight_file, "imagenet", (14, 14)), random_clips(4)
    expected = dino.forward_features(clips[0, :, ::2].transpose(0, 1))[:, 1:]
    assert teacher.out_dim == 384
    torch.testing.assert_close(teacher.tokens(clips).view(2, 196, 384), expected, atol=1e-4, rtol=0)
    expected = expected.reshape(392, 384)
    expected = (expected - expected.mean(0)) / (expected.std(0) + 1e-6)
    torch.testing.assert_close(teacher(clips)[0], expected, atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------------------------------- pixels, features


@pytest.mark.parametrize("num_frames, height, width", [(4, 32, 48), (16, 16, 16)])
def test_pixel_target_equals_a_loop(num_frames, height, width):
    clips = torch.randn(2, 3, num_frames, height, width, generator=torch.Generator().manual_seed(0))
    targets, pixels = PixelTarget()(clips), clips.double().numpy().copy()
    for c in range(3):
        pixels[:, c] = pixels[:, c] * IMAGENET_STD[c] + IMAGENET_MEAN[c]
    expected = []
    for clip in pixels:
        for t in range(0, num_frames, 2):
            for y in range(0, height, 16):
                for x in range(0, width, 16):
                    cube = clip[:, t : t + 2, y : y + 16, x : x + 16].reshape(3, 512)
                    cube = (cube - cube.mean(1, keepdims=True)) / (cube.std(1, ddof=1, keepdims=True) + 1e-6)
                    expected.append(cube.T.reshape(-1))  # p0 p1 p2 c
    assert targets.shape == (2, num_frames // 2 * height // 16 * width // 16, 1536) and targets.dtype == torch.float32
    np.testing.assert_allclose(targets.reshape(-1, 1536), np.stack(expected), atol=1e-4)
    black = PixelTarget()(torch.full((1, 3, 4, 32, 32), -2.0))
    assert black.isfinite().all() and black.abs().max() < 1


def test_features_by_hand():
    """Mean 0 and unbiased std 1 over the tokens; also of half-precision features, in fp32."""
    features = torch.tensor([[[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]])  # mean 3, squares 4 + 1 + 9, over 2
    std = math.sqrt(7) + 1e-6
    expected = torch.tensor([[[-2 / std, 0], [-1 / std, 0], [3 / std, 0]]])
    torch.testing.assert_close(normalize_features(features), expected, atol=1e-6, rtol=0)
    features = (torch.randn(1, 200, 4) + 30).to(torch.bfloat16)
    expected = normalize_features(features.double().float())
    assert torch.equal(normalize_features(features), expected) and expected.dtype == torch.float32
