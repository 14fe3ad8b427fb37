"""Make the sources of the site: docs/_build/source for Sphinx, docs/_build/colab.

    python tools/make_docs.py
"""

import json
import shutil
from pathlib import Path

import pages
import reference
from book import ROOT, dumps

BUILD = Path("docs/_build")


def write(path: Path, text: str) -> None:
    """Write a file if that changes it, so that Sphinx reads only what is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def build(root: Path = ROOT) -> pages.Site:
    """Write all sources; what they no longer have is removed."""
    site = pages.load_site(root)
    files: dict[str, str] = {}
    for page in sorted(site.pages, key=lambda p: p.stem == "index"):
        make = pages.landing if page.stem == "index" else pages.build_copy
        files[f"source/{page.path}.ipynb"] = dumps(make(page, site))
        files[f"colab/{page.path}.ipynb"] = dumps(pages.colab_copy(page, site))
    for name, text in reference.pages(site).items():
        files[f"source/api/{name}.md"] = text
    files["source/references.md"] = pages.bibliography(site)
    files["source/equations.json"] = json.dumps(site.numbers, indent=1)
    build_folder = root / BUILD
    for folder in ("source", "colab"):
        for path in (build_folder / folder).rglob("*"):
            name = path.relative_to(build_folder).as_posix()
            if path.is_file() and name not in files and path.suffix != ".svg":
                path.unlink()
    for name, text in files.items():
        write(build_folder / name, text)
    static = root / "docs" / "_static"
    shutil.copytree(static, build_folder / "source" / "_static", dirs_exist_ok=True)
    return site


if __name__ == "__main__":
    made = build()
    print(f"{len(made.pages)} notebooks, {len(made.names)} public names")
