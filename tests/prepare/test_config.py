"""Configurations that can't be carried out are told by field, value and remedy."""

from pathlib import Path

import pytest
import yaml

from m2_ds.cli import load
from m2_ds.prepare.config import load_config

PLAIN = {"out": "out", "inputs": [{"name": "web", "kind": "tar", "files": "a.tar"}]}
SIMILAR = {"model": "runs/x", "min": 0.2}


def write(folder: Path, **fields: object) -> Path:
    (folder / "c.yaml").write_text(yaml.safe_dump(PLAIN | fields))
    return folder / "c.yaml"


def test_overrides(tmp_path: Path) -> None:
    overrides = ["text.length.min_characters=2", "inputs.0.name=other", "picture.resize_to=256", "out=/tmp/x"]
    config = load_config(write(tmp_path), overrides)
    assert config.text.length.min_characters == 2 and config.inputs[0].name == "other"
    assert config.picture.resize_to == 256 and config.out == Path("/tmp/x") and config.inputs[0].files == ["a.tar"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"inputs": []}, "inputs"),
        ({"txt": {}}, "txt: "),
        ({"picture": {"min_side": 0}}, r"picture\.min_side: .*greater than or equal to 1.*got 0"),
        ({"inputs": PLAIN["inputs"] * 2}, "names must differ"),
        ({"inputs": [{"name": "a/b", "kind": "tar", "files": "x"}]}, "letters, digits"),
        ({"text": {"boilerplate": ["("]}}, "not a regular expression"),
        ({"columns": [{"field": "x", "rule": "format", "max": 1}]}, "program's own"),
        ({"columns": [{"field": "x", "rule": "x"}]}, "neither min nor max"),
        ({"similarity": SIMILAR | {"below": "rewrite"}}, "give a `rewrite` block"),
        ({"rewrite": {"function": "a:b"}}, r"it needs similarity\.below: rewrite"),
        ({"balance": {"how": "weights"}}, "each once"),
        ({"balance": {"sources": {"web": -1}}}, "not be negative"),
        ({"output": {"splits": {"val": 1.5}}}, "below 1 in all"),
    ],
)
def test_wrong_settings(fields: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load_config(write(tmp_path, **fields))


@pytest.mark.parametrize("override", ["nonsense", "inputs.7.name=x", "inputs.x.name=y", "=3", "out.x.y=3"])
def test_wrong_overrides(override: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="override"):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize("content", ["- a list", "a: [", "\x00"])
def test_files_that_are_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="no such preparation: .*none.yaml"):
        load_config(tmp_path / "none.yaml")


def test_the_console_knows_the_commands() -> None:
    assert load("prepare").__name__ == "prepare" and load("prepare list-dropped").__name__ == "list_dropped"
