"""The inputs of the fuzzer, a file for each kind. Its `make` changes a valid input at random and returns the program
to run on it.

`make(rng, folder, bench, number)` writes its input to `folder / "in"`, and returns the arguments
of a program (the first is a key of PROGRAMS), whose output goes to `folder / "out"` and `folder / "cache"`.
"""

import random
from collections.abc import Callable
from pathlib import Path

from tests.reliability.fuzz_inputs import checkpoints, dicom, labels, lists, nifti, presets, settings
from tests.reliability.fuzz_inputs.bench import Bench, Words

Make = Callable[[random.Random, Path, Bench, int], Words]
# kind -> function and number of inputs
KINDS: dict[str, tuple[Make, int]] = {
    "NIfTI": (nifti.make, 160),
    "DICOM": (dicom.make, 100),
    "checkpoint": (checkpoints.make, 120),
    "list": (lists.make, 100),
    "label map": (labels.make, 80),
    "preset": (presets.make, 98),
    "setting": (settings.make, 3 * len(settings.NUMERIC)),
}
