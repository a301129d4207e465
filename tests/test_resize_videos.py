"""resize_videos.py: what it writes, by PyAV and by the decoder of training; any source; killed anywhere, it goes on."""

import os
import time
from fractions import Fraction
from pathlib import Path

import av
import data_tools
import numpy as np
import pytest
import resize_videos
from data_tools import Unusable, read_list
from fixtures_data_tools import SIZE, kill_at, set_matrix
from fixtures_video import decode_all, source_frames, video_list, write_list, write_mp4
from video_writing import Settings, verify

from utils import RunError
from video_check import slow_reasons
from video_reader import PyAVVideo, VideoError, read_frames

pytest_plugins = "fixtures_data_tools"
EVERY = lambda total: np.arange(total)


def packets_of(path):
    """(seconds, is key frame) of the packets of a video in the order of time; and the video's seconds."""
    with av.open(str(path)) as container:
        packets = [(p.pts * p.time_base, p.is_keyframe) for p in container.demux(video=0) if p.size]
        stream = container.streams.video[0]
        return sorted(packets), stream.duration * stream.time_base


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


def resized(path, size):
    """Frames of a video resized to (width, height), by PyAV's own default; uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.reformat(*size, "rgb24").to_ndarray() for frame in container.decode(video=0)])


@pytest.fixture
def resize(tmp_path, capsys):
    """Resize the videos of a list into a folder of this test: path of each result by its name, and what was printed."""

    def resize(list_path, *options):
        resize_videos.main([str(list_path), "--output", str(tmp_path / "out"), "--workers", "2", *map(str, options)])
        lines = read_list(str(tmp_path / "out" / Path(list_path).name))
        return {Path(line.name).name: line.name for line in lines}, capsys.readouterr().out

    return resize


# One video ------------------------------------------------------------------------------------------------------

NAMES = ["plain.mp4", "uneven.mp4", "broken stamps.mp4", "b frames.avi", "av1.mp4", "vp9.webm"]


@pytest.mark.parametrize("name", NAMES)
def test_any_source_becomes_the_same_fast_video(resize, odd_videos, tmp_path, name):
    videos, _ = odd_videos
    if name not in videos:
        pytest.skip("PyAV has no encoder for it")
    results, _ = resize(write_list(tmp_path / "l.csv", [videos[name]]), "--short_side", 64, "--key_frames", 8)
    path = results[Path(name).stem + ".mp4"]
    times, seconds = packets_of(path)
    first = int(name == "b frames.avi")  # AVI has no stamps, and FFmpeg's begin after the delay of the B-frames
    expected = [Fraction(first + (n + n // 3 if name == "uneven.mp4" else n), 25) for n in range(40)]
    assert [round(float(time), 3) for time, _ in times] == [round(float(time), 3) for time in expected]
    assert abs(seconds - (expected[-1] - expected[0]) - Fraction(1, 25)) < Fraction(1, 50)
    keys = [number for number, (_, key) in enumerate(times) if key]
    assert keys[0] == 0 and max(np.diff([*keys, 40])) <= 8
    with av.open(path) as container:
        assert container.streams.video[0].codec_context.name == "h264" and not container.streams.audio
    ours = read_frames(path, EVERY)
    assert ours.shape == (40, 64, 106, 3)  # 160 x 96 to a short side of 64; even
    theirs = resized(videos["plain.mp4"], (106, 64))
    assert min(psnr(a, b) for a, b in zip(ours, theirs)) > 30
    assert min(psnr(a, b) for a, b in zip(ours, resized(videos[name], (106, 64)))) > 30
    assert psnr(ours[:-4], theirs[4:]) < 25  # the measure tells frames from each other
    assert slow_reasons(path) == []


def test_seconds_stay_what_they_are(resize, tmp_path):
    """If the picture begins after the sound, or a stamp is repeated: labels in seconds stay at their frames."""
    frames, stamps = source_frames("bikes", 0, 100, SIZE), [40 * (n if n < 50 else 25 * n - 1200) for n in range(100)]
    write_mp4(tmp_path / "late.mkv", frames, rate=1000, stamps=[3000 + stamp for stamp in stamps], sound=True)
    stamps[30] = stamps[29]
    write_mp4(tmp_path / "repeated.mkv", frames, rate=1000, stamps=stamps, options={"bf": "0"})
    for name in ("late.mkv", "repeated.mkv"):
        with av.open(str(tmp_path / name)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        assert PyAVVideo(str(tmp_path / name)).seconds == pytest.approx(times, abs=0.001)
        assert times[0] == 3 * (name == "late.mkv") and (times[29] == times[30]) == (name == "repeated.mkv")
        results, _ = resize(write_list(tmp_path / "l.csv", [tmp_path / name]), "--short_side", 48)
        assert PyAVVideo(results[Path(name).stem + ".mp4"]).seconds == pytest.approx(times, abs=0.001)


def test_turned_and_mirrored_videos_are_written_upright(resize, odd_videos, tmp_path):
    videos, _ = odd_videos
    (tmp_path / "mirrored.mp4").write_bytes(videos["plain.mp4"].read_bytes())
    set_matrix(tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    results, _ = resize(write_list(tmp_path / "l.csv", [videos["turned.mp4"], tmp_path / "mirrored.mp4"]))
    ours, source = read_frames(results["turned.mp4"], EVERY), read_frames(str(videos["turned.mp4"]), EVERY)
    plain = decode_all(videos["plain.mp4"])
    assert ours.shape == source.shape == (40, *SIZE, 3)
    assert psnr(ours, np.rot90(plain, -1, axes=(1, 2))) > 30 and psnr(ours, source) > 30
    assert psnr(read_frames(results["mirrored.mp4"], EVERY), plain[:, :, ::-1]) > 30


def test_colours_stay(resize, tmp_path):
    """Flat colours in the wide range and another colour matrix, told in the file."""
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [250, 250, 250], [5, 5, 5]], np.uint8)
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 2, 1  # JPEG, BT.709
        for number, colour in enumerate(colours):
            frame = av.VideoFrame.from_ndarray(np.tile(colour, (48, 64, 1)), "rgb24")
            frame = frame.reformat(format="yuvj420p", dst_colorspace="ITU709", dst_color_range="JPEG")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    results, _ = resize(write_list(tmp_path / "l.csv", [tmp_path / "wide.mp4"]))
    before, after = read_frames(str(tmp_path / "wide.mp4"), EVERY), read_frames(results["wide.mp4"], EVERY)
    assert np.abs(after.astype(int) - before).mean(axis=(1, 2, 3)).max() < 4
    assert np.abs(before[:, 24, 32].astype(int) - colours).max() < 8


def test_real_videos_keep_their_colours(resize, tmp_path):
    """Of the decoder of training, against frames of the original, resized."""
    source = source_frames("bikes", 0, 30, (640, 272))
    write_mp4(tmp_path / "part.mp4", source)
    results, _ = resize(write_list(tmp_path / "l.csv", [tmp_path / "part.mp4"]), "--short_side", 136)
    ours = read_frames(results["part.mp4"], EVERY)
    halves = source.reshape(30, 136, 2, 320, 2, 3).mean(axis=(2, 4))
    assert ours.shape == halves.shape and psnr(ours, halves) > 30
    assert np.abs((ours - halves).mean(axis=(0, 1, 2))).max() < 1.5


def test_small_videos_keep_their_size_and_odd_sizes_become_even(resize, tmp_path):
    names = {"small.mp4": (98, 66), "tall.mp4": (98, 130), "flat.mp4": (320, 64)}
    for name, size in names.items():
        write_mp4(tmp_path / name, source_frames("bikes", 0, 4, size))
    listed = write_list(tmp_path / "l.csv", [tmp_path / name for name in names])
    results, _ = resize(listed, "--short_side", 51)
    sizes = {name: read_frames(path, EVERY).shape[2:0:-1] for name, path in results.items()}
    assert sizes == {"small.mp4": (76, 52), "tall.mp4": (52, 68), "flat.mp4": (256, 52)}  # nearest even numbers
    assert resize_videos.Settings().short_side == 256
    resize_videos.main([listed, "--output", str(tmp_path / "out2")])
    assert read_frames(str(tmp_path / "out2" / "videos" / "small.mp4"), EVERY).shape[1:3] == (66, 98)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stamps": [Fraction(n, 25) for n in range(39)]}, "has 40 frames, not 39"),
        ({"stamps": [Fraction(n, 24) for n in range(40)]}, "other timestamps"),
        ({"size": (96, 160)}, "160 x 96 pixels, not 96 x 160"),
        ({"settings": Settings(key_frames=3)}, "fewer key frames"),
        ({"kept": {9: 30}}, "other pictures"),
    ],
)
def test_a_result_that_is_not_as_it_should_be_is_refused(odd_videos, change, message):
    videos, frames = odd_videos
    right = {"kept": {0: 0, 9: 9}, "stamps": [Fraction(n, 25) for n in range(40)], "size": SIZE}

    right |= {"settings": Settings(key_frames=12)}

    def check(kept, **options):
        kept = {number: frames[place] for number, place in kept.items()}
        return verify(str(videos["plain.mp4"]), kept=kept, **options)

    assert check(**right) > 30
    with pytest.raises(Unusable, match=message):
        check(**right | change)


# A data set -----------------------------------------------------------------------------------------------------


def test_lists_folders_and_totals(resize, clips, broken, tmp_path):
    sources = [tmp_path / "data" / place for place in ("train/a b/x.mp4", "train/c/x.mp4", "val/c/x.avi")]
    sources += [sources[1].with_name(f"{name}.mp4") for name in ("text", "cut")]
    contents = [*(clips[f"{name}.mp4"] for name in ("small", "short", "small")), broken["text"], broken["cut"]]
    for source, content in zip(sources, contents):
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(content.read_bytes())
    labels = ["92:11.90-21.20,147:0.00-12.60", "-", "3", "4", "5"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "l.csv").write_text("".join(f"{path} {label}\n" for path, label in zip(sources, labels)))
    (tmp_path / "in" / "classes.txt").write_text("one\n")
    _, text = resize(tmp_path / "in" / "l.csv")
    out = tmp_path / "out"
    places = [out / "videos" / place for place in ("train/a b/x.mp4", "train/c/x.mp4", "val/c/x.mp4")]
    assert read_list(str(out / "l.csv")) == [(str(place), label) for place, label in zip(places, labels)]
    assert (out / "classes.txt").read_text() == "one\n"
    failed = [line.split("\t") for line in (out / "failed.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in failed] == [str(path) for path in sources[3:]] and all(row[1] for row in failed)
    before, after = (sum(path.stat().st_size for path in part) for part in (sources[:3], places))
    assert f"3 videos, {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after" in text
    assert "2 failed" in text and "3 of 5 videos" in text
    assert sorted(path.name for path in out.iterdir() if path.name[0] == ".") == [".lock"]


def test_paths_relative_to_a_root_and_names_that_differ_in_the_suffix(tmp_path, clips):
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    for name in ("x.mp4", "x.avi"):
        (folder / name).write_bytes(clips["small.mp4"].read_bytes())
    (tmp_path / "l.csv").write_text("deep/x.mp4 0\ndeep/x.avi 1\n")
    where = [str(tmp_path / "l.csv"), "--output", str(tmp_path / "out"), "--data_root", str(tmp_path / "data")]
    resize_videos.main([*where, "--root", str(tmp_path / "data"), "--relative"])
    assert (tmp_path / "out" / "l.csv").read_text() == "deep/x.mp4.mp4 0\ndeep/x.avi.mp4 1\n"
    videos = video_list(str(tmp_path / "out" / "l.csv"), data_root=str(tmp_path / "out" / "videos"))
    assert read_frames(videos.path(1), EVERY).shape == (24, 64, 80, 3)


def test_a_second_run_makes_what_is_new_or_changed_alone(resize, clips, tmp_path):
    sources = [tmp_path / "data" / f"{name}.mp4" for name in "abc"]
    sources[0].parent.mkdir()
    for source in sources[:2]:
        source.write_bytes(clips["small.mp4"].read_bytes())
    listed = write_list(tmp_path / "l.csv", sources)
    results, text = resize(listed)
    assert list(results) == ["a.mp4", "b.mp4"] and "made now: 2" in text and "1 failed" in text
    made = os.stat(results["a.mp4"]).st_mtime_ns
    sources[2].write_bytes(clips["small.mp4"].read_bytes())
    sources[1].write_bytes(clips["short.mp4"].read_bytes())
    os.utime(sources[1], (time.time() + 5, time.time() + 5))
    sources[0].unlink()  # an original may be gone by then
    results, text = resize(listed)
    assert list(results) == ["a.mp4", "b.mp4", "c.mp4"] and "1 of 3 videos are there already" in text
    assert os.stat(results["a.mp4"]).st_mtime_ns == made
    assert len(read_frames(results["b.mp4"], EVERY)) == 5
    assert not (tmp_path / "out" / "failed.tsv").exists()


def test_refused(resize, clips, tmp_path):
    listed = write_list(tmp_path / "l.csv", [clips["short.mp4"]])
    resize(listed)
    with pytest.raises(RunError, match="is not below --root"):
        resize(listed, "--root", "/no/such")
    with pytest.raises(RunError, match="was made with --short_side 256, not 128"):
        resize(listed, "--short_side", "128")


def test_a_list_that_would_move_the_folders_is_refused(resize, clips, tmp_path):
    """val/a.mp4 alone would go where train/a.mp4 is."""
    for name, clip in {"train": "short.mp4", "val": "small.mp4"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").write_bytes(clips[clip].read_bytes())
    resize(write_list(tmp_path / "l1.csv", [tmp_path / "train" / "a.mp4"]), "--root", tmp_path)
    with pytest.raises(RunError, match=f"was made with --root {tmp_path}, not {tmp_path}/val"):
        resize(write_list(tmp_path / "l2.csv", [tmp_path / "val" / "a.mp4"]))
    results, _ = resize(write_list(tmp_path / "l2.csv", [tmp_path / "val" / "a.mp4"]), "--root", tmp_path)
    assert len(read_frames(results["a.mp4"], EVERY)) == 24


def test_originals_are_not_overwritten_and_two_runs_at_once_are_refused(clips, tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(clips["short.mp4"].read_bytes())
    listed = write_list(tmp_path / "l.csv", [tmp_path / "videos" / "a.mp4"])
    with pytest.raises(RunError, match="is one of the originals"):
        resize_videos.main([listed, "--output", str(tmp_path)])
    monkeypatch.setattr(data_tools, "LOCK_WAIT", 0.2)
    with data_tools.output_folder(tmp_path / "out", {}), pytest.raises(RunError, match="another run is writing"):
        resize_videos.main([listed, "--output", str(tmp_path / "out")])


# Killed ---------------------------------------------------------------------------------------------------------


def wholes(folder):
    """Frames of every video that has its final name."""
    return {path.name: len(read_frames(str(path), EVERY)) for path in folder.rglob("*.mp4") if ".unf" not in str(path)}


@pytest.mark.parametrize("name, done", [("write_resized", False), ("put_in_place", True), ("write_resized", None)])
def test_killed_anywhere_it_goes_on(tmp_path, name, done):
    """Killed three times: when a file is begun, when one is done, and some time after one was begun."""
    lengths = {f"{number}.mp4": 20 + number for number in range(8)}
    frames = source_frames("bikes", 0, 27, (192, 128))
    for video, count in lengths.items():
        write_mp4(tmp_path / video, frames[:count])
    listed = write_list(tmp_path / "l.csv", [tmp_path / video for video in lengths])
    out, rng = tmp_path / "out", np.random.default_rng(0)
    argv = [listed, "--output", str(out), "--workers", "2", "--preset", "slow"]
    for _ in range(3):
        pause = rng.uniform(0, 0.2) if done is None else 0
        kill_at(resize_videos.main, argv, resize_videos, name, done=bool(done), pause=pause)
        assert wholes(out / "videos").items() <= lengths.items()  # what has its name is whole
        listed_then = read_list(str(out / "l.csv")) if (out / "l.csv").exists() else []
        assert {Path(line.name).name for line in listed_then} <= wholes(out / "videos").keys()
    resize_videos.main(argv)
    assert wholes(out / "videos") == lengths
    assert [line.name for line in read_list(str(out / "l.csv"))] == [str(out / "videos" / name) for name in lengths]
    assert not (out / ".unfinished").exists()


def test_workers_end_with_the_program(tmp_path):
    """Killed, it leaves no process behind that would go on writing."""
    write_mp4(tmp_path / "long.mp4", source_frames("bikes", 0, 100, (640, 480)))
    listed = write_list(tmp_path / "l.csv", [tmp_path / "long.mp4"])
    argv = [listed, "--output", str(tmp_path / "out"), "--preset", "veryslow"]
    worker = Path("/proc") / str(kill_at(resize_videos.main, argv, resize_videos, "write_resized"))
    while worker.exists() and "\nState:\tZ" not in status_of(worker):
        time.sleep(0.01)
    assert not (tmp_path / "out" / "videos").exists()  # nor was it let finish its work


def status_of(process):
    try:
        return (process / "status").read_text()
    except OSError:  # it is gone
        return ""


def test_a_missing_source_is_named(resize, tmp_path):
    listed = write_list(tmp_path / "l.csv", [tmp_path / "none.mp4"])
    with pytest.raises(RunError, match="all of its videos failed"):
        resize(listed)
    assert "no such file" in (tmp_path / "out" / "failed.tsv").read_text()
    with pytest.raises(VideoError):
        read_frames(str(tmp_path / "out" / "videos" / "none.mp4"), EVERY)
