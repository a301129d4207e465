"""Videos of many containers and codecs in which every picture shows its number. No test here: PYTEST_DONT_REWRITE."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from fixtures_video import usual_priority

WIDTH, HEIGHT, RATE = 128, 96, 25


@dataclass(frozen=True)
class Kind:
    """A kind of video.

    Args:
        options: of the encoder.
        gap: frames between key frames.
        stamps: time of each frame, milliseconds; none: RATE frames a second.
        change: function of number and packet, applied to each packet while it is copied into a second file; packets
            for which it returns False are dropped.
    """

    title: str
    suffix: str
    codec: str
    options: dict[str, str] = field(default_factory=dict)
    gap: int = 60
    pixels: str = "yuv420p"
    stamps: Sequence[int] = ()
    change: Any = None


def drop_start(number: int, packet: av.Packet) -> bool:
    """Start between two key frames, as a recording may."""
    return number > 7


def cut_copied(number: int, packet: av.Packet) -> bool:
    """Cut as ``ffmpeg -ss 3 -c copy`` does: frames before the cut are in the file, but not to be shown."""
    packet.pts -= int(3 / packet.time_base)
    packet.dts -= int(3 / packet.time_base)
    return True


def lose_order(number: int, packet: av.Packet) -> bool:
    """Stamp frames in coding order, as a program without B-frames does."""
    packet.pts = packet.dts
    return True


OPEN = "open-gop=1:keyint=60:min-keyint=60:scenecut=0:bframes=3"
SLOWER = [40 * n if n < 120 else 4800 + 200 * (n - 120) for n in range(240)]
PAUSED = [40 * n + (600_000 if n > 100 else 0) for n in range(240)]
X265, VPX = {"x265-params": "log-level=none"}, {"deadline": "good", "cpu-used": "8", "lag-in-frames": "25"}
KINDS = [
    Kind("H.264, B-frames, closed GOPs", "mp4", "libx264"),
    Kind("H.264, as resize_videos.py writes it", "mp4", "libx264", {"x264-params": "bframes=7:b-pyramid=none"}, 24),
    Kind("H.264, open GOPs", "mp4", "libx264", {"x264-params": OPEN}),
    Kind("H.264, open GOPs", "mkv", "libx264", {"x264-params": OPEN}),
    Kind("H.264, periodic intra refresh", "mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=40:bframes=0"}),
    Kind("H.264, interlaced", "mov", "libx264", {"x264-params": "tff=1:bframes=3"}),
    Kind("H.264, B-frames", "flv", "libx264"),
    Kind("H.264, B-frames", "ts", "libx264"),
    Kind("H.264, B-frames", "avi", "libx264"),
    Kind("H.264, no B-frames", "avi", "libx264", {"bf": "0"}),
    Kind("H.264, rate falls from 25 to 5", "mp4", "libx264", stamps=SLOWER),
    Kind("H.264, a pause of ten minutes", "mp4", "libx264", stamps=PAUSED),
    Kind("H.264, two seconds before zero", "mkv", "libx264", stamps=[40 * n - 2000 for n in range(240)]),
    Kind("H.264, cut by stream copy", "mp4", "libx264", change=cut_copied),
    Kind("H.264, starts without key frame", "mkv", "libx264", change=drop_start),
    Kind("H.264, starts without key frame", "ts", "libx264", change=drop_start),
    Kind("H.264, B-frames stamped in coding order", "mp4", "libx264", change=lose_order),
    Kind("HEVC, x265's defaults (open GOPs)", "mp4", "libx265", X265),
    Kind("HEVC, open GOPs, 10 bit", "mkv", "libx265", X265, pixels="yuv420p10le"),
    Kind("HEVC, open GOPs", "ts", "libx265", X265),
    Kind("HEVC, open GOPs, cut by stream copy", "mp4", "libx265", X265, change=cut_copied),
    Kind("VP8, alternate reference frames", "webm", "libvpx", {**VPX, "auto-alt-ref": "1"}),
    Kind("VP9, alternate reference frames", "webm", "libvpx-vp9", {**VPX, "auto-alt-ref": "1"}),
    Kind("AV1", "mp4", "libsvtav1", {"preset": "10", "svtav1-params": "log=0"}),
    Kind("MPEG-4, no B-frames", "avi", "mpeg4"),
    Kind("MPEG-4, B-frames", "avi", "mpeg4", {"bf": "2"}, 30),
    Kind("MPEG-1 without a container", "m1v", "mpeg1video", {"bf": "2"}, 15),
    Kind("MPEG-2, B-frames", "ts", "mpeg2video", {"bf": "2"}, 15),
    Kind("MPEG-2, B-frames", "mpg", "mpeg2video", {"bf": "2"}, 15),
    Kind("MJPEG", "avi", "mjpeg", pixels="yuvj420p"),
    Kind("WMV", "wmv", "wmv2", gap=30),
]


def picture(number: int) -> np.ndarray:
    """Draw a number below 256 as two rows of bright and dark fields; uint8 ``[H, W, 3]``."""
    fields = np.unpackbits(np.array([number], np.uint8)).reshape(2, 4) * 200 + 25
    return np.repeat(np.kron(fields, np.ones((HEIGHT // 2, WIDTH // 4), np.uint8))[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    """Read the number that a frame ``[H, W, 3]`` shows."""
    height, width = frame.shape[:2]
    fields = frame.mean(axis=2).reshape(2, height // 2, 4, width // 4).mean(axis=(1, 3))
    return int(np.packbits(fields.ravel() > 125)[0])


def write_kind(path: str, kind: Kind, frames: int) -> None:
    """Write a video. Raises av.FFmpegError if this FFmpeg cannot."""
    first = f"{path}.whole.{kind.suffix}" if kind.change else path
    with av.open(first, "w") as container:
        stream = container.add_stream(kind.codec, rate=RATE, options=dict(kind.options))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, kind.pixels, kind.gap
        unit = Fraction(1, 1000 if kind.stamps else RATE)
        stream.codec_context.time_base = unit
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24").reformat(format=kind.pixels)
            frame.pts, frame.time_base = kind.stamps[number] if kind.stamps else number, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    usual_priority()
    if kind.change:
        with av.open(first) as source, av.open(path, "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for number, packet in enumerate(source.demux(video=0)):
                if packet.dts is not None and kind.change(number, packet):
                    packet.stream = stream
                    target.mux(packet)
        Path(first).unlink()
