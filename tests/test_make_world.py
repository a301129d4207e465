"""The mini world: lists and clips, parts that share nothing, labels that no single frame gives away."""

import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fixtures_video import video_list
from PIL import Image
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "mini"))
import make_world
from make_world import COMPOSITIONS, COUNTS, FRAMES, MOTIONS, SIZES, SPLITS, TASKS, motion_track

from object_overlay import find_objects
from video_reader import read_frames

SIDE = 64
OPTIONS = ["--pretrain_clips", "4", "--train_clips", "20", "--val_clips", "4", "--test_clips", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a world")  # with a space
    make_world.main([str(folder), *OPTIONS])
    return folder


def test_labelled_lists(world):
    for task, classes in zip(TASKS, (8, 20, 4, 4)):
        assert len((world / task / "classes.txt").read_text().splitlines()) == classes
        for split, number in zip(SPLITS, (20, 4, 4)):
            videos = video_list(str(world / task / f"{split}.csv"), classes)
            assert len(videos) == number and np.ptp(np.bincount(videos.labels, minlength=classes)) <= 1
            frames = read_frames(videos.path(number - 1), np.arange)
            assert frames.shape == (FRAMES, SIDE, SIDE, 3) and frames.std() > 5


def test_pretraining_lists(world):
    natural, black = (video_list(str(world / "pretrain" / f"{name}.csv")) for name in ("train", "black"))
    assert len(natural) == len(black) == 4
    assert read_frames(natural.path(0), np.arange).std() > 5
    assert read_frames(black.path(3), np.arange).max() < 8  # black, as far as a codec leaves it


def test_still_clips_do_not_move(tmp_path):
    videos = [make_world.read_video(make_world.VIDEOS[0], 2 * SIDE)]
    steps = {}
    for still in (False, True):
        folder = tmp_path / str(still)
        assert list(make_world.write_pretraining(folder, videos, 1, 0, SIDE, still)) == [None]
        frames = read_frames(str(folder / "videos" / "pretrain-0000.mp4"), np.arange).astype(float)
        steps[still] = np.abs(np.diff(frames, axis=0)).mean()
    assert len(frames) == make_world.PRETRAIN_FRAMES
    assert steps[True] < 0.5 < 2 < steps[False]  # coding changes a still picture little


def test_objects_of_pretraining_and_of_tasks_are_others(world):
    seen, unseen = (set(find_objects(str(world / folder))) for folder in ("objects", "unseen"))
    assert len(seen) > 200 and len(unseen) > 60 and not seen & unseen
    classes = (world / "object" / "classes.txt").read_text().splitlines()
    assert set(classes) <= {Path(name).stem for name in unseen}
    assert "OpenMoji" in (world / "objects" / "CREDITS.txt").read_text()
    for name in sorted(seen)[::20]:
        picture = np.asarray(Image.open(world / "objects" / name))
        assert picture.shape[2] == 4 and picture[..., 3].max() == 255
        assert np.ptp(picture[picture[..., 3] == 255][:, :3], axis=0).max() > 50, "drawn in one colour"


def test_every_supported_python_knows_the_objects():
    """Python 3.11 has Unicode 14; the order of characters that only later ones name would change which are unseen."""
    for category, ranges in make_world.CATEGORIES.items():
        for first, last in ranges:
            unknown = [hex(code) for code in range(first, last + 1) if not unicodedata.name(chr(code), "")]
            assert not unknown, f"{category}: {unknown}"


def test_parts_share_no_frames():
    parts = sorted(SPLITS.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(parts))


def test_a_world_depends_on_its_seed_alone_and_is_not_made_twice(world, tmp_path, capsys):
    make_world.main([str(tmp_path), *OPTIONS, "--tasks", "motion"])
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.[mp][pn][4g]")]
    assert len(made) > 300 and all((world / path).read_bytes() == (tmp_path / path).read_bytes() for path in made)
    videos = [make_world.read_video(make_world.VIDEOS[3], 2 * SIDE)]
    assert list(make_world.write_pretraining(tmp_path, videos, 1, 1, SIDE)) == [None]
    assert (world / "videos" / "pretrain-0000.mp4").read_bytes() != (tmp_path / "videos/pretrain-0000.mp4").read_bytes()
    make_world.main([str(world), *OPTIONS])
    assert "is there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other options"):
        make_world.main([str(world), "--train_clips", "30"])


