"""Everybody can use the page: by keyboard, with a screen reader, in both themes, on a phone."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from browser.conftest import FOLDER, OpenPage

BASH = "Write a bash command: Find all *.log files under /srv/backup"
AXE = FOLDER / "axe" / "axe.min.js"
PARTS = {
    "playground": ".answer .curl",
    "pool": ".adapters tbody tr",
    "pool/nl2bash": "dialog .samples li",
    "traffic": ".chart canvas",
}


def show(page: Page, part: str) -> None:
    """Brings up a part with something in it."""
    if part == "playground":
        page.get_by_label("Prompt", exact=True).fill(BASH)
        page.get_by_text("More settings").click()
        page.get_by_label("Tokens at most").fill("4")
        page.get_by_label("Base model beside it").check()
        expect(page.locator(".hit").first).to_be_visible()
        page.get_by_role("button", name="Answer").click()
        expect(page.locator("#base-text")).to_have_attribute("aria-busy", "false")
    expect(page.locator(PARTS[part]).first).to_be_visible()


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2.2, levels A and AA, and its own best practices."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found: Any = page.evaluate("tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})", tags)
    return [f"{rule['id']}: {node['html'][:150]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("part", PARTS)
def test_axe_finds_nothing(open_page: OpenPage, demo_url: str, part: str, theme: str) -> None:
    page = open_page(f"{demo_url}/#{part}", theme=theme, script=AXE, reduced_motion="reduce")
    show(page, part)
    found = violations(page)
    assert not found, "\n".join(found)


def test_axe_would_find_something(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url, script=AXE)
    expect(page.locator("#prompt")).to_be_visible()
    page.evaluate("document.querySelector('label[for=prompt]').remove()")
    page.evaluate("document.querySelector('#prompt').removeAttribute('placeholder')")
    assert any(each.startswith("label") for each in violations(page))


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_wider_than_a_phone(open_page: OpenPage, demo_url: str, part: str) -> None:
    page = open_page(f"{demo_url}/#{part}", width=360)
    show(page, part)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_keyboard_is_enough(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    expect(page.locator("#example")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    for control in ("#example", "button:text('Next example')", "#prompt", "#k", "#strategy", "#weighting"):
        page.keyboard.press("Tab")
        expect(page.locator(control)).to_be_focused()
    page.locator("#prompt").focus()
    page.keyboard.insert_text(BASH)
    slider = page.get_by_label("Weight of nl2bash")
    expect(slider).to_be_visible()
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_value("0")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#adapted-text")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#adapted-text")).to_have_attribute("aria-busy", "false")


def test_a_theme_is_chosen_and_kept(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url, theme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_label("Theme").select_option("dark")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    expect(page.get_by_label("Theme")).to_have_value("dark")
    assert page.evaluate(background) == dark
    page.get_by_label("Theme").select_option("system")
    assert page.evaluate(background) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == dark


def test_scripts_from_elsewhere_are_blocked(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    response = page.reload()
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    content = page.content()
    assert "style=" not in content.split("<body>")[0] and "onclick" not in content.lower()
