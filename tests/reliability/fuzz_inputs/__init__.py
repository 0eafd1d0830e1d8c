"""The inputs of the fuzzer: each function changes a valid input at random and returns the program to run on it.

Every function is `make(rng, folder, bench, number)`. It writes its input to `folder / "in"`, and returns the arguments
of a program (the first is a key of PROGRAMS), whose output goes to `folder / "out"` and `folder / "cache"`.
"""

import random
from collections.abc import Callable
from pathlib import Path

from tests.reliability.fuzz_inputs.bench import Bench, Words
from tests.reliability.fuzz_inputs.checkpoints import checkpoints
from tests.reliability.fuzz_inputs.dicom import dicom
from tests.reliability.fuzz_inputs.labels import labels
from tests.reliability.fuzz_inputs.lists import lists
from tests.reliability.fuzz_inputs.nifti import nifti
from tests.reliability.fuzz_inputs.presets import presets
from tests.reliability.fuzz_inputs.settings import NUMERIC, settings

Make = Callable[[random.Random, Path, Bench, int], Words]
# kind -> function and number of inputs
KINDS: dict[str, tuple[Make, int]] = {
    "NIfTI": (nifti, 160),
    "DICOM": (dicom, 100),
    "checkpoint": (checkpoints, 120),
    "list": (lists, 100),
    "label map": (labels, 80),
    "preset": (presets, 98),
    "setting": (settings, 3 * len(NUMERIC)),
}
