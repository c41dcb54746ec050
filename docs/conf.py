"""Sphinx configuration: `make docs` builds the pages into build/docs."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for extensions/

project = "lit_mult"
author = "The lit_mult developers"
project_copyright = "The lit_mult developers, Apache-2.0"
version = release = version_of("lit-mult")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "extensions.mathml",
    "extensions.repository",
    "extensions.decisions",
    "extensions.reference",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = True

# The page holds its formulas as MathML, so that it needs no network to show them.
html_math_renderer = "mathml"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
smartquotes = False  # two dashes are those of an option
default_role = "code"  # docstrings mark code with single backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "lit_mult"
html_static_path = ["static"]
html_css_files = ["lit_mult.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
copybutton_prompt_text = "$ "
