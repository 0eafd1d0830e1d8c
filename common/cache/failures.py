"""Volumes that cannot be used, and why, kept beside the cache: a bad file is read once, not on every call.

A volume is tried again when its file, the settings or the cache's format changed, and always when it could not be read
at all (no such file, no permission, a worker that died).
"""

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.data.datalist import Case


@dataclass(frozen=True)
class Failure:
    """Why a case cannot be used. `lasting`: the same files give the same answer, so they need not be read again."""

    case: Case
    reason: str
    lasting: bool = False


class FailureLog:
    """`quarantine.jsonl`: one line per failure, only added to, so any number of processes may write one list."""

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, str] = {}
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record["reason"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut off: that volume is tried again

    def reason(self, key: str) -> str | None:
        """Why the volume of this key (files, their state, settings) cannot be used; None when it is not known bad."""
        return self._known.get(key)

    def add(self, key: str, failure: Failure) -> None:
        record = {"key": key, "name": failure.case.name, "image": str(failure.case.image), "reason": failure.reason}
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._known[key] = failure.reason
        with open(self.path, "ab", buffering=0) as out:
            out.write((json.dumps(record) + "\n").encode())


def failure_table(failures: Sequence[Failure], limit: int = 100) -> str:
    """The failures as lines to print: how many of each kind, then each with its reason."""
    kinds = Counter(_kind(failure) for failure in failures)
    lines = [f"{len(failures)} volume(s) cannot be used:"]
    lines += [f"  {count:6d}  {kind}" for kind, count in kinds.most_common()]
    lines += [f"    {failure.case.name}: {failure.reason}" for failure in failures[:limit]]
    if len(failures) > limit:
        lines.append(f"    ... and {len(failures) - limit} more, see quarantine.jsonl in the cache")
    return "\n".join(lines)


def _kind(failure: Failure) -> str:
    """The reason without the file and the numbers, so that equal troubles are counted together."""
    text = failure.reason.split(": ", 1)[-1]
    return re.sub(r"[-+]?\d[\d.e+-]*", "#", text)[:90]
