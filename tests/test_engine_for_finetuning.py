"""Erasing and mixing of clips, the learning rate and weight decay of every parameter of ViT-B against the recipe, and
scores of videos.
"""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fixtures_teacher import IMAGENET_MEAN, IMAGENET_STD
from fixtures_video import video_list, write_list
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from datasets_finetune import ViewReader
from engine_for_finetuning import erase, mix
from evaluation import Evaluator, load_views, score_videos
from metrics import Task
from modeling_finetune import MODELS, Size, VisionTransformer
from optim_factory import Stepper, build_optimizer, parameter_groups
from options_finetune import get_args
from run_class_finetuning import build_loss

pytest_plugins = "fixtures_video"
CPU = torch.device("cpu")


# Erasing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_rectangles_that_timm_draws_are_erased_in_all_frames(mode, count):
    """Those of a clip are those of an image with its seed; about half of the clips have any."""
    eraser = RandomErasing(0.5, mode=mode, max_count=count, device="cpu")
    clips = torch.full((40, 3, 5, 32, 24), 7.0)  # no normal number is as large
    erased = erase(clips, torch.arange(40), eraser) != 7
    for seed, clip in enumerate(erased):
        random.seed(seed)
        assert (clip == (eraser(torch.full((1, 32, 24), 7.0)) != 7)).all()  # [3, T, H, W]: alike in colours and frames
    masks = [mask.numpy().tobytes() for mask in erased[:, 0, 0] if mask.any()]
    assert 8 < len(masks) < 32 and len(set(masks)) == len(masks)  # each clip its own


def test_erasing_depends_on_the_seed_of_the_clip_only():
    """Not on its place in the batch, nor on the global generators."""
    clips, eraser = torch.randn(4, 3, 2, 32, 32), RandomErasing(1.0, mode="pixel", device="cpu")
    together = erase(clips.clone(), torch.tensor([5, 6, 7, 5]), eraser)
    torch.manual_seed(99), random.seed(99)
    alone = erase(clips[2:3].clone(), torch.tensor([7]), eraser)
    assert torch.equal(together[2:3], alone) and not torch.equal(together[2], clips[2])
    assert torch.equal(together[0] != clips[0], together[3] != clips[3])


# Mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_clips_are_mixed_as_timm_mixes_each_frame(mode, alphas):
    clips, labels = torch.randn(6, 3, 4, 16, 24), torch.tensor([0, 3, 2, 1, 4, 4])
    mixup, changed = Mixup(*alphas, mode=mode, label_smoothing=0.1, num_classes=5), 0
    for seed in range(6):
        np.random.seed(seed)
        mixed, soft = mix(clips.clone(), labels, mixup)
        assert mixed.shape == clips.shape and soft.shape == (6, 5)
        for t in range(4):
            np.random.seed(seed)
            frame, targets = mixup(clips[:, :, t].clone(), labels)
            torch.testing.assert_close(mixed[:, :, t], frame, atol=1e-6, rtol=0)
            assert torch.equal(soft, targets)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
        changed += not torch.equal(mixed, clips)
    assert changed >= 5


# Learning rate and weight decay ---------------------------------------------------------------------------------


def layer_by_hand(name):
    """the recipe, for 12 blocks: 0 for the embedding, k + 1 for block k, 13 for the rest."""
    if name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    assert name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"), name
    return 13


