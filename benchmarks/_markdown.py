"""Figures as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

__all__ = ["EARLIER_BASE", "produced", "spread", "table"]

EARLIER_BASE = (
    "These figures are older than the base that averages several mixtures, each by EM on fresh draws: a "
    "base was one mixture by scikit-learn."
)


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Median, and the range over seeds where it shows."""
    values = list(values)
    middle, low, high = (format(v, form) for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def produced(document: dict[str, Any]) -> str:
    """One line on what made the figures."""
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
    return f"{document['threads']} threads, {document['device']}; {versions}."
