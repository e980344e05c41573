"""Which checkpoint of a run folder is taken: the newest whole one, with the reason why others are not."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_ds.convert.run_folder import CHECKSUMS, checkpoint_steps, newest_good, verify
from m2_ds.files import sha256


def make(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step-{step:08}"
    contents = {
        "model/model.safetensors": b"weights" * 99,
        "optimizer/exp_avg/model.safetensors": b"optimizer" * 99,
        "state.json": b'{"step": 1}',
    }
    for name, content in contents.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    (checkpoint / CHECKSUMS).write_text(json.dumps({name: sha256(checkpoint / name) for name in contents}))
    return checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_is_taken(tmp_path: Path) -> None:
    make(tmp_path, 900), make(tmp_path, 10_000), make(tmp_path, 123_456_789)
    assert newest_good(tmp_path) == tmp_path / "step-123456789"
    assert sorted(checkpoint_steps(tmp_path)) == [900, 10_000, 123_456_789]


@pytest.mark.parametrize("name", ["model/model.safetensors", "optimizer/exp_avg/model.safetensors", "state.json"])
@pytest.mark.parametrize(("damage", "reason"), [(flip, "damaged"), (cut, "damaged"), (Path.unlink, "missing")])
def test_a_damaged_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    good, bad = make(tmp_path, 3), make(tmp_path, 4)
    damage(bad / name)
    with caplog.at_level(logging.WARNING):
        assert newest_good(tmp_path) == good
    assert "step-00000004 passed over" in caplog.text and name in caplog.text and reason in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"17", b'{"state.json": "', b"\xff\xfe\x00", b"null"])
def test_a_damaged_list_of_checksums_is_no_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    good, bad = make(tmp_path, 3), make(tmp_path, 4)
    (bad / CHECKSUMS).unlink()
    if content is not None:
        (bad / CHECKSUMS).write_bytes(content)
    with pytest.raises(ValueError, match=CHECKSUMS):
        verify(bad)
    assert newest_good(tmp_path) == good


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path: Path) -> None:
    bad = make(tmp_path, 4)
    (bad / "optimizer/exp_avg/model.safetensors").unlink()
    (bad / "optimizer/exp_avg/model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"exp_avg/model\.safetensors is missing"):
        verify(bad)


def test_a_part_can_be_verified_alone(tmp_path: Path) -> None:
    bad = make(tmp_path, 4)
    flip(bad / "optimizer/exp_avg/model.safetensors")
    verify(bad, part="model/")
    assert newest_good(tmp_path, part="model/") == bad
    assert newest_good(tmp_path) is None
    flip(bad / "model/model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        verify(bad, part="model/")


def test_nothing_else_is_taken_for_a_checkpoint(tmp_path: Path) -> None:
    good = make(tmp_path, 3)
    for name in ("step-backup", "step-00000004.old", ".step-00000005.part", "step-12", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    assert newest_good(tmp_path) == good
    assert checkpoint_steps(tmp_path / "not there") == []
    assert newest_good(tmp_path / "not there") is None
