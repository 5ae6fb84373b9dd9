"""The pool's page against a real server: what is there, and what is changed."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from browser.conftest import SERVED, OpenPage

REGEX = "Write a regular expression for: lines with the string 'dog' before a number"
BASH = "Write a bash command: show the manual of the find command"


def first_hit(page: Page, url: str, prompt: str) -> str:
    """Routes a prompt in the playground."""
    page.goto(f"{url}/#playground")
    page.get_by_label("Prompt", exact=True).fill("")
    expect(page.locator(".hit")).to_have_count(0)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    return page.locator(".hit .name").first.inner_text()


def test_the_table_is_searched_and_sorted(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(f"{demo_url}/#pool")
    names = page.locator(".adapters tbody a")
    expect(names).to_have_text(sorted([*SERVED, "hostile"]))
    page.get_by_role("button", name="Adapter", exact=True).click()
    expect(names).to_have_text(sorted([*SERVED, "hostile"], reverse=True))
    expect(page.get_by_role("columnheader", name="Adapter")).to_have_attribute("aria-sort", "descending")
    page.get_by_role("button", name="Samples").click()
    expect(names.first).to_have_text("hostile")
    page.get_by_label("Search adapters").fill("sentiment")
    expect(names).to_have_text(["movie_sentiment"])
    page.get_by_label("Search adapters").fill("nothing is called so")
    expect(page.get_by_text("No adapter matches.")).to_be_visible()


def test_a_disabled_adapter_is_not_found(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(f"{demo_url}/#pool")
    switch = page.get_by_role("switch", name="nl2bash enabled")
    with page.expect_response("**/v1/adapters/nl2bash") as changed:
        switch.uncheck()
    assert changed.value.json()["enabled"] is False
    try:
        assert first_hit(page, demo_url, BASH) != "nl2bash"
    finally:
        page.goto(f"{demo_url}/#pool")
        with page.expect_response("**/v1/adapters/nl2bash"):
            switch.check()
    assert first_hit(page, demo_url, BASH) == "nl2bash"


def test_an_adapter_in_detail(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(f"{demo_url}/#pool")
    page.get_by_role("link", name="wiki_split").click()
    dialog = page.get_by_role("dialog", name="wiki_split")
    expect(dialog).to_contain_text("HuggingFaceTB/SmolLM2-135M-Instruct")
    expect(dialog.locator(".digest")).to_have_text(re.compile("[0-9a-f]{64}"))
    expect(dialog.locator(".samples li")).to_have_count(20)
    dialog.get_by_label("Another prompt").fill("Cut this long sentence into two.")
    dialog.get_by_role("button", name="Add the sample").click()
    expect(dialog.locator(".samples li")).to_have_count(21)
    dialog.get_by_label("Another prompt").fill("Join these two sentences.")
    dialog.get_by_label("must not be chosen").check()
    dialog.get_by_role("button", name="Add the sample").click()
    expect(dialog.get_by_role("heading", name="Counter samples 1")).to_be_visible()
    dialog.get_by_text("Change or remove").click()
    dialog.get_by_label("Description").fill("Two for one.")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.locator("p").first).to_have_text("Two for one.")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("link", name="wiki_split")).to_be_focused()
    expect(page.locator(".adapters")).to_contain_text("Two for one.")
    assert first_hit(page, demo_url, "Join these two sentences.") != "wiki_split"


def test_an_adapter_is_added_chosen_and_removed(open_page: OpenPage, demo_url: str, new_adapter: Path) -> None:
    page = open_page(demo_url)
    assert first_hit(page, demo_url, REGEX) != "regex-new"
    page.get_by_role("link", name="Pool").click()
    page.get_by_role("button", name="Add an adapter").click()
    dialog = page.get_by_role("dialog", name="Add an adapter")
    dialog.get_by_label("Files of a PEFT adapter").set_input_files(
        [new_adapter / name for name in ("adapter_config.json", "adapter_model.safetensors", "samples.jsonl")]
    )
    expect(dialog).to_contain_text("Taken: adapter_config.json, adapter_model.safetensors, samples.jsonl")
    dialog.get_by_label("Name", exact=True).fill("regex-new")
    dialog.get_by_label("Description").fill("Regular expressions from a description.")
    dialog.get_by_label("Tags").fill("code, regex")
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("status").filter(has_text="regex-new is in the pool")).to_be_visible()
    expect(page.locator(".adapters")).to_contain_text("regex-new")
    expect(page.locator(".adapters")).to_contain_text("Regular expressions from a description.")
    expect(page.get_by_role("img", name="Map of 8 adapters")).to_be_visible()

    page.get_by_role("link", name="Playground").click()
    expect(page.locator(".hit .name").first).to_have_text("regex-new")  # the prompt is routed anew by itself
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens at most").fill("4")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("#adapted-text")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".answer .composition")).to_contain_text("regex-new")

    page.goto(f"{demo_url}/#pool/regex-new")
    page.get_by_text("Change or remove").click()
    page.get_by_role("button", name="Remove …").click()
    page.get_by_role("button", name="Remove regex-new for good").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator(".adapters tbody a")).to_have_text(sorted([*SERVED, "hostile"]))
    assert first_hit(page, demo_url, REGEX) != "regex-new"


def test_a_refused_adapter_says_why(open_page: OpenPage, demo_url: str, new_adapter: Path) -> None:
    page = open_page(f"{demo_url}/#pool")
    page.get_by_role("button", name="Add an adapter").click()
    dialog = page.get_by_role("dialog", name="Add an adapter")
    dialog.get_by_label("Name", exact=True).fill("damaged")
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("adapter_config.json is missing")
    (new_adapter / "adapter_model.safetensors").write_bytes(b"not safetensors")
    dialog.get_by_label("Files of a PEFT adapter").set_input_files(
        [new_adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    )
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("adapter_model.safetensors")
    expect(dialog.get_by_label("Name", exact=True)).to_have_value("damaged")
    page.keyboard.press("Escape")
    expect(page.locator(".adapters")).not_to_contain_text("damaged")


def test_traffic(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    assert first_hit(page, demo_url, BASH) == "nl2bash"
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens at most").fill("4")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("#adapted-text")).to_have_attribute("aria-busy", "false")
    page.get_by_role("link", name="Traffic").click()
    expect(page.locator(".chart canvas")).to_have_count(6)
    expect(page.locator(".used li").filter(has_text="nl2bash")).to_be_visible()
    retrieval = page.locator(".chart").filter(has=page.get_by_role("heading", name="Retrieval"))
    expect(retrieval).to_contain_text("ms")
    with page.expect_response("**/v1/stats") as second:  # it goes on by itself
        pass
    assert second.value.ok
    slots = page.locator(".chart").filter(has=page.get_by_role("heading", name="Slots"))
    expect(slots).to_contain_text("slots 32")
