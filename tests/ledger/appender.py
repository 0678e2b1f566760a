"""A process that appends until it is killed: ``python -m tests.ledger.appender FOLDER``.

Appends ``click(n)`` from where the ledger ends and prints the first number that is not acknowledged after each batch.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from engine.ledger.commits import Limits
from engine.ledger.writer import LedgerWriter
from tests.ledger.trace import click

LIMITS = Limits(flush_rows=20, window_ns=500_000, segment_bytes=4_000)
BATCH, BEHIND = 30, 50  # the last ones of a batch are never waited for


def main() -> None:
    writer = LedgerWriter(Path(sys.argv[1]), LIMITS)
    begin = writer.durable_seq
    print(begin, flush=True)
    for batch in count():
        at = begin + batch * (BATCH + BEHIND)
        for number in range(at, at + BATCH):
            writer.append(click(number))
        if not writer.wait(60):
            sys.exit("not acknowledged")
        print(at + BATCH, flush=True)
        for number in range(at + BATCH, at + BATCH + BEHIND):
            writer.append(click(number))


if __name__ == "__main__":
    main()
