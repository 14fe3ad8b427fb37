"""Build the site: sources from the notebooks, Sphinx, then a look at what came out.

    python tools/make_docs.py                  into docs/_build
    python tools/make_docs.py --build FOLDER   into another folder

FOLDER/source is what Sphinx reads, FOLDER/html the site, FOLDER/colab the notebooks as
Colab opens them, FOLDER/external_links.txt the addresses that pages name.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import check_site
import pages
import picture
import reference
from book import ROOT, dumps


def sources(site: pages.Site) -> dict[str, str]:
    """All text files that the site is made from, by their path in the build folder."""
    files = {}
    for page in sorted(site.pages, key=lambda p: p.stem == "index"):
        make = pages.landing if page.path == "index" else pages.build_copy
        files[f"source/{page.path}.ipynb"] = dumps(make(page, site))
        files[f"colab/{page.path}.ipynb"] = dumps(pages.colab_copy(page, site))
    for name, text in reference.pages(site).items():
        files[f"source/api/{name}.md"] = text
    files["source/references.md"] = pages.bibliography(site)
    files["source/equations.json"] = json.dumps(site.numbers, indent=1)
    return files


def write(files: dict[str, str], build: Path) -> None:
    """Write what changed, so that Sphinx reads no more; remove what is gone."""
    for old in [*build.glob("source/**/*"), *build.glob("colab/**/*")]:
        if old.is_file() and old.relative_to(build).as_posix() not in files:
            old.unlink()
    for name, text in files.items():
        path = build / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def sphinx(build: Path, root: Path = ROOT) -> int:
    """Run Sphinx; a warning is an error. All pages are written: they share a menu."""
    shutil.rmtree(build / "html", ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-c", root / "docs"]
    command += ["-W", "--keep-going", "-q", "-a", "-j", "2"]
    command += ["-d", build / "doctrees", build / "source", build / "html"]
    return subprocess.run(command).returncode


def main() -> int:
    """Build and check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, default=ROOT / "docs" / "_build")
    build = parser.parse_args().build.resolve()
    site = pages.load_site()
    write(sources(site), build)
    for mode in picture.SIDE:
        picture.draw(mode, build / "source" / f"glance-{mode}.svg")
    if code := sphinx(build):
        return code
    print(f"{len(site.pages)} notebooks, {len(site.names)} public names")
    return check_site.report(build / "html", build / "external_links.txt")


if __name__ == "__main__":
    sys.exit(main())
