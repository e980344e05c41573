"""Damaged, cut, foreign and hostile files: always a ValueError that names the file, nothing written, nothing run."""

import argparse
import contextlib
import json
import pickle
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import m2_ds
from m2_ds.convert.canonical import read_weights
from m2_ds.convert.release import read_release
from m2_ds.convert.torch_file import read_torch_file
from tests.convert.checkpoints import as_layout, assert_same_bits, converted, left_in, random_state, write

FP16 = torch.float16


pytestmark = pytest.mark.usefixtures("bounded")


# -- code in pickles --------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function``, by name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def hostile(marker: Path) -> list[Any]:
    import os
    import subprocess

    return [
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(subprocess.check_call, ["touch", str(marker)]),
        Call(getattr, Call(__import__, "os"), "system"),
        {Call(os.mkdir, str(marker)): 1},
        [Call(torch.load, str(marker))],
        Call(Path.touch, marker),
        Call(Call, eval, "1"),
    ]


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("number", range(8))
def test_code_is_never_run(tmp_path: Path, number: int, old: bool) -> None:
    marker = tmp_path / "ran"
    for key in ("hyper_parameters", "state_dict"):
        content = as_layout(random_state(dtype=FP16), "lightning")
        evil = hostile(marker)[number]
        if key == "state_dict":
            content["state_dict"]["norm.weight"] = evil
        else:
            content[key] = evil
        source = write(tmp_path / "in", content, legacy=old)
        with pytest.raises(ValueError, match=r"m2\.ckpt is refused: beside tensors it holds objects of") as told:
            converted(source, tmp_path / "out")
        with pytest.raises(ValueError, match="is refused"):
            m2_ds.load(source)
        allowed = tuple(re.findall(r"--allow (\S+)", str(told.value)))
        assert allowed
        if key == "hyper_parameters":
            assert_same_bits(read_weights(converted(source, tmp_path / "out", allow=allowed)), random_state(dtype=FP16))
            shutil.rmtree(tmp_path / "out")
        else:
            with pytest.raises(ValueError, match=r"missing \(1\): norm\.weight"):
                converted(source, tmp_path / "out", allow=allowed)
        assert left_in(tmp_path) == ["in"], "something was written"


class Attributes(dict):
    """As Lightning's AttributeDict."""


class Sequence(list):
    """As sacred's read-only list."""


def test_foreign_objects_are_left_out_when_allowed(tmp_path: Path) -> None:
    content = as_layout(random_state(), "lightning")
    made = Attributes(lr=1e-3, names=Sequence(["a", "b"]))
    made.extra = argparse.Namespace(x=1, y=Attributes(z=torch.ones(3)))  # type: ignore[attr-defined]
    content["hyper_parameters"] = made
    content["callbacks"] = {Attributes: {"best": 1.0}}  # a class as a key
    source = write(tmp_path / "in", content)
    own = __name__
    with pytest.raises(ValueError, match=rf"argparse\.Namespace, {own}\.Attributes, {own}\.Sequence,"):
        converted(source, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"objects of {own}\.Sequence,"):
        converted(source, tmp_path / "out", allow=("argparse.Namespace", f"{own}.Attributes"))
    out = converted(source, tmp_path / "out", allow=("argparse.Namespace", f"{own}.*"), report=tmp_path / "report.json")
    assert_same_bits(read_weights(out), random_state())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["inert"] == ["argparse.Namespace", f"{own}.Attributes", f"{own}.Sequence"]
    assert report["other"] == ["epoch", "global_step", "hyper_parameters", "callbacks"]


def test_an_allowed_class_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_effects.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    body = b"\x80\x02}(X\x05\x00\x00\x00modelcwith_effects\nThing\n)\x81X\x01\x00\x00\x00xK\x01u."
    with zipfile.ZipFile(tmp_path / "m2.ckpt", "w") as archive:
        archive.writestr("m2/data.pkl", body)
    found = read_torch_file(tmp_path / "m2.ckpt", ["with_effects.Thing"])
    assert found.inert == ("with_effects.Thing",) and found.content["x"] == 1
    assert "with_effects" not in sys.modules and not (tmp_path / "ran").exists()


