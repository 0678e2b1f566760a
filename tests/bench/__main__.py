"""``make bench [NAME=…]``: each bench prints JSON lines; figures are ratios to a baseline of the same run.

``--device cuda`` runs those that take a device, on it. Nothing is asserted: machines are shared and noisy, so the load
average stands beside each figure; the bench itself is in it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import sys

import tests.bench
from tests.bench.figure import Figure


def main() -> None:
    """All benches, or those whose name holds the argument."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    names = [m.name for m in pkgutil.iter_modules(tests.bench.__path__) if m.name.startswith("bench_")]
    chosen = [name for name in names if options.name in name]
    if not chosen:
        known = ", ".join(n.removeprefix("bench_") for n in names)
        sys.exit(f"no bench {options.name!r}; there are: {known}")
    for name in chosen:
        bench = importlib.import_module(f"tests.bench.{name}").bench
        takes_device = "device" in inspect.signature(bench).parameters
        if options.device != "cpu" and not takes_device:
            print(f"{name.removeprefix('bench_')}: not on {options.device}", file=sys.stderr)
            continue
        found = bench(options.device) if takes_device else bench()
        for figure in found if isinstance(found, list) else [Figure(*found)]:
            line = {
                "bench": name.removeprefix("bench_"), "value": round(figure.value, 3), "unit": figure.unit,
                "baseline": figure.baseline, "baseline_value": round(figure.baseline_value, 3),
                "ratio": round(figure.value / figure.baseline_value, 3),
                "load_average": round(os.getloadavg()[0], 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
