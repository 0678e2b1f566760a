"""``make bench [NAME=…]``: each bench prints one JSON line; figures are ratios to a baseline of the same run.

Nothing is asserted: machines are shared and noisy, so the load average stands beside each figure.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys

import tests.bench


def main() -> None:
    """All benches, or those whose name holds the argument."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    names = [m.name for m in pkgutil.iter_modules(tests.bench.__path__) if m.name.startswith("bench_")]
    chosen = [name for name in names if wanted in name]
    if not chosen:
        sys.exit(f"no bench {wanted!r}; there are: {', '.join(n.removeprefix('bench_') for n in names)}")
    for name in chosen:
        value, unit, baseline, baseline_value = importlib.import_module(f"tests.bench.{name}").bench()
        line = {
            "bench": name.removeprefix("bench_"), "value": round(value, 3), "unit": unit, "baseline": baseline,
            "baseline_value": round(baseline_value, 3), "ratio": round(value / baseline_value, 3),
            "load_average": round(os.getloadavg()[0], 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
