"""Sphinx extension: the underlined headings and ``name : text`` items of this package's docstrings as reST.

A heading (a line of text over a line of dashes) becomes a rubric, an item of it a definition. Sphinx's own napoleon
knows a fixed list of headings; here any heading may name any group of choices.
"""

import re
from typing import Any

from sphinx.util.nodes import make_refnode

__all__ = ["converted", "setup"]

ITEM = re.compile(r"^(?P<names>\S.*?) : (?P<text>.*)$")


def converted(lines: list[str]) -> list[str]:
    """The docstring's lines in plain reST."""
    result: list[str] = []
    items = False
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if line.strip() and re.fullmatch(r"-{3,}", following):
            result += ["", f".. rubric:: {line.strip()}", ""]
            items = True
            continue
        if re.fullmatch(r"-{3,}", line):
            continue
        item = ITEM.match(line)
        if item and items:
            names = [name if name.startswith("``") else f"``{name}``" for name in item["names"].split(", ")]
            result += [", ".join(names), f"    {item['text']}"]
        else:
            result.append(line)
    return result


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = converted(lines)


def _top_level(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Find names of the package itself that a docstring gives bare, or by the module that defines them."""
    target = node.get("reftarget", "")
    objects = env.domains["py"].objects
    inner = target.startswith("latentprior.")
    name = f"latentprior.{target.rpartition('.')[2] if inner else target}"
    if node.get("refdomain") != "py" or name not in objects:
        return None
    return make_refnode(app.builder, node["refdoc"], objects[name].docname, objects[name].node_id, contnode)


def setup(app: Any) -> dict[str, Any]:
    """Connect to autodoc."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("missing-reference", _top_level)
    return {"version": "1", "parallel_read_safe": True}
