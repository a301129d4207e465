"""The reader of frames against FFmpeg's own sequence, in containers and codecs of all kinds, and in odd files."""

import io
import re
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import resize_videos
from av.stream import Disposition
from fixtures_data_tools import set_matrix
from fixtures_kinds import KINDS, Kind, number_of, picture, write_kind
from fixtures_video import ROOT, decode_all, write_list
from PIL import Image

from datasets_finetune import ActionList, ViewReader, WindowReader
from video_check import wrong_frames
from video_reader import PyAVVideo, VideoError, read_clip, read_frames

pytest_plugins = "fixtures_video"
CHOICES = {  # ways to ask for frames of `total`
    "clip": lambda rng, total: np.minimum(rng.integers(0, total) + 4 * np.arange(16), total - 1),
    "segments": lambda rng, total: np.sort(rng.integers(0, total, 16)),
    "unordered": lambda rng, total: rng.integers(0, total, 5),
    "one": lambda rng, total: rng.integers(0, total, 1),
    "last": lambda rng, total: np.arange(max(0, total - 3), total),
}


def write(path, kind, frames=140):
    """Write a video of a kind, or skip the test."""
    if kind.codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {kind.codec}")
    write_kind(str(path), kind, frames)
    return str(path)


def check(path, choices=CHOICES, rounds=2):
    """Compare pixels and seconds of chosen frames with a plain decoding of the file; returns the number of frames."""
    pictures, times = [], []
    with av.open(path) as container:
        for packet in container.demux(container.streams.best("video")):
            for frame in packet.decode():
                pictures.append(frame.to_ndarray(format="rgb24"))
                times.append(frame.time)
    for seed, choose in enumerate([*choices.values()] * rounds):
        totals = []
        clip = read_clip(path, lambda total: totals.append(total) or choose(np.random.default_rng(seed), total))
        assert totals == [len(pictures)]
        for index, frame, second in zip(clip.indices, clip.frames, clip.seconds):
            assert (frame == pictures[index]).all(), f"frame {index} is another one"
            if path.endswith(("mp4", "mkv", "mov")) and times == sorted(times):
                assert second == pytest.approx(times[index])
    return len(pictures)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.title}, {kind.suffix}")
def test_frames_are_those_of_ffmpegs_sequence(kind, tmp_path):
    path = write(tmp_path / f"v.{kind.suffix}", kind)
    total = check(path)
    assert total == 140 if kind.change is None else 60 < total <= 140
    assert wrong_frames(path, np.random.default_rng(1)) == ""


def test_what_no_clip_needs_is_not_decoded(tmp_path, monkeypatch):
    """Of 7 B-frames between two others those that are not wanted; nothing before the key frame, nothing behind."""
    options = {"x264-params": "bframes=7:b-adapt=0:b-pyramid=none:keyint=24:min-keyint=24:scenecut=0"}
    path = write(tmp_path / "v.mp4", Kind("", "mp4", "libx264", options))
    given, modes = [], []
    real = PyAVVideo.packets_from

    def watched(self, place):
        for number, packet in real(self, place):
            yield number, packet
            given.append(number)
            modes.append(str(self.stream.codec_context.skip_frame))

    monkeypatch.setattr(PyAVVideo, "packets_from", watched)
    wanted = 48 + 4 * np.arange(6)
    frames = read_frames(path, lambda total: wanted)
    assert [number_of(frame) for frame in frames] == list(wanted)
    assert min(given) == 48 and max(given) < 48 + 24
    assert sum("NONREF" in mode for mode in modes) >= 10


def test_files_that_cannot_be_sought(tmp_path):
    """Two recordings one behind the other: the stamps begin anew."""
    part = Path(write(tmp_path / "v.ts", Kind("", "ts", "libx264")))
    (tmp_path / "twice.ts").write_bytes(part.read_bytes() * 2)
    assert check(str(tmp_path / "twice.ts")) == 280


