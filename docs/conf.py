"""Builds the documentation as a site: sphinx-build -W docs site."""

import featup_hub

project = "featup_hub"
author = "The featup_hub authors"
version = release = featup_hub.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_parser",
]
html_theme = "furo"
html_title = "featup_hub"
exclude_patterns = ["site", "conf.py"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
myst_heading_anchors = 3
# Links to files outside this folder; tests/test_docs.py checks that they exist.
suppress_warnings = ["myst.xref_missing"]
