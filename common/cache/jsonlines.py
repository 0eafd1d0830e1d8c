"""Files of JSON lines to which any number of processes append."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, without lines that were cut off; none if the file does not exist."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append one line per record, all in one call to the system, so that lines of several processes do not mix."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())
