"""The documentation site: ``make docs`` builds it, with every warning an error."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# Times in the report are those of the machine that it describes, not of the one that builds.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="docs-")
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "headinfer-compile"
author = "headinfer-compile contributors"
copyright = author
release = version = metadata.version("headinfer-compile")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "code_reference"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autoclass_content = "both"
napoleon_use_rtype = False

# Nothing is loaded from elsewhere: the site reads from a folder, with no network.
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
