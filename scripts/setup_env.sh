# shellcheck shell=bash
# Sourced by the other scripts: activates a Python environment with all requirements.
#
# Uses the active virtual or conda environment, or creates .venv in the repository with the interpreter PYTHON_BIN. Only
# installs if the requirements have changed since the last installation. CONSTRAINTS is a constraints file for pip (-c).
# If unset, it is constraints-v100.txt on machines whose GPU the newest torch does not support; set it to "" for none.

has_old_gpu() { # a GPU of compute capability below 7.5
  command -v nvidia-smi >/dev/null &&
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    awk '/^[0-9]+\.[0-9]+$/ && $1 < 7.5 {old = 1} END {exit !old}'
}

setup_env() {
  local root env stamp wanted log constraints=${CONSTRAINTS-} why=
  unset CDPATH # with it, cd may go elsewhere, and prints
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  env=${VIRTUAL_ENV:-}
  if [[ -z $env && -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    env=$CONDA_PREFIX
  fi
  if [[ -z $env ]]; then
    env=$root/.venv
    if ! "$env/bin/python" -m pip --version >/dev/null 2>&1; then
      echo "environment: making $env"
      "${PYTHON_BIN:-python3}" -m venv "$env" >/dev/null ||
        { echo "error: '${PYTHON_BIN:-python3} -m venv' failed: install python3-venv, or activate an environment" >&2; return 1; }
    fi
  fi
  [[ -x $env/bin/python ]] || { echo "error: the active environment $env has no bin/python" >&2; return 1; }
  export PATH="$env/bin:$PATH"
  python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: Python 3.11 or newer is needed, $env has $(python -V 2>&1); set PYTHON_BIN and remove .venv" >&2; return 1; }

  if [[ -z ${CONSTRAINTS+set} ]] && has_old_gpu; then
    constraints=$root/constraints-v100.txt
    why=" (a GPU here is older than compute capability 7.5; CONSTRAINTS= to do without)"
  fi
  if [[ -n $constraints && ! -r $constraints ]]; then
    echo "error: CONSTRAINTS=$constraints: no such file" >&2
    return 1
  fi
  stamp=$env/.smile-requirements
  wanted=$(cat "$root/requirements.txt" "$root/requirements-dev.txt" ${constraints:+"$constraints"} | cksum)
  if [[ -r $stamp && $(<"$stamp") == "$wanted" ]]; then
    return 0
  fi
  log=$(mktemp "${TMPDIR:-/tmp}/smile-install.XXXXXX")
  echo "environment: checking and installing requirements into $env (a few GB the first time; log: $log)"
  [[ -z $constraints ]] || echo "environment: versions as in $constraints$why"
  python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null ||
    { echo "error: $env has no pip" >&2; return 1; }
  if ! (
    set -o pipefail
    python -m pip install --progress-bar off -r "$root/requirements.txt" -r "$root/requirements-dev.txt" \
      ${constraints:+-c "$constraints"} 2>&1 |
      tee "$log" | awk '/^Collecting /{print "  collecting " $2; fflush()}
                        /^Installing collected packages/{print "  installing " NF - 3 " packages, please wait"; fflush()}'
  ); then
    echo "error: pip failed: $(grep -m1 '^ERROR' "$log" || tail -n 1 "$log") (see $log)" >&2
    return 1
  fi
  echo "$wanted" >"$stamp" || echo "note: $env cannot be written to; requirements will be checked every time" >&2
}

setup_env || return 1
