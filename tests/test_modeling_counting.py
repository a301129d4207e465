"""Counting: targets against hand-worked cycles, decoding as their inverse, the search with a perfect head, walks."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import interp1d

from modeling_counting import (
    BOX_LIMIT,
    BOX_WEIGHT,
    MEAN_COLOUR,
    NO_NEIGHBOUR,
    CountingHead,
    Prediction,
    RepetitionCounter,
    Walks,
    anchor_targets,
    count_cycles,
    counting_loss,
    counting_scores,
    cycle_offsets,
    decode,
    take_frames,
    window_frames,
)
from modeling_finetune import vit_tiny_patch16_224


def perfect(classes, boxes, rng):
    """What a head says that has learned its targets; where there is nothing to learn it says anything."""
    logits = rng.normal(0, 5, (*classes.shape, 2))
    known = classes.numpy() >= 0
    logits[known] = np.eye(2)[classes.numpy()[known]] * 30
    boxes = np.where(classes.numpy() == 1, boxes.numpy(), rng.normal(0, 1, classes.shape))
    return Prediction(torch.from_numpy(logits).float(), torch.from_numpy(boxes).float())


def perfect_head(bounds, rng):
    """The same as a function of moments and lengths, for count_cycles."""
    offsets = cycle_offsets(torch.as_tensor(bounds))
    return lambda moments, lengths: perfect(*anchor_targets(offsets[moments], lengths), rng)


def test_offsets_by_hand():
    """Cycles of 4 and 6 frames: neighbours, since they differ by no more than 2."""
    before, after = cycle_offsets(torch.tensor([10, 14, 20])).T.tolist()
    assert before[:4] == [NO_NEIGHBOUR] * 4 and after[4:] == [NO_NEIGHBOUR] * 7
    assert after[:4] == pytest.approx([4, 4.5, 5, 5.5])  # a quarter of 6 frames for one of 4
    assert before[4:] == pytest.approx([4, 4 + 1 / 3, 4 + 2 / 3, 5, 5 + 1 / 3, 5 + 2 / 3, 6])


@pytest.mark.parametrize("other, alike", [(13, True), (14, False), (7, False), (8, True)])
def test_cycles_that_are_no_repetition_of_each_other(other, alike):
    """From 10 frames: 13 is at a factor of 1.3; 14 above it; 8 differs by 2 frames; 7 by 3, and by a factor of 1.43."""
    offsets = cycle_offsets(torch.tensor([0, 10, 10 + other]))
    assert (offsets[:10, 1] == NO_NEIGHBOUR).all() != alike
    assert (offsets[10:, 0] == NO_NEIGHBOUR).all() != alike


@pytest.mark.parametrize("seed", range(5))
def test_offsets_lead_to_the_same_phase(seed):
    """Phase as SciPy interpolates it: 0, 1, 2, … at the boundaries."""
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([0, *rng.integers(20, 26, 8)])  # all within a factor of 1.3
    phase = interp1d(bounds, np.arange(9))
    frames, offsets = np.arange(bounds[-1] + 1), cycle_offsets(torch.from_numpy(bounds)).numpy()
    for side, sign, known in ((0, -1, frames >= bounds[1]), (1, 1, frames < bounds[-2])):
        assert ((offsets[:, side] == NO_NEIGHBOUR) == ~known).all()
        there = frames[known] + sign * offsets[known, side]
        assert phase(there.clip(0, bounds[-1])) == pytest.approx(phase(frames[known]) + sign, abs=1e-5)


def test_targets_by_hand():
    """A guess of 20 frames: the anchors are 10, 13.4, 16, 20, 25, 30, 40 frames long; the truth touches 21 and 9."""
    classes, boxes = anchor_targets(torch.tensor([[20.0, 8.0], [NO_NEIGHBOUR, 60.0]]), torch.full((2, 2), 20.0))
    assert classes[0].tolist() == [[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]
    assert classes[1].tolist() == [[-1] * 7, [0, 0, 0, 0, 0, 0, 1]]
    assert boxes[0, 0, 3].item() == pytest.approx(np.log(1.05))
    assert boxes[0, 1, 0].item() == pytest.approx(np.log(0.9))
    assert boxes.isfinite().all()


def test_decoding_is_the_inverse_of_the_targets():
    """Any period from 3 to 400 frames, any guess from which an anchor is near and the correction within its limit."""
    rng = np.random.default_rng(0)
    period = torch.from_numpy(np.exp(rng.uniform(np.log(3), np.log(400), (5000, 2)))).float()
    low, high = np.log(0.5) - BOX_LIMIT, np.log(2) + BOX_LIMIT  # the outermost anchors, and what they can correct
    ratio = torch.from_numpy(np.exp(rng.uniform(low + 1e-3, high - 1e-3, (5000, 2)))).float()
    lengths = (period + 1) / ratio
    decoded = decode(perfect(*anchor_targets(period, lengths), rng), lengths)
    torch.testing.assert_close(decoded - 1, period, rtol=1e-4, atol=1e-4)


def test_from_further_away_it_takes_two_steps():
    """A correction is limited."""
    period, lengths = torch.full((2, 2), 100.0), torch.tensor([[26.0, 27.0], [380.0, 400.0]])
    rng = np.random.default_rng(0)
    once = decode(perfect(*anchor_targets(period, lengths), rng), lengths)
    assert ((once - 101).abs() < (lengths - 101).abs()).all() and ((once - 101).abs() > 1).all()
    twice = decode(perfect(*anchor_targets(period, once), rng), once)
    torch.testing.assert_close(twice - 1, period)
    logits = torch.zeros(1, 2, 7, 2)
    logits[0, 0, 6, 1], logits[0, 1, 0, 1] = 9, 9
    boxes = torch.tensor([3.0, -3.0])[None, :, None].expand(1, 2, 7)
    lengths = decode(Prediction(logits, boxes), torch.full((1, 2), 10.0))[0]
    assert lengths.tolist() == pytest.approx([20 * np.exp(0.5), 5 * np.exp(-0.5)])


def test_loss_by_hand():
    rng = np.random.default_rng(1)
    logits, said = torch.from_numpy(rng.normal(size=(3, 2, 7, 2))), torch.from_numpy(rng.normal(size=(3, 2, 7)))
    classes, boxes = torch.from_numpy(rng.integers(-1, 2, (3, 2, 7))), torch.from_numpy(rng.normal(size=(3, 2, 7)))
    said.requires_grad_()
    loss, parts = counting_loss(Prediction(logits, said), classes, boxes)
    wanted_class = wanted_box = 0
    for side in range(2):
        rows = [(b, a) for b, a in itertools.product(range(3), range(7)) if classes[b, side, a] >= 0]
        wanted_class += np.mean([-logits[b, side, a].log_softmax(0)[classes[b, side, a]].item() for b, a in rows])
        errors = [(said[b, side, a] - boxes[b, side, a]).abs().item() for b, a in rows if classes[b, side, a] == 1]
        wanted_box += sum(0.5 * e**2 if e < 1 else e - 0.5 for e in errors) / 21
    assert parts["class_loss"].item() == pytest.approx(wanted_class, rel=1e-5)
    assert loss.item() == pytest.approx(wanted_class + BOX_WEIGHT * wanted_box, rel=1e-5)
    loss.backward()
    assert ((said.grad != 0) <= (classes == 1)).all() and (said.grad != 0).any()


def test_nothing_to_learn_is_no_loss_and_no_gradient():
    """A batch without any neighbour must neither divide by zero nor leave a layer out of the graph."""
    head = CountingHead(6)
    loss, _ = counting_loss(head(torch.randn(2, 6)), torch.full((2, 2, 7), -1), torch.zeros(2, 2, 7))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in head.parameters())


def test_windows_by_hand():
    left, right = window_frames(torch.tensor([20]), torch.tensor([[8.0, 4.0]]), 26, 16)[0].tolist()
    assert left == list(range(5, 21))  # twice 8 frames, up to the moment
    assert right == [21, 21, 22, 22, 23, 23, 24, 24, 25, 25, -1, -1, -1, -1, -1, -1]  # of 8 frames 5 are there


def test_pixels_outside_of_a_segment_are_the_mean():
    frames = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 2, 2, 3)
    windows = take_frames(frames, window_frames(torch.tensor([0, 9]), torch.full((2, 2), 4.0), 10, 4))
    assert windows.shape == (2, 2, 4, 2, 2, 3) and windows.dtype == torch.uint8
    assert windows[0, 0, 3, 0, 0].tolist() == [0] * 3 and windows[1, 0, :, 0, 0, 0].tolist() == [2, 4, 7, 9]
    assert (windows[0, 0, :3] == MEAN_COLOUR).all() and (windows[1, 1] == MEAN_COLOUR).all()


def test_the_head_sees_both_windows_and_the_encoder_one_at_a_time():
    torch.manual_seed(0)
    encoder = vit_tiny_patch16_224(num_classes=0)
    model = RepetitionCounter(encoder).eval()
    windows = torch.randint(0, 256, (2, 2, 4, 32, 32, 3), dtype=torch.uint8)
    said = model(windows)
    assert said.logits.shape == (2, 2, 7, 2) and said.boxes.shape == (2, 2, 7)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    clips = ((windows / 255 - mean) / std).permute(0, 1, 5, 2, 3, 4)
    features = torch.cat([encoder(clips[:, 0]), encoder(clips[:, 1])], dim=1)
    torch.testing.assert_close(said.boxes[:, 1], F.linear(features, model.head.box_2.weight, model.head.box_2.bias))
    flat = F.linear(features, model.head.cls_1.weight, model.head.cls_1.bias)
    torch.testing.assert_close(said.logits[:, 0], flat.view(2, 7, 2))
    names = {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    heads = "cls_1 cls_2 box_1 box_2".split()
    assert names == {f"head.{head}.{what}" for head in heads for what in ("weight", "bias")}


@pytest.mark.parametrize("cycles", [2, 3, 8, 60])
def test_constant_periods_are_counted(cycles):
    """A period of 4 to 60 frames, given a perfect head, whatever it says where there is no neighbour."""
    rng = np.random.default_rng(cycles)
    for period in range(4, 61, 4) if cycles == 8 else (4, 5, 7, 16, 31, 60):
        count = count_cycles(perfect_head(np.arange(cycles + 1) * period, rng), cycles * period + 1)
        assert count == pytest.approx(cycles, abs=0.01), period


@pytest.mark.parametrize("seed", range(3))
def test_changing_periods_are_counted(seed):
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([0, *(20 * np.exp(0.2 * np.sin(np.arange(12))) + rng.uniform(-1, 1, 12)).round().astype(int)])
    assert round(count_cycles(perfect_head(bounds, rng), int(bounds[-1]) + 1)) == 12


def test_a_count_is_always_a_number():
    """Whatever the head says, each position counts with a cycle within its limits."""
    rng = np.random.default_rng(0)

    def nonsense(moments, lengths):
        n = len(moments)
        return Prediction(*(torch.from_numpy(rng.normal(0, 9, shape)) for shape in ((n, 2, 7, 2), (n, 2, 7))))

    for total in (9, 20, 150):
        assert 2 - 1e-3 <= count_cycles(nonsense, total) <= (total - 1) / 3 + 1e-3


def test_scores_by_hand():
    scores = counting_scores([4.4, 6.6, 12.5, 2.0], [4, 5, 10, 2])  # counted 4, 7, 13, 2
    assert scores == {"mae": pytest.approx((0 + 2 / 5 + 3 / 10 + 0) / 4), "obo": 0.5}


def blinking(rng, period, cycles):
    """A segment of one pixel that gets bright and dark, uint8 [F, 1, 1, 3], and its boundaries."""
    wave = np.sin(2 * np.pi * (np.arange(period * cycles + 1) / period + rng.random())) * rng.uniform(60, 110)
    noisy = wave + rng.normal(0, 5, len(wave)) + 120
    return np.tile(noisy.astype(np.uint8)[:, None, None, None], 3), np.arange(cycles + 1) * period


def test_walks_go_on_and_start_again_where_they_are_lost():
    rng = np.random.default_rng(0)
    batch = [blinking(rng, 20, 6), blinking(rng, 30, 3)]
    walks = Walks(batch, [np.random.default_rng(seed) for seed in range(2)], 11)
    assert walks.windows(16).shape == (2, 2, 16, 1, 1, 3)
    for step in range(11):
        before = walks.moments
        walks.move(torch.tensor([[1.0, 22.0], [29.0, 6.0]]))
        for i, (total, period, near, wrong) in enumerate(((121, 20, 22, 4), (91, 30, 29, 6))):
            moment, length = walks.moments[i], walks.lengths[i]
            assert moment == (before[i] + walks.strides[i]) % total
            assert total / 20 - 1 <= walks.strides[i] <= total / 5
            assert length[1 - i] == near  # or nothing is known of it
            known = moment >= period if i == 0 else moment < total - 1 - period
            again = (period + 1) * walks.restarts[i, step, i]
            assert length[i] == pytest.approx(float(again if known else wrong))
    assert (walks.restarts >= 0.5).all() and (walks.restarts <= 2).all() and len(walks.restarts.unique()) == 44


def test_walks_depend_on_their_generators_alone():
    rng = np.random.default_rng(0)
    batch = [blinking(rng, 20, 6), blinking(rng, 30, 3)]
    both = Walks(batch, [np.random.default_rng(seed) for seed in (3, 4)], 5)
    alone = Walks(batch[1:], [np.random.default_rng(4)], 5)
    for name in ("moments", "lengths", "strides", "restarts"):
        assert torch.equal(getattr(both, name)[1:], getattr(alone, name))
