"""A bench's environment card: what ran where, in words."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import version

from engine.scenario import DATA, Resolved
from engine.units import format_ns
from sim.twin.cost import FAKE, Calibration

PACKAGES = ("torch", "simpy", "numpy")


def card(resolved: Resolved, calibration: Calibration, seed: int, base_rps: float) -> dict[str, str]:
    """What a bench is made of, by name."""
    scenario, machine = resolved.scenario, calibration.machine
    factor = scenario.workload.spike_factor
    digest = hashlib.sha256(resolved.text.encode()).hexdigest()[:8]
    pace = f"fake, at the pace of {calibration.model}" if scenario.model.name == FAKE else calibration.model
    step_ns = calibration.cost.fixed_ns + calibration.cost.decode_row_ns
    return {
        "revision": _revision(), "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "scenario": f"{scenario.name} ({digest}), seed {seed}",
        "model": f"{pace}; a decode step of one row takes {format_ns(step_ns)}",
        "calibration": f"{machine.cpu}, {machine.threads} thread(s), measured {calibration.measured_at}",
        "load": f"base {base_rps:.2f}/s, plateau {base_rps * factor:.2f}/s (+{factor - 1:.0%})",
    }


def _revision() -> str:
    """The commit, "+" where files differ from it."""
    command = ["git", "-C", str(DATA.parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: no git here"
    return done.stdout.strip()
