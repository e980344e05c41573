"""Damaged, cut, foreign and hostile files: always a ValueError that names the file, nothing written, nothing run."""

import argparse
import io
import json
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m2_ds
from m2_ds.convert.canonical import read_config, read_weights, weight_files
from m2_ds.convert.release import read_release
from m2_ds.convert.safetensors_file import read_safetensors
from m2_ds.convert.torch_file import read_torch_file
from tests.convert.checkpoints import CONFIG, as_layout, converted, left_in, random_state, same_bits, write

FP16 = torch.float16


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("release"), as_layout(random_state(dtype=FP16), "lightning"))


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = as_layout(random_state(dtype=FP16), "deepspeed")
    return write(tmp_path_factory.mktemp("legacy"), content, legacy=True)


@pytest.fixture(scope="module")
def canonical(release: Path) -> Path:
    return converted(release, release.parent / "canonical", shard_size="100kB")


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test of this file may take much memory or time, whatever a file claims."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
    assert time.monotonic() - start < 60


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
            same_bits(read_weights(converted(source, tmp_path / "out", allow=allowed)), random_state(dtype=FP16))
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
    same_bits(read_weights(out), random_state())
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
        with pytest.warns(UserWarning) if "two records" in words else _nothing():
            make()
        with pytest.raises(ValueError, match=words) as told:
            read_release(path)
        assert str(path) in str(told.value)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, chance: random.Random, dense: list[range]) -> bytes:
    """Cut somewhere, or some bits flipped, mostly where a file describes itself."""
    if chance.random() < 0.25:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        where = chance.choice(dense) if chance.random() < 0.9 else range(len(content))
        changed[chance.choice(where)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def survives(source: Path, file: Path, out: Path) -> bool:
    """Whether a damaged source is refused as it has to be; if it is not, what came out is a whole model."""
    before = left_in(out.parent)
    try:
        converted(source, out)
    except ValueError as error:
        assert str(file.parent) in str(error), f"no file is named: {error}"
        assert left_in(out.parent) == before, "something was written"
        return False
    assert {name: x.shape for name, x in read_weights(out).items()} == {
        name: x.shape for name, x in random_state().items()
    }
    shutil.rmtree(out)
    return True


@pytest.mark.parametrize("kind", ["release", "legacy"])
def test_damaged_releases(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path: Path = request.getfixturevalue(kind)
    content, chance = path.read_bytes(), random.Random(5)
    (tmp_path / "in").mkdir()
    shutil.copy(path.with_suffix(".json"), tmp_path / "in/m2.json")
    ends = [range(26_000), range(len(content) - 22_000, len(content))] if kind == "release" else [range(26_000)]
    passed = 0
    for _ in range(100):
        (tmp_path / "in/m2.ckpt").write_bytes(damaged(content, chance, ends))
        passed += survives(tmp_path / "in/m2.ckpt", tmp_path / "in/m2.ckpt", tmp_path / "out")
    assert 0 < passed < 50


def test_damaged_canonical_folders(canonical: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, folder = random.Random(6), tmp_path / "in"
    names = [path.name for path in weight_files(canonical)[:2]] + ["model.safetensors.index.json", "config.json"]
    passed = 0
    for turn in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(canonical, folder)
        (folder / "checksums.json").unlink()  # they would find all of it
        file = folder / names[turn % 4]
        content = file.read_bytes()
        file.write_bytes(damaged(content, chance, [range(min(len(content), 8000))]))
        passed += survives(folder, file, tmp_path / "out")
    assert 0 < passed < 50
    shutil.rmtree(folder)
    shutil.copytree(canonical, folder)
    (folder / names[0]).write_bytes(damaged((folder / names[0]).read_bytes(), chance, [range(100)]))
    with pytest.raises(ValueError, match=rf"{names[0]} is damaged"):
        converted(folder, tmp_path / "out")


def test_canonical_folders_that_lead_elsewhere(canonical: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(canonical, folder)
    index = folder / "model.safetensors.index.json"
    for weight_map in ({"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {}, [], {"a": "gone.safetensors"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"index of weights|holds no gone"):
            weight_files(folder)
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        weight_files(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"num_vl_layers": 10**30},
        {"hidden_size": 10**12, "num_heads": 1},
        {"ffn_ratio": 1e300},
        {"vocab_size": 2**62},
        {"image_size": 2**40},
        {"stem": "conv", "stem_depth": 10**9},
        {"text_positions": 10**18},
        {"unheard_of": 1},
        {"hidden_size": "a"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_configurations_of_impossible_networks(canonical: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(canonical, tmp_path / "in")
    fields = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=r"in/config\.json"):
        converted(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=r"tmp|in"):
        m2_ds.load(tmp_path / "in")
    assert left_in(tmp_path) == ["in"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "[" * 100_000, '{"beit_version": "giant"}', "\x00"])
def test_release_configurations(release: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=r"c\.json"):
        converted(release, tmp_path / "out", config=tmp_path / "c.json")


def test_safetensors_headers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def file(header: Any, payload: bytes = b"", length: int | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)

    def entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> dict[str, Any]:
        return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    file(entry(), b"1234")
    assert read_safetensors(path)["a"].shape == (2,)
    cases: list[tuple[Any, bytes, int | None]] = [
        (entry(), b"123", None),
        (entry(), b"12345", None),
        (entry(shape=[1 << 40]), b"1234", None),
        (entry(shape=[-2], offsets=(0, -4)), b"1234", None),
        (entry(shape=[2, 0]), b"1234", None),
        (entry(shape=["2"]), b"1234", None),
        (entry(shape=[True, 2]), b"1234", None),
        (entry(offsets=(-4, 0)), b"1234", None),
        (entry(offsets=(4, 8)), b"12345678", None),
        (entry(offsets=(0,)), b"1234", None),
        (entry(dtype="F7"), b"1234", None),
        (entry(dtype=[]), b"1234", None),
        ({"a": entry()["a"], "b": entry()["a"]}, b"1234", None),
        ({"a": entry()["a"], "b": entry()["a"]}, b"12345678", None),
        (b'{"a": 1, "a": 2}', b"", None),
        (b"[" * 200_000, b"", None),
        ({}, b"", 1 << 62),
        ({}, b"", 1 << 20),
        ([], b"", None),
        (b"\xff\xfe", b"", None),
    ]
    for header, payload, length in cases:
        file(header, payload, length)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            read_safetensors(path)
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_safetensors(path)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04", struct.pack("<Q", 40)])
)
def test_any_bytes_at_all(tmp_path_factory: pytest.TempPathFactory, content: bytes, head: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    path.write_bytes(head + content)
    with pytest.raises(ValueError, match=r"any\.ckpt"):
        read_release(path)
    with pytest.raises(ValueError, match=r"any\.ckpt"):
        read_safetensors(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(pickle._Unpickler.dispatch)), max_size=30), st.binary(max_size=60))
def test_any_program_of_opcodes(codes: list[int], data: bytes) -> None:
    """Opcodes with whatever follows as their arguments end in an error or in a plain value."""
    from m2_ds.convert.inert import Capped, InertUnpickler

    body = b"\x80\x02" + b"".join(bytes([code]) + data[i : i + 4] for i, code in enumerate(codes)) + b"."
    try:
        InertUnpickler(Capped(io.BufferedReader(io.BytesIO(body))), {}).load()  # type: ignore[arg-type]
    except Exception as error:
        assert not isinstance(error, MemoryError)


def test_the_reader_of_configurations_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json does not hold a model configuration"):
        read_config(tmp_path)
    assert CONFIG.num_layers == 1
