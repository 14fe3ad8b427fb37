"""Sphinx's configuration. tools/pages.py makes the sources; settings.ini, addresses."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))

from pages import settings  # noqa: E402

given = settings(HERE.parent)
repository = f"https://github.com/{given['user']}/{given['repo']}"
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"

project, author, copyright = given["lib_name"], given["author"], given["copyright"]
language = "en"
smartquotes_action = "qe"  # two hyphens stay: they begin options
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_static", "mathjax/*svg*", "mathjax/*mml-*", "mathjax/*full*"]
templates_path = ["_templates"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 2
suppress_warnings = ["myst.header"]  # a docstring's directive holds no headings

mathjax_path = "mathjax/tex-chtml.js"
math_numfig = False
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
pygments_style, pygments_dark_style = "friendly", "monokai"

html_theme = "sphinx_book_theme"
html_title = project
html_context = {"default_mode": "auto"}
html_baseurl = f"https://{given['user']}.github.io/{given['repo']}/"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", str(mathjax)]
html_css_files = ["book.css"]
html_copy_source = html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "repository_url": repository,
    "repository_branch": given["branch"],
    "use_repository_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "search_as_you_type": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def number_equations(app, doctree):
    """Give each labelled equation the number that tools/pages.py chose."""
    numbers = json.loads((Path(app.srcdir) / "equations.json").read_text("utf-8"))
    for node in doctree.findall(lambda n: n.tagname == "math_block"):
        if node.get("label") in numbers:
            node["number"] = numbers[node["label"]]


def setup(app):
    """Connect the above."""
    app.connect("doctree-read", number_equations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
