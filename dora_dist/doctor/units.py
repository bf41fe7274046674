"""Speeds and times for people."""


def rate(bytes_per_second: float) -> str:
    """As makers of networks and disks count: ``12.3 GB/s``, ``450 MB/s``."""
    for unit, bytes_ in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= 0.9995 * bytes_:
            return f"{_digits(bytes_per_second / bytes_)} {unit}"
    return f"{_digits(bytes_per_second / 1e3)} kB/s"


def duration(seconds: float) -> str:
    """``350 us``, ``12.3 ms``, ``4.20 s``."""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * length:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds / 1e-6)} us"


def _digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
