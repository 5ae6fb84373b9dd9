"""The page of a server with keys: it asks for one, and says what that one may not do."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from browser.conftest import Guarded, OpenPage


def enter(page: Page, secret: str) -> None:
    page.get_by_label("Key").fill(secret)
    page.get_by_role("button", name="Enter").click()


def test_it_asks_for_a_key_and_keeps_it_in_the_tab(open_page: OpenPage, guarded: Guarded) -> None:
    page = open_page(guarded.url)
    expect(page.get_by_role("heading", name="needs an API key")).to_be_visible()
    enter(page, "lr-wrong")
    expect(page.get_by_role("alert")).to_contain_text("unknown, expired or revoked")
    enter(page, guarded.keys["operator"])
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page.get_by_role("banner")).to_contain_text("operator")
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    stored = page.evaluate("[JSON.stringify(localStorage), document.cookie]")
    assert guarded.keys["operator"] not in "".join(stored)
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("Key")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Key")).to_be_visible()


def test_an_operator_sees_all(open_page: OpenPage, guarded: Guarded) -> None:
    page = open_page(f"{guarded.url}/#pool")
    enter(page, guarded.keys["operator"])
    expect(page.locator(".adapters tbody a")).to_have_text(["acme:tone", "other:secret", "sql"])
    page.get_by_role("link", name="Traffic").click()
    expect(page.locator(".chart canvas")).to_have_count(6)
    page.get_by_role("link", name="Playground").click()
    page.get_by_text("More settings").click()
    page.get_by_label("As tenant").fill("acme")
    page.get_by_label("As tenant").blur()
    page.get_by_label("Prompt", exact=True).fill("This is what it is for")
    expect(page.locator(".hit")).to_have_count(2)


def test_a_tenant_changes_its_own(open_page: OpenPage, guarded: Guarded) -> None:
    page = open_page(f"{guarded.url}/#pool")
    enter(page, guarded.keys["tenant"])
    expect(page.locator(".adapters tbody a")).to_have_text(["sql", "tone"])
    expect(page.get_by_role("switch", name="tone enabled")).to_be_enabled()
    expect(page.get_by_role("switch", name="sql enabled")).to_be_disabled()
    page.get_by_role("link", name="sql").click()
    expect(page.get_by_role("dialog").locator(".samples li")).to_have_count(3)
    expect(page.get_by_text("Change or remove")).to_have_count(0)
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Traffic").click()
    expect(page.get_by_text("may not see the server's figures")).to_be_visible()


def test_a_key_that_may_only_look(open_page: OpenPage, guarded: Guarded) -> None:
    page = open_page(guarded.url)
    enter(page, guarded.keys["reader"])
    expect(page.get_by_text("it lacks the scope generate")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("This is what sql is for")
    expect(page.locator(".hit")).to_have_count(1)
    expect(page.get_by_role("button", name="Answer")).to_be_disabled()
    page.get_by_role("link", name="Pool").click()
    expect(page.get_by_role("button", name="Add an adapter")).to_be_disabled()
    expect(page.get_by_text("it lacks the scope pool:write")).to_be_visible()


def test_a_key_that_may_only_generate(open_page: OpenPage, guarded: Guarded) -> None:
    page = open_page(guarded.url)
    enter(page, guarded.keys["writer"])
    expect(page.get_by_text("it lacks the scope route")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("This is what sql is for")
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens at most").fill("4")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("#adapted-text")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".facts")).to_contain_text("4 tokens out")
    page.get_by_role("link", name="Pool").click()
    expect(page.get_by_text("it lacks the scope pool:read")).to_be_visible()
