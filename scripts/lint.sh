#!/usr/bin/env bash
# Check the style, the types and the shell scripts, and change nothing. `ruff check --fix . && ruff format .` mends most.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
ruff check .
ruff format --check .
mypy
shellcheck .ci/run scripts/*.sh scripts/*/*.sh scripts/*/*.sbatch