def op(code: bytes, form: str = "", *values: Any) -> bytes:
    return code + (struct.pack(form, *values) if form else b"")


BOMBS = {
    "memo": b"\x80\x02K\x01" + op(pickle.LONG_BINPUT, "<I", 0x7FFFFFFF) + b".",
    "bytes": b"\x80\x04" + op(pickle.BINBYTES8, "<Q", 1 << 40) + b"x.",
    "text": b"\x80\x04" + op(pickle.BINUNICODE8, "<Q", 1 << 40) + b"x.",
    "array": b"\x80\x05" + op(pickle.BYTEARRAY8, "<Q", 1 << 36) + b"x.",
    "frame": b"\x80\x04" + op(pickle.FRAME, "<Q", 1 << 50) + b"N.",
    "number": b"\x80\x02" + op(pickle.LONG4, "<i", 0x7FFFFFFF) + b"x.",
    "deep key": b"\x80\x02}N" + pickle.TUPLE1 * 300_000 + b"K\x01s.",
    "deep list": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "extension": b"\x80\x02" + op(pickle.EXT1, "<B", 1) + b".",
    "no stop": b"\x80\x02}",
    "nothing": b"",
    "unknown opcode": b"\x80\x02\xff.",
    "list as function": b"\x80\x02])R.",
    "set attribute of a class": b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00xK\x01s\x86b.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_claim_too_much(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "m2.ckpt", "w") as archive:
        archive.writestr("m2/data.pkl", BOMBS[name])
        archive.writestr("m2/version", "3")
    with pytest.raises(ValueError, match=r"m2\.ckpt"):
        read_release(tmp_path / "m2.ckpt")
    (tmp_path / "m2.ckpt").write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=r"m2\.ckpt"):
        read_release(tmp_path / "m2.ckpt")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"K\x04\x85", b"K\x05\x85", "beyond its storage"),  # the shape
        (b"K\x00K\x04", b"K\x01K\x04", "beyond its storage"),  # where it begins
        (b"K\x01\x85", b"K\x02\x85", "beyond its storage"),  # the stride
        (b"K\x04tq", b"K\x05tq", "holds 16 bytes instead of 20"),  # the storage's length
        (b"K\x04\x85", b"K\x04\x86", "is damaged"),
    ],
)
def test_tensors_that_claim_more_than_there_is(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "right")
    with zipfile.ZipFile(tmp_path / "right") as right, zipfile.ZipFile(tmp_path / "wrong", "w") as wrong:
        for info in right.infolist():
            content = right.read(info)
            if info.filename.endswith("data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            wrong.writestr(info.filename, content)
    assert read_torch_file(tmp_path / "right").content["a"].read().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=words):
        read_torch_file(tmp_path / "wrong")


def test_archives_that_are_not_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "m2.ckpt"
    body = pickle.dumps({}, protocol=2)

    def archive(*records: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", how) as opened:
            for name, content in records:
                opened.writestr(name, content)

    cases: list[tuple[Any, str]] = [
        (lambda: archive(("a/data.pkl", body), how=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: archive(("a/data.pkl", body), ("b/data.pkl", body)), "not one that torch.save writes"),
        (lambda: archive(("a/data.pkl", body), ("a/constants.pkl", body)), "not one that torch.save writes"),
        (lambda: archive(("a/x", body)), "not one that torch.save writes"),
        (lambda: archive(("a/data.pkl", body), ("a/data.pkl", body)), "two records of one name"),
        (lambda: archive(("a/data.pkl", bytes(33 << 20))), "larger than 32 MiB"),
        (lambda: archive(("a/data.pkl", body)), "holds no tensors"),
        (lambda: archive(("a/data.pkl", pickle.dumps([1], protocol=2))), "holds a list, not a dictionary"),
        (lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), r"begins with b'vers'"),
        (lambda: path.write_bytes(pickle.dumps({"a": 1})), "not one of torch.save"),
    ]
    for make, words in cases:
        with pytest.warns(UserWarning) if "two records" in words else contextlib.nullcontext():
            make()
        with pytest.raises(ValueError, match=words) as told:
            read_release(path)
        assert str(path) in str(told.value)
