"""Make the reference from the notebooks: every public name, an example, its chapter.

Nothing is imported: names come from `__all__`, signatures and docstrings from the
exported cells, the example is the first cell after it that asserts something of it.
"""

import ast
import posixpath
import re
from dataclasses import dataclass

from book import directives, is_export, tree
from pages import Page, Site, prose, public_names, shown, toctree

LEAD = r"(?:(?<=^)|(?<=[.;:] ))"
NOTES = re.compile(r"(?<=[.;] )(?=(?:Returns?|Raises:?|Others|Buffers?|Call|Every) )")


@dataclass(frozen=True)
class Entry:
    """One public name: where it is defined and what shows it at work."""

    name: str
    node: ast.stmt
    cell: dict
    section: str
    example: dict | None


def entries(page: Page, names: list[str]) -> list[Entry]:
    """The public names of a chapter, in the order of the chapter."""
    found, section = [], page.title
    cells = page.nb["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            if match := re.search(r"^## (.+)$", cell["source"], re.MULTILINE):
                section = match[1]
            continue
        for node in tree(cell["source"]).body if is_export(cell["source"]) else []:
            for name in _defined(node):
                known = {entry.name for entry in found}
                if name in names and name not in known:
                    example = example_of(name, cells[number + 1 :])
                    found.append(Entry(name, node, cell, section, example))
    if missing := set(names) - {entry.name for entry in found}:
        raise ValueError(f"{page.path}: no exported cell defines {sorted(missing)}")
    return found


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        leaves = [leaf for target in targets for leaf in ast.walk(target)]
        return [leaf.id for leaf in leaves if isinstance(leaf, ast.Name)]
    return []


def example_of(name: str, cells: list[dict]) -> dict | None:
    """The first cell that asserts something and uses the name."""
    for cell in cells:
        if cell["cell_type"] != "code" or is_export(cell["source"]):
            continue
        nodes = list(ast.walk(tree(cell["source"])))
        used = {getattr(n, "id", getattr(n, "attr", "")) for n in nodes}
        hidden = "hide" in directives(cell["source"])
        asserts = any(isinstance(n, ast.Assert) for n in nodes)
        if name in used and asserts and not hidden:
            return cell
    return None


# Signatures


class _Tidy(ast.NodeTransformer):
    """Keep numbers as they are written; show `Annotated[X, …]` as X."""

    def __init__(self, source: str) -> None:
        self.source = source

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return ast.Name(ast.get_source_segment(self.source, node))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value).endswith("Annotated"):
            return self.visit(node.slice.elts[0])
        return self.generic_visit(node)


def signature(node: ast.FunctionDef, source: str, *, method: bool = False) -> str:
    """The arguments with their types, and what is returned."""
    tidy = _Tidy(source)
    args = tidy.visit(node.args)
    if method and "staticmethod" not in {ast.unparse(d) for d in node.decorator_list}:
        (args.posonlyargs or args.args).pop(0)
    result = f" -> {ast.unparse(tidy.visit(node.returns))}" if node.returns else ""
    return f"({ast.unparse(args)}){result}"


