"""The loss against NumPy, multiple sampling, accumulation, bad batches, and learning one batch by heart."""

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch
from fixtures_teacher import SMALL_CLIP, make_small_clip
from fixtures_video import video_list, write_list

from checkpoints import Position
from datasets import ChunkSampler, PretrainDataset, build_loader
from engine_for_pretraining import masked_loss, train_one_epoch, with_second_masks
from masking_generator import MaskGenerator
from modeling_finetune import channel_stats, normalize_clips
from modeling_pretrain import MODELS
from modeling_teacher import PixelTarget, build_teacher
from object_overlay import ObjectLibrary, ObjectOverlay, find_objects
from optim_factory import Stepper, build_optimizer, parameter_groups
from training import Run, RunOptions, epoch_batches
from utils import RunError
from video_transforms import ClipSource

pytest_plugins = "fixtures_video"
CPU = torch.device("cpu")
NORM = channel_stats("imagenet")


def random_masks(rng, rows, tokens, hidden):
    masks = np.zeros((rows, tokens), bool)
    for row in masks:
        row[rng.permutation(tokens)[:hidden]] = True
    return torch.from_numpy(masks)


# Pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks_per_clip", [1, 2])
def test_masked_loss_by_hand(masks_per_clip):
    """Also under objects and of the background: means over hidden tokens."""
    rng, (B, N, M, D) = np.random.default_rng(0), (3, 10, 6, 4)
    masks, objects = random_masks(rng, masks_per_clip * B, N, M), random_masks(rng, B, N, 4)
    predictions, targets = rng.normal(size=(masks_per_clip * B, M, D)), rng.normal(2, 3, size=(B, N, D))
    loss, logged = masked_loss(torch.tensor(predictions), torch.tensor(targets).float(), masks, objects)
    errors, target_stds = {True: [], False: []}, []
    for row in range(masks_per_clip * B):
        target_stds += list(targets[row % B][masks[row].numpy()].std(axis=0, ddof=1))
        for place, token in enumerate(np.flatnonzero(masks[row])):
            error = ((predictions[row, place] - targets[row % B, token]) ** 2).mean()
            errors[bool(objects[row % B, token])].append(error)
    found = {"loss": float(loss)} | {name: float(value) for name, value in logged.items()}
    expected = {
        "loss": np.mean(errors[True] + errors[False]),
        "loss_objects": np.mean(errors[True]),
        "loss_background": np.mean(errors[False]),
        "pred_std": predictions.std(axis=1, ddof=1).mean(),
        "target_std": np.mean(target_stds),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert masked_loss(torch.tensor(predictions), torch.tensor(targets).float(), masks)[0] == loss


def test_second_masks_are_a_permutation_of_the_first():
    masks = random_masks(np.random.default_rng(0), 8, 20, 12)
    orders = set()
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        out = with_second_masks(np.random.default_rng(key), masks)
        assert out.dtype == torch.bool and out.shape == (16, 20) and torch.equal(out[:8], masks)
        order = [next(i for i in range(8) if torch.equal(row, masks[i])) for row in out[8:]]
        assert sorted(order) == list(range(8))
        assert torch.equal(out, with_second_masks(np.random.default_rng(key), masks))
        orders.add(tuple(order))
    assert len(orders) == 4


# Steps ----------------------------------------------------------------------------------------------------------


def student_of(teacher, **options):
    torch.manual_seed(0)
    options = {"decoder_depth": 1, "decoder_num_classes": teacher.out_dim} | options
    return MODELS["pretrain_videomae_tiny_patch16_224"](**options)


def stepper_of(student, update_freq=1, opt="adamw", precision="fp32", lr=1e-3, clip_grad=None):
    optimizer = build_optimizer(parameter_groups(student, 0.05), opt, lr, (0.9, 0.95), 1e-8)
    return Stepper(student, optimizer, CPU, precision, update_freq, lambda step: lr, lambda step: 0.05, clip_grad)


def run_of(dataset, stepper, chunk, steps=1, first_step=0, seed=0, epoch=0):
    """A run that stands at `first_step` of an epoch of so many `steps`; writes nothing."""
    sampler = ChunkSampler(len(dataset), chunk, stepper.update_freq)
    assert steps <= sampler.steps_per_epoch
    sampler.steps_per_epoch = steps
    values = {field.name: 0 for field in fields(RunOptions)} | {"epochs": epoch + 1, "seed": seed}
    settings = RunOptions(**values | {"output_dir": "", "log_dir": "", "log_interval": 1, "save_ckpt_freq": 1})
    loader = build_loader(dataset, sampler, 0, False, 0)
    return Run(settings, Position(epoch, first_step), loader, stepper, {})


def train(run, teacher, multiple_sampling=False, norm=NORM):
    """Run train_one_epoch over the one epoch of a run, and return its meter."""
    with run:
        for epoch in run.epochs():
            train_one_epoch(run.stepper.model, teacher, epoch, norm, multiple_sampling)
    assert run.position.epoch == epoch.index + 1
    return epoch.meter


@pytest.fixture(scope="module")
def dataset(clips, objects_folder, tmp_path_factory):
    """Clips of 4 frames, 32 px, with objects: 8 tokens each, 4 of them hidden."""
    path = write_list(tmp_path_factory.mktemp("list") / "list.csv", list(clips.values()) * 2)
    overlay = ObjectOverlay((32, 32), ObjectLibrary(str(objects_folder), find_objects(str(objects_folder))))
    masks = MaskGenerator("tubelet", (2, 2, 2), 0.5)
    return PretrainDataset(video_list(path), ClipSource((32, 32), 4, 2), masks, overlay)


def batches_of(dataset, chunk, steps):
    loader = build_loader(dataset, ChunkSampler(len(dataset), chunk), 0, False, 0)
    return list(epoch_batches(loader, dataset.videos))[:steps]


def weights(stepper):
    return copy.deepcopy(stepper.model.state_dict())


def largest_difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_accumulation_reaches_the_weights_of_the_larger_batch(dataset):
    """Two micro-batches of 3 clips against one of 6: the same clips, and so the same steps."""
    teacher, runs = PixelTarget(), []
    for chunk, update_freq in ((6, 1), (3, 2)):
        stepper = stepper_of(student_of(teacher), update_freq, opt="momentum", lr=0.05)
        meter = train(run_of(dataset, stepper, chunk, steps=2), teacher)
        runs.append((weights(stepper), meter.averages()))
    start = student_of(teacher).state_dict()
    assert largest_difference(runs[0][0], start) > 1e-3 > 1e-6 > largest_difference(runs[0][0], runs[1][0])
    assert runs[0][1]["train_loss"] == pytest.approx(runs[1][1]["train_loss"], rel=1e-5)
    assert runs[0][1]["train_grad_norm"] == pytest.approx(runs[1][1]["train_grad_norm"], rel=1e-4)


def test_the_loss_is_that_of_both_masks_together(dataset):
    teacher, [batch] = PixelTarget(), batches_of(dataset, 4, 1)
    student = student_of(teacher).eval()
    clips = normalize_clips(batch["clips"], *NORM)
    masks = with_second_masks(np.random.default_rng((0, 0, 0)), batch["masks"])
    with torch.no_grad():
        predictions = torch.cat([student(clips, masks[:4]), student(clips, masks[4:])])
        targets = teacher(clips).repeat(2, 1, 1)
    expected = (predictions - targets[masks].reshape(predictions.shape)).pow(2).mean()
    meter = train(run_of(dataset, stepper_of(student), 4), teacher, multiple_sampling=True)
    assert meter.averages()["train_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_what_is_drawn_depends_on_the_chunk_alone(dataset):
    """Drop path and second masks: steps made after a resume are those of the undisturbed run."""
    teacher = PixelTarget()
    whole, parts, other = (stepper_of(student_of(teacher, drop_path_rate=0.5)) for _ in range(3))
    train(run_of(dataset, whole, 4, steps=3), teacher, multiple_sampling=True)
    train(run_of(dataset, parts, 4, steps=2), teacher, multiple_sampling=True)
    torch.rand(1000)  # the global generators may be anywhere
    train(run_of(dataset, parts, 4, steps=3, first_step=2), teacher, multiple_sampling=True)
    assert largest_difference(weights(whole), weights(parts)) == 0
    train(run_of(dataset, other, 4, steps=3, seed=1), teacher, multiple_sampling=True)
    assert largest_difference(weights(whole), weights(other)) > 0


@pytest.mark.parametrize("opt, precision", [("adamw", "fp32"), ("lamb", "fp32"), ("adamw", "bf16")])
def test_a_batch_with_a_bad_loss_changes_nothing(dataset, opt, precision, caplog):
    """A zero std makes the clips infinite, and so the loss."""
    teacher, batches = PixelTarget(), batches_of(dataset, 4, 2)
    stepper = stepper_of(student_of(teacher), opt=opt, precision=precision)
    train(run_of(dataset, stepper, 4), teacher)
    before, state = weights(stepper), copy.deepcopy(stepper.optimizer.state_dict())
    run = run_of(dataset, stepper, 4, steps=2, first_step=1)
    meter = train(run, teacher, norm=(NORM[0], torch.zeros_like(NORM[1])))
    assert meter.averages() == {"skipped_steps": 1} and largest_difference(before, weights(stepper)) == 0
    for old, new in zip(state["state"].values(), stepper.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(old[name]), torch.as_tensor(new[name])) for name in old)
    assert all(path in caplog.text for path in batches[1]["paths"])


def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(dataset):
    """And schedules see the step of the run."""
    teacher, losses = PixelTarget(), []
    for precision in ("fp32", "bf16"):
        stepper, seen = stepper_of(student_of(teacher), precision=precision), []
        stepper.lr_schedule = lambda step: seen.append(step) or 1e-3
        meter = train(run_of(dataset, stepper, 4, steps=2, epoch=3), teacher, multiple_sampling=True)
        losses.append(meter.averages()["train_loss"])
        assert {value.dtype for value in weights(stepper).values()} == {torch.float32}
        assert seen == [6, 6, 7]  # of epochs of two steps; the first before any step, for the log
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_autocast_ends_with_the_forward_pass(dataset):
    """Gradients are not computed in it, nor is what comes after a step."""
    stepper, seen = stepper_of(student_of(PixelTarget()), precision="bf16"), []
    with run_of(dataset, stepper, 4, steps=2) as run:
        for epoch in run.epochs():
            for step in epoch.steps():
                for batch in step.micro_batches():
                    seen.append(torch.is_autocast_enabled("cpu"))
                    loss = stepper.model(normalize_clips(batch["clips"], *NORM), batch["masks"]).float().mean()
                    loss.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
                    step.backward(loss)
                seen.append(torch.is_autocast_enabled("cpu"))
                step.update()
    assert seen == [True, False, False] * 2


def test_a_dead_worker_is_reported_wherever_torch_notices_it(dataset):
    """Torch raises from a signal handler, here in the middle of the engine."""
    run = run_of(dataset, stepper_of(student_of(PixelTarget())), 4)
    with pytest.raises(RunError, match="data loader failed") as told, run:
        for epoch in run.epochs():
            for step in epoch.steps():
                next(step.micro_batches())
                run.sampler.issued.append([0])  # on its way
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
    assert dataset.videos.path(0) in str(told.value)


def test_one_batch_is_learnt_by_heart(dataset, tmp_path):
    """100 steps on one batch with a CLIP target take the loss below half its start; the teacher stays as it is."""
    make_small_clip(tmp_path)
    clip_teacher = build_teacher("clip", SMALL_CLIP, "random", "imagenet", (2, 2), 32)
    before = [value.clone() for value in clip_teacher.state_dict().values()]
    stepper, losses = stepper_of(student_of(clip_teacher, decoder_depth=2), lr=1e-3), []
    for _ in range(100):
        meter = train(run_of(dataset, stepper, 4), clip_teacher)
        losses.append(meter.averages()["train_loss"])
    assert 0.8 < losses[0] < 4 and np.mean(losses[-5:]) < 0.5 * losses[0]
    assert meter.averages()["train_pred_std"] > 0.3  # not by predicting the mean
    assert all(torch.equal(a, b) for a, b in zip(before, clip_teacher.state_dict().values()))
    assert all(parameter.grad is None for parameter in clip_teacher.parameters())
