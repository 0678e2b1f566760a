"""``doorbuster doctor``: is everything here that a run needs? One line a check, and the fix under each failure."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import msgspec

from engine.errors import CalibrationError, UserError
from engine.model import compiling
from engine.model.folder import cache_dir, prepare
from engine.scenario import data_path, load
from engine.service.replicas import share_cores
from sim.twin import cost

WANTED_DISK_GIB = 3.0


class Check(msgspec.Struct, frozen=True):
    """One line. ``ok`` None: worth knowing, nothing wrong."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def examine(scenario_name: str = "flash-sale") -> list[Check]:
    """All checks, cheap ones first; nothing is changed but the model cache, which is filled on first use."""
    checks = (_python, _packages, _cores, _memory, _disk, _corpora, lambda: _scenario(scenario_name), _model, _kernels,
              _faiss, _port, lambda: _calibration(scenario_name))
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except UserError as error:
        return Check(error.where or "check", False, error.what, error.fix)


def _python() -> Check:
    return Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Check:
    wanted = ("torch", "transformers", "simpy", "uvicorn", "httptools", "msgspec")
    try:
        found = ", ".join(f"{name} {version(name)}" for name in wanted)
    except PackageNotFoundError as error:
        return Check("packages", False, f"{error} is missing", "make setup")
    return Check("packages", True, found)


def _cores() -> Check:
    own, replica, threads = share_cores(0)
    if not own:
        return Check("cores", None, f"{os.cpu_count()} core(s) for torch and the gateway together: rough timings")
    return Check("cores", True, f"gateway and load on {list(own)}, replica on {list(replica)} with {threads} thread(s)")


def _memory() -> Check:
    try:
        import psutil
    except ImportError:
        return Check("memory", False, "psutil is missing", "make setup")
    free_gib = psutil.virtual_memory().available / 2**30
    fix = "close something, or serve --model tiny" if free_gib < 3 else ""
    return Check("memory", free_gib >= 3, f"{free_gib:.1f} GiB available; SmolLM2 with its KV pool takes about 2", fix)


def _disk() -> Check:
    place = cache_dir()
    while not place.exists():
        place = place.parent
    free_gib = shutil.disk_usage(place).free / 2**30
    return Check(
        "disk", free_gib >= WANTED_DISK_GIB, f"{free_gib:.0f} GiB free for {cache_dir()}",
        "" if free_gib >= WANTED_DISK_GIB else "point DOORBUSTER_CACHE at a larger disk",
    )


def _corpora() -> Check:
    path = data_path("corpora", "questions.csv")
    return Check("corpus", path.is_file(), str(path), "" if path.is_file() else "git checkout -- data")


def _scenario(name: str) -> Check:
    resolved = load(name)
    classes = ", ".join(resolved.scenario.classes)
    return Check("scenario", True, f"{resolved.path}: {classes}")


def _model() -> Check:
    folder = prepare("smollm2", lambda line: None)
    return Check("model", True, f"smollm2 ({folder.digest}) in {folder.path}")


def _kernels() -> Check:
    try:
        made = compiling.library()
    except (OSError, subprocess.SubprocessError) as error:
        fix = "apt install g++" if not compiling.compiler() else "CXX=... names another compiler"
        return Check("kernels", None, f"{error}: torch alone computes, decode is up to twice as slow", fix)
    return Check("kernels", True, f"compiled with {' '.join(compiling.compiler())} into {made}")


def _faiss() -> Check:
    if importlib.util.find_spec("faiss") is None:
        return Check("faiss", None, "not installed: only a GPU's index needs it", "pip install -e '.[cpu]'")
    return Check("faiss", True, "installed")


def _port() -> Check:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return Check("loopback", True, f"a port can be opened ({sock.getsockname()[1]})")


def _calibration(name: str) -> Check:
    scenario = load(name).scenario
    try:
        found = cost.for_model(scenario)
        cost.require_encoder(scenario, found)
    except CalibrationError as error:
        return Check("calibration", None, error.what, error.fix)
    told = f"{found.model}, measured {found.measured_at} on {found.machine.cpu}"
    if doubts := found.doubts():
        return Check("calibration", None, f"{told}; doubtful: {'; '.join(doubts)}", "doorbuster calibrate")
    return Check("calibration", True, told)
