#!/usr/bin/env bash
# Run the tests that need a GPU (tests/cuda/). Without one they are skipped, and this succeeds.
#
#   bash scripts/test_gpu.sh                                   all of them, on all GPUs that are visible
#   bash scripts/test_gpu.sh -k fp16                           arguments go to pytest
#   MASK_VOLUMES_CUDA_TESTS_ON=cpu bash scripts/test_gpu.sh    the same tests on the CPU, to see that they are in order
#
# Time on a GPU: not measured here. On the CPU: some minutes, most of them for torch.compile.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ -z "${MASK_VOLUMES_CUDA_TESTS_ON:-}" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "No CUDA device is available here: the tests marked cuda are skipped."
  exit 0
fi
exec "$PYTHON" -m pytest tests/cuda -m cuda "$@"
