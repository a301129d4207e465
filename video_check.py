"""Problems of a video before it is trained on: frames that a reader gets wrong, and reasons why clips load slowly.

scripts/data/check_videos.py checks a whole list. Training checks some videos of its list when it starts, by
``python video_check.py SIZE READER VIDEO ...`` (datasets.VideoCheck).
"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from shards import opened
from video_reader import PyAVVideo, VideoError, decoded, read_clip, to_rgb, video_stream

# Decoding starts at the key frame before a clip: with a gap of 128 frames that is 64 more on average, as many as a clip
# of 16 frames 4 apart spans itself.
MAX_KEY_FRAME_GAP = 128
MAX_ENLARGEMENT = 2.0  # video side / clip side; at twice the side decoding takes four times as long as needed
# Mean absolute difference (of 255) of equal frames. decord has another version of FFmpeg, which may round colours
# differently.
TOLERANCE = {"pyav": 0.0, "decord": 2.0}
CHUNK = 64  # frames in memory at a time
FIRST_FRAMES = 600  # of each video that are checked when a training starts
SECONDS = 8.0  # for all of these videos


def ffmpeg_frames(path: str) -> Iterator[av.VideoFrame]:
    """Decode a video from its start with FFmpeg; packets that do not decode are dropped."""
    with opened(path) as source, av.open(source, "r", metadata_errors="replace") as container:
        yield from decoded(container.demux(video_stream(container)))


def wrong_frames(
    path: str, rng: np.random.Generator, reader: str = "pyav", places: int = 16, first: int | None = None
) -> str:
    """Compare random frames of a reader with FFmpeg's own sequence.

    Args:
        places: number of frames to compare; 0: all.
        first: compare only the first frames of the video.
    Returns:
        a description of the problem; "" if there is none.
    Raises:
        VideoError: unreadable.
    """
    totals, counts = list[int](), list[int]()  # frames by the reader; last of each reading, at most `first`

    def read(numbers: np.ndarray) -> dict[int, np.ndarray]:
        def choose(total: int) -> np.ndarray:
            totals.append(total)
            return numbers[numbers < total]

        clip = read_clip(path, choose, reader)
        counts.append(min(totals[-1], first or totals[-1]))
        return dict(zip(clip.indices.tolist(), clip.frames))

    read(np.array([0]))
    numbers = np.sort(rng.choice(counts[0], min(places or counts[0], counts[0]), replace=False))
    sequence, reformatter = enumerate(islice(ffmpeg_frames(path), first)), VideoReformatter()
    wrong, shown = [], 0
    for chunk in np.split(numbers, range(CHUNK, len(numbers), CHUNK)):
        ahead = read(chunk)
        for number, frame in sequence:
            shown = number + 1
            if number in ahead:
                right, found = to_rgb(frame, reformatter).astype(int), ahead.pop(number)
                if right.shape != found.shape or abs(right - found).mean() > TOLERANCE[reader]:
                    wrong.append(number)
            if not ahead:
                break
        wrong += list(ahead)
    shown = max([shown, *(number + 1 for number, _ in sequence)])
    if set(counts) != {shown}:
        return f"the reader counts {max(counts)} frames, FFmpeg decodes {shown}"
    return f"{len(wrong)} of {len(numbers)} compared frames differ, for example frame {wrong[0]}" if wrong else ""


def slow_reasons(path: str, size: int = 224) -> list[str]:
    """List reasons why clips of `size` pixels a side load slowly from a video. Raises VideoError if unreadable."""
    with closing(PyAVVideo(path)) as video:
        width, height = video.stream.codec_context.width, video.stream.codec_context.height
        total, keys = len(video.seconds), np.flatnonzero(video.packets.key)
        gap = int(np.diff([*keys, len(video.packets.pts)]).max(initial=0))
        in_order = video.in_order
    reasons = []
    if in_order:
        reasons.append("frames cannot be found by timestamps: every clip is decoded from the start of the file")
    elif gap > MAX_KEY_FRAME_GAP:
        reasons.append(f"one key frame for all its {total} frames" if len(keys) == 1 else f"key frames {gap} apart")
    if min(height, width) > MAX_ENLARGEMENT * size:
        reasons.append(f"{width} x {height} pixels for clips of {size}")
    return reasons


def main() -> None:
    """Print wrong_frames and slow_reasons of each video on the command line, a JSON list per line."""
    signal.alarm(60)  # ends the process if the decoder hangs and nobody waits any more
    size, reader, end = int(sys.argv[1]), sys.argv[2], time.monotonic() + SECONDS
    for path in sys.argv[3:]:
        if time.monotonic() > end:
            break
        try:
            wrong = wrong_frames(path, np.random.default_rng(0), reader, first=FIRST_FRAMES)
            found = [wrong, "; ".join(slow_reasons(path, size))]
        except VideoError:  # training reports it
            found = ["", ""]
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
