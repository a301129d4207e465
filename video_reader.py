"""Frames of a video by index. Data sets and transforms reach video decoders only through this file.

Frame i is the i-th frame that FFmpeg returns when it decodes the file from its start. For most files it is found
without decoding the others: the timestamps of the packets give the order of the frames, decoding starts at the key
frame before the wanted one, and frames that no other frame refers to are skipped. If the timestamps do not give that
order (`is_exact`), or packets need the file's first one for its palette, the file is decoded from its start and the
frames are counted.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from shards import ShardError, opened, split

READERS = ("pyav", "decord")
NEVER_SKIPS = ("libdav1d",)  # decoders that read skip_frame only when they are opened
MAX_REPEATED = 0.1  # fraction of the frames whose time may be that of the frame before
MAX_REORDER = 16  # frames between decoding and display, the limit of H.264 and HEVC
BROADCAST = ("mpegts", "mpeg")  # formats whose timestamps begin anywhere
NO_TIMESTAMPS = 0x80  # flag of a format (AVFMT_NOTIMESTAMPS): FFmpeg makes the timestamps up
REPEAT_SIZE = 8  # largest MPEG-4 packet without a coded frame (repeats a frame, or belongs to a packed one), bytes
DECODER_ERRORS = (av.FFmpegError, OSError, ValueError, EOFError, IndexError, MemoryError)
DECORD_CODES = {"-1128613112": "decord has no decoder for this format (AV1?)", "-1381258232": "no video stream"}


class VideoError(Exception):
    """A video cannot be used; the message is the reason, without the path."""


class InexactError(VideoError):
    """The decoder does not return a frame that the packets announce."""


class Clip(NamedTuple):
    """Frames of a video, their indices, and presentation times."""

    frames: np.ndarray  # RGB uint8 [T, H, W, 3]
    indices: np.ndarray  # int [T]
    seconds: np.ndarray  # float64 [T], from the start of the file


class Span(NamedTuple):
    """Time of a temporal view of a video."""

    start: float  # second of its first frame
    end: float  # second of the frame that would follow its last one
    rate: float  # average frames per second of the whole video; NaN for a single frame
    frames: int  # of the whole video


Choose = Callable[[int], np.ndarray]  # number of frames → indices [T] of the wanted ones, in any order
Transform = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] → [h, w, 3]


def read_clip(path: str, choose: Choose, reader: str = "pyav", transform: Transform = lambda frame: frame) -> Clip:
    """Decode the frames that `choose` picks, repeated ones once.

    Args:
        choose: called with the number of frames, and called again if that turns out to be wrong.
        reader: one of READERS.
        transform: applied to each frame as it is decoded, so that only the results are in memory together.
    Raises:
        VideoError: missing, unreadable, or without frames.
    """
    try:
        with open_video(path, reader) as video:
            return take_clip(video, choose, transform)
    except InexactError:
        with open_video(path, reader, in_order=True) as video:
            return take_clip(video, choose, transform)


def read_frames(path: str, choose: Choose, reader: str = "pyav") -> np.ndarray:
    """Decode frames with read_clip, and return only them, ``[T, H, W, 3]``."""
    return read_clip(path, choose, reader).frames


def take_clip(video: "PyAVVideo | DecordVideo", choose: Choose, transform: Transform) -> Clip:
    """Decode the frames of an open video that `choose` picks. Raises VideoError."""
    indices = choose(len(video.seconds))
    wanted, back = np.unique(indices, return_inverse=True)
    frames = np.empty(0, np.uint8)
    for number, frame in enumerate(map(transform, video.frames(wanted))):
        if number == 0:
            frames = np.empty((len(wanted), *frame.shape), np.uint8)
        if frame.shape != frames.shape[1:]:
            raise VideoError(f"the frame size changes at frame {wanted[number]}")
        frames[number] = frame
    return Clip(frames if np.array_equal(wanted, indices) else frames[back], indices, video.seconds[indices])


@contextmanager
def open_video(path: str, reader: str = "pyav", in_order: bool = False) -> Iterator["PyAVVideo | DecordVideo"]:
    """Open a video, a file or a member of a shard, in a ``with`` block.

    Args:
        reader: one of READERS.
        in_order: PyAV decodes and counts all frames, ignoring timestamps.
    Raises:
        VideoError: missing, unreadable, or without frames.
    """
    if os.path.isdir(path):
        raise VideoError("is a folder; of a folder of frames, make a video first: ffmpeg -i FOLDER/%05d.jpg VIDEO.mp4")
    if not os.path.isfile(path) and not split(path):
        raise VideoError("no such file")
    with closing(DecordVideo(path) if reader == "decord" else PyAVVideo(path, in_order)) as video:
        if len(video.seconds) == 0:
            raise VideoError("no frames")
        yield video


# PyAV -----------------------------------------------------------------------------------------------------------


class Packets(NamedTuple):
    """The P packets of a video stream, in decoding order."""

    pts: np.ndarray  # float64 [P], presentation time in ticks of the stream, NaN if unknown
    dts: np.ndarray  # float64 [P], decoding time, likewise
    key: np.ndarray  # bool [P], decoding can start there
    shown: np.ndarray  # bool [P], False outside of an edit list
    hidden: bool  # a packet may hold no frame to show, or several


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg chooses. Raises VideoError if there is none that can be decoded."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise VideoError("no video stream")
    if stream.disposition & Disposition.attached_pic:
        raise VideoError("no video stream, only a cover picture")
    if stream.codec_context is None:
        raise VideoError("FFmpeg has no decoder for this format")
    if container.format.name.endswith("_pipe"):
        raise VideoError("an image, not a video")
    return stream


def holds_no_picture(codec: str, packet: av.Packet) -> bool:
    """Whether a packet seems to hold no frame to show, by the first bits of its header."""
    if packet.size == 0:
        return True
    if codec == "vp8":  # RFC 6386, 9.1: bit 4 is show_frame
        return not bytes(memoryview(packet)[:1])[0] & 0x10
    if codec == "vp9":  # bits: marker 2, profile 2, show_existing_frame, frame_type, show_frame; else a superframe
        view = memoryview(packet)
        return view[-1] & 0xE0 != 0xC0 and view[0] & 0x30 != 0x30 and not view[0] & 0x0A
    return codec == "mpeg4" and packet.size <= REPEAT_SIZE


def list_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Packets:
    """Read the packets of a stream to the end of the file, without decoding any."""
    codec, rows, hidden = stream.codec_context.name, [], False
    for packet in container.demux(stream):
        if packet.dts is None and packet.pts is None and packet.size == 0:
            continue  # the one that ends the stream
        rows.append((packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
        hidden |= packet.is_corrupt or holds_no_picture(codec, packet)
    check_whole(stream, len(rows))
    pts, dts, key, shown = zip(*rows) if rows else ((), (), (), ())
    return Packets(np.array(pts, float), np.array(dts, float), np.array(key, bool), np.array(shown, bool), hidden)


def check_whole(stream: av.VideoStream, num_packets: int) -> None:
    """Raise VideoError if the index of a file, if it has one, lists more packets than there are."""
    if len(stream.index_entries) > num_packets:
        raise VideoError(f"the file is cut off: {num_packets} of {len(stream.index_entries)} frames are there")


def is_exact(packets: Packets, has_b_frames: bool) -> bool:
    """Whether the timestamps of the packets give the order of the frames.

    They do not if one is missing, repeated or decreasing, if the first frame is not a key frame or others are shown
    before it (a decoder drops those), or if a packet holds no frame.
    """
    pts, dts = packets.pts, packets.dts[np.isfinite(packets.dts)]
    if packets.hidden or not len(pts) or np.isnan(pts).any() or len(np.unique(pts)) < len(pts):
        return False
    if not packets.key[0] or (pts < pts[0])[packets.shown].any() or (np.diff(dts) <= 0).any():
        return False
    depth = MAX_REORDER if has_b_frames else 1
    return bool((pts[depth:] > np.maximum.accumulate(pts)[:-depth]).all())


def start_of(container: InputContainer) -> Fraction:
    """Return the timestamp that counts as 0, in seconds: only streams of broadcasting begin at any time."""
    return Fraction(container.start_time or 0, av.time_base) if container.format.name in BROADCAST else Fraction(0)


def can_be_right(times: np.ndarray) -> bool:
    """Whether these can be the times of frames ``[total]``: none goes back, and few are repeated."""
    steps = np.diff(times)
    return bool((steps >= 0).all() and (steps == 0).sum() <= MAX_REPEATED * len(times))


class PyAVVideo:
    """A video opened by PyAV; see open_video. `seconds` ``[total]`` are the presentation times of its frames."""

    def __init__(self, path: str, in_order: bool = False):
        self.path, self.in_order = path, in_order
        try:
            self.open()
            if not in_order:
                self.packets = list_packets(self.container, self.stream)
                delayed = bool(self.stream.codec_context.has_b_frames)
                made_up = bool(self.container.format.flags & NO_TIMESTAMPS)
                palette = self.stream.codec_context.pix_fmt == "pal8"  # only the first packet may carry it
                exact = not made_up and not palette and is_exact(self.packets, delayed)
                self.in_order = not exact or not self.order_is_shown(delayed)
            if self.in_order:
                self.seconds = self.count_frames()
            else:
                places = np.flatnonzero(self.packets.shown)
                self.order = places[np.argsort(self.packets.pts[places], kind="stable")]  # [total], as they are shown
                self.seconds = self.packets.pts[self.order] * float(self.stream.time_base or 0) - self.start
        except (VideoError, *DECODER_ERRORS) as error:
            self.close()
            raise VideoError(decoder_reason(error, path)) from error

    def open(self) -> None:
        """Open the file at its start. Raises VideoError or one of DECODER_ERRORS."""
        self.opened = ExitStack()
        source = self.opened.enter_context(opened(self.path))
        self.container = self.opened.enter_context(av.open(source, "r", metadata_errors="replace"))
        self.stream = video_stream(self.container)
        self.stream.codec_context.thread_count = 1
        self.start = float(start_of(self.container))

    def close(self) -> None:
        """Close the file."""
        self.opened.close()

    def reopen(self) -> None:
        """Go back to the start, with a new decoder."""
        self.close()
        self.open()

    def order_is_shown(self, delayed: bool) -> bool:
        """Whether the decoder returns the first frames in the order of their timestamps.

        Only checked if the decoder delays frames although the stamps increase from packet to packet: some programs
        write such stamps for reordered frames.
        """
        if not delayed or (np.diff(self.packets.pts) < 0).any():
            return True
        self.reopen()
        first = (packet for packet, _ in zip(self.container.demux(self.stream), range(2 * MAX_REORDER)))
        return bool((np.diff([frame.pts or 0 for frame in decoded(first)]) > 0).all())

    def count_frames(self) -> np.ndarray:
        """Decode all frames to count them; returns their presentation times ``[total]``."""
        self.reopen()
        times = [frame.time for frame in decoded(self.container.demux(self.stream))]
        if None not in times and can_be_right(np.array(times, float)):
            return np.array(times, float) - self.start
        rate = float(self.stream.average_rate or 0)
        return np.arange(len(times)) / rate if rate else np.full(len(times), np.nan)

    def frames(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frames with these increasing indices, RGB uint8 ``[H, W, 3]``. Raises VideoError."""
        reason, done, reformatter = "", 0, VideoReformatter()
        for skip in (False,) if self.in_order else (True, False):
            pictures = self.counted(wanted) if self.in_order else self.sought(wanted[done:], skip)
            try:
                for picture in pictures:
                    yield to_rgb(picture, reformatter)
                    done += 1
            except DECODER_ERRORS as error:
                reason = decoder_reason(error, self.path)
            except InexactError as error:
                reason = str(error)
            if done == len(wanted):
                return
        raise InexactError(reason or f"{len(wanted) - done} of {len(wanted)} frames do not decode")

    def counted(self, wanted: np.ndarray) -> Iterator[av.VideoFrame]:
        """Yield the wanted frames, counting from the start."""
        self.reopen()
        chosen, last = set(wanted.tolist()), wanted[-1]
        for number, frame in enumerate(decoded(self.container.demux(self.stream))):
            if number in chosen:
                yield frame
            if number >= last:
                return

    def needed(self, places: np.ndarray) -> np.ndarray:
        """Packets to decode for those at `places`, bool ``[P]``: from the key frames before them on."""
        pts = self.packets.pts
        keys = np.flatnonzero(self.packets.key)
        decode = np.zeros(len(pts) + 1, int)
        key = np.searchsorted(keys, places, side="right") - 1
        while (late := pts[keys[key]] > pts[places]).any():  # shown before its key frame: refers to earlier frames
            key = key - late
        np.add.at(decode, keys[key], 1)
        np.add.at(decode, places + 1, -1)
        return np.cumsum(decode)[:-1] > 0

    def packets_from(self, place: int) -> Iterator[tuple[int, av.Packet]]:
        """Yield the packets from a key frame on, with their places."""
        where = {pts: number for number, pts in enumerate(self.packets.pts.tolist())}
        self.container.seek(int(self.packets.pts[place]), stream=self.stream)
        for again in (False, True):
            if again:
                self.reopen()  # the file cannot be sought in
            found = False
            for packet in self.container.demux(self.stream):
                number = where.get(packet.pts) if packet.size else None
                found |= number == place
                if found and number is not None:
                    yield number, packet
                elif number is not None and number > place:
                    break
            if found:
                return

    def sought(self, wanted: np.ndarray, skip: bool) -> Iterator[av.VideoFrame]:
        """Yield the wanted frames; without `skip` all frames from the start are decoded, not only those needed."""
        places = self.order[wanted]
        stamps, done = self.packets.pts[places], 0
        keys = set(self.packets.pts[self.packets.key].tolist())
        for frame in self.decode(places, skip):
            if frame.pts in keys and not frame.key_frame and frame.pict_type in (PictureType.P, PictureType.B):
                raise InexactError("a packet that is marked as a key frame holds none")
            if frame.pts == stamps[done]:
                yield frame
                done += 1
                if done == len(stamps):
                    return
            elif frame.pts is None or frame.pts > stamps[done]:
                raise InexactError("frames come in another order than their timestamps")

    def decode(self, places: np.ndarray, skip: bool) -> Iterator[av.VideoFrame]:
        """Decode the packets at `places` and those they depend on; see sought."""
        needed = self.needed(places) if skip else np.arange(len(self.packets.pts)) <= places.max()
        first, last = np.flatnonzero(needed)[[0, -1]]
        skip &= self.stream.codec_context.name not in NEVER_SKIPS
        full, running = set(places.tolist()), False
        for place, packet in self.packets_from(first):
            context = self.stream.codec_context
            if running and not needed[place]:
                yield from context.decode(None)
                context.flush_buffers()
            running = bool(needed[place])
            if place > last:
                return
            if running:
                context.skip_frame = "NONREF" if skip and place not in full else "DEFAULT"
                yield from context.decode(packet)
        if running:
            yield from self.stream.codec_context.decode(None)


