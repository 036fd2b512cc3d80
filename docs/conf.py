"""Configuration of the documentation: built offline, with every warning an error."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import xgenda

HERE = Path(__file__).resolve().parent

# The worked example is a file of its own, which the tests run; here it is shown as it was executed.
(HERE / "generated").mkdir(exist_ok=True)
shutil.copyfile(HERE.parent / "examples" / "first_analysis.ipynb", HERE / "generated" / "first-analysis.ipynb")

warnings.filterwarnings("ignore", category=DeprecationWarning)

project = "xgenda"
author = copyright = "the xgenda developers"
release = version = xgenda.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "benchmarks"]
default_role = "py:obj"

autosummary_generate = True
autodoc_typehints = "none"
maximum_signature_line_length = 80
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = f"xgenda {release}"
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
