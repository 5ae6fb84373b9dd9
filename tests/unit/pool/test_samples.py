from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.pool import samples
from loraretriever.pool.samples import (
    ModelCard,
    derived_samples,
    given_samples,
    read_card,
    read_samples,
    rewrite_samples,
    write_samples,
)
from loraretriever.types import Sample


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(
        '\ufeff{"inputs": "one", "targets": "x"}\n\n{"text": "zwei ü"}\r\n{"prompt": "one"}\n'
        '{"prompt": "a\u2028b", "source": "model_card"}',
        encoding="utf-8",
    )
    read = read_samples(file)
    assert read == [Sample("one"), Sample("zwei ü"), Sample("a\u2028b", "model_card")]
    file.write_text(write_samples(read), encoding="utf-8")
    assert read_samples(file) == read


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "s.jsonl:2 is not JSON: Expecting"),
        ('"text"', "s.jsonl:2 is '\"text\"'; expected a JSON object"),
        ('{"input": "x"}', "expected a JSON object with one of inputs, text, prompt"),
        ('{"inputs": 3}', "s.jsonl:2: inputs is 3; expected a string"),
        ('{"inputs": " "}', "s.jsonl:2: the sample is ' '"),
        ('{"inputs": "\\ud800"}', "s.jsonl:2: the sample is not Unicode"),
        ('{"inputs": "x", "counter": "yes"}', "s.jsonl:2: counter is 'yes'; expected true or false"),
        ('{"inputs": "fine", "counter": true}', "'fine' is a sample and a counter sample at once"),
        ('{"inputs": "' + "x" * 20_001 + '"}', "s.jsonl:2: the sample has 20001 characters"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "s.jsonl").write_text('{"inputs": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidInputError) as caught:
        read_samples(tmp_path / "s.jsonl")
    assert message in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read .*none"):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "latin1.jsonl").write_bytes(b'{"inputs": "\xfc"}')
    with pytest.raises(InvalidInputError, match="UTF-8"):
        read_samples(tmp_path / "latin1.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidInputError, match="there is no sample"):
        read_samples(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is no sample"),
        ("one string", "expected a list of strings"),
        (["a", ""], "sample 2: the sample is ''"),
        ([3], "expected some text"),
        (["\udc00"], "not Unicode"),
        ([str(number) for number in range(samples.MAX_SAMPLES + 1)], "at most 1000"),
    ],
)
def test_bad_strings(texts: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        given_samples(texts)


def test_counter_samples_come_last(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(
        '{"inputs": "no", "counter": true, "source": "feedback"}\n{"inputs": "yes", "counter": false}\n'
        '{"text": "no", "counter": true}\n'
    )
    read = read_samples(file)
    assert read == [Sample("yes"), Sample("no", "feedback", counter=True)]
    file.write_text(write_samples(read))
    assert read_samples(file) == read
    file.write_text('{"inputs": "no", "counter": true}\n')
    with pytest.raises(InvalidInputError, match="there is no sample"):
        read_samples(file)


def test_a_changed_file_keeps_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    one, two, three = (
        '{"id": 7, "inputs": "one",   "targets": [1e5]}\r',
        '{"prompt": "no", "counter": true, "who": "me"}',
        '{"text": "three\u2028\\u00fc", "note": "\\ud800"}',
    )
    file.write_text(f"\ufeff{one}\n\n{two}\n{three}\n{one}", encoding="utf-8")
    old = read_samples(file)
    text = rewrite_samples(file, [*old, Sample("neü", "feedback"), Sample("never", counter=True)])
    assert text.split("\n") == [
        *(one, two, three, one),
        '{"inputs": "neü", "source": "feedback"}',
        '{"inputs": "never", "source": "given", "counter": true}',
        "",
    ]
    assert rewrite_samples(file, old[1:]) == f"{two}\n{three}\n"


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_FILE_BYTES", 10)
    (tmp_path / "s.jsonl").write_text('{"inputs": "x"}')
    with pytest.raises(InvalidInputError, match="more than 10 bytes"):
        read_samples(tmp_path / "s.jsonl")


CARD = """---
license: mit
widget:
- text: Translate to German: hello
- text: "Übersetze: good morning"
- messages:
  - role: system
    content: You translate.
  - role: user
    content: How do you say bread?
- 3
---
# Model card

<!-- a comment -->
| a | table |
|---|---|

This adapter translates **English** to German,
see [the paper](http://example.org). ![badge](x.png)

```python
print("no prose")
```

- **Developed by:** [More Information Needed]

Trained for one epoch.
"""


def test_model_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.replace("text: Translate to German: hello", "text: 'Translate: hello'"))
    card = read_card(tmp_path / "README.md")
    assert card.prompts == ("Translate: hello", "Übersetze: good morning", "How do you say bread?")
    assert card.paragraphs == (
        "This adapter translates **English** to German, see the paper.",
        "Trained for one epoch.",
    )
    assert [sample.source for sample in derived_samples("x", card, "")] == ["model_card"] * 3


def test_a_card_with_broken_front_matter_still_has_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)  # "text: Translate to German: hello" is not YAML
    card = read_card(tmp_path / "README.md")
    assert card.prompts == ()
    assert len(card.paragraphs) == 2


def test_a_description_in_front_matter_stands_in_for_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ndescription: Writes SQL.\n---\n# Title\n")
    assert read_card(tmp_path / "README.md").paragraphs == ("Writes SQL.",)


@pytest.mark.parametrize("text", [None, "", "# Only a heading", "---\n- a list\n---\n", "\0\xff"])
def test_cards_that_tell_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path / "README.md") == ModelCard()