def decoded(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """Yield the frames of packets in FFmpeg's order; packets that do not decode are dropped."""
    for packet in packets:
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Convert to RGB uint8 ``[H, W, 3]``, upright; use one `reformatter` per video, as a new one takes time."""
    return upright(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), frame)


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Return how a frame is to be shown, ``[2, 2]``: (x, y) @ matrix is the place on the screen. None: as it is."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 does not know Exif: only turns are known then, and mirrored pictures come out wrong
        cos, sin = (round(f(np.deg2rad(frame.rotation))) for f in (np.cos, np.sin))
        return np.array([[cos, -sin], [sin, cos]]) if frame.rotation else None
    return np.frombuffer(bytes(side_data), np.int32).reshape(3, 3)[:2, :2] if isinstance(side_data, SideData) else None


def upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn by quarters and mirror the pixels ``[H, W, 3]`` of a frame, as players do."""
    if (matrix := display_matrix(frame)) is None:
        return picture
    if abs(matrix[0, 1]) > abs(matrix[0, 0]):  # rows become columns
        picture, matrix = picture.transpose(1, 0, 2), matrix[::-1]
    across, down = np.where(np.diag(matrix) < 0, -1, 1)
    return np.ascontiguousarray(picture[::down, ::across])


def decoder_reason(error: Exception, path: str) -> str:
    """Reduce a decoder's error to one reproducible line, without clock times, source lines and the path."""
    if isinstance(error, (ShardError, VideoError)):
        return str(error)
    line = getattr(error, "strerror", None) or next((line for line in str(error).splitlines() if line.strip()), "")
    for code, meaning in DECORD_CODES.items():
        line = meaning if f"({code} vs. 0)" in line else line
    line = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: ", "", line).replace(path, "it").strip()
    return line[:200] or type(error).__name__


# decord ---------------------------------------------------------------------------------------------------------


class DecordVideo:
    """A video opened by decord, as the released code reads it; like PyAVVideo."""

    def __init__(self, path: str):
        # Imported here: its FFmpeg and C++ libraries must be loaded after those of torch and PyAV.
        import decord

        self.path = path
        self.errors = (decord.DECORDError, RuntimeError, IndexError, TypeError, UnicodeEncodeError, ShardError)
        try:
            with opened(path) as source:
                self.reader = decord.VideoReader(source, num_threads=1)
            total = len(self.reader)
            starts = self.reader.get_frame_timestamp(np.arange(total)) if total else np.empty((0, 2))
            self.seconds = starts[:, 0].astype(float)
        except self.errors as error:
            raise VideoError(decoder_reason(error, path)) from error

    def close(self) -> None:
        """Close the file."""
        del self.reader

    def frames(self, wanted: np.ndarray, chunk: int = 64) -> Iterator[np.ndarray]:
        """See PyAVVideo.frames; `chunk` frames are in memory at a time."""
        for start in range(0, len(wanted), chunk):
            try:
                yield from self.reader.get_batch(wanted[start : start + chunk]).asnumpy()
            except self.errors as error:
                raise VideoError(decoder_reason(error, self.path)) from error
