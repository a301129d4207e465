#!/usr/bin/env bash
# Run the tests, two files at a time, the slowest first. Arguments go to pytest: bash scripts/test.sh -k mask -n 4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
: "${OMP_NUM_THREADS:=1}" # two processes on two cores: threads would wait for each other
export OMP_NUM_THREADS
exec python -m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
