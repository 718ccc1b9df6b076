"""Settings of Sphinx."""

import sys
from pathlib import Path

import latentprior

sys.path.insert(0, str(Path(__file__).parent))

project = "latentprior"
author = "The latentprior contributors"
project_copyright = author
version = release = latentprior.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton", "docstrings"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "latentprior"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

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
    (r"py:.*", r"latentprior\.(processes\.T|bases\.mixtures\.B)"),
    (r"py:.*", r"(Distribution|Dataset|TextIO|Kind|Rows|Range|Method|Score|FitCallback|Callback|optional|Self)"),
]
