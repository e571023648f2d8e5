"""The site: `make docs`. Its sources are the repository's own pages and notebooks, so links work here and on GitHub."""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))
from api_pages import write_api_pages  # noqa: E402

write_api_pages(DOCS.parent / "companion", DOCS / "api")

_project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project, release, author = _project["name"], _project["version"], _project["authors"][0]["name"]
copyright = author

extensions = ["myst_nb", "mathml"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "*.md", "companion/**/README.md"]
exclude_patterns = [".*", "**/.ipynb_checkpoints", "benchmarks", "build", "dist", "runs", "tests"]

suppress_warnings = ["myst.header"]  # a level left out, for its size
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True  # $$…$$ between two lines of a paragraph
myst_heading_anchors = 3
myst_links_external_new_tab = True
html_math_renderer = "mathml"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_front"]
html_copy_source = False
