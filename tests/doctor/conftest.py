"""The engine tests' small data set, tokenizer and recipe."""

from pathlib import Path
from typing import Any

import pytest

from m2_ds.config import RunConfig
from tests.engine.conftest import broken_shapes, deepspeed_files, recipe, shapes, tokenizer_folder
from tests.engine.jobs import changed, config_of

__all__ = ["broken_shapes", "deepspeed_files", "recipe", "shapes", "tokenizer_folder"]


@pytest.fixture
def tree(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return changed(recipe, {"folder": str(tmp_path / "runs/new")})


@pytest.fixture
def config(tree: dict[str, Any]) -> RunConfig:
    return config_of(tree)
