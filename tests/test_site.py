"""The site: every page and notebook is on it, its links lead somewhere, and it fits a telephone."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

import companion

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from api_pages import markdown, write_api_pages  # noqa: E402
from mathml import mathml  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. A warning, such as a link to nowhere or a page that no other one lists, is an error."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-d", str(folder / "doctrees"), "-c", "docs", ".", str(folder / "html")]
    built = subprocess.run([sys.executable, "-m", "sphinx", *options], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


class Links(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[tuple[str, str]] = []  # attribute, address
        self.names: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.names.add(value)
            if value and (name == "src" or (name == "href" and (tag != "link" or ("rel", "stylesheet") in attributes))):
                self.targets.append(("href" if tag == "a" else name, value))


@pytest.mark.slow
def test_every_page_is_there_and_every_link_leads_somewhere(site: Path) -> None:
    for source in [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb"), ROOT / "README.md"]:
        assert (site / source.relative_to(ROOT).with_suffix(".html")).exists(), source
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    lost, loaded_from_elsewhere = [], []
    for path, page in pages.items():
        for kind, target in page.targets:
            address = urlsplit(target)
            if address.scheme == "data":
                continue
            if address.scheme or address.netloc:
                if kind != "href":
                    loaded_from_elsewhere.append((path.name, target))
                continue
            file = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not file.exists() or (file in pages and address.fragment and address.fragment not in pages[file].names):
                lost.append((path.name, target))
    assert not lost
    assert not loaded_from_elsewhere


@pytest.fixture(scope="module")
def browser_page(chromium_path: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=chromium_path, args=flags)
        yield browser.new_page()
        browser.close()


@pytest.mark.slow
@pytest.mark.browser
def test_pages_fit_and_complain_of_nothing(site: Path, browser_page: Page) -> None:
    complaints: list[str] = []
    browser_page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    browser_page.on("pageerror", lambda error: complaints.append(str(error)))
    browser_page.on(
        "request", lambda asked: None if asked.url.startswith(site.as_uri()) else complaints.append(asked.url)
    )
    pages = [*site.glob("docs/*.html"), *site.glob("notebooks/*.html"), site / "docs/api/companion.guidance.html"]
    wide = []
    for path in pages:
        browser_page.set_viewport_size({"width": 1280, "height": 800})
        browser_page.goto(path.as_uri())
        for width in (1280, 400):
            browser_page.set_viewport_size({"width": width, "height": 800})
            if browser_page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
                wide.append((path.name, width))
    assert not wide
    assert not complaints


def test_every_formula_is_drawn() -> None:
    """docutils raises where it does not know a command."""
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path] = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = 0
    for path, text in texts.items():
        prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        for formula in re.finditer(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+)\$", prose, re.DOTALL):
            try:
                assert mathml(formula[1] or formula[2], block=bool(formula[1])).startswith("<math")
            except Exception as error:
                pytest.fail(f"{path.name}: {formula[0]}: {error}")
            found += 1
    assert found > 500


def test_spellings_that_docutils_lacks() -> None:
    assert mathml(r"\frac12").count("<mn>") == 2
    assert mathml(r"\big(x\big)") == mathml(r"\bigl(x\bigl)")
    assert mathml(r"a \dots b") == mathml(r"a \ldots b")
    assert "msub" in mathml(r"\bar\alpha_t") and "munder" not in mathml(r"\bar\alpha_t")


def test_an_api_page_has_signatures_and_sections(tmp_path: Path) -> None:
    package = tmp_path / "thing"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(
        '"""A part."""\n\nLIMIT = 3\n"""How many."""\n\n_hidden = 1\n"""No."""\n\n\n'
        'def act(x: int, *, scale: float = 1.0) -> int:\n    """Act.\n\n    Args:\n        x: a number,\n'
        '            whole.\n        scale: in pixels.\n\n    Raises:\n        ValueError: x is 0.\n    """\n\n\n'
        'class Box:\n    """A box."""\n\n    size: int\n\n    def open(self) -> None:\n        """Open it."""\n\n'
        "    def quiet(self) -> None: ...\n"
    )
    write_api_pages(package, tmp_path / "api")
    text = (tmp_path / "api" / "thing.md").read_text()
    assert "def act(x: int, *, scale: float=1.0) -> int" in text
    assert "- `x`: a number, whole.\n- `scale`: in pixels." in text and "**Raises**\n\n- `ValueError`: x is 0." in text
    assert "### LIMIT\n\nHow many." in text and "class Box:\n    size: int" in text and "def open(self)" in text
    assert "_hidden" not in text and "quiet" not in text
    assert "thing" in (tmp_path / "api" / "index.md").read_text()


def test_the_reference_holds_every_public_name(tmp_path: Path) -> None:
    write_api_pages(ROOT / "companion", tmp_path / "api")
    text = "\n".join(path.read_text() for path in (tmp_path / "api").glob("*.md"))
    assert not [name for name in companion.__all__ if f"### {name}\n" not in text]


def test_markdown_of_a_docstring_keeps_its_tables() -> None:
    docstring = "Read.\n\n| a | b |\n|---|---|\n\nReturns:\n    what was read.\n"
    assert markdown(docstring) == "Read.\n\n| a | b |\n|---|---|\n\n\n**Returns**\n\n- what was read."
