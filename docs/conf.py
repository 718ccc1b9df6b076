"""Settings of Sphinx."""

from typing import Any

from sphinx.util.nodes import make_refnode

import latentprior

project = "latentprior"
author = "The latentprior contributors"
project_copyright = author
version = release = latentprior.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "latentprior"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Docstrings are numpydoc. Types of parameters are shown as they are written: many are sentences, not names to link.
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
# "Attributes" looks like "Parameters". The other headings list the options of one parameter.
napoleon_custom_sections = [
    (heading, "params_style")
    for heading in ("Attributes", "Graphs", "Kinds", "Methods", "Samplers", "Several processes")
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True

nitpicky = True
nitpick_ignore = [("py:attr", "log_abs_det")]
# Types of other packages, whose inventories a build without a network cannot read, and names for annotations only.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|pathlib|collections|typing|rich|os|types|time)\..*"),
    (
        r"py:.*",
        r"(Tensor|Array|NDArray|Path|Any|Callable|Iterable|Iterator|Mapping|Sequence|Literal|ClassVar|NamedTuple)",
    ),
    (r"py:.*", r"(nn|constraints)\..*"),
    # Types of internals, in signatures of internals.
    (r"py:class", r"latentprior\.\w+\..*"),
    (r"py:.*", r"(Distribution|Dataset|TextIO|Console|Kind|Rows|Range|Method|Score|FitCallback|Callback|Self)"),
]


def link_to_entry(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link a name that stands bare, or under the module that defines it, to the one entry that ends with it."""
    if node.get("refdomain") != "py":
        return None
    objects, target = env.domains["py"].objects, node.get("reftarget", "")
    ending = "." + (target.rpartition(".")[2] if target.startswith("latentprior.") else target)
    names = [name for name, entry in objects.items() if name.endswith(ending) and not entry.aliased]
    # Names of the package itself come first.
    names = [name for name in names if name == f"latentprior{ending}"] or names
    if len(names) != 1:
        return None
    entry = objects[names[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode)


def keep_attribute_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put an empty mark before "text: more text", which napoleon would read as a type and its description."""
    if what in {"attribute", "data", "property"} and lines and ":" in lines[0]:
        lines.insert(0, "\\ ")


def setup(app: Any) -> None:
    """Connect the functions above to Sphinx."""
    # Napoleon's own handler has the priority 500.
    app.connect("autodoc-process-docstring", keep_attribute_text, priority=400)
    app.connect("missing-reference", link_to_entry)
