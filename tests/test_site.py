"""The site, read with and without a browser. It is built once, from the notebooks."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import check_site
import pages
import pytest
import reference
from book import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync""".split()
PHONE, DESK = (390, 844), (1280, 900)


# The tools, on small examples


def notebook(*cells: str) -> dict:
    """A notebook; code begins with `#|` or is marked by a first line `code`."""
    made = []
    for number, text in enumerate(cells):
        code = text.startswith(("#|", "code\n"))
        cell = {"cell_type": "code" if code else "markdown", "id": f"c{number}"}
        cell |= {"metadata": {}, "source": text.removeprefix("code\n")}
        made.append(cell | ({"outputs": [], "execution_count": None} if code else {}))
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def small_site(*cells: str, path: str = "03_eql") -> tuple["pages.Page", "pages.Site"]:
    title = "# A title\n\n> A sentence."
    page = pages.Page(path, notebook(title, *cells))
    other = pages.Page("results/table1_lvis", notebook(title))
    site = pages.Site(ROOT, [page, other], pages.settings())
    site.papers["lin2017"] = {"author": "Tsung-Yi Lin and Kaiming He", "year": "2017"}
    site.papers["he2017"] = {"author": "Kaiming He", "year": "2017", "names": "R-CNN"}
    site.names["eql.equalization_loss"] = "eql_repro.eql.equalization_loss"
    site.names["lanes.step"] = "eql_repro.lanes.step"
    return page, site


def copied(*cells: str) -> list[dict]:
    """The cells of a build copy, the title aside."""
    return pages.build_copy(*small_site(*cells))["cells"][1:]


def linked(text: str) -> str:
    return copied(text)[0]["source"]


def test_directives_and_hidden_cells_do_not_show():
    cells = copied("#| default_exp eql", "#| hide\nx = 1", "#| echo: false\ny = 2")
    assert [c["source"] for c in cells] == ["y = 2"]
    assert cells[0]["metadata"]["tags"] == ["remove-input"]
    target, cell = copied("#| export\ndef f(): ...")
    assert target["source"] == "(cell-c1)="
    assert cell["source"] == "def f(): ..." and cell["metadata"]["tags"] == ["export"]


def test_links_stand_below_the_sentence_of_a_page():
    page, site = small_site()
    page.nb["cells"][0]["source"] += "\n\nMore."
    rows = pages.build_copy(page, site)["cells"][0]["source"].split("\n")
    assert rows[:5] == [
        "# A title",
        "",
        "> A sentence.",
        "",
        "```{container} page-links",
    ]
    assert site.colab(page) in rows[5] and rows[-1] == "More."


def test_figures_have_number_caption_and_alt_text():
    source = "#| label: fig-a\n#| fig-cap: It rises.\n#| fig-alt: A line.\ndraw()"
    page, site = small_site(source, source)
    for cell in page.nb["cells"][1:]:
        cell["outputs"] = [{"output_type": "display_data", "data": {"image/png": ""}}]
    first, second = pages.build_copy(page, site)["cells"][1:]
    assert first["metadata"]["mystnb"]["image"] == {"alt": "A line."}
    caption = second["metadata"]["mystnb"]["figure"]["caption"]
    assert caption == "**Figure 03.2.** It rises."
    cell, text = copied(source)  # an interactive figure: its caption follows
    assert "**Figure 03.1.** It rises." in text["source"] and not cell["outputs"]


def test_equations_carry_the_papers_number_or_their_own():
    parts = "The loss (Eq. 6-7):", "$$a$$", "From Eq. 7 follows", "$$b$$", "Eq. 8 is"
    text = "\n\n".join([*parts, "$$c$$"])
    page, site = small_site(text)
    source = pages.build_copy(page, site)["cells"][1]["source"]
    numbers = list(site.numbers.values())
    assert numbers == ["Eq. 6–7", "03.1", "Eq. 8"]
    assert "(eq-6)=\n(eq-7)=\n$$a$$ (eq-03_eql-1)" in source
    assert "From [Eq. 7](#eq-7) follows" in source
    assert pages.numbers_of("9 to 11") == [9, 10, 11]


def test_names_papers_and_pages_become_links():
    full = "<eql_repro.eql.equalization_loss>"
    assert linked("`equalization_loss`") == f"{{py:obj}}`equalization_loss {full}`"
    assert linked("a `step`") == "a `step`"  # a plain word of another module
    assert linked("`table1_lvis`") == "[`table1_lvis`](results/table1_lvis.ipynb)"
    assert linked("Lin et al. 2017)") == "[Lin et al. 2017](#paper-lin2017))"
    assert linked("Lin et al. (2017)") == "[Lin et al. (2017)](#paper-lin2017)"
    assert linked("R-CNN, R-CNN") == "[R-CNN](#paper-he2017), R-CNN"
    for same in ("`R-CNN`", "$R-CNN$", "# R-CNN", "```\nR-CNN\n```", "[R-CNN](#x)"):
        assert linked(same) == same
    with pytest.raises(ValueError, match="lacks 'Nobody et al. 2001"):
        linked("Nobody et al. 2001")


