"""A preparation as a whole: counts that add up, killed and continued runs, other workers, changed and broken input."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from m2_ds.data.shards import Caption, Record, ShardWriter
from m2_ds.prepare.command import list_dropped
from m2_ds.prepare.config import PrepareConfig, load_config
from m2_ds.prepare.run import run
from tests.prepare import raw
from tests.prepare.raw import caption, changed, config, dropped, image, kept, plain, prepare, rules, snapshot, tars

NOISY = [plain(n) for n in range(30)]
NOISY += [changed(40, lambda files: files.update(png=b"")), changed(41, lambda files: files.pop("png"))]
NOISY += [changed(42, lambda files: files.update(json=b'{"caption": "cat"}')), (f"{43:05d}", plain(3)[1])]
NOISY += [changed(44, lambda files: files.update(json=b'{"caption": ["fine words here", "x", "12345"]}'))]
NOISY += [changed(45, lambda files: files.update(json=b'{"caption": "half \\ud83d \\u0000 pair of surrogates"}'))]


def noisy(folder: Path, each: int = 6) -> str:
    for number, low in enumerate(range(0, len(NOISY), each)):
        raw.write_tar(folder / f"{number:03d}.tar", NOISY[low : low + each])
    return str(folder / "*.tar")


def options(folder: Path) -> dict[str, Any]:
    """Settings with every step: evaluation sets, comparing rules, scores, balance, splits."""
    (folder / "mine.py").write_text("def width(items):\n    return [item.picture.width for item in items]\n")
    with ShardWriter(folder / "eval", "eval") as writer:
        writer.add("test", Record("e", image(5), [Caption(caption(6), "en")], "e", "e", "CC0-1.0", 64, 64))
    return {
        "evaluation_sets": {"paths": [folder / "eval"], "captions": True},
        "duplicates": {"caption_repeats": 2},
        "scores": [{"function": "mine.py:width", "rule": "narrow", "min": 10}],
        "balance": {"max_records": 20},
        "output": {"splits": {"val": 0.2}, "shard_mb": 1, "samples": 3},
        "exchange_rows": 60,
    }


def test_nothing_is_lost(tmp_path: Path) -> None:
    ledger = run(config(tmp_path / "out", noisy(tmp_path / "in"), **options(tmp_path)), tmp_path)
    assert ledger.read.total() == len(NOISY) == ledger.kept.total() + len(rules(tmp_path / "out"))
    found = {name: rule for name, rule in rules(tmp_path / "out").items() if rule != "balance"}
    assert found == {
        "00005": "evaluation_picture", "00006": "evaluation_caption", "00040": "empty_picture",
        "00041": "missing_picture", "00042": "short_caption", "00043": "duplicate_picture",
    }  # fmt: skip
    captions = [(row["rule"], row["text"]) for row in dropped(tmp_path / "out") if row["level"] == "caption"]
    assert captions == [("short_caption", "x"), ("no_letters", "12345")]
    assert ledger.kept.total() == 20 and ledger.balanced()
    texts = {c.text for split in ("train", "val") for r in kept(tmp_path / "out", split) for c in r.captions}
    shown = {row["text"] for row in dropped(tmp_path / "out") if row["level"] == "record"}
    assert {"half pair of surrogates", "fine words here"} <= texts | shown
    page = (tmp_path / "out" / "card.html").read_text()
    assert "evaluation_picture" in page and "data:image/jpeg;base64," in page
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", page)
    assert not list((tmp_path / "out").rglob("*.part"))


def test_dropped_records_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path / "out", noisy(tmp_path / "in"))
    list_dropped(tmp_path / "out", rule="short_caption", level="record", as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["key"] == "raw/005/00042" and json.loads(line)["text"] == "cat"
    list_dropped(tmp_path / "out", limit=2)
    assert "... of 6" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"rule 'nsfw' took nothing; these did: .*short_caption"):
        list_dropped(tmp_path / "out", rule="nsfw")
    with pytest.raises(ValueError, match="no dropped"):
        list_dropped(tmp_path)


def dying(count: int, out: Path, files: str, settings: dict[str, Any], home: Path) -> None:
    """A run whose process is killed at its `count`-th published file, before or after the rename; 0: never."""
    import m2_ds.files

    replace, left = os.replace, count

    def counted(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0 and count % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    m2_ds.files.os.replace = counted  # os itself: every step's renames pass here
    run(config(out, files, **settings), home)


def die_again_and_again(folder: Path, counts: list[int]) -> PrepareConfig:
    """Kill a run at its counts[0]-th file, the next at its counts[1]-th ... until one ends; beside it a whole run."""
    files, settings = noisy(folder / "in"), options(folder) | {"name": "set"}
    run(config(folder / "whole", files, **settings), folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["m2_ds.prepare.run", "tests.prepare.raw"])
    kills = 0
    for count in counts * 100:
        process = context.Process(target=dying, args=(count, folder / "out", files, settings, folder))
        process.start()
        process.join(100)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    else:
        raise AssertionError("no run ended: a unit publishes more files than any of these runs lives to")
    assert kills >= 5
    return config(folder / "out", files, **settings)


def test_killed_and_called_again_it_ends_the_same(tmp_path: Path) -> None:
    finished = die_again_and_again(tmp_path, [8, 17, 13])
    before = snapshot(tmp_path / "out")
    assert before == snapshot(tmp_path / "whole")
    run(finished, tmp_path)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[1, 2, 3, 4, 12], [2, 1, 12], [3, 5, 12]])  # the end publishes ten
def test_killed_at_every_file_it_ends_the_same(counts: list[int], tmp_path: Path) -> None:
    die_again_and_again(tmp_path, counts)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_finished_units_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tars(tmp_path / "in", 20)
    (tmp_path / "in" / "002.tar").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="no such file"):
        prepare(tmp_path / "out", str(tmp_path / "in" / "{000..003}.tar"))
    (tmp_path / "away").rename(tmp_path / "in" / "002.tar")
    from m2_ds.prepare import run as module

    done, real = [], module.examine

    def examine(job: Any, unit: Any) -> Any:
        if unit.number == 2 and len(done) < 3:
            (tmp_path / "in" / "002.tar").rename(tmp_path / "away")  # it vanishes while the run is under way
        done.append(unit.number)
        return real(job, unit)

    monkeypatch.setattr(module, "examine", examine)
    with pytest.raises(ValueError, match=r"002\.tar is not there any more.*put it back"):
        prepare(tmp_path / "out", files)
    (tmp_path / "away").rename(tmp_path / "in" / "002.tar")
    (tmp_path / "in" / "000.tar").unlink()  # finished: not needed any more
    _, records = prepare(tmp_path / "out", files)
    assert done == [0, 1, 2, 2, 3] and len(records) == 20


def test_a_missing_shard_may_be_left_out(tmp_path: Path) -> None:
    tars(tmp_path / "in", 10)
    wanted = str(tmp_path / "in" / "{000..002}.tar")
    ledger, records = prepare(tmp_path / "out", wanted, skip_broken_shards=True)
    assert len(records) == 10 and ledger.broken == [[str(tmp_path / "in" / "002.tar"), "no such file"]]
    assert "002.tar" in (tmp_path / "out" / "card.html").read_text()


def test_a_shard_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tars(tmp_path / "in", 15)
    from m2_ds.prepare import examine as module

    tries: list[str] = []
    real = module.read_unit

    def shaky(unit: Any, path: Path, settings: Any) -> Any:
        tries.append(path.name)
        for number, pair in enumerate(real(unit, path, settings)):
            if number == 2 and (path.name == "001.tar" or tries.count(path.name) == 1 and path.name == "002.tar"):
                raise module.BrokenShard("OSError: Input/output error", again=True)
            yield pair

    monkeypatch.setattr(module, "read_unit", shaky)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    ledger, records = prepare(tmp_path / "out", files, work={"retries": 1})
    # One fails twice: what came before is kept, and it is named. The other works at the second attempt.
    assert len(records) == 12 and tries == ["000.tar", "001.tar", "001.tar", "002.tar", "002.tar"]
    assert ledger.broken == [[str(tmp_path / "in" / "001.tar"), "after 2 records: OSError: Input/output error"]]


def test_what_changed_since_the_beginning_is_refused(tmp_path: Path) -> None:
    files = tars(tmp_path / "in", 5)
    prepare(tmp_path / "out", files)
    with pytest.raises(ValueError, match=r"other settings.*picture\.min_side: 16 -> 20.*--restart"):
        prepare(tmp_path / "out", files, picture={"min_side": 20})
    raw.write_tar(tmp_path / "in" / "009.tar", [plain(9)])
    with pytest.raises(ValueError, match=r"009\.tar: None -> "):
        prepare(tmp_path / "out", files)
    (tmp_path / "in" / "009.tar").unlink()
    prepare(tmp_path / "out", files)
    raw.write_tar(tmp_path / "in" / "000.tar", [plain(7), plain(8)])
    with pytest.raises(ValueError, match=r"000\.tar\.0: "):
        prepare(tmp_path / "out", files)
    (tmp_path / "out" / "mine.txt").write_text("keep")
    ledger = run(config(tmp_path / "out", files), restart=True)
    assert ledger.kept.total() == 2 and (tmp_path / "out" / "mine.txt").exists()


def test_a_folder_of_someone_elses_is_not_touched(tmp_path: Path) -> None:
    files = tars(tmp_path / "in", 5)
    with ShardWriter(tmp_path / "out", "other") as writer:
        writer.add("train", Record("o", image(1), [Caption("a caption", "en")], "o", "o", "CC0-1.0", 64, 64))
    for restart in (False, True):
        with pytest.raises(ValueError, match="holds a data set already"):
            run(config(tmp_path / "out", files), restart=restart)
    assert len(kept(tmp_path / "out")) == 1


def test_nothing_to_read_or_to_keep(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match=r"not one record could be read: .*a\.tar"):
        prepare(tmp_path / "out", str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match=r"no record is left: see .*card\.html"):
        prepare(tmp_path / "none", tars(tmp_path / "in", 5), picture={"min_side": 500})
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_columns_with_bounds(tmp_path: Path) -> None:
    values = {0: 0.1, 1: 0.9, 2: None, 3: "high", 4: 0.2}
    raw.write_tar(tmp_path / "a.tar", [plain(n, punsafe=value) for n, value in values.items()])
    column = {"field": "punsafe", "max": 0.5, "rule": "nsfw"}
    prepare(tmp_path / "out", str(tmp_path / "a.tar"), columns=[column])
    assert rules(tmp_path / "out") == {"00001": "nsfw", "00002": "nsfw", "00003": "nsfw"}
    prepare(tmp_path / "kept", str(tmp_path / "a.tar"), columns=[column | {"missing": "keep"}])
    assert rules(tmp_path / "kept") == {"00001": "nsfw"}


CONFIG = """
out: {folder}/out
name: set
inputs:
  - {{name: raw, kind: tar, files: '{folder}/in/*.tar', license: CC0-1.0}}
