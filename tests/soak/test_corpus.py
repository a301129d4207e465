"""Hundreds of broken and odd videos and objects: nothing crashes or hangs, each is read or refused with a reason."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fixtures_video import decode_all, source_frames

from object_overlay import ObjectLibrary, find_objects
from soak import corpus, corpus_objects
from video_reader import read_frames

NOT_READ = set[str]()  # good videos that are refused with a reason
NOT_THE_SAME = {"rotated.mp4"}  # PyAV alone leaves it as it is


@pytest.fixture(scope="module")
def frames():
    """24 frames of a real video, 96 x 64."""
    return source_frames("bikes", 0, 24, (96, 64))


def read_all(variants, folder, reader):
    """{name: (outcome, shape or reason, seconds)}; each file is removed after it was read."""
    outcomes = {}
    for name, content in variants:
        path = folder / name
        path.write_bytes(content)
        outcomes[name] = reader(path)
        path.unlink()
    return outcomes


def tell(outcomes):
    """Counts by outcome, and the longest time."""
    counts = Counter(outcome for outcome, _, _ in outcomes.values())
    slowest = max(seconds for _, _, seconds in outcomes.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + f", slowest {slowest:.1f} s"


def test_videos(tmp_path, frames, figure):
    groups = {
        "real mp4s, damaged": corpus.damaged(cuts=24, flips=40),
        "good but odd": corpus.odd(frames),
        "other formats, damaged": corpus.cut_odd(frames),
        "no videos": corpus.no_videos(),
    }
    total = 0
    with corpus.Reader("video") as reader:
        for group, variants in groups.items():
            outcomes = read_all(variants, tmp_path, reader)
            figure(f"{len(outcomes)} videos ({group}): {tell(outcomes)}")
            bad = {name: seen for name, seen in outcomes.items() if seen[0] not in ("read", "refused")}
            assert not bad
            if group == "good but odd":
                assert {name for name, seen in outcomes.items() if seen[0] == "refused"} == NOT_READ
            if group == "no videos":
                assert all(seen[0] == "refused" for seen in outcomes.values())
            total += len(outcomes)
    assert total >= 300


def test_odd_videos_are_read_as_pyav_reads_them(tmp_path, frames):
    for name, content in corpus.odd(frames):
        if name in NOT_READ or name in NOT_THE_SAME:
            continue
        path = tmp_path / name
        path.write_bytes(content)
        expected = decode_all(path).astype(int)
        ours = read_frames(str(path), lambda total: np.arange(total))
        assert ours.shape == expected.shape, name
        assert np.abs(ours - expected).mean() < 4, name


@pytest.mark.filterwarnings("ignore:Image size")
def test_objects(tmp_path, figure):
    root = tmp_path / "objects"
    (root / "all").mkdir(parents=True)
    with corpus.Reader("object") as reader:
        good = read_all(corpus_objects.good_objects(), root / "all", reader)
        bad = read_all(corpus_objects.bad_objects(cuts=24, flips=40), root / "all", reader)
    figure(f"{len(good) + len(bad)} object images: good ones {tell(good)}; broken ones {tell(bad)}")
    assert {seen[0] for seen in good.values()} == {"read"} and {seen[0] for seen in bad.values()} <= {"read", "refused"}
    assert len(good) + len(bad) >= 100
    for name, content in itertools.chain(corpus_objects.good_objects(), corpus_objects.bad_objects(cuts=24, flips=40)):
        (root / "all" / name).write_bytes(content)
    library = ObjectLibrary(str(root), find_objects(str(root)))
    rng = np.random.default_rng(0)
    for _ in range(30 * len(library.names)):
        assert library.draw(rng).dtype == np.uint8
    skipped = {Path(path).name: reason for path, reason in library.take_skipped()}
    assert skipped.keys() == {name for name, seen in bad.items() if seen[0] == "refused"} and all(skipped.values())
