"""What a recipe asks for: each thing that is missing, damaged or does not fit is a red line with a remedy."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from m2_ds.config import RunConfig
from m2_ds.doctor import recipe
from m2_ds.doctor.check import Result, Status, run_all
from m2_ds.doctor.machine import Place
from tests.engine.jobs import changed, config_of


def looked_at(config: RunConfig, ranks: int = 1) -> dict[str, Result]:
    """By name; those of the data without the data set's."""
    results = run_all(recipe.checks(config, Place(world_size=ranks, ranks_here=ranks)))
    return {result.name.split(", train", 1)[-1].strip(": ") or "data": result for result in results}


def test_a_good_recipe_is_green(config: RunConfig) -> None:
    results = looked_at(config, ranks=4)
    status: dict[str, Status] = {name: result.status for name, result in results.items()}
    assert status == {
        "layout": "ok", "tokenizer": "ok", "initial weights": "skipped", "evaluation": "skipped", "loggers": "ok",
        "data": "ok", "checksums": "ok", "captions": "ok", "first batch": "ok",
    }, results  # fmt: skip
    assert "4 rank(s): 1 tensor x 4 data x 1 pipeline; 1 micro-batch(es) of 4 pairs; ZeRO 1" in results["layout"].found
    assert "72 pairs (en 144, zh 144 captions) in 1 shard(s)" in results["data"].found
    assert "1 of 1 shard(s)" in results["checksums"].found
    assert "pictures 4 x 3 x" in results["first batch"].found and "captions 2 x 4 x" in results["first batch"].found


@pytest.mark.parametrize(
    ("changes", "name", "words", "remedy"),
    [
        ({"global_batch": 18}, "layout", "global_batch 18 does not divide over 4", "use 16 or 20"),
        ({"parallel.tensor_parallel_size": 4, "engine.deepspeed": "ds_configs/zero0.json"}, "layout",
         "wrong gradient norm", ""),
        ({"engine.deepspeed": "none.json"}, "layout", "none.json cannot be read", ""),
        ({"model.vocab_size": 300}, "tokenizer", "less than the 330 pieces", "model.vocab_size=330"),
        ({"tokenizer": "nowhere"}, "tokenizer", "no tokenizer at nowhere", ""),
        ({"init_from": "nowhere"}, "initial weights", "nowhere does not exist", ""),
        ({"data.sources.0.split": "trian"}, "data", "has no split 'trian'", ""),
        ({"data.languages": {"en": 1, "de": 1}}, "data", "no captions in de", "data.captions: one"),
        ({"log.wandb_project": "p"}, "loggers", "wandb is not installed", ""),
        ({"evaluation.tasks": [{"kind": "retrieval", "dataset": "nowhere", "splits": ["test"]}]}, "evaluation",
         "nowhere holds no data set", "build one"),
    ],
)  # fmt: skip
def test_one_fault_is_one_red_line(
    tree: dict[str, Any], changes: dict[str, Any], name: str, words: str, remedy: str
) -> None:
    faulty = changed_sources(tree, changes)
    checks = recipe.checks(config_of(faulty), Place(world_size=4))
    checks = [check for check in checks if name in (check.name, check.section)]
    result = checks[0].run()
    assert result.status == "fail" and words in result.found and remedy in result.remedy, result


def changed_sources(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in changes.items() if not key.startswith("data.sources.0.")}
    made = changed(tree, own)
    for key, value in changes.items():
        if key not in own:
            made["data"]["sources"][0][key.removeprefix("data.sources.0.")] = value
    return made


def copied(tree: dict[str, Any], shapes: Path, folder: Path) -> tuple[RunConfig, Path]:
    """The recipe on a copy of the data set, and the copy's shard."""
    shutil.copytree(shapes, folder)
    (shard,) = (folder / "train").glob("*.parquet")
    return config_of(changed_sources(tree, {"data.sources.0.path": str(folder)})), shard


def test_a_flipped_byte_is_found(tree: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    config, shard = copied(tree, shapes, tmp_path / "set")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = looked_at(config)["checksums"]
    assert result.status == "fail" and str(shard) in result.found and "is not the manifest's" in result.found


def test_a_shard_that_is_cut_short_is_found(tree: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    config, shard = copied(tree, shapes, tmp_path / "set")
    shard.write_bytes(shard.read_bytes()[:-100])
    results = looked_at(config)
    assert {results[name].status for name in ("data", "checksums", "captions", "first batch")} == {"fail"}
    assert "cut short or replaced" in results["data"].found and "build this data set again" in results["data"].remedy


def test_broken_pictures_are_told(tree: dict[str, Any], broken_shapes: Path) -> None:
    config = config_of(changed_sources(tree, {"data.sources.0.path": str(broken_shapes), "global_batch": 64}))
    result = looked_at(config)["first batch"]
    assert result.status == "warn" and "pairs could not be used: broken picture" in result.found


def test_captions_that_are_cut_or_not_known(tree: dict[str, Any]) -> None:
    result = looked_at(config_of(changed(tree, {"model.max_text_length": 8})))["captions"]
    assert result.status == "warn" and "raise model.max_text_length (8) for en" in result.remedy


def test_too_few_pairs_for_a_step(tree: dict[str, Any]) -> None:
    result = looked_at(config_of(changed(tree, {"global_batch": 128})))["data"]
    assert result.status == "warn" and "fewer than the 128 of a step" in result.found


def test_digests_follow_what_ranks_must_share(tree: dict[str, Any], shapes: Path) -> None:
    found = recipe.digests(config_of(tree))
    assert found.keys() == {"recipe", "DeepSpeed file", "tokenizer", f"data set {shapes}"}
    assert all(len(digest) == 12 for digest in found.values())
    other = recipe.digests(config_of(changed(tree, {"optim.lr": 1e-5})))
    assert [name for name in found if found[name] != other[name]] == ["recipe"]
    gone = recipe.digests(config_of(changed(tree, {"tokenizer": "nowhere"})))
    assert gone["tokenizer"] == "unreadable" and gone["DeepSpeed file"] == found["DeepSpeed file"]


def test_what_needs_the_tokenizer_is_left_out_without_one(tree: dict[str, Any]) -> None:
    results = looked_at(config_of(changed(tree, {"tokenizer": "nowhere"})))
    assert [results[name].status for name in ("tokenizer", "captions", "first batch", "data")] == [
        "fail", "skipped", "skipped", "ok",
    ]  # fmt: skip
