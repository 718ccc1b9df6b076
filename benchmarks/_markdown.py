"""Figures as Markdown: tables, spreads over seeds, and the places on a page that figures fill."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["EARLIER_BASE", "FIGURE", "fill_blocks", "fill_figures", "how", "produced", "ranged", "spread", "table"]

EARLIER_BASE = (
    "These figures are older than the base that averages several mixtures. At that time a base was one mixture, "
    "fitted by scikit-learn."
)
FIGURE = re.compile(r"<!-- figure (\S+) -->.*?<!-- /figure -->")
"""A figure on a page: its name, and the text that ``report.py`` writes between the two marks."""


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Return the median, and the range over seeds where it shows."""
    values = list(values)
    middle, low, high = (format(v, form) for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def ranged(values: Iterable[float], form: str = ".1f") -> str:
    """Return the least and the greatest value, as they stand in a sentence."""
    values = list(values)
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def produced(document: dict[str, Any]) -> str:
    """Return one line on what made the figures."""
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
    threads = document["threads"]
    return f"{threads} thread{'s' if threads > 1 else ''}, {document['device']}; {versions}."


def how(command: str, document: dict[str, Any], text: str) -> list[str]:
    """Return the lines that end a section: what was done, by which command, with which versions."""
    return [f"**How.** {text}", "", f"`{command}`: {produced(document)}", ""]


def fill_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """Write each block between its two marks, where the page has them."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{block}\n\n{end}{rest.split(end)[1]}"
    return text


def fill_figures(text: str, figures: Mapping[str, str]) -> str:
    """Write each figure between its two marks; a name that is not known raises a KeyError."""
    return FIGURE.sub(lambda found: f"<!-- figure {found[1]} -->{figures[found[1]]}<!-- /figure -->", text)
