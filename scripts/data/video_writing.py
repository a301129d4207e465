"""Make one video small and quick to read at random places: decode, shrink, encode as H.264, verify the result.

Timestamps are those of the source, as video_reader.py counts them; if they cannot be right, the frame rate gives them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from data_tools import Unusable

from shards import opened, problem_of
from video_check import ffmpeg_frames, slow_reasons
from video_reader import (
    VideoError,
    can_be_right,
    check_whole,
    display_matrix,
    read_frames,
    start_of,
    upright,
    video_stream,
)

AV_ERRORS = (av.FFmpegError, OSError, ValueError, EOFError)
TICK = Fraction(1, 90000)  # seconds; fine enough for any source's stamps
USUAL_RATE = Fraction(25)  # frames per second, for a source that does not say
MIN_PSNR = 20.0  # dB; below it a picture is another one, not a bad one
MIN_SIDE = 16


class WrongTimes(Unusable):
    """A source has timestamps that cannot be right."""


@dataclass(frozen=True)
class Settings:
    """Settings of the encoder."""

    short_side: int = 256  # pixels; a smaller video keeps its size
    key_frames: int = 24  # largest distance of key frames, in frames
    crf: int = 23  # x264's constant quality, 0 (lossless) to 51
    preset: str = "medium"  # x264's effort
    b_frames: int = 7  # frames between two others that need not be decoded, as none refers to them; -1: the preset's


@dataclass(frozen=True)
class Written:
    """Properties of a video that was written."""

    seconds: float
    psnr: float  # dB, of some frames, to the source resized the same way
    guessed_rate: bool  # the source has neither timestamps nor a frame rate


@dataclass(frozen=True)
class Timing:
    """Times of the frames of a video."""

    rate: Fraction  # frames per second
    trusted: bool  # each packet has a timestamp, and these are used instead of `rate`
    start: Fraction  # time that counts as 0, seconds
    guessed: bool  # `rate` is used, and is USUAL_RATE, as the file names no credible one


def even_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Shrink the short side to `short_side`: (width, height) with the same aspect ratio, even for YUV 4:2:0."""
    scale = min(1.0, short_side / min(width, height))
    return max(MIN_SIDE, 2 * round(width * scale / 2)), max(MIN_SIDE, 2 * round(height * scale / 2))


def read_timing(path: str) -> Timing:
    """Read the timing of a video from its index and packets."""
    with opened(path) as source, av.open(source, "r", metadata_errors="replace") as container:
        stream = video_stream(container)
        rate = stream.average_rate
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        check_whole(stream, len(stamps))
        start = Fraction(start_of(container))
    trusted = None not in stamps and can_be_right(np.sort(np.array(stamps, float)))
    credible = bool(rate) and 1 <= rate <= 240
    return Timing(rate if credible else USUAL_RATE, trusted, start, not trusted and not credible)


def resized_frames(path: str, short_side: int, timing: Timing) -> Iterator[tuple[av.VideoFrame, Fraction, Fraction]]:
    """Yield frames shrunk to YUV 4:2:0 and turned upright, with their times, at least 0, and durations, in seconds."""
    start, reformatter = timing.start, VideoReformatter()
    how = {"interpolation": Interpolation.BICUBIC, "dst_color_range": ColorRange.MPEG, "threads": 1}
    for number, frame in enumerate(ffmpeg_frames(path)):
        second, lasts = number / timing.rate, 1 / timing.rate
        if timing.trusted:
            if frame.pts is None:
                raise WrongTimes(f"frame {number} has no timestamp")
            second = frame.pts * frame.time_base
            start = start if number else min(start, second)
            second -= start
            lasts = frame.duration * frame.time_base or lasts
        small = reformatter.reformat(frame, *even_size(frame.width, frame.height, short_side), "yuv420p", **how)
        if display_matrix(frame) is not None:
            small = av.VideoFrame.from_ndarray(upright(pixels(small), frame), "rgb24").reformat(format="yuv420p")
        yield small, second, lasts


def pixels(frame: av.VideoFrame) -> np.ndarray:
    """A frame as RGB, uint8 ``[H, W, 3]``."""
    return frame.to_ndarray(format="rgb24")


def psnr_of(errors: float) -> float:
    """Peak signal to noise ratio, dB, of a mean squared error of uint8 values; at most 90."""
    return 10 * np.log10(255**2 / max(errors, 255**2 / 1e9))


