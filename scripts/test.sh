#!/usr/bin/env bash
# Run the tests. On a fresh machine with Python 3.11 or newer it first creates .venv and installs requirements.txt.
#
#   bash scripts/test.sh                              the fast tests
#   bash scripts/test.sh -m "slow or not slow"        all tests, as CI does
#   bash scripts/test.sh tests/common -k cache        arguments go to pytest

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -m pytest "$@"
