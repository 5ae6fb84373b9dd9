"""Streams of all kinds of tokenizers against the plain decode of all tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from loraretriever.engine.text import TextStream

UNDECODED = "\ufffd"
# How fast examples are made and run depends on the machine.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
CORPUS = [
    "the cat sat on the mat. the dog isn't there, is it?",
    "  two  spaces\n\nand lines\t , ' quotes ' and I've 's 'm 're !",
    "naïve café 日本語の文 😀 👍🏽 \ufffd ½",
    "STOP stop <stop> </s> ### ###",
]


def _wrap(tokenizer: Tokenizer, **settings: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings
    )


def _train(tokenizer: Tokenizer, trainer_type: Callable[..., Any], **settings: Any) -> Tokenizer:
    trainer = trainer_type(special_tokens=SPECIAL, show_progress=False, **settings)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer, vocab_size=330, initial_alphabet=alphabet)
    tokenizer.add_tokens(["added", " é "])  # not special: they stay
    return _wrap(tokenizer)


def byte_fallback(**settings: Any) -> Any:
    """As Llama's: a character without a token becomes bytes, a line break among them."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehiostn.,'!", UNDECODED]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("▁", "s"), ("'", "s")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _wrap(tokenizer, **settings)


def metaspace(**settings: Any) -> Any:
    """As T5's. Byte tokens are mere text here, since the decoder has no fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _train(tokenizer, trainers.UnigramTrainer, unk_token="<unk>", vocab_size=150)
    tokenizer.add_tokens(["<0x0A>", "<0x41>"])
    return _wrap(tokenizer, **settings)


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _wrap(_train(tokenizer, trainers.WordPieceTrainer, vocab_size=150), clean_up_tokenization_spaces=True)


def word_ends() -> Any:
    """As OpenAI's first GPT: a suffix marks the end of a word, and is no space at the end of the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    return _wrap(_train(tokenizer, trainers.BpeTrainer, vocab_size=150, end_of_word_suffix="</w>"))


MAKERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "clean_up": lambda: metaspace(clean_up_tokenization_spaces=True),
    "clean_bytes": lambda: byte_fallback(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    ),
    "word_piece": word_piece,
    "word_ends": word_ends,
    "slow_bytes": ByT5Tokenizer,  # in Python; leaves out bytes that do not fit
}
CLEANS = ("clean_up", "clean_bytes", "word_piece")


@functools.cache
def make(kind: str) -> Any:
    return MAKERS[kind]()


