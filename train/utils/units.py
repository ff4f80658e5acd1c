"""Numbers in readable units."""

TIMES = "\N{MULTIPLICATION SIGN}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}{TIMES}" if ratio < 10 else f"{ratio:.1f}{TIMES}"


def unit_of(kind: str, largest: float) -> tuple[float, str, int]:
    """(divisor, unit, decimals) in which values of a kind up to `largest` read well side by side."""
    if kind == "seconds":
        if largest < 1:
            return 1e-3, "ms", 1
        if largest < 300:
            return 1.0, "s", 3 if largest < 10 else 2
        return (60.0, "min", 1) if largest < 3 * 3600 else (3600.0, "h", 2)
    if kind == "bytes":
        return (2.0**30, "GiB", 2) if largest >= 2**30 else (2.0**20, "MiB", 1)
    if kind == "joules":
        return (1e-3, "mJ", 1) if largest < 1 else (1.0, "J", 2)
    if kind == "flops":
        return (1e12, "TFLOP/s", 1) if largest >= 1e13 else (1e9, "GFLOP/s", 1)
    if kind == "rate":
        return 1.0, "tokens/s", 0 if largest >= 1000 else 1
    return {"fraction": (1e-2, "%", 2), "nats": (1.0, "", 4), "perplexity": (1.0, "", 2), "number": (1.0, "", 3)}.get(
        kind, (1.0, "", 0)
    )


def in_unit(kind: str, value: float, largest: float | None = None) -> str:
    """A value with its unit, the one that suits `largest` (default: the value)."""
    divisor, unit, decimals = unit_of(kind, value if largest is None else largest)
    return f"{value / divisor:,.{decimals}f} {unit}".rstrip()


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if abs(seconds) < 0.1 else f"{1e3 * seconds:,.0f}"


def short_count(value: float, position: float = 0) -> str:
    """1500 → "1.5K", 2e9 → "2B": how token counts are written in this field. `position` is matplotlib's."""
    for size, letter in [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")]:
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def memory_kind_title(kind: str) -> str:
    """What a `peak_memory_kind` is a measure of: "rss", or "cuda_allocated" and its like."""
    return "resident memory of a process" if kind == "rss" else "device memory allocated to tensors"
