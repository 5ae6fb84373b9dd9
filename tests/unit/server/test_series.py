from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraretriever.server import series
from loraretriever.server.series import Family, Figures, Kind, Series, cumulative, last_minute, merge, quantile
from loraretriever.server.shared_figures import SILENT_SECONDS, SharedFigures

COUNTER = Family(Kind.COUNTER, "events_total", "Events.", ("kind",))
GAUGE = Family(Kind.GAUGE, "open", "Open.")
LARGEST = Family(Kind.GAUGE, "known", "Known.", largest=True)
SECONDS = Family(Kind.HISTOGRAM, "seconds", "Seconds.", bounds=(1.0, 2.0, 4.0))
FAMILIES = (COUNTER, GAUGE, LARGEST, SECONDS)


def test_a_value_at_a_bound_is_in_its_bucket_and_one_above_all_in_the_last() -> None:
    kept = Series(FAMILIES)
    for value in (0.5, 1.0, 1.5, 4.0, 9.0):
        kept.observe(SECONDS, value)
    (numbers,) = kept.figures().values["seconds"].values()
    assert numbers == [2, 1, 1, 1, 16.0]
    assert cumulative(numbers) == [2, 3, 4, 5]


def test_what_has_no_labels_shows_a_zero_and_what_has_some_shows_nothing() -> None:
    values = Series(FAMILIES).figures().values
    assert values["open"] == {(): [0]}
    assert values["seconds"] == {(): [0, 0, 0, 0, 0]}
    assert values["events_total"] == {}


def test_figures_do_not_change_afterwards() -> None:
    kept = Series(FAMILIES)
    kept.observe(SECONDS, 1.0)
    before = kept.figures()
    kept.observe(SECONDS, 1.0)
    assert before.values["seconds"][()][0] == 1
    assert [numbers[0] for numbers in before.recent["seconds"][()].values()] == [1]


def test_the_last_minute_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000
    monkeypatch.setattr(series.time, "time", lambda: float(now))
    kept = Series(FAMILIES)
    kept.observe(SECONDS, 3.0)
    now += 30
    kept.observe(SECONDS, 0.5)
    assert last_minute(kept.figures().recent["seconds"][()], SECONDS) == [1, 0, 1, 0, 3.5]
    now += 31
    assert last_minute(kept.figures().recent["seconds"][()], SECONDS) == [1, 0, 0, 0, 0.5]
    now += 60
    assert last_minute(kept.figures().recent["seconds"][()], SECONDS) == [0, 0, 0, 0, 0]
    for _ in range(100):
        now += 5
        kept.observe(SECONDS, 0.5)
    assert len(kept.figures().recent["seconds"][()]) == series.WINDOW_SECONDS // 5


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([10, 0, 0, 0], 0.5, 0.5),
        ([0, 10, 0, 0], 0.5, 1.5),
        ([5, 5, 0, 0], 0.5, 1.0),
        ([0, 0, 4, 0], 0.95, 3.9),
        ([1, 0, 0, 9], 0.99, 4.0),  # above the last bound nothing is known
        ([0, 0, 0, 0], 0.5, None),
    ],
)
def test_quantiles(counts: list[float], share: float, expected: float | None) -> None:
    assert quantile([*counts, 0.0], SECONDS.bounds, share) == (None if expected is None else pytest.approx(expected))


def filled(events: int, open_now: float, known: float, seconds: float) -> Series:
    kept = Series(FAMILIES)
    kept.add(COUNTER, events, ("a",))
    kept.set(GAUGE, open_now)
    kept.set(LARGEST, known)
    kept.observe(SECONDS, seconds)
    return kept


def test_processes_add_up_and_the_gauges_of_dead_ones_do_not_count() -> None:
    parts = [filled(1, 2, 10, 0.5), filled(2, 3, 11, 1.5), filled(4, 100, 100, 5.0)]
    merged = merge([(part.figures(), place < 2) for place, part in enumerate(parts)], FAMILIES)
    assert merged.values == {
        "events_total": {("a",): [7]},
        "open": {(): [5]},
        "known": {(): [11]},
        "seconds": {(): [1, 1, 0, 1, 7.0]},
    }
    assert last_minute(merged.recent["seconds"][()], SECONDS) == [1, 1, 0, 1, 7.0]


def shared(folder: Path, kept: Series) -> SharedFigures:
    return SharedFigures(folder, kept.figures)


def test_processes_share_by_files(tmp_path: Path) -> None:
    kept = filled(1, 2, 10, 0.5), filled(2, 3, 11, 1.5)
    one, other = (shared(tmp_path, each) for each in kept)
    one.write()
    other.write()
    expected = merge([(each.figures(), True) for each in kept], FAMILIES)
    assert one.merge(kept[0].figures(), FAMILIES) == expected
    assert other.merge(kept[1].figures(), FAMILIES) == expected


def test_a_process_that_ended_keeps_its_counts_but_not_its_gauges(tmp_path: Path) -> None:
    kept = filled(1, 2, 10, 0.5), filled(2, 3, 11, 1.5)
    one, other = (shared(tmp_path, each) for each in kept)
    one.start()
    one.close()
    values = other.merge(kept[1].figures(), FAMILIES).values
    assert values["events_total"] == {("a",): [3]}
    assert values["open"] == {(): [3]}


def test_a_process_that_was_killed_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = filled(1, 2, 10, 0.5), filled(2, 3, 11, 1.5)
    one, other = (shared(tmp_path, each) for each in kept)
    one.write()
    assert other.merge(kept[1].figures(), FAMILIES).values["open"] == {(): [5]}
    later = series.time.time() + SILENT_SECONDS + 1
    monkeypatch.setattr("loraretriever.server.shared_figures.time.time", lambda: later)
    values = other.merge(kept[1].figures(), FAMILIES).values
    assert values["open"] == {(): [3]}
    assert values["events_total"] == {("a",): [3]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"figures": {}, "written": 1}'])
def test_a_damaged_file_is_left_out(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1-dead.json").write_text(text)
    kept = filled(1, 2, 10, 0.5)
    merged = shared(tmp_path, kept).merge(kept.figures(), FAMILIES)
    assert merged.values["events_total"] == {("a",): [1]}
    assert "1-dead.json" in caplog.text


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    one = shared(tmp_path, filled(1, 2, 10, 0.5))
    one.write()
    one.write()
    (file,) = tmp_path.iterdir()
    assert set(json.loads(file.read_text())) == {"written", "figures"}


def test_a_folder_that_cannot_be_written_to_does_not_stop_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    one = shared(folder, filled(1, 2, 10, 0.5))
    one.start()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    one.close()
    assert "cannot be written" in caplog.text


def test_nothing_is_written_where_writing_did_not_start(tmp_path: Path) -> None:
    one = SharedFigures(tmp_path / "none", Figures)
    one.close()
    assert not (tmp_path / "none").exists()