picture: {{min_side: 16}}
duplicates: {{caption_repeats: 2}}
scores: [{{function: 'slow.py:slow', rule: never, min: 0}}]
exchange_rows: 60
"""


def ray_case(folder: Path, seconds: float) -> list[str]:
    """The command of a run on two workers, whose scoring takes its time; the same run without Ray is in folder/one."""
    noisy(folder / "in")
    slow = f"import time\ndef slow(items):\n    time.sleep({seconds})\n    return [1 for _ in items]\n"
    (folder / "slow.py").write_text(slow)
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder))
    run(load_config(folder / "c.yaml", [f"out={folder}/one", "work.workers=0", "work.progress=false"]), folder)
    return [sys.executable, "-m", "m2_ds.cli", "prepare", str(folder / "c.yaml"), "--workers", "2"]


@pytest.mark.distributed
def test_two_workers_of_ray_give_the_same(tmp_path: Path) -> None:
    done = subprocess.run(ray_case(tmp_path, 0), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "duplicate_picture" in done.stdout and "data set:" in done.stdout
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_killed_and_called_again_gives_the_same(tmp_path: Path) -> None:
    command = ray_case(tmp_path, 0.5)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "out" / ".prepare"
    end = time.monotonic() + 120
    while not list(work.glob("score/*.json")) and time.monotonic() < end:
        assert first.poll() is None
        time.sleep(0.05)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert list(work.glob("examine/*.json")) and not (tmp_path / "out" / "manifest.json").exists()
    _, alive = psutil.wait_procs(family, timeout=90)
    for process in alive:
        process.kill()
    assert not alive, "Ray's processes outlive the command"
    second = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    assert "examine:" not in second.stderr  # all units had been examined
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "one")
