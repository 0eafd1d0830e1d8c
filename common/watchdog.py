"""A step that never ends: the process says where every thread stands, and dies, so that the launcher can start anew."""

import faulthandler
import sys


class Watchdog:
    """Ends the process (exit code 1, stacks on stderr) unless it is fed again within `minutes`; None: never.

    faulthandler's own thread holds no interpreter lock, so it also sees a main thread stuck in a CUDA or NCCL call.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else minutes * 60

    def feed(self) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def rest(self) -> None:
        """Until it is fed again nothing is watched: between epochs, where validation takes as long as it takes."""
        faulthandler.cancel_dump_traceback_later()