def test_links_into_the_repository_go_to_its_host():
    host = pages.settings()
    base = f"https://github.com/{host['user']}/{host['repo']}"
    assert linked("[n](../NOTICE)") == f"[n]({base}/blob/main/NOTICE)"
    assert linked("[n](../records)") == f"[n]({base}/tree/main/records)"
    same = "[t](results/table1_lvis.ipynb)"
    assert linked(same) == same
    with pytest.raises(ValueError, match="nowhere.md, which is not there"):
        linked("[n](nowhere.md)")


def test_short_titles_and_order_come_from_the_file_names():
    def page(path):
        return pages.Page(path, notebook("# Its own title\n\n> A sentence."))

    names = ["table2_lambda", "fig2_scores", "verdict", "table11_12_open", "sliders"]
    found = [page(f"results/{name}") for name in names]
    shorts = [p.short for p in sorted(found, key=lambda p: p.order)]
    last = ["Figure 2: scores", "Table 2: λ", "Tables 11, 12: open", "Sliders"]
    assert shorts == ["Verdict", *last]
    assert page("03_eql").short == "03 EQL"
    assert page("howto/your_data").short == "Its own title"


def test_the_first_page_shows_only_the_imports_it_uses():
    hidden = "#| echo: false\nplot(pd)"
    imports = "code\nimport pandas as pd\nfrom eql_repro import a, b"
    nb = {"cells": copied(imports, "## Use", "code\na()", hidden)}
    pruned = [pages.prune_imports(nb, cell) for cell in nb["cells"]]
    sources = [cell["source"] for cell in pages.place_imports(pruned)]
    assert sources[:2] == ["## Use", "from eql_repro import a\n\na()"]


def test_a_docstring_becomes_fields():
    doc = "Sum.\n\n`x`: float [N]. `y`, `z`: more; two. Returns a sum.\nRaises OSError."
    assert reference.describe(doc, ["x", "y", "z"])[2:-1] == [
        ":Parameters:",
        "    - **x** – float [N].",
        "    - **y**, **z** – more; two.",
        ":Returns: a sum.",
        ":Errors: OSError.",
    ]


def test_the_static_check_finds_faults(tmp_path):
    good = '<a id="a" href="#a">x</a><img src="p.svg" alt="A.">'
    (tmp_path / "p.svg").write_text("<svg/>")
    (tmp_path / "index.html").write_text(good)
    assert check_site.check(tmp_path) == ([], [])
    bad = '<a href="b.html">x</a><a href="#b">x</a><img src="p.svg">{ref}`x`'
    bad += (
        '<script src="https://cdn.example/x.js"></script><a href="https://x.org">x</a>'
    )
    (tmp_path / "index.html").write_text(bad)
    faults, addresses = check_site.check(tmp_path)
    assert addresses == ["https://x.org"]
    assert [fault.split(": ", 1)[1] for fault in faults] == [
        "loads https://cdn.example/x.js",
        "no alt text: p.svg",
        "b.html: no such file",
        "#b: no such anchor",
        "markup left over: '{ref}'",
    ]


# The site


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of a fresh build; a warning of Sphinx fails here."""
    if not (find_spec("sphinx") and find_spec("myst_nb")):
        pytest.skip("no Sphinx with myst-nb")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "tools" / "make_docs.py", "--build", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout + done.stderr)
    assert (folder / "html" / "index.html").exists(), done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def site() -> "pages.Site":
    return pages.load_site()


def test_links_anchors_and_pictures_are_there(built):
    faults, addresses = check_site.check(built / "html")
    assert not faults, "\n".join(faults)
    listed = (built / "external_links.txt").read_text().splitlines()
    assert listed == addresses and any("arxiv.org" in a for a in addresses)


def test_every_notebook_is_a_page_in_the_menu(built, site):
    menu = check_site.read_page(built / "html" / "index.html").links
    for page in site.pages:
        assert (built / "html" / f"{page.path}.html").exists()
        assert page.path == "index" or f"{page.path}.html" in menu


def test_every_public_name_is_in_the_reference(built, site):
    found = {
        path.stem: check_site.read_page(path).ids
        for path in (built / "html" / "api").glob("*.html")
    }
    assert len(site.names) > 300
    for full in site.names.values():
        assert full in found[full.split(".")[1]], full


def test_a_page_names_its_source_and_its_colab_copy(built, site):
    for page in site.pages:
        links = check_site.read_page(built / "html" / f"{page.path}.html").links
        assert site.colab(page) in links
        assert site.blob(f"nbs/{page.path}.ipynb") in links


# A browser


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(built):
    """The site on a port of this machine."""
    handler = functools.partial(_Quiet, directory=str(built / "html"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, and without any host but this machine."""
    if not (BROWSER and DRIVER and find_spec("selenium")):
        pytest.skip("no chromium with chromedriver and selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    rules = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for flag in [
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--host-resolver-rules={rules}",
    ]:
        options.add_argument(flag)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(30)
    driver.get("about:blank")  # leave the page that a new window opens with,
    driver.get_log("performance")  # and forget what it asked for
    yield driver
    driver.quit()