@pytest.mark.parametrize("layer_decay", [0.75, 0.7, 1.0])
def test_rate_and_decay_of_every_parameter_of_vit_b(layer_decay):
    with torch.device("meta"):
        model = MODELS["vit_base_patch16_224"](num_classes=400)
    groups = parameter_groups(model, 0.05, layer_decay)
    optimizer = build_optimizer(groups, "adamw", 1e-3, (0.9, 0.999), 1e-8)
    rates = [2e-4, 5e-5]
    stepper = Stepper(model, optimizer, CPU, "fp32", 1, lambda step: rates[step], lambda step: 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for step, rate in enumerate(rates):
        stepper.schedule(step)
        seen = {}
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
            for parameter in group["params"]:
                assert seen.setdefault(names[id(parameter)], group) is group
        assert seen.keys() == set(names.values()) and len(seen) == 162  # each parameter once
        for name, parameter in model.named_parameters():
            scale = layer_decay ** (13 - layer_by_hand(name))
            assert seen[name]["lr"] == pytest.approx(rate * scale, rel=1e-12), name
            no_decay = parameter.ndim == 1  # biases and norms
            assert no_decay == (name.endswith("bias") or "norm" in name)
            assert seen[name]["weight_decay"] == (0.0 if no_decay else 0.05), name


# Weights of classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--mixup 0 --cutmix 0 --smoothing 0", "", "--linear_probe"])
def test_losses_are_weighted_by_class(how):
    """The loss of each clip times the weight of its class, scikit-learn's; of mixed labels, each class's part of it."""
    labels, videos = torch.tensor([0, 1, 1, 3]), np.array([0, 0, 0, 1, 3, 3])
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    soft = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    norm = (torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1))
    given = logits[:, None] if "probe" in how else logits, labels if how else soft  # Mixup is the default
    parts = (F.one_hot(labels, 5) if how else soft) * logits.log_softmax(dim=1)
    for option, weights in (("balanced", torch.tensor([6 / 9, 2.0, 0.0, 1.0, 0.0])), ("none", torch.ones(5))):
        words = f"--data_set custom --nb_classes 5 --class_weights {option} {how}".split()
        loss = build_loss(get_args(words), norm, videos)[0]
        torch.testing.assert_close(loss(*given), -(parts * weights).sum() / 4)


# Scores of videos -----------------------------------------------------------------------------------------------


@pytest.fixture
def videos(clips, broken, tmp_path):
    """Five good videos and one that is none."""
    names = [*list(clips.values())[:3], broken["text"], *list(clips.values())[3:5]]
    return video_list(write_list(tmp_path / "test.csv", names, 2), 4)


@pytest.fixture
def evaluator(tmp_path):
    views = [ViewReader("dense", segments, crops, 32, 4, 2) for segments, crops in ((0, 1), (2, 3))]
    return Evaluator(CPU, "fp32", *views, output_dir=str(tmp_path), task=Task(num_classes=4, names=list("abcd")))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionTransformer(Size(24, 2, 3, 24, 3), num_classes=4, init_scale=50, drop_path_rate=0.5).train()


def test_scores_are_softmax_of_normalised_views_in_eval_mode(evaluator, model, videos):
    for batch_size in (16, 4, 1):  # views of a video that come and are judged together
        samples = load_views(videos, evaluator.test_views, batch_size=batch_size)
        scores = list(score_videos(model, samples, CPU, "fp32", "test", evaluator.task.probabilities))
        assert [score.index for score in scores] == list(range(6))
        assert [bool(score.error) for score in scores] == [False] * 3 + [True] + [False] * 2
        assert len(scores.pop(3).views) == 0
        for score in scores:
            views = evaluator.test_views(videos.path(score.index)).float() / 255
            mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            with torch.no_grad():
                logits = model.eval()((views - mean) / std)
            np.testing.assert_allclose(score.views, logits.softmax(dim=1), atol=1e-5)
            assert np.ptp(score.views, axis=0).max() > 1e-3  # views differ
        model.train()


def test_a_test_reports_what_its_files_hold(evaluator, model, videos, tmp_path):
    evaluator.test(model, videos)
    with np.load(tmp_path / "test_predictions.npz") as file:
        right = file["scores"].argmax(axis=1) == file["label"]
        right[3] = False
        assert np.isnan(file["scores"][3]).all() and file["view_scores"].shape == (6, 6, 4)
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    log = json.loads(line)
    assert log["test_acc1"] == pytest.approx(100 * right.mean()) and log["test_videos"] == 6
    assert log["test_views"] == 30 and log["test_unreadable"] == 1
    assert evaluator.validate(model, videos)["views"] == 5
    nn.init.constant_(model.head.bias, float("nan"))  # must not pass for an answer
    assert evaluator.validate(model, videos)["acc5"] == 0