def write_resized(source: str, target: str, settings: Settings) -> Written:
    """Write `source` resized as the mp4 file `target`, and verify it.

    Raises Unusable if the source cannot be decoded to its end, or the result is not as it should be.
    """
    if problem := problem_of(source):
        raise Unusable(problem)
    try:
        timing = read_timing(source)
        try:
            kept, stamps, size = encode(source, target, settings, timing)
        except WrongTimes:  # then the frame rate gives them
            timing = replace(timing, trusted=False)
            kept, stamps, size = encode(source, target, settings, timing)
    except VideoError as error:
        raise Unusable(str(error)) from error
    except AV_ERRORS as error:
        raise Unusable(f"{getattr(error, 'strerror', None) or error}"[:200]) from error
    psnr = verify(target, kept, stamps, size, settings)
    return Written(float(stamps[-1] - stamps[0] + 1 / timing.rate), psnr, timing.guessed)


def encode(
    source: str, target: str, settings: Settings, timing: Timing
) -> tuple[dict[int, np.ndarray], list[Fraction], tuple[int, int]]:
    """Write the file.

    Returns:
        pixels of frames 0, 1, 2, 4, 8, ... and of the last, by number; time of each frame, seconds; (width, height).
    """
    kept: dict[int, np.ndarray] = {}
    stamps: list[Fraction] = []
    lasting: dict[int, int] = {}  # by the time of the frame
    before = Fraction(0)
    with av.open(target, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=timing.rate)

        def put(packets: list[av.Packet]) -> None:
            for packet in packets:
                packet.duration = lasting.pop(packet.pts)  # FFmpeg would take the frame rate's
                container.mux(packet)

        for number, (frame, second, lasts) in enumerate(resized_frames(source, settings.short_side, timing)):
            if not stamps:
                configure(stream, frame, settings)
            if (frame.width, frame.height) != (stream.width, stream.height):
                raise Unusable(f"the picture changes its size at frame {number}")
            if second < before:
                raise WrongTimes(f"the timestamps go back at frame {number}")
            before = second
            if stamps and second - stamps[-1] < TICK:  # repeated
                second = stamps[-1] + 2 * TICK
            stamps.append(second)
            if number & (number - 1) == 0:
                kept[number] = pixels(frame)
            frame.pts, frame.time_base = round(second / TICK), TICK
            lasting[frame.pts] = round(lasts / TICK)
            frame.pict_type = PictureType.NONE  # or the source's key frames become key frames again
            put(stream.encode(frame))
            last = frame
        if not stamps:
            raise Unusable("no frames")
        kept[number] = pixels(last)
        put(stream.encode())
    return kept, stamps, (stream.width, stream.height)


def configure(stream: av.VideoStream, frame: av.VideoFrame, settings: Settings) -> None:
    """Configure the encoder for frames like this one."""
    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
    stream.gop_size = settings.key_frames
    context = stream.codec_context
    context.time_base, context.thread_count = TICK, 1
    context.color_range, context.colorspace = frame.color_range, frame.colorspace
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    stream.options = {"crf": str(settings.crf), "preset": settings.preset, "tune": "fastdecode"}
    if settings.b_frames >= 0:
        stream.options |= {"x264-params": f"bframes={settings.b_frames}:b-adapt=0:b-pyramid=none"}


def verify(
    path: str, kept: dict[int, np.ndarray], stamps: list[Fraction], size: tuple[int, int], settings: Settings
) -> float:
    """Check size, times and key frames of a file, and some pictures as training reads them. Raises Unusable.

    Args:
        kept: expected pixels ``[H, W, 3]`` of some frames, by number.
        stamps: time of each frame, seconds.
    Returns:
        PSNR of the kept frames, dB.
    """
    with av.open(path) as container:
        packets = sorted((p.pts * p.time_base, p.is_keyframe) for p in container.demux(video=0) if p.size)
    times = [time for time, _ in packets]
    keys = [number for number, (_, key) in enumerate(packets) if key]
    if len(packets) != len(stamps):
        raise Unusable(f"the result has {len(packets)} frames, not {len(stamps)}")
    if max(abs(time - stamp) for time, stamp in zip(times, stamps)) > Fraction(1, 1000) or len(set(times)) < len(times):
        raise Unusable("the result has other timestamps than the source")
    if np.diff([*keys, len(packets)]).max() > settings.key_frames:
        raise Unusable("the result has fewer key frames than asked for")
    try:
        if reasons := slow_reasons(path, 2**16):
            raise Unusable(f"the result is slow to load: {reasons[0]}")
        frames = read_frames(path, lambda _: np.array(sorted(kept)))
    except VideoError as error:
        raise Unusable(f"the result cannot be read: {error}") from error
    if frames.shape[2:0:-1] != size:
        raise Unusable(f"the result has {frames.shape[2]} x {frames.shape[1]} pixels, not {size[0]} x {size[1]}")
    errors = [float(np.square(kept[n] - frame.astype(float)).mean()) for n, frame in zip(sorted(kept), frames)]
    if psnr_of(max(errors)) < MIN_PSNR:
        raise Unusable(f"the result shows other pictures than the source ({psnr_of(max(errors)):.0f} dB)")
    return psnr_of(float(np.mean(errors)))