def resize(browser, size: tuple[int, int]) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "mobile": width < 600}
    metrics["deviceScaleFactor"] = 1
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


READY = """
const done = arguments[0];
const math = window.MathJax ? MathJax.startup.promise : Promise.resolve();
const pictures = [...document.images].map(i => { i.loading = 'eager';
  return i.decode().catch(() => {}); });
Promise.all([math, ...pictures]).then(() => done(true));
"""
LOOK = """
const box = document.querySelector('article') || document.body;
return {
  missing: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
  formulas: document.querySelectorAll('.math').length,
  rendered: document.querySelectorAll('.math mjx-container').length,
  wrong: document.querySelectorAll('mjx-merror').length,
  wide: document.documentElement.scrollWidth - innerWidth,
  text: box.innerText.length,
};
"""
WIDE = "return document.documentElement.scrollWidth - innerWidth"
SLIDE = """
const [slider] = arguments, box = slider.closest('.cell_output') || document.body;
const said = () => [...box.querySelectorAll('output')].map(o => o.value);
const read = () => box.innerText + said();
const before = read();
slider.value = slider.value == slider.max ? slider.min : slider.max;
for (const kind of ['input', 'change'])
  slider.dispatchEvent(new Event(kind, {bubbles: true}));
return before != read();
"""


def messages(browser, address: str) -> list[str]:
    """Errors of the console and requests that left this machine, since last asked."""
    faults = [
        m["message"] for m in browser.get_log("browser") if m["level"] == "SEVERE"
    ]
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            local = address, "data:", "blob:", "about:", "chrome"
            if not url.startswith(local):
                faults.append(f"asks for {url}")
    return faults


def test_every_page_loads_and_fits_a_phone(built, browser, address):
    html = built / "html"
    paths = [p.relative_to(html).as_posix() for p in sorted(html.rglob("*.html"))]
    paths = [p for p in paths if not p.startswith("_")]
    faults, formulas, sliders = [], 0, 0
    for path in paths:
        resize(browser, PHONE)
        browser.get(f"{address}/{path}")
        browser.execute_async_script(READY)
        seen = browser.execute_script(LOOK)
        formulas += seen["formulas"]
        faults += [f"{path}: missing {src}" for src in seen["missing"]]
        if seen["rendered"] < seen["formulas"] or seen["wrong"]:
            faults.append(f"{path}: {seen}")
        if seen["wide"] > 0:
            faults.append(f"{path}: {seen['wide']} pixels too wide for a phone")
        for slider in browser.find_elements("css selector", "input[type=range]"):
            sliders += 1
            if not browser.execute_script(SLIDE, slider):
                faults.append(f"{path}: a slider that changes nothing")
        resize(browser, DESK)
        if (wide := browser.execute_script(WIDE)) > 0:
            faults.append(f"{path}: {wide} pixels too wide for a desk")
        faults += [f"{path}: {text}" for text in messages(browser, address)]
    assert not faults, "\n".join(faults)
    assert len(paths) > 70 and formulas > 200
    print(f"{len(paths)} pages, {formulas} formulas, {sliders} sliders")


def test_a_slider_is_seen_to_move_its_number(browser):
    slider = "<input type=range min=0 max=1 oninput='o.value=this.value'>"
    for page, moves in ((slider, True), (slider.replace("oninput", "on"), False)):
        browser.get(f"data:text/html,{page}<output id=o>x</output>")
        found = browser.find_element("css selector", "input[type=range]")
        assert browser.execute_script(SLIDE, found) is moves


