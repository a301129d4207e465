#!/usr/bin/env bash
# Check style, types and shell scripts without changing them. `ruff check --fix . && ruff format .` fixes most problems.
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and prints
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
ruff check .
ruff format --check .
mypy
shellcheck .ci/run scripts/*.sh scripts/*/*.sh scripts/*/*.sbatch
