"""How the site is built: `sphinx-build -W -n --keep-going -b html docs build/docs`.

Pages are plain Markdown that reads as well without the site. Pages whose text lives elsewhere (README, ARCHITECTURE, the error
pages of the package) are stubs here; the site puts the text in their place and turns links between files into links between pages.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

from docstrings import to_rst  # noqa: E402
from sphinx import addnodes  # noqa: E402

from limbeck import __version__  # noqa: E402

project = "Limbeck"
author = copyright = "The Limbeck authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["build", "_build"]

html_theme = "furo"
html_title = f"Limbeck {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"  # every colour has a contrast of 4.5 or more on its ground
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
add_module_names = False
nitpick_ignore_regex = [
    ("py:.*", ".*")
]  # types of other packages have no page here: the site is whole without a network

# Files outside of docs/ that are pages of the site, by the page that stands for them.
ELSEWHERE = {
    "readme": "README.md",
    "architecture": "ARCHITECTURE.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "embedded-teacher": "src/limbeck/embedded_teacher/README.md",
} | {
    f"errors/{page.stem}": f"src/limbeck/explanations/{page.name}"
    for page in (ROOT / "src/limbeck/explanations").glob("*.md")
}
PAGE_OF = {(ROOT / file).resolve(): page for page, file in ELSEWHERE.items()}
# The terminal shows the same pages, and has no links.
AFTER_ERRORS = """
Next: [all codes](../../../docs/errors/index.md), [messages word by word](../../../docs/troubleshooting.md),
[every key of a recipe](../../../docs/recipe.md), [every command](../../../docs/cli.md).
"""
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^ *```.*?^ *```[ ]*$)", re.MULTILINE | re.DOTALL)


def place_text(app, name, source):
    """Put the text of a page that lives elsewhere in its place, and lead its links to pages of the site."""
    file = ROOT / ELSEWHERE[name] if name in ELSEWHERE else Path(app.env.doc2path(name))
    text = file.read_text(encoding="utf-8") if name in ELSEWHERE else source[0]
    text += AFTER_ERRORS if name in ELSEWHERE and name.startswith("errors/") else ""
    here = ROOT / "docs" / Path(name).parent
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(lambda link: _link(link, file.parent, here), part) for part in parts[::2]]
    source[0] = "".join(parts)


def _link(link, origin, here):
    words, target, anchor = link[1], link[2], link[3] or ""
    if not target or ":" in target:
        return link[0]
    path = (origin / target).resolve()
    if path in PAGE_OF:
        path = ROOT / "docs" / f"{PAGE_OF[path]}.md"
    elif (ROOT / "docs") not in path.parents:
        return f"{words} (`{path.relative_to(ROOT)}`)" if words != str(path.relative_to(ROOT)) else f"`{words}`"
    return f"[{words}]({os.path.relpath(path, here)}{anchor})"


def write_docstring(app, what, name, thing, options, lines):
    """Docstrings here are plain sentences with `code` in them."""
    lines[:] = to_rst(lines)


def show_definitions(app):
    """Objectives are objects that are called; their page shows the functions that define them."""
    import limbeck.train.on_policy  # noqa: F401  whatever looks at the objects has to have seen them before
    from limbeck.objectives import divergences

    for name, thing in list(vars(divergences).items()):
        if isinstance(thing, divergences.Comparison):
            setattr(divergences, name, thing.of_log_probs)


def link_own_names_only(app, doctree):
    """Types that are not Limbeck's stand as words: `bytes` is no attribute of some class of that name."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link.get("refdomain") == "py" and not link["reftarget"].startswith("limbeck."):
            short = link.children[0]  # the name without its module, when there are two forms
            link.replace_self(short.children if isinstance(short, addnodes.pending_xref_condition) else link.children)


def setup(app):
    app.connect("doctree-read", link_own_names_only)
    app.connect("builder-inited", show_definitions)
    app.connect("source-read", place_text)
    app.connect("autodoc-process-docstring", write_docstring)
