"""Make README.md from nbs/index.ipynb.

python tools/readme.py           write it
python tools/readme.py --check   only say whether it is in step
"""

import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from book import DIRECTIVE, ROOT, directives, read

NOTE = "<!-- Made from nbs/index.ipynb by tools/readme.py. Edit the notebook. -->"
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)(\))")


def render(nb: dict) -> str:
    """The index notebook as the text of README.md."""
    parts = [NOTE]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(_relink, cell["source"]))
        elif "hide" not in (found := directives(cell["source"])):
            if found.get("echo") != "false":
                parts.append(_source(cell["source"]))
            parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _relink(match: re.Match) -> str:
    """A link seen from nbs/, as seen from the project's folder."""
    before, target, after = match.groups()
    return before + posixpath.normpath(posixpath.join("nbs", target)) + after


def _source(source: str) -> str:
    code = DIRECTIVE.sub("", source).strip()
    return f"```python\n{code}\n```" if code else ""


def _output(output: dict) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/markdown" in data:
        return LINK.sub(_relink, "".join(data["text/markdown"]))
    if "<table" in (page := "".join(data.get("text/html", ""))):
        return table(page)
    if any(mime.startswith("image/") for mime in data):
        return ""
    text = "".join(data.get("text/plain", "")).strip("\n")
    return f"```text\n{text}\n```" if text else ""


class _Rows(HTMLParser):
    """Collects the cells of the tables on a page, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            self.rows[-1][-1] += data


def table(page: str) -> str:
    """An HTML table as a Markdown table; its first row becomes the head."""
    parser = _Rows()
    parser.feed(page)
    rows = [[cell.strip().replace("|", r"\|") for cell in r] for r in parser.rows if r]
    width = max(len(row) for row in rows)
    rows = [row + [""] * (width - len(row)) for row in rows]
    rows.insert(1, ["---"] * width)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_step(root: Path = ROOT) -> list[str]:
    """A line if README.md is not what the index gives."""
    index, readme = root / "nbs" / "index.ipynb", root / "README.md"
    if not index.exists():
        return ["nbs/index.ipynb: missing"]
    current = readme.read_text(encoding="utf-8") if readme.exists() else ""
    stale = current != render(read(index))
    return ["README.md: not in step with nbs/index.ipynb; `make readme`"] * stale


def main() -> int:
    """Write README.md, or with --check report; return the exit code."""
    if "--check" in sys.argv:
        problems = in_step()
        print("\n".join(problems) or "README.md is in step")
        return bool(problems)
    text = render(read(ROOT / "nbs" / "index.ipynb"))
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
