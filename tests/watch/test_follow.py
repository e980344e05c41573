"""Lines that somebody else writes: whole, once, whatever happens to the file; columns and what is drawn of them."""

import os
from pathlib import Path

import numpy as np

from m2_ds.watch.follow import Columns, Records, Tail, thin


def test_only_what_is_new_is_read_and_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_text("one\ntw")
    assert tail.read() == (True, ["one"])
    with path.open("a") as handle:
        handle.write("o\nthree\n")
    assert tail.read() == (False, ["two", "three"])
    assert tail.read() == (False, [])
    path.unlink()
    assert tail.read() == (True, [])
    assert tail.read() == (False, [])


def test_a_file_that_was_written_anew_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    path.write_text("one\ntwo\nthree\n")
    tail.read()
    path.write_text("one\n")  # shorter
    assert tail.read() == (True, ["one"])
    path.write_text("ONE\nTWO\n")  # longer, in place
    assert tail.read() == (True, ["ONE", "TWO"])
    (tmp_path / "other").write_text("ONE\nTWO\nTHREE\n")  # another file under the name, with the same beginning
    os.replace(tmp_path / "other", path)
    assert tail.read() == (True, ["ONE", "TWO", "THREE"])


def test_damaged_lines_are_counted_and_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = ['{"step": 1, "loss": 2.5}', '{"step": 2.0, "loss": NaN}', '{"step": 3, "loss": 1e999}']
    bad = ['{"step": 4', "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": -1}', '{"step": true}', '{"step": 1e999}']
    bad += ["[" * 100_000, "\ufffd"]
    path.write_text("\n".join([*good, *bad, ""]))
    with path.open("ab") as handle:
        handle.write(b"\xff\xfe\n\n")
    records = Records(path)
    _, found = records.read()
    assert [entry["step"] for entry in found] == [1, 2, 3]
    assert records.damaged == len(bad) + 1 and records.example.startswith("line 13: ")


def test_columns_keep_place_and_drop_what_is_written_again() -> None:
    columns = Columns()
    columns.append({"step": 1, "loss": 3.0, "skipped": {"broken": 2}})
    columns.append({"step": 2, "loss": None, "late": 5.0, "flag": True, "text": "x"})
    assert columns.get("loss").tolist()[0] == 3.0 and np.isnan(columns.get("loss")[1])
    assert np.isnan(columns.get("late")[0]) and columns.last("late") == 5.0
    assert columns.last("loss") is None and columns.last("skipped/broken") is None
    assert "flag" not in columns and "text" not in columns
    columns.append({"step": 2, "loss": 1.0})
    assert columns.get("step").tolist() == [1, 2] and columns.last("loss") == 1.0
    columns.append({"step": 1, "loss": 7.0})
    assert len(columns) == 1 and columns.get("loss").tolist() == [7.0]


def test_thinning_keeps_ends_and_spikes() -> None:
    values = np.sin(np.arange(100_000) / 9000)
    values[70_001], values[30_002] = 40.0, -40.0
    values[5] = np.nan
    rows = thin(values, 300)
    assert len(rows) <= 300 and {0, 99_999, 70_001, 30_002} <= set(rows.tolist()) and 5 not in rows
    assert (np.diff(rows) > 0).all()
    assert thin(values[:9], 300).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert thin(np.full(4, np.nan), 300).tolist() == []
