#!/usr/bin/env bash
# The tests. Alone enough on a fresh machine with Python 3.11+: makes .venv, installs requirements.txt, runs pytest.
#
#   bash scripts/test.sh                              the fast ones
#   bash scripts/test.sh -m "slow or not slow"        all of them, as CI does
#   bash scripts/test.sh tests/common -k cache        arguments go to pytest

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -m pytest "$@"
