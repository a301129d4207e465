#!/usr/bin/env bash
# Run the tests, three files at a time as they often wait, the slowest first. Arguments go to pytest: scripts/test.sh -k mask -n 4
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and prints
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
: "${OMP_NUM_THREADS:=1}" # several processes on two cores: threads would wait for each other
export OMP_NUM_THREADS
exec python -m pytest tests -q -n 3 --dist loadfile --no-loadscope-reorder "$@"
