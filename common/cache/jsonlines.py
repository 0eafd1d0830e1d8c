"""Files of JSON lines to which any number of processes append."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class JsonLines:
    """A file with one record per line. `records` holds the last record of each value of the field `key`.

    Lines that were cut off are ignored. A missing file has no records.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.records: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                self.records[record[key]] = record

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, all in one call to the system, so that lines of several processes do not mix."""
        records = list(records)
        self.records |= {record[self.key]: record for record in records}
        with open(self.path, "ab", buffering=0) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
