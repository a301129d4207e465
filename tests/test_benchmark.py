"""The fast paths give the numbers of the plain ones, and the benchmark itself runs."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fixtures_video import in_child

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import naive  # noqa: E402

from engine_for_pretraining import masked_loss, with_second_masks  # noqa: E402
from masking_generator import tube_mask  # noqa: E402
from modeling_finetune import NORMS, Size  # noqa: E402
from modeling_pretrain import PretrainVisionTransformer  # noqa: E402
from modeling_teacher import FrameTeacher  # noqa: E402

GRID = (4, 4, 6)  # 8 frames of 64 x 96 pixels


@pytest.fixture(scope="module")
def problem():
    """A small student with random weights, clips, targets and two masks a clip."""
    torch.manual_seed(0)
    model = PretrainVisionTransformer(Size(96, 3, 3, 48, 2), decoder_depth=2, decoder_num_classes=40)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(np.stack([tube_mask(rng, GRID, 0.75) for _ in range(2)]))
    return (
        model,
        torch.randn(2, 3, 8, 64, 96),
        torch.randn(2, int(np.prod(GRID)), 40),
        with_second_masks(np.random.default_rng(1), masks),
    )


def run(problem, fast: bool, precision: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the fast or of the straightforward step."""
    model, clips, targets, masks = problem
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        if fast:
            loss, _ = masked_loss(model(clips, masks, int(masks[0].sum())), targets, masks)
        else:
            loss = naive.loss(model, clips, targets, masks)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_fp32_step_equals_the_straightforward_one(problem):
    loss, gradients = run(problem, fast=True)
    plain_loss, plain_gradients = run(problem, fast=False)
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_give_the_same_numbers(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    size = Size(48, 0, 3, 24, 2)  # the decoder has a block, and each costs seconds
    model = PretrainVisionTransformer(size, decoder_depth=1, decoder_num_classes=40)
    loss, gradients = run((model, *problem[1:]), fast=True)
    model.compile(dynamic=False)
    compiled_loss, compiled_gradients = run((model, *problem[1:]), fast=True)
    torch.testing.assert_close(compiled_loss, loss, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=0, atol=1e-5, msg=name)
    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    teacher, clips = FrameTeacher(tower, (32, 32), NORMS["clip"], (2, 2)), torch.randn(2, 3, 4, 32, 32)
    targets = teacher(clips)
    teacher.compile(dynamic=False)
    torch.testing.assert_close(teacher(clips), targets, rtol=0, atol=1e-4)  # normalised features amplify


def test_bf16_step_is_within_a_hundredth(problem):
    loss, gradients = run(problem, fast=True, precision=torch.bfloat16)
    plain_loss, plain_gradients = run(problem, fast=False)
    assert abs(loss - plain_loss) / plain_loss < 1e-2
    whole, plain = (
        torch.cat([gradients[name].flatten() for name in sorted(gradients)])
        for gradients in (gradients, plain_gradients)
    )
    assert torch.cosine_similarity(whole, plain, dim=0) > 0.999


def test_benchmark_of_the_data_writes_its_numbers(tmp_path, monkeypatch):
    options = ["--rounds", "1", "--workers", "0", "--input_size", "64", "--json", str(tmp_path / "numbers.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "data", *options])
    assert in_child(runpy.run_path, str(ROOT / "scripts" / "benchmark.py"), None, "__main__")[1] == "SystemExit: 0"
    tables = json.loads((tmp_path / "numbers.json").read_text())["tables"]
    for videos in ("as they are", "prepared"):
        parts = tables[f"videos {videos}: CPU milliseconds a clip"]
        assert parts["megabytes a clip"] == pytest.approx((16 * 64 * 64 * 3 + 8 * 4 * 4) / 1e6)
        assert all(parts[name] > 0 for name in ("open", "decode", "crop", "overlay", "whole"))
        processes = (parts["whole"] + parts["collate"]) / 1000 * 100  # each second of work is a process for a second
        assert parts["loader processes for 100 videos a second"] == pytest.approx(processes)
    originals, copies = (tables[f"videos {videos}: CPU milliseconds a clip"] for videos in ("as they are", "prepared"))
    ratio = (copies["whole"] + copies["collate"]) / (originals["whole"] + originals["collate"])
    assert tables["prepared / as they are"]["whole + collate"] == pytest.approx(ratio)
