"""The fast paths give the numbers of the plain ones, and the benchmark itself runs."""

import json
import runpy
import shutil
import sys
import weakref

import estimate_memory
import naive
import numpy as np
import pytest
import timm
import torch
from fixtures_video import ROOT, in_child
from torch.utils._python_dispatch import TorchDispatchMode

from engine_for_pretraining import masked_loss, with_second_masks
from masking_generator import tube_mask
from modeling_finetune import NORMS, SIZES, Size
from modeling_pretrain import PretrainVisionTransformer, pretrain_videomae_tiny_patch16_224
from modeling_teacher import FrameTeacher

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


@pytest.mark.parametrize("fast, precision", [(True, torch.bfloat16), (False, torch.float16)])
def test_half_precision_is_within_a_hundredth(fast, precision, problem):
    """As programs here train, and as the released code does."""
    loss, gradients = run(problem, fast, precision)
    plain_loss, plain_gradients = run(problem, fast=False)
    assert abs(loss - plain_loss) / plain_loss < 1e-2
    whole, plain = (
        torch.cat([gradients[name].flatten() for name in sorted(gradients)])
        for gradients in (gradients, plain_gradients)
    )
    assert torch.cosine_similarity(whole, plain, dim=0) > 0.999


@pytest.fixture
def tables_of(tmp_path, monkeypatch):
    """Runs the benchmark on a command line, and reads what it writes."""

    def measure(*argv):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv, "--json", str(tmp_path / "numbers.json")])
        assert in_child(runpy.run_path, str(ROOT / "scripts" / "benchmark.py"), None, "__main__")[1] == "SystemExit: 0"
        return json.loads((tmp_path / "numbers.json").read_text())["tables"]

    return measure


def test_benchmark_of_a_step_compares_with_the_released_way(tables_of):
    small = ["--model", "pretrain_videomae_tiny_patch16_224", "--num_frames", "2", "--batch_size", "2", "--steps", "1"]
    tables = tables_of("step", *small, "--precision", "fp32", "--straightforward", "released", "--device", "cpu")
    ours, released = tables["fp32"], tables["straightforward released"]
    assert released["whole / straightforward"] == 1 and ours["teacher"] > 0
    assert ours["whole / straightforward"] == pytest.approx(ours["whole"] / released["whole"])
    assert ours["clips per second, both masks counted"] == pytest.approx(2000 / ours["whole"])


def test_benchmark_of_the_data_writes_its_numbers(tables_of):
    tables = tables_of("data", "--rounds", "1", "--workers", "0", "--input_size", "64")
    for videos in ("as they are", "prepared"):
        parts = tables[f"videos {videos}: CPU milliseconds a clip"]
        assert parts["megabytes a clip"] == pytest.approx((16 * 64 * 64 * 3 + 8 * 4 * 4) / 1e6)
        assert all(parts[name] > 0 for name in ("open", "decode", "crop", "overlay", "whole"))
        processes = (parts["whole"] + parts["collate"]) / 1000 * 100  # each second of work is a process for a second
        assert parts["loader processes for 100 videos a second"] == pytest.approx(processes)
    originals, copies = (tables[f"videos {videos}: CPU milliseconds a clip"] for videos in ("as they are", "prepared"))
    ratio = (copies["whole"] + copies["collate"]) / (originals["whole"] + originals["collate"])
    assert tables["prepared / as they are"]["whole + collate"] == pytest.approx(ratio)
    packed = tables["videos prepared, in a shard: CPU milliseconds a clip"]
    ratio = (copies["whole"] + copies["collate"]) / (packed["whole"] + packed["collate"])
    assert tables["prepared, files / in a shard"]["whole + collate"] == pytest.approx(ratio)


# Memory ---------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, beside those of a model, and the most there were."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return made

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_estimated_memory_of_a_step_is_what_its_tensors_take(use_checkpoint):
    model = pretrain_videomae_tiny_patch16_224(decoder_num_classes=768, use_checkpoint=use_checkpoint)
    rng, clip = np.random.default_rng(0), (16, 224, 224)
    masks = with_second_masks(rng, torch.from_numpy(np.stack([tube_mask(rng, (8, 14, 14), 0.8) for _ in range(4)])))
    with LiveBytes(model) as live:
        clips, targets = torch.zeros(4, 3, *clip, dtype=torch.uint8), torch.randn(4, 1568, 768)
        normalised = clips / 255
        predictions = model(normalised, masks, 8 * 156)
        loss, _ = masked_loss(predictions, targets, masks)
        loss.backward()
    estimate = estimate_memory.pretraining_bytes(SIZES["tiny"], False, use_checkpoint, clip, 0.8)
    assert live.peak == pytest.approx(8 * estimate, rel=0.1)


@pytest.mark.parametrize("batch, peak", [(64, 13.7), (128, 25.8)])
def test_estimated_memory_is_within_a_tenth_of_the_measured_peak(batch, peak):
    """Of ViT-B in bf16 on an H200: BENCHMARKS.md."""
    fixed = estimate_memory.fixed_bytes("base", True, False)
    each = estimate_memory.pretraining_bytes(SIZES["base"], True, False, (16, 224, 224), 0.8)
    assert (fixed + batch * each) / 2**30 == pytest.approx(peak, rel=0.1)


def test_table_of_memory(capsys, monkeypatch):
    """Twice the batch where there is twice the room, and none where there is none."""
    monkeypatch.setattr(sys, "argv", ["x", "--finetune", "--model", "large", "--gpu_memory", "4", "32", "64"])
    estimate_memory.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [len(row) for row in rows] == [7] * 4 and [row[:2] for row in rows[2:]] == [
        ["large", "off"],
        ["large", "on"],
    ]
    fixed, each = (float(cell) for cell in rows[2][2:4])
    assert int(rows[2][4]) == 0 and int(rows[2][5]) <= (0.9 * 32 - fixed) * 1024 / each < 2 * int(rows[2][5])