def shortest(difference):
    """Differences of positions, the shortest way around."""
    return (difference + 0.5) % 1 - 0.5


def named_motion(centres, sizes):
    """The class of a track, read off its steps by hand."""
    steps = shortest(np.diff(centres, axis=0))
    if np.ptp(sizes) > 1e-6:
        return "growing" if np.median(np.diff(sizes)) > 0 else "shrinking"
    turn = np.cross(np.pad(steps[:-1], ((0, 0), (0, 1))), np.pad(steps[1:], ((0, 0), (0, 1))))[:, 2]
    if np.abs(turn).min() > 1e-6:  # the y axis points down
        return "clockwise" if turn.min() > 0 else "counter-clockwise"
    x, y = steps.sum(axis=0)
    return ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")


@pytest.mark.parametrize("label", range(len(MOTIONS)))
def test_motions_are_what_they_are_called(label):
    rng = np.random.default_rng(label)
    assert all(named_motion(*motion_track(rng, label)) == MOTIONS[label] for _ in range(50))


def test_counts_are_passes():
    rng = np.random.default_rng(0)
    for label in range(len(COUNTS)):
        for _ in range(20):
            centres, _ = make_world.count_track(rng, label)
            assert centres.min() >= 0 and centres.max() <= 1
            steps = np.diff(centres, axis=0)
            forward = np.sign(np.round(steps @ steps[0], 6))
            assert (np.diff(forward[forward != 0]) != 0).sum() == label, "as many turns as passes, less one"


def test_position_and_size_of_a_frame_tell_nothing_of_the_motion():
    """In every frame of every class they are uniform: Kolmogorov-Smirnov, 8 classes × 8 frames × 3 values."""
    low, high = np.log(SIZES)
    worst = 1.0
    for label in range(len(MOTIONS)):
        rng = np.random.default_rng((1, label))
        tracks = [motion_track(rng, label) for _ in range(1000)]
        for t in range(FRAMES):
            x, y = (np.array([centres[t, axis] for centres, _ in tracks]) for axis in (0, 1))
            size = (np.log([sizes[t] for _, sizes in tracks]) - low) / (high - low)
            worst = min(worst, *(stats.kstest(values, "uniform").pvalue for values in (x, y, size)))
    assert worst > 1e-3 / 192  # Bonferroni


def test_compositions_are_what_they_are_called():
    """A goes the same way in all classes; only what happens from its arrival on differs."""
    on_top = np.zeros(len(COMPOSITIONS))
    for seed in range(100):
        of_class = []
        for label in range(len(COMPOSITIONS)):
            tracks = make_world.composition_tracks(np.random.default_rng(seed), label)
            upper_is_a = np.abs(np.diff(tracks[1][0][:2], axis=0)).max() > 1e-9  # B rests at first
            (a, a_size), (b, b_size) = tracks[:: -1 if upper_is_a else 1]
            on_top[label] += upper_is_a
            steps = [shortest(np.diff(centres, axis=0)) for centres in (a, b)]
            between = shortest(b - a)
            touching = 0.9 * (a_size + b_size)[0] / 2
            of_class.append((a, b, *steps, np.hypot(*between.T) / touching))
        (a, b, way, _, distance), behind, (_, _, _, push, pushed_at), (_, _, _, dodge, dodged_at) = of_class
        assert all(np.array_equal(a, other[0]) and np.array_equal(b[0], other[1][0]) for other in of_class)
        assert np.array_equal(b, behind[1]) and np.ptp(b, axis=0).max() == 0
        assert distance[0] > 1 and distance.min() < 0.8, "A passes over B or under it"
        assert pushed_at.min() > 1 - 1e-9 and np.allclose(pushed_at[-3:], 1), "A pushes B at the distance of contact"
        np.testing.assert_allclose(push[-2:], way[-2:])
        np.testing.assert_allclose(np.hypot(*dodge[-2:].T), np.hypot(*way[-2:].T))
        assert np.abs((dodge * way).sum(axis=1)).max() < 1e-9 and dodged_at.min() > 0.5**0.5 - 1e-9
    assert on_top[0] == 100 and on_top[1] == 0 and 30 < on_top[2] < 70 and 30 < on_top[3] < 70


