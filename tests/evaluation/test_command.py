"""`m2 evaluate` and `m2 embed` on lists and folders, as a user calls them."""

import json
import subprocess
import sys

import pytest

from m2_ds import cli
from m2_ds.evaluation.embedding_files import read_embeddings


def run(command, *arguments):
    cli.run(cli.load(command), f"m2 {command}", [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Commands take every core they may use; other tests of this process want one thread."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})


@pytest.fixture
def a_list(pictures):
    return "--list", pictures / "list.jsonl", "--language", "zh"


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]


def test_a_list_is_evaluated_and_only_once(weights, a_list, tmp_path, capsys):
    run("evaluate", weights, *a_list, "--protocol", "release", "--out", tmp_path)
    first, told = metrics(tmp_path), capsys.readouterr()
    assert "mean" in told.out and "counted as the release counts" in told.out and "embedding pictures" in told.err
    run("evaluate", weights, *a_list, "--protocol", "release", "--out", tmp_path)
    assert metrics(tmp_path) == first and "embedding" not in capsys.readouterr().err
    assert "as the release measures" in (tmp_path / "report.html").read_text(encoding="utf-8")
    run("evaluate", weights, *a_list, "--protocol", "release", "--out", tmp_path, "--no-keep")
    assert metrics(tmp_path) == first and "embedding pictures" in capsys.readouterr().err
    run("evaluate", weights, *a_list, "--out", tmp_path / "bf16", "--precision", "bf16", "--batch-size", "3")
    facts = json.loads((tmp_path / "bf16/metrics.json").read_text(encoding="utf-8"))["facts"]
    assert facts["precision"] == "bf16" and facts["model"] == str(weights)


def test_a_folder_is_classified(weights, pictures, tmp_path):
    names = pictures / "classes.json"
    given = "--imagenet", pictures / "imagenet/val", "--classes"
    run("evaluate", weights, *given, names, "--predictions", "--out", tmp_path / "one")
    assert (tmp_path / "one/predictions-imagenet-val-zh.parquet").is_file()
    assert {name.split("/")[2] for name in metrics(tmp_path / "one")} == {"en", "zh"}
    run("evaluate", weights, *given, f"en={names}", f"zh={names}", "--out", tmp_path / "two")
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert "Zero-shot" in (tmp_path / "one/report.html").read_text(encoding="utf-8")


def test_a_recipe_with_lists_and_folders(weights, pictures, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""evaluation:
  tasks:
    - {{kind: retrieval, name: flickr, list: {pictures}/list.jsonl, language: zh, protocol: release}}
    - {{kind: zeroshot, name: imagenet, folder: {pictures}/imagenet/val, classes: {pictures}/classes.json}}
"""
    )
    run("evaluate", weights, "--recipe", recipe, "--out", tmp_path / "out")
    assert {name.split("/")[0] for name in metrics(tmp_path / "out")} == {"flickr", "imagenet"}


def test_embeddings_of_lists_and_folders(weights, pictures, a_list, tmp_path, capsys):
    run("embed", weights, *a_list, "--out", tmp_path)
    assert '6 pictures and {"zh": 12} captions' in capsys.readouterr().out
    found = read_embeddings(tmp_path)
    assert found.keys[0] == "list/red.png" and found.texts["zh"].owner.tolist() == [i // 2 for i in range(12)]
    run("embed", weights, "--imagenet", pictures / "imagenet/val", "--out", tmp_path / "folder")
    assert read_embeddings(tmp_path / "folder").categories == ["cold"] * 4 + ["warm"] * 2


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evaluate", [], "say what to evaluate"),
        ("evaluate", ["--list", "l", "--imagenet", "f"], "--list and --imagenet are given"),
        ("evaluate", ["--recipe", "r", "--language", "zh"], "--language belongs to --list, and --recipe is given"),
        ("evaluate", ["--list", "l", "--classes", "c"], "--classes belongs to --imagenet, and --list is given"),
        ("evaluate", ["--dataset", "d", "--protocol", "release"], "--protocol belongs to --list"),
        ("evaluate", ["--list", "l"], "language: say which language"),
        ("evaluate", ["--list", "l", "--language", "zh"], "l: no such list"),
        ("evaluate", ["--imagenet", "f"], "needs the names of its classes"),
        ("evaluate", ["--imagenet", "f", "--classes", "a", "b"], "several files need their language"),
        ("evaluate", ["--list", "l", "--language", "zh", "--ranks", "2", "--device", "cpu"], "--device is for one"),
        ("embed", ["--out", "o"], "say what to embed"),
        ("embed", ["--out", "o", "--list", "l"], "say which language"),
    ],
)
def test_what_is_missing_or_too_much_is_named(weights, command, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, weights, *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_give_the_numbers_of_one_process(weights, a_list, pictures, tmp_path):
    for ranks in (1, 2):
        command = [sys.executable, "-m", "m2_ds.cli", "evaluate", weights, *a_list, "--ranks", ranks]
        out = tmp_path / str(ranks)
        done = subprocess.run([*map(str, command), "--out", str(out)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "1") == metrics(tmp_path / "2")
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    (tmp_path / "l.jsonl").write_text('{"image": "bad.png", "caption": ["x"]}\n')
    command = [sys.executable, "-m", "m2_ds.cli", "evaluate", weights, "--list", tmp_path / "l.jsonl"]
    command += ["--language", "zh", "--ranks", 2, "--out", tmp_path / "3"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "picture 'bad.png'" in done.stderr
