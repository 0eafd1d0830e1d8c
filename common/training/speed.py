"""How fast a run is, measured between two log entries, and how long the rest of it will take."""

import time


class Speed:
    """Speed of the updates of a run. The host has waited for the device when a log entry is made, so times are true.

    The first interval of a process is not used for the estimate: workers start in it, and blocks may be compiled.
    """

    def __init__(self) -> None:
        self._step, self._began, self._intervals = 0, 0.0, 0

    def start(self, step: int) -> None:
        """Start an interval before update `step`, so that what came before, such as a validation, is left out."""
        self._step, self._began = step, time.perf_counter()

    def seconds_per_update(self, step: int) -> float:
        """Return the seconds per update since the last call, with `step` updates done."""
        seconds = self._seconds(step)
        self.start(step)
        self._intervals += 1
        return seconds

    def _seconds(self, step: int) -> float:
        return (time.perf_counter() - self._began) / max(1, step - self._step)

    @property
    def has_first_estimate(self) -> bool:
        """True once, after the second interval, when the remaining time is printed."""
        return self._intervals == 2
