from __future__ import annotations

from pathlib import Path

import pytest

from loraretriever.config import Settings, cache_folder, load_settings
from loraretriever.errors import InvalidInputError


def test_overrides_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_K", "5")
    monkeypatch.setenv("LORARETRIEVER_STRATEGY", "fusion")
    settings = load_settings(k=None, strategy="selection")
    assert (settings.k, settings.strategy) == (5, "selection")
    assert load_settings(k=2).k == 2


def test_defaults() -> None:
    assert load_settings() == Settings()
    settings = load_settings()
    assert settings.retriever == "hybrid"
    assert settings.threshold is settings.encoder is settings.instruction is None
    assert settings.coverage == 0.95


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("weighting_temperature", -1),
        ("threshold", float("nan")),
        ("slots", "many"),
        ("colour", "red"),
        ("coverage", 0),
        ("coverage", 1.01),
        ("false_fallback", 1),
        ("drift", -0.1),
        ("precision", "int4"),
        ("max_tokens", 7),
    ],
)
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=f"setting {name}"):
        load_settings(**{name: value})


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORARETRIEVER_CACHE", raising=False)
    assert cache_folder() == tmp_path / "loraretriever"
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_THRESHHOLD", "0.7")
    with pytest.raises(InvalidInputError, match="LORARETRIEVER_THRESHHOLD='0.7'"):
        load_settings()
