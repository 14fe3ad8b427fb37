"""Check the pages of the built site without a browser.

python tools/check_site.py docs/_build/html

Every link inside the site and every anchor leads somewhere, every picture is there and
has a text, nothing is loaded from elsewhere, no markup of the sources is left over.
Addresses outside the site are listed, not fetched.
"""

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
UNSEEN = ("script", "style", "template")
ROLES = "py:obj|ref|doc|any|eq|numref|math|term|cite|download|figure|toctree|container"
LEFTOVER = re.compile(
    rf"^\s*#\||\{{(?:{ROLES})\}}|^:::|^```|^\([\w-]+\)=$", re.MULTILINE
)


@dataclass
class Found:
    """What stands on one page."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found, self.unseen = Found(), 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = {name: value or "" for name, value in attrs}
        self.unseen += tag in UNSEEN
        self.found.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.found.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.found.loaded.append(given["href"])
        if given.get(LOADED.get(tag, "-")):
            self.found.loaded.append(given[LOADED[tag]])
        if tag == "img":
            self.found.pictures.append((given.get("src", ""), given.get("alt", "")))

    def handle_endtag(self, tag: str) -> None:
        self.unseen -= tag in UNSEEN

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.found.text += data


def read_page(path: Path) -> Found:
    """Parse one page."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.found


def outside(address: str) -> bool:
    """Whether an address leaves the site."""
    return bool(urlsplit(address).scheme or address.startswith("//"))


def check(html: Path) -> tuple[list[str], list[str]]:
    """A line for each fault of a site, and all addresses outside it."""
    site = {p: read_page(p) for p in sorted(html.rglob("*.html"))}
    site = {p: found for p, found in site.items() if "_static" not in p.parts}
    faults, addresses = [], set()
    for path, found in site.items():
        name = path.relative_to(html).as_posix()
        away = {link for link in found.links if outside(link)}
        addresses |= away
        faults += [f"{name}: loads {x}" for x in found.loaded if _foreign(x)]
        faults += [
            f"{name}: no alt text: {src}" for src, alt in found.pictures if not alt
        ]
        local = [x for x in [*found.links, *found.loaded] if not outside(x)]
        for link in dict.fromkeys(local):
            faults += [f"{name}: {link}: {x}" for x in _broken(link, path, site)]
        if match := LEFTOVER.search(found.text):
            faults.append(f"{name}: markup left over: {match[0].strip()!r}")
    return faults, sorted(addresses)


def _foreign(address: str) -> bool:
    return outside(address) and not address.startswith("data:")


def _broken(link: str, path: Path, site: dict[Path, Found]) -> list[str]:
    parts = urlsplit(link)
    target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
    if not target.is_file():
        return ["no such file"]
    if parts.fragment and target in site:
        anchor = unquote(parts.fragment)
        return [] if anchor in site[target].ids else ["no such anchor"]
    return []


def report(html: Path, listing: Path | None = None) -> int:
    """Print the faults, write the list of addresses; return the exit code."""
    faults, addresses = check(html.resolve())
    print("\n".join(faults) or f"the site has no fault; {len(addresses)} outside links")
    if listing:
        listing.write_text("".join(f"{a}\n" for a in addresses), encoding="utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(report(Path(sys.argv[1])))
