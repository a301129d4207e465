"""Hundreds of broken and odd videos and objects: nothing crashes or hangs, each is read or refused with a reason."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fixtures_video import decode_all, source_frames

from object_overlay import ObjectLibrary, find_objects
from soak import corpus, corpus_objects
from video_reader import read_frames


@pytest.fixture(scope="module")
def frames():
    """24 frames of a real video, 96 x 64."""
    return source_frames("bikes", 0, 24, (96, 64))


def tell(outcomes):
    """Counts by outcome, and the longest time."""
    counts = Counter(outcome for outcome, _ in outcomes.values())
    slowest = max(seconds for _, seconds in outcomes.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + f", slowest {slowest:.1f} s"


def test_videos(tmp_path, frames, figure):
    groups = {
        "real mp4s, damaged": corpus.damaged(cuts=24, flips=40),
        "good but odd": corpus.odd(frames),
        "other formats, damaged": corpus.cut_odd(frames),
        "no videos": corpus.no_videos(),
    }
    allowed = {"good but odd": {"read"}, "no videos": {"refused"}}
    total = 0
    for group, variants in groups.items():
        (tmp_path / group).mkdir()
        outcomes = corpus.read_all(variants, tmp_path / group, corpus.read_video)
        shutil.rmtree(tmp_path / group)
        figure(f"{len(outcomes)} videos ({group}): {tell(outcomes)}")
        assert {outcome for outcome, _ in outcomes.values()} <= allowed.get(group, {"read", "refused"}), outcomes
        total += len(outcomes)
    assert total >= 300


def test_odd_videos_are_read_as_pyav_reads_them(tmp_path, frames):
    for name, content in corpus.odd(frames):
        if name == "rotated.mp4":  # PyAV alone leaves it as it is
            continue
        path = tmp_path / name
        path.write_bytes(content)
        expected = decode_all(path).astype(int)
        ours = read_frames(str(path), lambda total: np.arange(total))
        assert ours.shape == expected.shape, name
        assert np.abs(ours - expected).mean() < 4, name


@pytest.mark.filterwarnings("ignore:Image size")
def test_objects(tmp_path, figure):
    outcomes = {}
    for kind in ("good", "bad"):
        (tmp_path / kind).mkdir()
        variants = corpus_objects.good_objects() if kind == "good" else corpus_objects.bad_objects(cuts=24, flips=40)
        outcomes[kind] = corpus.read_all(variants, tmp_path / kind, corpus.read_sprite)
    good, bad = outcomes.values()
    figure(f"{len(good) + len(bad)} object images: good ones {tell(good)}; broken ones {tell(bad)}")
    assert {seen[0] for seen in good.values()} == {"read"} and {seen[0] for seen in bad.values()} <= {"read", "refused"}
    assert len(good) + len(bad) >= 100
    library = ObjectLibrary(str(tmp_path), find_objects(str(tmp_path)))
    rng = np.random.default_rng(0)
    for _ in range(30 * len(library.names)):
        assert library.draw(rng).dtype == np.uint8
    skipped = {Path(path).name: reason for path, reason in library.take_skipped()}
    assert skipped.keys() == {name for name, seen in bad.items() if seen[0] == "refused"} and all(skipped.values())