@pytest.mark.parametrize(
    "matrix, shown",
    [
        ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1, (1, 2))),
        ((0, -1, 1, 0), lambda stored: np.rot90(stored, 1, (1, 2))),
        ((-1, 0, 0, -1), lambda stored: stored[:, ::-1, ::-1]),
        ((-1, 0, 0, 1), lambda stored: stored[:, :, ::-1]),
        ((1, 0, 0, -1), lambda stored: stored[:, ::-1]),
        ((0, 1, 1, 0), lambda stored: stored.swapaxes(1, 2)),
        ((0, -1, -1, 0), lambda stored: stored[:, ::-1, ::-1].swapaxes(1, 2)),
    ],
)
def test_turned_and_mirrored_videos_are_read_as_they_are_shown(matrix, shown, clips, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(clips["bunny.mp4"].read_bytes())
    set_matrix(path, *matrix)
    assert np.array_equal(read_frames(str(path), np.arange), shown(decode_all(clips["bunny.mp4"])))


@pytest.mark.parametrize("suffix", ["avi", "mov"])
def test_a_palette_that_only_the_first_packet_carries(suffix, tmp_path):
    """As in uncompressed grey files of ImageJ."""
    palette = np.stack([np.full(256, 255), *[np.arange(256)] * 3], axis=1).astype(np.uint8)  # alpha, red, green, blue
    with av.open(str(tmp_path / f"v.{suffix}"), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "pal8"
        for number in range(40):
            grey = np.ascontiguousarray(picture(number)[..., 1])
            frame = av.VideoFrame.from_ndarray((grey, palette), "pal8")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert check(str(tmp_path / f"v.{suffix}")) == 40
    assert [number_of(frame) for frame in read_frames(str(tmp_path / f"v.{suffix}"), np.arange)] == list(range(40))


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_frames_with_exif_are_read_upright(orientation, turns, tmp_path):
    """Photographs of a camera, made a video without encoding them anew."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with av.open(str(tmp_path / "v.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuvj420p"
        for number in range(10):
            file = io.BytesIO()
            Image.fromarray(picture(number)).save(file, "JPEG", quality=95, exif=exif)
            packet = av.Packet(file.getvalue())
            packet.stream, packet.is_keyframe = stream, True
            packet.pts, packet.dts, packet.time_base = number, number, Fraction(1, 25)
            container.mux(packet)
    frames = read_frames(str(tmp_path / "v.mov"), np.arange)
    assert [number_of(np.rot90(frame, -turns)) for frame in frames] == list(range(10))
    resize_videos.main([write_list(tmp_path / "l.csv", [tmp_path / "v.mov"]), "--output", str(tmp_path / "out")])
    assert read_frames(str(tmp_path / "out" / "videos" / "v.mp4"), np.arange).shape == frames.shape


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(picture(1), "rgb24").reformat(format="yuvj420p")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(VideoError, match="no video stream, only a cover picture"):
        read_frames(str(tmp_path / "song.mp4"), np.arange)


def test_a_colon_in_a_name_makes_no_protocol(clips, tmp_path, monkeypatch):
    (tmp_path / "12:30.mp4").write_bytes(clips["short.mp4"].read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read_frames("12:30.mp4", np.arange)) == 5
    assert wrong_frames("12:30.mp4", np.random.default_rng(0)) == ""


def test_packets_that_are_falsely_marked_as_key_frames(tmp_path):
    """An mp4 file without a table of key frames."""

    def mark(number, packet):
        packet.is_keyframe = True
        return True

    path = write(tmp_path / "v.mp4", Kind("", "mp4", "mpeg4", change=mark))
    wanted = np.array([30, 75, 130])
    assert [number_of(frame) for frame in read_frames(path, lambda total: wanted)] == list(wanted)
    assert wrong_frames(path, np.random.default_rng(0)) == ""


def test_frames_that_ffmpeg_leaves_out_are_reported_if_only_some_readings_notice(tmp_path):
    lossy = Kind("", "mp4", "libx265", {"x265-params": "log-level=none"}, 12, change=lambda number, _: number % 17 != 9)
    path = write(tmp_path / "v.mp4", lossy, 100)
    for seed in range(4):
        assert "the reader counts" in wrong_frames(path, np.random.default_rng(seed))


def test_all_programs_read_the_same_of_several_streams(tmp_path):
    """FFmpeg's choice."""
    path = str(tmp_path / "two.mkv")
    with av.open(path, "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for shrink, stream in zip((2, 1), streams):
            stream.width, stream.height, stream.pix_fmt = 128 // shrink, 96 // shrink, "yuv420p"
        for number in range(20):
            for shrink, stream in zip((2, 1), streams):
                frame = av.VideoFrame.from_ndarray(picture(number + 100 * (shrink - 1)), "rgb24")
                frame = frame.reformat(stream.width, stream.height, "yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    numbers = [number_of(frame) for frame in read_frames(path, np.arange)]
    assert numbers in (list(range(20)), list(range(100, 120)))
    resized = tmp_path / "out" / "videos" / "two.mp4"
    (tmp_path / "l.csv").write_text(f"{path} 0\n")
    resize_videos.main([str(tmp_path / "l.csv"), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert [number_of(frame) for frame in read_frames(str(resized), np.arange)] == numbers
    assert wrong_frames(path, np.random.default_rng(0)) == wrong_frames(str(resized), np.random.default_rng(0)) == ""


def test_decord_reads_ordinary_files_alike_and_is_found_wrong_elsewhere(clips, tmp_path):
    choose = lambda total: np.arange(0, total, 3)
    ours, theirs = (read_clip(str(clips["bikes.mp4"]), choose, reader) for reader in ("pyav", "decord"))
    assert (ours.frames == theirs.frames).all() and np.allclose(ours.seconds, theirs.seconds, atol=1e-6)
    path = write(tmp_path / "v.mp4", next(kind for kind in KINDS if "cut by stream copy" in kind.title))
    assert re.search("frames differ|the reader counts", wrong_frames(path, np.random.default_rng(0), "decord"))


def test_decord_is_imported_only_for_its_reader(clips):
    code = "import sys; from datasets import *; from video_reader import *; "
    code += f"read_frames({str(clips['bikes.mp4'])!r}, np.arange); print('decord' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("kind", [IndexError, RuntimeError, ValueError])
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_errors_of_our_own_are_no_unreadable_videos(clips, tmp_path, kind, reader):
    def choose(total):
        raise kind("ours")

    with pytest.raises(kind, match="ours"):
        read_clip(str(clips["bikes.mp4"]), choose, reader)
    with pytest.raises(VideoError, match="is a folder; of a folder of frames, make a video first: ffmpeg"):
        read_clip(str(tmp_path), np.arange, reader)


# Seconds --------------------------------------------------------------------------------------------------------


def test_labels_in_seconds_go_by_the_frames_own_times(tmp_path):
    """25 frames a second up to frame 60, then 5: second 4 is frame 68, not frame 100."""
    stamps = [40 * n if n < 60 else 2400 + 200 * (n - 60) for n in range(120)]
    path = write(tmp_path / "v.mp4", Kind("", "mp4", "libx264", stamps=stamps), 120)
    (tmp_path / "l.csv").write_text(f"{path} 3:4.0-6.0,5:0.0-2.0\n")
    videos = ActionList(str(tmp_path / "l.csv"), 10)
    for start in range(0, 104, 4):
        clip = read_clip(path, lambda total: np.arange(start, start + 16))
        first, last = stamps[start] / 1000, stamps[start + 15] / 1000
        expected = {label for label, a, b in ((3, 4, 6), (5, 0, 2)) if a <= last and b >= first}
        assert set(np.flatnonzero(videos.clip_label(0, clip)).tolist()) == expected


# Views and windows ----------------------------------------------------------------------------------------------


def test_windows_lie_where_localisation_code_expects_them(tmp_path):
    """ActionFormer's grid: feature i is centred on second (i * stride + window / 2) / rate."""
    path = write(tmp_path / "v.mp4", Kind("", "mp4", "libx264"))
    frames = decode_all(path)
    reader = WindowReader("dense", 0, 1, 96, 4, 3, every=5)
    views = list(reader.views(path))
    assert len(views) == (140 - 12) // 5 + 1
    for i, (clips, span) in enumerate(views):
        assert (span.start + span.end) / 2 == pytest.approx((i * 5 + 12 / 2) / 25)
        assert span.start == pytest.approx(i * 5 / 25) and span.rate == pytest.approx(25) and span.frames == 140
        assert (clips[0] == frames[5 * i : 5 * i + 12 : 3, :, 16:112]).all()  # 128 x 96: the square in the middle


@pytest.mark.parametrize("every, first", [(0.4, [0, 10, 20, 30, 40]), (0.5, [0, 12, 25, 37])])
def test_windows_by_seconds_begin_with_the_frame_shown_then(every, first):
    reader = WindowReader("dense", 0, 1, 32, 4, 2, every=every, in_seconds=True)
    assert reader.frame_indices(np.arange(50) / 25)[:, 0].tolist() == first
    late = np.concatenate([np.arange(25) / 25, 1 + np.arange(5) * 0.2])  # 25 frames a second, then 5
    assert reader.frame_indices(late)[:, 0].tolist() == [shown for shown in first if shown < 22]
    with pytest.raises(VideoError, match="no times"):
        reader.frame_indices(np.full(50, np.nan))


def test_a_video_shorter_than_a_window_has_one(tmp_path):
    path = write(tmp_path / "v.mp4", Kind("", "mp4", "libx264"), 5)
    ((clips, span),) = WindowReader("dense", 0, 1, 32, 8, 2, every=4).views(path)
    assert (clips[0, 3:] == clips[0, 3]).all() and span.end == pytest.approx(5 / 25)


MANY = [ViewReader("dense", 40, 1, 32, 4, 1), WindowReader("dense", 0, 1, 32, 4, 1, every=2)]


@pytest.mark.parametrize("reader", MANY)
def test_few_frames_are_in_memory_however_many_windows_there_are(reader, tmp_path, monkeypatch):
    """Frames are counted that have been cropped and not yet been given up."""
    path = write(tmp_path / "v.mp4", Kind("", "mp4", "libx264"))
    seen, squares = [], ViewReader.squares

    def watched(self, frame):
        found = squares(self, frame)
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(ViewReader, "squares", watched)
    most = max(sum(reference() is not None for reference in seen) for _ in reader.views(path))
    assert 4 <= most <= 8 and len(seen) > 80