def wait_for(browser, script: str):
    """The result of a script, as soon as it is not empty."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda b: b.execute_script(script))


def test_search_finds_tail_ratio(browser, address):
    browser.get(f"{address}/search.html?q=tail+ratio")
    links = "return [...document.querySelectorAll('#search-results li a')]"
    found = wait_for(browser, f"{links}.map(a => a.href).join(' ')")
    assert "01_longtail.html" in wait_for(
        browser, f"{links}.map(a => a.href).join(' ')"
    )
    assert "tail" in found
    assert not messages(browser, address)


def test_keyboard_and_dark_mode(browser, address):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    resize(browser, DESK)
    browser.get(f"{address}/03_eql.html")
    browser.execute_async_script(READY)
    ActionChains(browser).send_keys(Keys.TAB).perform()
    active = "return document.activeElement.innerText"
    assert "Skip to main content" in browser.execute_script(active)
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("k").key_up(
        Keys.CONTROL
    ).perform()
    assert wait_for(
        browser, "return document.querySelector('dialog[open] input') != null"
    )
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    ground = "return getComputedStyle(document.body).backgroundColor"
    grounds = []
    for mode in ("light", "dark"):
        button = f".theme-change-button[data-mode={mode}]"
        browser.execute_script(f"document.querySelector('{button}').click()")
        grounds.append(browser.execute_script(ground))
    light, dark = (int(text.split("(")[1].split(",")[0]) for text in grounds)
    assert light > 240 and dark < 50
    assert browser.execute_script("return document.querySelectorAll('.copybtn').length")


def test_the_menu_opens_on_a_phone(browser, address):
    resize(browser, PHONE)
    browser.get(f"{address}/03_eql.html")
    browser.execute_async_script(READY)
    browser.find_element("css selector", ".bd-header-article .primary-toggle").click()
    link = "document.querySelector('.bd-sidebar-primary a[href=\"04_seql.html\"]')"
    seen = (
        f"const r = {link}.getBoundingClientRect(); return r.width > 0 && r.left >= 0"
    )
    assert wait_for(browser, seen)


# Colab


GIT = """#!{python}
import shutil, sys
from pathlib import Path
options = ["-q", "--depth", "1", "--branch", {branch!r}]
assert sys.argv[1:-1] == ["clone", *options, {url!r}]
root, here = Path({root!r}), Path(sys.argv[-1])
for name in ("nbs", "eql_repro", "paper", "records"):
    shutil.copytree(root / name, here / name)
for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE",
             "NOTICE", "MANIFEST.in", "constraints.txt"):
    shutil.copy(root / name, here / name)
"""
LIKE_COLAB = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""


@pytest.fixture(scope="module")
def colab(tmp_path_factory, site) -> dict[str, str]:
    """The environment of a machine like Colab; its `git clone` copies this project."""
    folder = tmp_path_factory.mktemp("colab")
    for name in ("bin", "fake", "installed"):
        (folder / name).mkdir()
    given = {"python": sys.executable, "root": str(ROOT), "url": site.repository}
    git = folder / "bin" / "git"
    git.write_text(GIT.format(branch=site.settings["branch"], **given))
    git.chmod(0o755)
    (folder / "fake" / "sitecustomize.py").write_text(LIKE_COLAB)
    env = {k: v for k, v in os.environ.items() if not k.startswith("EQL_")}
    env |= {"PIP_TARGET": str(folder / "installed"), "PIP_NO_DEPS": "1"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_UPGRADE": "1"}
    env |= {"PATH": f"{folder / 'bin'}:{env['PATH']}", "PYTHONPATH": ""}
    env["PYTHONPATH"] = f"{folder / 'fake'}:{folder / 'installed'}"
    return env


@pytest.mark.parametrize("path", ["04_seql", "results/fig3_thresholds"])
def test_a_notebook_runs_on_colab_from_top_to_bottom(path, site, colab, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.from_dict(pages.colab_copy(site.page(path), site))
    assert nb.cells[1].source.startswith("# On Colab")
    last = nbformat.v4.new_code_cell("import eql_repro\nprint(os.getcwd(), eql_repro)")
    nb.cells.append(last)
    nbformat.validate(nb)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(nb, timeout=300, resources=place).execute(env=colab)
    text = nb.cells[-1].outputs[0].text
    assert text.startswith(f"{tmp_path}/{site.settings['repo']}/nbs")
    assert colab["PIP_TARGET"] in text


def test_elsewhere_the_first_cell_does_nothing(site, tmp_path):
    cell = pages.colab_copy(site.page("04_seql"), site)["cells"][1]
    code = f"{cell['source']}\nprint(os.getcwd())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.stdout.strip() == str(tmp_path) and not done.stderr
    assert not list(tmp_path.iterdir())
