"""scripts/setup_env.sh: what is installed, and when. python is a stub that notes what it is asked."""

import sys

import pytest
from fixtures_scripts import SCRIPTS, STUB

pytest_plugins = "fixtures_scripts"
V100 = "constraints-v100.txt"


@pytest.fixture
def set_up(run_script, tmp_path):
    """Source setup_env.sh where python only notes what it is asked: what was said, and the arguments of pip install."""
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    (env / "bin" / "python").write_text(STUB)
    (env / "bin" / "python").chmod(0o755)
    (tmp_path / "script").write_text(f"set -euo pipefail; source {SCRIPTS / 'setup_env.sh'}")

    def call(cards="", **variables):
        if cards:  # as the real one prints them
            stub = f"""#!/bin/sh\n[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && printf '{cards}'"""
            (tmp_path / "bin" / "nvidia-smi").write_text(stub)
            (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
        result, commands = run_script(tmp_path / "script", VIRTUAL_ENV=str(env), **variables)
        assert result.returncode == 0, result.stderr
        installs = [command for command in commands if command[1:4] == ["-m", "pip", "install"]]
        return result.stdout, installs[0] if installs else []

    return call


OLD, NEW = ["7.0\\n" * 8, "6.0\\n", "9.0\\n7.0\\n"], ["7.5\\n8.0\\n", "12.0\\n", "NVIDIA-SMI has failed\\n"]


@pytest.mark.parametrize("cards, old", [*((cards, True) for cards in OLD), *((cards, False) for cards in NEW)])
def test_the_gpu_picks_the_versions(set_up, cards, old):
    said, install = set_up(cards)
    assert (install[-2:] == ["-c", str(SCRIPTS.parent / V100)]) == old and ("-c" in install) == old
    assert (V100 in said and "older than compute capability 7.5" in said) == old
    assert set_up(cards) == ("", [])  # the second time there is nothing to do


def test_constraints_are_part_of_what_is_installed(set_up):
    said, install = set_up("7.0\\n", CONSTRAINTS="")
    assert "-c" not in install and V100 not in said
    path = str(SCRIPTS.parent / V100)
    said, install = set_up(CONSTRAINTS=path)
    assert install[-2:] == ["-c", path] and path in said
    assert set_up()[1] == []  # the same for the same GPU, by itself


def test_constraints_that_are_not_there(run_script, tmp_path):
    (tmp_path / "script").write_text(f"set -euo pipefail; source {SCRIPTS / 'setup_env.sh'}")
    result, _ = run_script(tmp_path / "script", VIRTUAL_ENV=sys.prefix, CONSTRAINTS="missing.txt")
    assert result.returncode != 0 and result.stderr == "error: CONSTRAINTS=missing.txt: no such file\n"