def test_the_last_resort_is_the_name() -> None:
    assert derived_samples("wiki-sql_v2", ModelCard(), " ") == [Sample("wiki sql v2", "name")]
    assert derived_samples("x", ModelCard(), "Writes SQL.") == [Sample("Writes SQL.", "description")]
    assert derived_samples("x", ModelCard((), ("A text.",)), "Writes SQL.") == [
        Sample("A text.", "model_card"),
        Sample("Writes SQL.", "description"),
    ]


FRONT = "---\ndescription: {}\nwidget:\n- text: hello\n---\nWrites SQL for you.\n"


@pytest.mark.parametrize(
    "value", ["!!bool maybe", "!!int ''", "!!timestamp foo", "!!python/name:os.system x", "&a [*a]"]
)
def test_front_matter_with_odd_tags(tmp_path: Path, value: str) -> None:
    (tmp_path / "README.md").write_text(FRONT.format(value))
    assert read_card(tmp_path / "README.md").paragraphs == ("Writes SQL for you.",)


def test_terminal_escapes_are_taken_out_of_cards(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Writes \x1b[31mred\x1b[0m \u202etext.\x07\n")
    assert read_card(tmp_path / "README.md").paragraphs == ("Writes [31mred[0m text.",)
    (tmp_path / "README.md").write_text(
        '---\ndescription: "a\\e[2Jb \\ud800"\nwidget:\n- text: "\\e"\n- text: "x\\x9by"\n---\n'
    )
    assert read_card(tmp_path / "README.md") == ModelCard(("xy",), ("a[2Jb",))


def test_prose_in_any_script_counts(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "# 标题\n\n把自然语言翻译成结构化查询。\n\n---\n\n***\n\n日本語の質問をSQLに変換します\n"
    )
    assert read_card(tmp_path / "README.md").paragraphs == (
        "把自然语言翻译成结构化查询。",
        "日本語の質問をSQLに変換します",
    )


@pytest.mark.parametrize(
    "text",
    [
        "![" * 500_000,
        "[" * 500_000 + "](" * 200_000,
        "[" * 9_000 + "]" + "(" * 9_000,
        "<" * 900_000,
        "a b" * 300_000,
        "aa " * 300_000,
        "\n \n" * 300_000,
        "---\n" + "\n--- " * 100_000,
        "---\n" + "- [a, b, c]\n" * 80_000 + "---\n",
    ],
    ids=["pictures", "links", "link", "tags", "words", "pairs", "blanks", "matter", "yaml"],
)
def test_hostile_cards_take_no_time(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    begin = time.process_time()
    read_card(tmp_path / "README.md")
    assert time.process_time() - begin < 3
