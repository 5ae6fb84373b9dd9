from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from retrieve_helpers import tfidf

from loraretriever.retrieve import sparse

SAMPLES = [
    "Translate the text to German: the house",
    "translate to french: the the the house!",
    "Write a query\nfor the table.",
    "add 3 + 4, and add 5",
    "a",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Add the", ["add", "the", "add the"]),
        ("ÄRGER über ß", ["ärger", "über", "ß", "ärger über", "über ß"]),
        ("a,b", ["a", ",", "b", "a ,", ", b"]),
        ("x\n y", ["x", "\n", "y", "x \n", "\n y"]),
        ("?", ["?"]),
        ("one two one two", ["one", "two", "one", "two", "one two", "two one", "one two"]),
        ("", []),
        (" \t ", []),
        ("\ud800 a", ["\ud800", "a", "\ud800 a"]),
        ("漢字 🙂", ["漢字", "🙂", "漢字 🙂"]),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    assert sparse.terms(text) == expected


def test_only_both_ends_of_a_long_text_are_read() -> None:
    text = "start " + "x " * 5000 + "end"
    found = sparse.terms(text)
    assert found[0] == "start" and "end" in found and len(found) < 1010
    assert found == sparse.terms("start " + "x " * 500_000 + "end"), "what is between does not count"
    whole = "ab " * 333 + "c"
    assert len(whole) == 1000 and sparse.terms(whole).count("ab") == 333


def test_a_terms_number_is_the_same_in_every_process() -> None:
    assert sparse.bucket("123456789") == 0xCBF43926 % (1 << 20), "the check value of CRC-32"
    script = "from loraretriever.retrieve.sparse import bucket; print(bucket('ärger über'))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(printed) == sparse.bucket("ärger über")
    assert 0 <= sparse.bucket("\udc80") < sparse.BUCKETS


def test_weights_are_scikit_learns() -> None:
    queries = ["the table in german", "the the house", "unknown words only", "add\n3"]
    counted = sparse.count_terms(SAMPLES)
    assert counted.shape == (5, sparse.BUCKETS)
    weights = sparse.TermWeights(counted)
    rows = weights(counted)
    expected_rows, expected_queries = tfidf(SAMPLES, queries)
    assert sparse.products(rows, rows.T.tocsr()) == pytest.approx(expected_rows @ expected_rows.T, abs=1e-5)
    # scikit-learn leaves unknown terms out before it scales a row to length 1; here they count, with the greatest idf.
    found = sparse.products(weights(sparse.count_terms(queries)), rows.T.tocsr())
    expected = expected_queries @ expected_rows.T
    for mine, theirs, query in zip(found, expected, queries, strict=True):
        known = set(sparse.terms(" ".join(SAMPLES)) + [t for s in SAMPLES for t in sparse.terms(s)])
        if set(sparse.terms(query)) <= known:
            assert mine == pytest.approx(theirs, abs=1e-5)
        else:
            assert (mine <= theirs + 1e-6).all()
            assert mine * np.linalg.norm(theirs) == pytest.approx(theirs * np.linalg.norm(mine), abs=1e-5)
    assert (found[2] == 0).all()


def test_centroids_and_lengths_are_the_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    counted = sparse.count_terms([" ".join(rng.choice(list("abcdefgh"), 6)) for _ in range(12)])
    rows = sparse.TermWeights(counted)(counted)
    owners = np.array([0, 2, 2, 1, 0, 0, 1, 2, 2, 2, 1, 4])
    dense = rows.toarray()
    sums = np.stack([dense[owners == owner].sum(axis=0) for owner in range(5)])
    found = sparse.centroids(rows, owners, 5).toarray()
    assert found.shape == sums.shape and not found[3].any(), "the member without a row"
    for owner in (0, 1, 2, 4):
        assert np.abs(found[owner] - sums[owner] / np.linalg.norm(sums[owner])).max() < 1e-6
    assert sparse.lengths(rows) == pytest.approx(np.ones(12), abs=1e-5)
    both = sparse.stack([rows, sparse.count_terms(["a"])])
    assert both.shape[0] == 13 and (both.toarray()[:12] == dense).all()


def test_texts_without_terms_give_rows_of_zeros() -> None:
    counted = sparse.count_terms(["", "word", "  "])
    rows = sparse.TermWeights(counted)(counted)
    assert np.asarray(rows.sum(axis=1)).tolist() == pytest.approx([0, 1, 0])
    assert sparse.products(rows, rows.T.tocsr()).tolist() == [[0, 0, 0], [0, pytest.approx(1), 0], [0, 0, 0]]
    none = sparse.count_terms([])
    assert none.shape == (0, sparse.BUCKETS)
    assert sparse.stack([none, counted]).shape == (3, sparse.BUCKETS)


@pytest.mark.parametrize(
    "text", ["the table in german", "the the the house", "add 3 + 4", "unheard of", "", "\udc80 a"]
)
def test_one_text_is_read_as_a_row(text: str) -> None:
    counted = sparse.count_terms(SAMPLES)
    weights = sparse.TermWeights(counted)
    rows, row = weights(counted), weights(sparse.count_terms([text]))
    read = weights.read(text)
    used = np.unique(row.indices)
    assert (np.sort(read.buckets) == used).all()
    assert read.values[np.argsort(read.buckets)] == pytest.approx(row.toarray()[0, used], abs=1e-6)
    expected = sparse.products(row, rows.T.tocsr())[0]
    assert read.times_columns(rows.T.tocsr()) == pytest.approx(expected, abs=1e-6)
    for chosen in ([0, 1, 2, 3, 4], [3, 1], [2], []):
        for _ in range(2):  # the second time with the table that the first has used
            assert read.times_rows(rows, np.array(chosen, dtype=np.int64)) == pytest.approx(expected[chosen], abs=1e-6)


def test_rows_without_terms_have_no_products() -> None:
    counted = sparse.count_terms(["", "a b", ""])
    read = sparse.TermWeights(counted).read("b a")
    expected = [0, read.values[:2].sum(), 0]
    assert read.times_columns(counted.T.tocsr()) == pytest.approx(expected)
    assert read.times_rows(counted, np.array([0, 1, 2])) == pytest.approx(expected)
