"""Damage and nonsense: bits flipped, files cut, numbers that cannot be; readers end in an error that names the file."""

import io
import json
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import m2_ds
from m2_ds.convert.canonical import read_config, read_weights, weight_files
from m2_ds.convert.release import read_release
from m2_ds.convert.safetensors_file import read_safetensors
from tests.convert.checkpoints import converted, left_in, random_state

pytestmark = pytest.mark.usefixtures("bounded")


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