def plain(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def cut(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None without one."""
    places = [text.find(each) for each in stop if each in text]
    return text[: min(places)] if places else None


def expected(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, int]:
    """The answer's text, and how many tokens it takes to know: decodes everything at every token."""
    for count in range(1, len(ids) + 1):
        answer = cut(plain(tokenizer, ids[:count]).removesuffix(UNDECODED), stop)
        if answer is not None:
            return answer, count
    text = plain(tokenizer, ids)
    answer = cut(text, stop)
    return (text if answer is None else answer), len(ids) + 1


def stream(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], int]:
    """The pieces, and the number of tokens after which the stream stopped (one more: at the end, or not at all)."""
    texts = TextStream(tokenizer, stop)
    pieces: list[str] = []
    count = len(ids) + 1
    for i, token in enumerate(ids):
        pieces.append(texts.push(token))
        assert texts.text == "".join(pieces)
        if texts.stopped:
            count = min(count, i + 1)
            assert i + 1 == count or not pieces[-1]
    was_stopped = texts.stopped
    pieces.append(texts.finish())
    assert not (was_stopped and pieces[-1])
    assert texts.finish() == ""
    assert texts.text == "".join(pieces)
    return pieces, count


characters_ = st.one_of(st.integers(0, 0xD7FF), st.integers(0xE000, 0x10FFFF)).map(chr)
parts_ = st.sampled_from([*CORPUS, " ", "\n", "e", "aa", "'s", " ' ", "é", "😀", "日", "\u200d", UNDECODED])
texts_ = st.lists(st.one_of(parts_, characters_), max_size=5).map("".join)


@st.composite
def tokens_(draw: st.DrawFn, tokenizer: Any) -> list[int]:
    """Texts as the tokenizer cuts them, with any other tokens in between: special, unknown, parts of characters."""
    any_token = st.integers(0, len(tokenizer) + 3 * tokenizer.is_fast - 1)
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        ids += draw(
            st.one_of(
                texts_.map(lambda text: tokenizer(text, add_special_tokens=False).input_ids),
                st.lists(any_token, max_size=8),
                st.builds(lambda token, times: [token] * times, any_token, st.integers(1, 30)),
            )
        )
    return ids


@st.composite
def stops_(draw: st.DrawFn, text: str, least: int = 0, most: int = 3) -> list[str]:
    """Strings cut from the text, mostly, perhaps with one character changed at their end."""
    stops = []
    for _ in range(draw(st.integers(least, most))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        piece = text[start : start + draw(st.integers(1, 8))] + draw(st.sampled_from(["", "", "", "a", "😀"]))
        stops.append(piece or "a")
    return stops


@pytest.mark.parametrize("kind", MAKERS)
@steady
@given(data=st.data())
def test_pieces_join_to_the_plain_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(tokens_(tokenizer))
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == plain(tokenizer, ids)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in CLEANS])
@steady
@given(data=st.data())
def test_text_is_cut_before_the_first_stop_string_at_once(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(tokens_(tokenizer))
    stop = data.draw(stops_(plain(tokenizer, ids)))
    if kind == "byte_fallback":  # each byte of an unfinished character is one, and may still become something else
        stop = [each for each in stop if UNDECODED not in each]
    pieces, count = stream(tokenizer, ids, stop)
    assert ("".join(pieces), count) == expected(tokenizer, ids, stop)


@pytest.mark.parametrize("kind", CLEANS)
@steady
@given(data=st.data())
def test_a_stop_string_is_found_in_the_clean_text(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(tokens_(tokenizer))
    text = plain(tokenizer, ids)
    stop = data.draw(stops_(text, least=1, most=1))
    assert "".join(stream(tokenizer, ids, stop)[0]) == text.partition(stop[0])[0]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_ends", "slow_bytes"])
@steady
@given(data=st.data())
def test_nothing_is_held_back_without_need(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(tokens_(tokenizer))
    stop = data.draw(stops_(plain(tokenizer, ids)))
    texts = TextStream(tokenizer, stop)
    begins = {each[:size] for each in stop for size in range(1, len(each))}
    for count in range(1, len(ids) + 1):
        texts.push(ids[count - 1])
        if texts.stopped:
            return
        if kind == "byte_fallback" and not (tokenizer.convert_ids_to_tokens(ids[count - 1]) or "<").startswith("▁"):
            continue  # a run of bytes is given out at its end
        certain = plain(tokenizer, ids[:count]).removesuffix(UNDECODED)
        held = max((len(begin) for begin in begins if certain.endswith(begin)), default=0)
        assert texts.text == certain[: len(certain) - held]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_parts_of_an_emoji_are_held(kind: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer("a😀", add_special_tokens=False).input_ids
    texts = TextStream(tokenizer)
    pieces = [texts.push(token) for token in ids]
    assert [piece for piece in [*pieces, texts.finish()] if piece] == ["a", "😀"]


@pytest.mark.parametrize(("text", "pieces"), [("a\ufffdb", ["a", "\ufffdb"]), ("a\ufffd", ["a", "\ufffd"])])
def test_a_genuine_replacement_character_comes_out(text: str, pieces: list[str]) -> None:
    tokenizer = make("byte_level")
    assert [piece for piece in stream(tokenizer, tokenizer(text).input_ids)[0] if piece] == pieces


def test_a_stop_string_may_be_complete_at_the_end_only() -> None:
    tokenizer = make("byte_level")
    texts = TextStream(tokenizer, [UNDECODED])
    for token in tokenizer("a\ufffd").input_ids:
        texts.push(token)
    assert not texts.stopped
    assert texts.finish() == ""
    assert texts.stopped
    assert texts.text == "a"


def test_a_line_break_in_bytes_stops_at_once() -> None:
    tokenizer = make("byte_fallback")
    texts = TextStream(tokenizer, ["\n"])
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0x0A>"])
    assert [texts.push(token) for token in ids] == ["the", ""]
    assert texts.stopped
    assert texts.text == "the"


def test_a_replacement_character_before_bytes_is_not_lost() -> None:
    tokenizer = make("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["a", UNDECODED, "<0x0A>"])
    assert stream(tokenizer, ids, ["\n"]) == (["a", "", UNDECODED, ""], 3)


def test_a_bad_byte_spoils_its_run_as_in_the_plain_decode() -> None:
    tokenizer = make("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["a", "<0x0A>", "<0xF0>", "b"])
    assert stream(tokenizer, ids)[0] == ["a", "", "", "\ufffd\ufffdb", ""]


def test_byte_tokens_are_text_where_the_decoder_says_so() -> None:
    tokenizer = make("metaspace")
    ids = [*tokenizer("the").input_ids, tokenizer.convert_tokens_to_ids("<0x0A>")]
    assert "".join(stream(tokenizer, ids, ["\n"])[0]) == plain(tokenizer, ids) == "the<0x0A>"


@pytest.mark.parametrize(
    ("stop", "answer"),
    [
        (["ell", "hello"], "h"),
        (["hello w", "ello"], "h"),
        (["o wo", " w"], "hello"),
        (["x", "hello world"], ""),
        (["o world!"], "hello world"),
        (["lo", "l"], "he"),
    ],
)
def test_the_first_complete_stop_string_counts(stop: list[str], answer: str) -> None:
    tokenizer = make("slow_bytes")  # a token for each character
    assert "".join(stream(tokenizer, tokenizer("hello world", add_special_tokens=False).input_ids, stop)[0]) == answer


def test_of_stop_strings_completed_by_one_token_the_first_to_begin_counts() -> None:
    tokenizer = make("byte_level")
    ids = [*tokenizer("a").input_ids, tokenizer.convert_tokens_to_ids("added")]
    assert "".join(stream(tokenizer, ids, ["ed", "dd", "aad"])[0]) == ""
    assert "".join(stream(tokenizer, ids, ["ed", "dd"])[0]) == "aa"


@steady
@given(parts=st.lists(st.text(" .?!,'ntmsvrex", max_size=4)))
@example(parts=[" n ", "' t"])  # becomes n't, as " ' " is replaced before " n't"
@example(parts=[" ' ", "' s", "  ' ve"])
def test_clean_up_is_transformers_own(parts: list[str]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(sorted({*parts, "<unk>"})), unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    ids = tokenizer.convert_tokens_to_ids(parts)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == plain(tokenizer, ids) == tokenizer.clean_up_tokenization("".join(parts))


def _words(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_many_spaces_stay_though_the_decoder_strips_a_text_s_first() -> None:
    words = _words(["<unk>", "a", " "])
    words.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 50, 0)])
    tokenizer = _wrap(words)
    ids = tokenizer.convert_tokens_to_ids([*"  a", *" " * 40, "a"])
    assert "".join(stream(tokenizer, ids)[0]) == plain(tokenizer, ids) == "a" + 40 * " " + "a"


def test_bytes_after_text_that_the_clean_up_holds_do_not_stop() -> None:
    tokenizer = make("clean_bytes")
    ids = tokenizer.convert_tokens_to_ids(["c", "▁", "n", "<0x61>", "b"])  # " n" could become " n't"
    assert "".join(stream(tokenizer, ids, ["ca"])[0]) == "c nab"


@pytest.mark.parametrize("forced", [False, True])
def test_clean_up_of_byte_pairs_is_as_in_decode(forced: bool) -> None:
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = forced
    ids = tokenizer("a . b ' c n't").input_ids
    assert "".join(stream(tokenizer, ids)[0]) == plain(tokenizer, ids) == ("a. b'cn't" if forced else "a . b ' c n't")


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: list[int], **settings: Any) -> str:
        self.decoded += len(ids)
        return str(self._tokenizer.decode(ids, **settings))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("kind", "cycle"),
    [
        ("byte_level", ["ĺ"]),  # continues a character that never began
        ("byte_level", ["ð"]),  # begins characters without end
        ("byte_level", ["ð", "<|end|>"]),
        ("byte_level", ["Ġ"]),
        ("byte_level", ["t", "<s>", "<s>", "<s>"]),
        ("byte_level", [""]),  # not in the vocabulary
        ("byte_fallback", ["<0x41>", ""]),
        ("byte_fallback", ["<0xFF>"]),
        ("byte_fallback", ["<0x41>"]),
        ("byte_fallback", ["<0x41>", "</s>"]),
        ("byte_fallback", ["▁"]),
        ("metaspace", ["▁"]),
        ("metaspace", ["<s>"]),
        ("word_piece", ["the"]),
    ],
)
@pytest.mark.parametrize("start", [[], ["t"]])
def test_the_cost_is_linear(kind: str, cycle: list[str], start: list[str]) -> None:
    tokenizer = make(kind)
    counting = CountingTokenizer(tokenizer)
    tokens = [*start, *(cycle * 1000)][:1000]
    ids = [tokenizer.convert_tokens_to_ids(token) if token else len(tokenizer) for token in tokens]
    texts = TextStream(counting, ["AAB", "\n\n"])
    pieces = [texts.push(token) for token in ids]
    assert "".join([*pieces, texts.finish()]) == plain(tokenizer, ids)
    assert counting.decoded <= 20 * len(ids)


def test_tokens_without_trace_do_not_push_the_text_out_of_sight() -> None:
    tokenizer = make("byte_level")
    first, *rest = tokenizer("😀").input_ids
    hidden = tokenizer.convert_tokens_to_ids(["<s>", "<|end|>"]) * 20 + [len(tokenizer) + 5] * 20
    assert "".join(stream(tokenizer, [first, *hidden, *rest])[0]) == "😀"
