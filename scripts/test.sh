#!/usr/bin/env bash
# Run the tests. Arguments go to pytest: bash scripts/test.sh -k mask
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
exec python -m pytest tests -q "$@"
