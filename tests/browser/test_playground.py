"""The playground against a real server with real models: routes, explanations, streams, weights."""

from __future__ import annotations

import json
import re

from playwright.sync_api import Page, Request, expect

from browser.conftest import HOSTILE, OpenPage

BASH = "Write a bash command: Find all *.log files under /srv/backup"
OFF_TOPIC = "zxqv 8841 qwfp lorem"


def ask_for_few_tokens(page: Page, tokens: int = 16) -> None:
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_label("Tokens at most").blur()


def body_of(request: Request) -> dict:
    return json.loads(request.post_data or "")


def test_the_adapters_are_found_while_the_prompt_is_typed(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    page.get_by_label("Prompt", exact=True).press_sequentially(BASH)
    first = page.locator(".hit").first
    expect(first.get_by_role("link", name="nl2bash")).to_be_visible()
    expect(page.get_by_role("meter", name="Fit of the best adapter")).to_have_attribute(
        "aria-valuetext", re.compile(r"0\.\d\d, the threshold is 0\.\d\d")
    )
    score, weight = first.locator(".hit-line .number").last, first.get_by_label("Weight of nl2bash")
    assert float(score.inner_text().removeprefix("score").strip()) > 0.5
    assert float(weight.input_value()) > 0.5
    assert first.locator(".near li").count() == 3
    expect(first.locator(".near li").first).to_contain_text("bash")
    expect(first.locator(".terms code").filter(has_text="bash").first).to_be_visible()
    expect(page.get_by_role("img", name="with the prompt")).to_be_visible()
    page.get_by_role("slider", name="Adapters at most").fill("1")
    expect(page.locator(".hit")).to_have_count(1)
    page.get_by_label("Prompt", exact=True).fill("")
    expect(page.locator(".hit")).to_have_count(0)


def test_an_answer_streams_beside_that_of_the_base_model(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    ask_for_few_tokens(page)
    page.get_by_label("Base model beside it").check()
    page.get_by_label("Prompt", exact=True).fill(BASH)
    with page.expect_request("**/v1/chat/completions"):
        page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#adapted-text[aria-busy=true]")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="Answering.")).to_be_attached()
    for name in ("adapted", "base"):
        expect(page.locator(f"#{name}-text")).to_have_attribute("aria-busy", "false")
        expect(page.locator(f"#{name}-text")).not_to_be_empty()
    expect(page.get_by_role("status").filter(has_text="complete")).to_be_attached()
    adapted = page.get_by_role("article", name="With adapters")
    expect(adapted.locator(".composition")).to_contain_text("nl2bash")
    expect(adapted.locator(".facts")).to_contain_text("tokens out")
    expect(page.get_by_role("article", name="Base model alone").locator(".composition")).to_have_text("base")
    assert page.locator("#adapted-text").inner_text() != page.locator("#base-text").inner_text()


def test_weights_set_by_hand_are_used(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    ask_for_few_tokens(page, 4)
    page.get_by_label("Prompt", exact=True).fill(BASH)
    page.get_by_label("Weight of nl2bash").fill("0.6")
    second = page.locator(".hit").nth(1).get_by_role("slider")
    second.fill("0.4")
    other = (second.get_attribute("aria-label") or "").removeprefix("Weight of ")
    expect(page.get_by_role("combobox", name="Weights")).to_have_value("own")
    page.get_by_label("Strategy").select_option("fusion")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Answer").click()
    assert body_of(sent.value)["lora"] == {"adapters": {"nl2bash": 0.6, other: 0.4}, "strategy": "fusion"}
    expect(page.locator("#adapted-text")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".answer .composition")).to_have_text(f"fusion(nl2bash=0.6,{other}=0.4)")

    page.get_by_label("Weight of nl2bash").fill("0")
    second.fill("0")
    expect(page.get_by_text("All weights are zero: the base model answers.")).to_be_visible()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Answer").click()
    assert body_of(sent.value)["model"] == "base"

    page.get_by_role("button", name="Back to the weights found").click()
    expect(page.get_by_role("combobox", name="Weights")).to_have_value("")
    assert float(page.get_by_label("Weight of nl2bash").input_value()) > 0.5


def test_the_base_model_answers_where_nothing_fits(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    page.get_by_label("Prompt", exact=True).fill(OFF_TOPIC)
    expect(page.get_by_text("No adapter fits well enough: the base model answers.")).to_be_visible()
    assert {slider.input_value() for slider in page.locator(".hit input").all()} == {"0"}


def test_an_answer_is_stopped(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    ask_for_few_tokens(page, 1000)
    page.get_by_label("Prompt", exact=True).fill("Tell me a very long story.")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("#adapted-text .caret")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_examples_are_the_samples_of_the_pool(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    page.get_by_label("Example of the adapter").select_option("wikisql")
    expect(page.locator(".hit").first.get_by_role("link")).to_have_text("wikisql")
    before = page.get_by_label("Prompt", exact=True).input_value()
    page.get_by_role("button", name="Next example").click()
    expect(page.get_by_label("Prompt", exact=True)).not_to_have_value(before)
    example = page.get_by_label("Prompt", exact=True).input_value()
    samples = page.locator(".hit").first.locator(".near button")
    expect(samples.first).to_have_attribute("title", example)  # the example itself: the route is that of the new prompt
    nearest = samples.nth(1)
    text = nearest.get_attribute("title") or ""
    nearest.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(text)


def test_texts_of_others_are_text(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    page.get_by_label("Prompt", exact=True).fill(f"{HOSTILE} is number 1 of the hostile samples.")
    expect(page.locator(".hit").first.get_by_role("link")).to_have_text("hostile")
    expect(page.locator(".near").first).to_contain_text("<img src=x onerror=")
    described = page.request.patch(f"{demo_url}/v1/adapters/hostile", data={"description": HOSTILE, "tags": [HOSTILE]})
    assert described.ok
    page.goto(f"{demo_url}/#pool/hostile")
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    expect(page.locator(".adapters")).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.title() == "Pool – LoraRetriever"


def test_an_error_is_shown(open_page: OpenPage, demo_url: str) -> None:
    page = open_page(demo_url)
    body = json.dumps({"error": {"message": "too many prompts wait.", "type": "server_error", "code": "overloaded"}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, body=body))
    page.get_by_label("Prompt", exact=True).fill(BASH)
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_role("alert")).to_have_text("too many prompts wait.")
    events = 'data: {"choices":[{"index":0,"delta":{"content":"find"}}]}\n\ndata: {"error":{"message":"it broke."}}\n\n'
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_role("alert")).to_have_text("it broke.")
    expect(page.locator("#adapted-text")).to_have_text("find")
