"""Numbers as people read them."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_flops(operations: float) -> str:
    """1.5e9 -> '1.5 GFLOP'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(operations) < 1000:
            return f"{operations:.0f} FLOP" if not unit else f"{operations:.1f} {unit}FLOP"
        operations /= 1000
    return f"{operations:.1f} PFLOP"


def format_count(number: int, one: str, many: str) -> str:
    """1234, 'step', 'steps' -> '1,234 steps'."""
    return f"{number:,} {one if number == 1 else many}"
