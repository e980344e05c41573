"""The console: every command answers --help completely, wrong input ends with one line and code 2."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from m2_ds import cli
from m2_ds.commands import _evaluation_block

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_and_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for parameter in inspect.signature(cli.load(name)).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert f"--{parameter.name.replace('_', '-')}" in shown
            documented = (cli.load(name).__doc__ or "") + str(parameter.annotation)
            assert f"{parameter.name}:" in documented, f"{name}: no word on --{parameter.name}"


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"m2 {name}" in shown for name in cli.COMMANDS)


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evluate"])
    assert ended.value.code == 2
    assert "no command 'evluate'" in capsys.readouterr().err


def test_group_without_command_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data"])
    shown = capsys.readouterr().out
    assert "m2 data emoji" in shown and "m2 train" not in shown


def test_wrong_recipe_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["config", str(ROOT / "ds_configs/recipes/emoji.yaml"), "optim.lr=fast", "model.stem=foo"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "optim.lr" in told and "'fast'" in told and "model.stem" in told and "'patch' or 'conv'" in told
    assert "Traceback" not in told


def test_evaluation_recipes_can_be_read() -> None:
    for recipe in (ROOT / "ds_configs/recipes").glob("*_test.yaml"):
        assert _evaluation_block(recipe).tasks
    with pytest.raises(ValueError, match="evaluation block"):
        _evaluation_block(ROOT / "ds_configs/zero1.json")


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tools_answer_help(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "usage" in done.stdout
