# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""How Sphinx builds these pages: `python -m sphinx -W -b html docs docs/_build`."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the docstrings are read off the imported package
DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402 - needs the path

import pallas_paged  # noqa: E402

generate.main()  # the tables that are made from files of the repository

project = "pallas_paged"
author = "The pallas_paged Authors"
project_copyright = "2026 The pallas_paged Authors"
version = release = pallas_paged.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]  # what is generated is included by pages
html_theme = "furo"
html_title = f"pallas_paged {version}"

# Docstrings write code in single backticks, as Markdown does.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_ivar = True

myst_heading_anchors = 3
# Sections of the repository's notes are included below headings of another level.
suppress_warnings = ["myst.header"]
