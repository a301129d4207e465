"""Why a video is slow to load at random places, told from its index and one frame. Knows decord and nothing of ours.

scripts/data/check_videos.py asks it of a whole list; a training asks it of some videos, by ``python video_speed.py SIZE
VIDEO ...`` (datasets.SpeedCheck); scripts/data/resize_videos.py makes what it finds fast.
"""

import json
import signal
import sys

import decord
import numpy as np

# A clip begins at a random frame, and decoding at the key frame before it: with a gap of 128 frames that is 64 more on
# average, as many as a clip of 16 frames 4 apart spans itself.
MAX_KEY_FRAME_GAP = 128
# Decoding takes time by the pixel: at twice the side four times as long as needed.
MAX_ENLARGEMENT = 2.0


def slow_reasons(path: str, size: int = 224) -> list[str]:
    """Why clips of a video load slowly, in words for the user; nothing if they load fast.

    A file that cannot be opened gives nothing: that is for the reader to report.

    Args:
        size: side of the clips, pixels.
    """
    try:
        reader = decord.VideoReader(path, num_threads=1)
        num_frames = len(reader)
        starts = reader.get_frame_timestamp(np.arange(num_frames))[:, 0]  # [frames], seconds
        keys = reader.get_key_indices()
        if num_frames > 1 and (np.diff(starts) <= 0).any():
            # Seeking by time fails: decord gives other frames, or decodes from the start for each one. AVI with
            # B-frames is like that by nature, since it holds no time stamps.
            return ["broken or no time stamps: gives wrong frames, or takes a hundred times as long"]
        height, width, _ = reader[0].shape
    except (decord.DECORDError, RuntimeError, IndexError, UnicodeEncodeError):
        return []
    reasons = []
    gap = int(np.diff([*keys, num_frames]).max(initial=0))
    if gap > MAX_KEY_FRAME_GAP:
        reasons.append(
            f"one key frame for all its {num_frames} frames" if len(keys) == 1 else f"key frames {gap} frames apart"
        )
    if min(height, width) > MAX_ENLARGEMENT * size:
        reasons.append(f"{width} x {height} pixels for clips of {size}")
    return reasons


def main() -> None:
    """Print the reasons of each video on the command line, a JSON list a line."""
    signal.alarm(60)  # ends it even where the decoder hangs and nobody waits any more
    for path in sys.argv[2:]:
        print(json.dumps(slow_reasons(path, int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
