"""How Sphinx makes a site of these pages: ``make docs``.

Sphinx, for the docstrings are written for it: their roles and ``#:`` comments are its own, and it
checks that every one leads somewhere. Pages are Markdown, by MyST, so that they read well without a
site, too.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mintnet_triton as mint  # noqa: E402  # found by the path above

project, author = "mintnet-triton", "the mintnet-triton authors"
release = version = mint.__version__
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["requirements.txt"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
add_module_names = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False

# Every role must lead somewhere, but for what other libraries document and what is no part of the
# interface.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|matplotlib|collections|pathlib|os|typing)\b.*"),
    (r"py:class", r"\w|.* .*"),  # what a docstring returns, in words
]

maximum_signature_line_length = 88
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"{project} {version}"
html_show_copyright = False


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("missing-reference", find_public)
    app.connect("source-read", mark_files)
    app.connect("autodoc-process-docstring", keep_colon, priority=0)


def write_math(writer: Any, node: Any) -> None:
    """Formulas as browsers know them, which need no script from elsewhere."""
    block = type(node).__name__ == "math_block"
    formula = convert(node.astext(), display="block" if block else "inline")
    writer.body.append(f"<div>{formula}</div>" if block else formula)
    raise SkipNode


def find_public(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Where something is documented that is named without its module, or by the file it is in."""
    domain, name = env.domains.python_domain, str(node.get("reftarget", "")).split(".")[-1]
    found = [
        full
        for full, one in domain.objects.items()
        if full.split(".")[-1] == name and not one.aliased
    ]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, text)


def mark_files(app: Any, page: str, source: list[str]) -> None:
    """Markdown of the repository that is no page of the site is a file to download."""
    source[0] = re.sub(r"\]\(\.\./(\S+\.md)\)", r"](path:../\1)", source[0])


def keep_colon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon would take what stands before a colon for a type, and look for it."""
    if what in ("attribute", "property"):
        lines[:] = [line.replace(": ", " – ", 1) for line in lines]
