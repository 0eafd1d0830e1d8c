# Sourced by every script: moves to the project's root, finds or makes a Python with what requirements.txt lists, sets PYTHON.
#
# In this order: PYTHON, if it has the requirements; the active environment, if it has them; .venv here (or VENV=elsewhere), made and
# filled once. An environment of yours is never changed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

satisfied() { # does this Python have every requirement, in a version that is allowed?
  "$1" - requirements.txt <<'PY' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement

for line in open(sys.argv[1]):
    line = line.split("#")[0].strip()
    if line:
        requirement = Requirement(line)
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                sys.exit(1)
        except PackageNotFoundError:
            sys.exit(1)
PY
}

make_venv() { # $1: the Python to build on
  local stamp="$VENV/requirements.cksum" wanted
  wanted="$(cat requirements.txt constraints.txt | cksum | cut -d" " -f1)"
  if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "== Installing requirements.txt into $VENV (once; torch is large, this takes minutes)"
  "$1" -c 'import sys; sys.exit(f"error: Python {sys.version.split()[0]} found, 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
  [ -x "$VENV/bin/python" ] || "$1" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
  echo "$wanted" >"$stamp"
}

VENV="${VENV:-.venv}"
if [ -n "${PYTHON:-}" ] && satisfied "$PYTHON"; then
  :
elif [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && satisfied python; then
  PYTHON=python
else
  base="${PYTHON:-python3}"
  if [ -n "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ ! -x "$VENV/bin/python" ]; then
    echo "== ${PYTHON:-the active environment} lacks what requirements.txt lists and is left as it is; using $VENV"
  fi
  make_venv "$base"
  PYTHON="$VENV/bin/python"
fi
export PYTHON

launch() { # NPROC processes of a module: one as plain Python, more through torchrun; or as LAUNCHER says (scripts/slurm/)
  if [ -n "${LAUNCHER:-}" ]; then
    local launcher
    read -ra launcher <<<"$LAUNCHER"
    exec "${launcher[@]}" -m "$@" # a signal to every process of the job would end this shell while the program still saves
  elif [ "${NPROC:-1}" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" -m "$@"
  else
    "$PYTHON" -m "$@"
  fi
}