def test_neither_an_object_nor_a_frame_tells_a_composition():
    """With perfect knowledge of A's way, of B's way, or of both positions, sizes and the order in a single frame."""
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % len(COMPOSITIONS)
    tracks = [make_world.composition_tracks(rng, label) for label in labels]
    centres, sizes = (np.array([[track[part] for track in pair] for pair in tracks]) for part in (0, 1))
    steps = shortest(np.diff(centres, axis=2))
    rests = np.abs(steps[:, :, 0]).max(axis=2) < 1e-9
    assert (rests.sum(axis=1) == 1).all()
    between = shortest(centres[:, 1] - centres[:, 0])

    def right(features):
        features = features.reshape(len(labels), -1)
        model = HistGradientBoostingClassifier(random_state=0).fit(features[:3000], labels[:3000])
        return model.score(features[3000:], labels[3000:])

    error = 0.5 / 1000**0.5
    assert right(steps[~rests]) < 0.25 + 4 * error, "A"
    assert right(steps[rests]) < 0.5 + 4 * error, "B: whether it stays"
    for t in (0, FRAMES // 2, FRAMES - 1):
        distance = np.linalg.norm(between[:, t], axis=1, keepdims=True)
        frame = np.concatenate([between[:, t], distance, sizes[:, :, t]], axis=1)
        assert right(frame) < (0.25 if t == 0 else 0.75) + 4 * error, "in front of or behind is never told"


def test_a_classifier_of_single_frames_is_at_chance():
    """Ridge regression on the pixels of one frame, against the same on what changes from frame to frame."""
    rng = np.random.default_rng(5)
    background = rng.integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
    disc = np.hypot(*np.mgrid[-1:1:32j, -1:1:32j]) < 1
    sprite = np.repeat((255 * disc).astype(np.uint8)[..., None], 4, axis=2)
    labels = np.arange(700) % 2  # left and right
    clips = np.stack([make_world.labelled_clip(rng, "motion", label, background, [sprite], SIDE) for label in labels])
    small = clips.astype(np.float64).mean(axis=4).reshape(-1, FRAMES, 16, 4, 16, 4).mean(axis=(3, 5))

    def right(features):
        features = features.reshape(len(features), -1)
        features = (features - features.mean(axis=0)) / features.std(axis=0)
        train, test = features[:500], features[500:]
        weights = np.linalg.solve(train.T @ train + 300 * np.eye(train.shape[1]), train.T @ (labels[:500] - 0.5))
        return ((test @ weights > 0) == labels[500:]).mean()

    chance_error = 0.5 / 200**0.5
    for t in (0, FRAMES - 1):
        assert abs(right(small[:, t]) - 0.5) < 4 * chance_error
    change = small[:, 1:] - small[:, :-1]
    moved = np.stack([change[:, :, :, 1:] * small[:, 1:, :, :-1], change[:, :, :, :-1] * small[:, 1:, :, 1:]], axis=1)
    assert right(moved.mean(axis=(2, 3, 4))) > 0.5 + 8 * chance_error


@pytest.mark.parametrize("task", TASKS)
def test_worlds_of_two_sides_show_the_same_clips(task):
    """The larger one, averaged over 2 x 2 pixels, is close to the smaller one."""
    background = np.random.default_rng(0).integers(0, 256, (4, 3, 4, 3), dtype=np.uint8).repeat(64, 1).repeat(64, 2)
    disc = np.hypot(*np.mgrid[-1:1:128j, -1:1:128j]) < 1
    sprite = np.repeat((255 * disc).astype(np.uint8)[..., None], 4, axis=2)
    small, large = (
        make_world.labelled_clip(np.random.default_rng(1), task, 1, video, [sprite, sprite], side).astype(float)
        for side, video in ((SIDE, background[:, ::2, ::2]), (2 * SIDE, background))
    )
    assert small.shape == (FRAMES, SIDE, SIDE, 3) and large.shape == (FRAMES, 2 * SIDE, 2 * SIDE, 3)
    error = np.abs(large.reshape(FRAMES, SIDE, 2, SIDE, 2, 3).mean(axis=(2, 4)) - small)
    assert error.mean() < 6 and np.ptp(small, axis=0).max() > 200, "the object moves alike over the same background"


@pytest.mark.parametrize("module", ["skvideo", "no_such_module"])
def test_a_missing_package_says_what_to_install(module):
    with pytest.raises(SystemExit, match=r"pip install .*a-package==1"):
        make_world.package_file(module, "a-package==1", "datasets/data/none.mp4")
