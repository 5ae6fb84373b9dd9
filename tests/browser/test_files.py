"""The page's files as they lie in the package; nothing here needs a browser."""

from __future__ import annotations

import re
from pathlib import Path

import loraretriever.server

STATIC = Path(loraretriever.server.__file__).parent / "static"
IMPORT = re.compile(r'^(?:import|export) [^;]*?from ?"([^"]+)"', re.MULTILINE)


def imported(module: Path) -> set[Path]:
    """The modules that one needs, and those that they need."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        each = waiting.pop()
        others = {(each.parent / name).resolve() for name in IMPORT.findall(each.read_text())}
        waiting += others - found
        found |= others
    return found


def own_files(*kinds: str) -> list[Path]:
    return [path for path in STATIC.rglob("*") if path.suffix in kinds and path.parent.name != "vendor"]


def test_what_the_first_part_needs_is_preloaded() -> None:
    needed = imported(STATIC / "js/app.js")
    listed = re.findall(r'rel="modulepreload" href="static/([^"]+)"', (STATIC / "index.html").read_text())
    assert sorted(listed) == sorted(str(path.relative_to(STATIC.resolve())) for path in needed)


def test_nothing_comes_from_elsewhere() -> None:
    for path in own_files(".html", ".css", ".js", ".svg"):
        addresses = set(re.findall(r"\bhttps?://[^\s\"'`]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
    for path in own_files(".css"):
        assert not re.search(r"url\(|@import", path.read_text()), path


def test_untrusted_text_cannot_become_html() -> None:
    for path in own_files(".js"):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", text), path


def test_each_library_has_its_licence() -> None:
    libraries = {path.name.split(".")[0].split("-")[0] for path in (STATIC / "vendor").glob("*.js")}
    assert libraries == {path.name.split(".")[0] for path in (STATIC / "vendor").glob("*.LICENSE.txt")}
