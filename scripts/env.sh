# Sourced by every script. Moves to the root of the repository and sets PYTHON to a Python that meets requirements.txt.
#
# The first of these that meets the requirements is used: PYTHON; the active environment; .venv in the root (or VENV=elsewhere), which is
# created and filled if necessary. Existing environments other than .venv are never changed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# Succeed if the Python $1 has every requirement in a permitted version.
satisfied() {
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

# Create and fill $VENV with the Python $1, unless it was filled from the present requirements.
make_venv() {
  local stamp="$VENV/requirements.cksum" wanted
  wanted="$(cat requirements.txt constraints.txt | cksum | cut -d" " -f1)"
  if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "== Installing requirements.txt into $VENV (once; about 6 GB, several minutes without further output)"
  "$1" -c 'import sys; sys.exit(f"error: Python: found {sys.version.split()[0]}, expected 3.11 or newer" if sys.version_info < (3, 11) else 0)'
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
    echo "== ${PYTHON:-the active environment} does not meet requirements.txt and stays unchanged; using $VENV"
  fi
  make_venv "$base"
  PYTHON="$VENV/bin/python"
fi
export PYTHON

# Run a module: with the command LAUNCHER if it is set (scripts/slurm/), else on NPROC processes, through torchrun if there are several.
launch() {
  if [ -n "${LAUNCHER:-}" ]; then
    local launcher
    read -ra launcher <<<"$LAUNCHER"
    # The program replaces this shell, which a signal to every process of the job would end while the program still saves.
    exec "${launcher[@]}" -m "$@"
  elif [ "${NPROC:-1}" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" -m "$@"
  else
    "$PYTHON" -m "$@"
  fi
}

# Print the flags for the data of a pretraining recipe: the papers' 1k list, unless the recipe's arguments $@ name other data, or a file of
# settings, which then names the data. The paths of a --datalist start from the list's folder, so it gets no --data_root.
pretraining_data() {
  case " $* " in
    *" --datasets "* | *" --datasets="*) echo --data_root data ;;
    *" --datalist "* | *" --datalist="* | *" --config "* | *" --config="*) ;;
    *) echo --datasets 1k --data_root data ;;
  esac
}
