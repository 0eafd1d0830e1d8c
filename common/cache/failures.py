"""Volumes that cannot be used, with the reasons, stored in the cache: a bad file is read once, not in every run.

A volume is tried again if its file, the settings or the format of the cache have changed, and always if it could not be
read at all (no such file, no permission, a worker that died).
"""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common.data.datalist import Case


@dataclass(frozen=True)
class Failure:
    """The reason why a case cannot be used. `lasting`: the same files would fail again, so they need not be read."""

    case: Case
    reason: str
    lasting: bool = False

    def record(self, key: str) -> dict[str, str]:
        """Return the line of `failures.jsonl`. `key` identifies the files, their state and the settings."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        return {"key": key, "name": self.case.name, "image": str(self.case.image), "reason": self.reason, "time": now}


def failure_table(failures: Sequence[Failure], limit: int = 100) -> str:
    """Return lines to print: the number of failures of each kind, then up to `limit` of them with their reasons."""
    kinds = Counter(_kind(failure) for failure in failures)
    lines = [f"{len(failures)} volume(s) cannot be used:"]
    lines += [f"  {count:6d}  {kind}" for kind, count in kinds.most_common()]
    lines += [f"    {failure.case.name}: {failure.reason}" for failure in failures[:limit]]
    if len(failures) > limit:
        lines.append(f"    ... and {len(failures) - limit} more, see failures.jsonl in the cache")
    return "\n".join(lines)


def _kind(failure: Failure) -> str:
    """Return the reason without the file and the numbers, so that equal reasons are counted together."""
    text = failure.reason.split(": ", 1)[-1]
    return re.sub(r"[-+]?\d[\d.e+-]*", "#", text)[:90]
