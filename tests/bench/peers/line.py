"""A contender's side of the line: jobs come in on stdin, the times of its tokens go out on stdout, JSON both ways.

Only the standard library: the foreign engines run this in environments of their own. What they print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple


class Job(NamedTuple):
    """Generate ``new_tokens`` greedily for each prompt, never stopping early, all at once."""

    prompts: list[list[int]]
    new_tokens: int


class Seen(NamedTuple):
    """When things happened, in seconds of one clock: the start, and each token of each sequence."""

    began_s: float
    tokens_s: list[list[float]]


Run = Callable[[Job], Seen]


def serve(load: Callable[[str], Run]) -> None:
    """Load on the device that the first argument names, say so, then run jobs until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints, also from C
    run = load(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seen = run(Job(**json.loads(line)))
        print(json.dumps(seen._asdict()), file=out, flush=True)
