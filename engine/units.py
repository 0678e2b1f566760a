"""Time inside doorbuster is an integer number of nanoseconds; people meet milliseconds and seconds at the edges.

Names say it: ``*_ns`` in code, ``*_ms`` and ``*_s`` in scenario files and on plot axes. Integers add up exactly, so a
token bucket cannot drift and ``0.1 + 0.1 + 0.1`` cannot land after ``0.3``.
"""

US_NS = 1_000
MS_NS = 1_000_000
S_NS = 1_000_000_000
MIB_BYTES = 1 << 20


def ms_to_ns(ms: float) -> int:
    """Milliseconds (as written in a scenario file) to nanoseconds."""
    return round(ms * MS_NS)


def s_to_ns(seconds: float) -> int:
    """Seconds to nanoseconds."""
    return round(seconds * S_NS)


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up: a wait computed with it is never one nanosecond short, so a wake cannot spin."""
    return -(-a // b)


def format_ns(ns: float) -> str:
    """A duration as a person would write it: ``850 us``, ``12.3 ms``, ``4.20 s``, ``3 min 5 s``."""
    if ns < MS_NS:
        return f"{ns / US_NS:.0f} us"
    if ns < S_NS:
        return f"{ns / MS_NS:.1f} ms"
    if ns < 120 * S_NS:
        return f"{ns / S_NS:.2f} s"
    return f"{int(ns // (60 * S_NS))} min {int(ns // S_NS) % 60} s"
