"""Shell scripts of the project, run with stubs in place of what they start.

A pytest plugin (``pytest_plugins = "fixtures_scripts"``). torchrun, srun and scontrol are stubs that write down their
arguments. No test here: PYTEST_DONT_REWRITE.
"""

import os
import subprocess
from pathlib import Path

import pytest

from run_smile_pretraining import get_args

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$STUB_LOG"
printf '\\n' >> "$STUB_LOG"
[[ $(basename "$0") == scontrol ]] || exit "${STUB_EXIT:-0}"
"""


@pytest.fixture
def run_script(tmp_path):
    """A function that runs a script with stubs and variables; gives the result and the commands it started."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("torchrun", "srun", "scontrol"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    for name in ("my train.csv", "stage1.pth"):
        (tmp_path / name).touch()
    (tmp_path / "objects").mkdir()
    log = tmp_path / "commands"
    env = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUB_LOG": str(log),
        "DATA_PATH": str(tmp_path / "my train.csv"),
        "OBJECTS_PATH": str(tmp_path / "objects"),
        "FIRST_STAGE_CKPT": str(tmp_path / "stage1.pth"),
    }

    def call(script, *options, **variables):
        log.write_text("")
        result = subprocess.run(
            ["bash", str(script), *options],
            env=env | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return result, [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    return call


def program_args(command):
    """What run_smile_pretraining.py makes of a recorded command."""
    program = next(i for i, word in enumerate(command) if word.endswith("/run_smile_pretraining.py"))
    return get_args(command[program + 1 :])


def launcher_option(command, name):
    return command[command.index(name) + 1]
