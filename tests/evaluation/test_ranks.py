"""Evaluation over real ranks gives the numbers of one process, on every rank."""

import pytest
import torch

from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.embed import embed_split
from m2_ds.evaluation.run import run_evaluations
from tests.evaluation.conftest import ColourModel, ColourProcessor
from tests.support.ranks import run_ranks


def measure(mesh, dataset):
    # The folder is opened by each rank itself, as in training.
    from m2_ds.data.shards import open_dataset
    from m2_ds.parallel.mesh import SOLO

    group = SOLO if mesh is None else mesh.data_parallel
    model, processor = ColourModel(), ColourProcessor()
    split = open_dataset(dataset).split("test")
    found = embed_split(model, processor, split, 2, "cpu", ["en", "zh"], group=group)
    config = EvaluationConfig(
        batch_size=2,
        tasks=[
            {"kind": "retrieval", "dataset": dataset, "splits": ["test"]},
            {"kind": "hard_negatives", "dataset": dataset, "splits": ["test"]},
        ],
    )
    metrics = run_evaluations(model, processor, config, group=group)
    return metrics, found.image.tolist(), {lang: texts.features.tolist() for lang, texts in found.texts.items()}


@pytest.mark.distributed
def test_three_ranks_equal_one(colours):
    alone = measure(None, colours.folder)
    for metrics, image, texts in run_ranks(3, measure, colours.folder):
        assert metrics == alone[0] and texts == alone[2]
        assert torch.equal(torch.tensor(image), torch.tensor(alone[1]))
