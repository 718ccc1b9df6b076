"""HTML made of nested calls: every text and every attribute is escaped, unless it is markup already."""

from __future__ import annotations

import html

__all__ = ["Markup", "joined", "tag"]

VOID = frozenset({"br", "img", "input", "meta"})
ONLY_TEXT = frozenset({"script", "style"})


class Markup(str):
    """HTML that needs no escaping, because :func:`tag` made it."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element; ``class_`` and ``for_`` lose their underscore, inner underscores become hyphens.

    An attribute that is None or False is left out, True stands alone. Children that are None are left out, what is
    no :class:`Markup` is escaped; scripts and styles take :class:`Markup` alone.

    >>> print(tag("p", "a < b ", tag("b", 2), class_="note", hidden=False))
    <p class="note">a &lt; b <b>2</b></p>
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opened = f"<{' '.join(parts)}>"
    if name in VOID:
        return Markup(opened)
    if name in ONLY_TEXT and not all(isinstance(child, Markup) for child in children):
        raise TypeError(f"{name} cannot hold text that is not trusted")
    return Markup(f"{opened}{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Children one after another, as :func:`tag` holds them."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(str(child)) for child in children if child is not None
        )
    )
