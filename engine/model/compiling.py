"""``kernels.cpp`` compiled once for this very processor: a shared library in the cache folder. Imports no torch.

Named by a digest of the source, the flags, the compiler and the processor, so that a cache on a shared disk serves
machines that differ. No C++ compiler is no error for anybody but the caller.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

from engine.model.folder import cache_dir

SOURCE = Path(__file__).with_name("kernels.cpp")
# no errno and no traps from single numbers, so that loops may be vectorised; nan and the order of sums stay as written
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
MISSING = "no C++ compiler (Debian: apt install g++)"


def compiler() -> list[str]:
    """$CXX with its arguments, or the first that is installed; empty where there is none."""
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), "")
    return shlex.split(found)


def mark() -> str:
    """What a speed that was measured here depends on besides the model: 16 hex digits, or "" without a compiler.

    OSError or SubprocessError from a compiler that does not say its version.
    """
    command = compiler()
    if not command:
        return ""
    asked = [*command, "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    return sha256("\0".join((SOURCE.read_text(), version, *FLAGS, _processor())).encode()).hexdigest()[:16]


def library() -> Path:
    """The compiled file, made now unless it is there. OSError or SubprocessError when it cannot be made."""
    command = compiler()
    if not command:
        raise OSError(MISSING)
    target = cache_dir() / "native" / f"kernels-{mark()}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "kernels.so"
            asked = [*command, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise OSError(f"{shlex.join(command)} gave up: {done.stderr.strip()[-300:]}")
            made.replace(target)  # whole or not at all: replicas start side by side
    return target


def _processor() -> str:
    """What -march=native may depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kept = dict.fromkeys(line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part")))
    return "\n".join((platform.machine(), platform.processor(), *kept))
