"""Read the ``log.txt`` of runs: a JSON line for each epoch, and one for each test."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import RunError


def read_log(path: Path) -> list[dict]:
    """Read the lines of a log; a last line that was cut off is ignored. Raises RunError if it is not a log."""
    lines, found = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not a line of the log of a run ({line[:60]!r})") from error
    return found


def last_test(folder: Path) -> dict[str, float]:
    """Metrics of the last test in the log of a run; empty if there is none. Raises RunError."""
    path = folder / "log.txt"
    log = read_log(path) if path.is_file() else []
    return next((line for line in reversed(log) if any(name.startswith("test_") for name in line)), {})
