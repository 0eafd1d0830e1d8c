#!/usr/bin/env bash
# Run the tests. On a fresh machine with Python 3.11 or newer it first creates .venv and installs requirements.txt.
#
#   bash scripts/test.sh                              the fast tests
#   bash scripts/test.sh -m "slow or not slow"        all tests, as CI does
#   bash scripts/test.sh tests/common -k cache        arguments go to pytest
#   bash scripts/test.sh -n 0 --pdb tests/common      in this process, for a debugger
#
# The tests run in one process per core, at most 4: a process needs about 2 GB.
#
# Slow tests open the pages of runs in Chromium. Where it is missing, and this runs as root with apt-get, it is installed; else these tests
# are skipped with a warning.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_chromium() {
  local install=(timeout 300 apt-get install --yes --no-install-recommends chromium)
  export DEBIAN_FRONTEND=noninteractive
  echo "== Installing chromium for the tests of pages"
  if ! "${install[@]}" >/dev/null 2>&1 && ! { timeout 120 apt-get update && "${install[@]}"; } >/dev/null 2>&1; then
    echo "== chromium could not be installed; the tests of pages are skipped"
  fi
}

if [[ " $* " == *slow* ]] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  command -v chromium chromium-browser google-chrome chrome >/dev/null || install_chromium
fi
workers="$("$PYTHON" -c "from common.resources import cores; print(max(1, min(4, int(cores()))))")"
# a process that has run out of tests takes some of another's
exec "$PYTHON" -m pytest -n "$workers" --dist worksteal "$@"