def class_signature(node: ast.ClassDef, source: str) -> str:
    """What the class is called with: the arguments of `__init__`, or its fields."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            part.returns = None
            return signature(part, source, method=True)
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return ""
    tidy, fields = _Tidy(source), []
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            default = f" = {ast.unparse(tidy.visit(part.value))}" if part.value else ""
            kind = ast.unparse(tidy.visit(part.annotation))
            fields.append(f"{part.target.id}: {kind}{default}")
    return f"({', '.join(fields)})"


def arguments(text: str) -> list[str]:
    """The names in a signature."""
    call = ast.parse(f"def f{text}: pass" if text else "def f(): pass").body[0].args
    every = [*call.posonlyargs, *call.args, *call.kwonlyargs, call.vararg, call.kwarg]
    return [a.arg for a in every if a]


# Docstrings


def describe(doc: str, names: list[str]) -> list[str]:
    """A docstring as paragraphs; its arguments, result and errors as fields."""
    head, _, rest = doc.partition("\n")
    one = "|".join(f"`?{re.escape(name)}`?" for name in names) or r"(?!)"
    label = re.compile(rf"{LEAD}((?:{one})(?:, (?:{one}))*): ")
    before, *labelled = label.split(" ".join(rest.split()))
    listed, said = [], NOTES.split(before)
    for name, text in zip(labelled[::2], labelled[1::2], strict=True):
        text, *notes = NOTES.split(text)
        said += notes
        shown = re.sub(r"`?(\w+)`?", r"**\1**", name)
        listed.append(f"    - {shown} – {text.strip(' ;.')}.")
    fields = [":Parameters:", *listed] if listed else []
    for field, verbs in (("Returns", "Returns?"), ("Errors", "Raises:?")):
        found = [m[1] for note in said if (m := re.match(rf"{verbs} (.*)", note))]
        fields += [f":{field}: {' '.join(found).strip()}"] if found else []
    plain = [n.strip() for n in said if not re.match(r"Returns? |Raises:? ", n)]
    paragraphs = [line for text in [head, *filter(None, plain)] for line in (text, "")]
    return [*paragraphs, *fields, ""] if fields else paragraphs


def safe(text: str) -> str:
    """Docstring text as markdown: nothing in it is HTML or a list."""
    parts = re.split(r"(`[^`]*`|\$[^$]*\$)", text)
    plain = [
        re.sub(r"([<*\\])", r"\\\1", p) if i % 2 == 0 else p
        for i, p in enumerate(parts)
    ]
    return "".join(plain)


# Pages


def pages(site: Site) -> dict[str, str]:
    """All pages of the reference, by name: one a module, and the list of them."""
    made, rows = {}, []
    for page in site.pages:
        if not page.module:
            continue
        names = public_names(site.root, page.module)
        made[page.module] = module_page(page, entries(page, names), site)
        sentence = prose(page.sentence, page, site, set())
        link = f"[`eql_repro.{page.module}`]({page.module}.md)"
        rows.append(f"| {link} | {sentence} | {len(names)} |")
    head = [
        "# Reference",
        "",
        "Every public name, from the docstrings of the chapters that define it. The "
        "examples are cells of the book, so they are run with it. All names in one "
        "list: the {ref}`index <genindex>`.",
        "",
        "| module | what it holds | names |",
        "| --- | --- | --: |",
    ]
    listed = toctree([f"eql_repro.{name} <{name}>" for name in made])
    made["index"] = "\n".join([*head, *rows, "", listed, ""])
    return made


def module_page(page: Page, found: list[Entry], site: Site) -> str:
    """The reference of one module."""
    chapter = f"../{page.path}.ipynb"
    here = Page(f"api/{page.module}", page.nb)
    rows = [
        f"# eql_repro.{page.module}",
        "",
        prose(safe(page.sentence), here, site, set()),
        "",
        f"Chapter: [{page.title}]({chapter}).",
        "",
        f"```{{py:module}} eql_repro.{page.module}",
        "```",
        "",
    ]
    shown_at: dict[str, str] = {}
    for entry in found:
        rows += entry_block(entry, here, site, example_block(entry, here, shown_at))
    return "\n".join(rows)


def example_block(entry: Entry, page: Page, shown_at: dict[str, str]) -> list[str]:
    """The example, or the name where the same cell is shown already; the section."""
    section = f"[{entry.section}](#cell-{entry.cell['id']})"
    if entry.example is None:
        return [f"In the chapter: {section}.", ""]
    first = shown_at.setdefault(entry.example["id"], entry.name)
    if first != entry.name:
        where = f"{{py:obj}}`{first} <eql_repro.{page.module}.{first}>`"
        return [f"Example: see {where}. In the chapter: {section}.", ""]
    code = shown(entry.example["source"])
    return [f"Example, from {section}:", "", "```python", code, "```", ""]


def entry_block(entry: Entry, page: Page, site: Site, example: list[str]) -> list[str]:
    """A name as a directive of Sphinx's Python domain, the example inside."""
    node, source = entry.node, entry.cell["source"]
    full = f"eql_repro.{posixpath.basename(page.path)}"
    options = [f":module: {full}", ""]
    if isinstance(node, ast.ClassDef):
        text = class_signature(node, source)
        body = [*_body(node, arguments(text), page, site), *example]
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and ast.get_docstring(part):
                if not part.name.startswith("_"):
                    body += _method(part, source, page, site)
        return _directive("py:class", entry.name + text, options, body)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        text = signature(node, source)
        body = [*_body(node, arguments(text), page, site), *example]
        return _directive("py:function", entry.name + text, options, body)
    value = ast.unparse(node.value)
    options = [options[0], *([f":value: {value}"] if len(value) <= 70 else []), ""]
    return _directive("py:data", entry.name, options, example)


def _method(node: ast.FunctionDef, source: str, page: Page, site: Site) -> list[str]:
    decorators = {ast.unparse(d) for d in node.decorator_list}
    text = signature(node, source, method=True)
    body = _body(node, arguments(text), page, site)
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return _directive("py:property", node.name, [], body, 4)
    return _directive("py:method", node.name + text, [""], body, 4)


def _body(node: ast.stmt, names: list[str], page: Page, site: Site) -> list[str]:
    text = describe(safe(ast.get_docstring(node) or ""), names)
    return [prose(line, page, site, set()) for line in text]


def _directive(
    kind: str, head: str, options: list[str], body: list[str], ticks: int = 6
) -> list[str]:
    fence = "`" * ticks
    return [f"{fence}{{{kind}}} {head}", *options, *body, fence, ""]
