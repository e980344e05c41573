"""Words told from pictures, by a model that has learnt the names of colours: tasks, several ranks, the report."""

from pathlib import Path

import pytest
import torch

from m2_ds.api import Processor
from m2_ds.data.image import decode
from m2_ds.data.reader import Dataset
from m2_ds.data.text import load_tokenizer
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.report import write_report
from m2_ds.evaluation.run import evaluate, run_evaluations
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.masked import MaskedInputs, pixels_of, rebuild_patches
from m2_ds.model.masking import hide_patches, hide_words
from m2_ds.model.random import Noise
from m2_ds.model.weights import init_weights
from m2_ds.parallel.collectives import all_gather_objects
from m2_ds.parallel.mesh import Mesh
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def learnt(colours: Dataset, weights: Path) -> tuple[M2Encoder, Processor]:
    """Both objectives on the six pictures and their names, until the model tells the words."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(weights)
    config = M2EncoderConfig.preset(
        "test", vocab_size=tokenizer.vocab_size, position_std=0.1, masked_text_head=True, masked_image_head=192
    )
    model, processor = M2Encoder(config), Processor(config.image_size, tokenizer)
    init_weights(model, config, seed=0)
    records = [record for record in colours.split("test").read(range(6)) for _ in range(2)]
    images = processor.images([decode(record.image) for record in records])
    texts = [record.captions[0 if place % 2 else 2].text for place, record in enumerate(records)]
    ids, mask = processor.texts(texts)
    words, real = tokenizer.words(), torch.ones(len(ids), dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        noise = Noise.of(step, torch.arange(len(ids)))
        hidden = MaskedInputs(
            hide_words(ids, mask, words, 0.4, noise), words.mask_id, hide_patches(noise, 16, 0.5), 8, None, real
        )
        sums = model(images, ids, mask, masked=hidden).masked
        loss = sums.text / hidden.words.sum() + sums.image / (8 * len(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), processor


def tasks(colours: Dataset) -> EvaluationConfig:
    place = {"dataset": str(colours.folder), "splits": ["test"], "caption_kinds": ["name"]}
    return EvaluationConfig.model_validate(
        {
            "batch_size": 5,
            "tasks": [
                {"kind": "hidden_words", **place},
                {"kind": "hard_negatives", **place, "score": "words", "rounds": 6},
                {"kind": "hard_negatives", **place},
                {"kind": "retrieval", **place},
            ],
        }
    )


def test_words_are_told_from_the_picture_and_captions_from_their_twins(
    colours: Dataset, learnt: tuple[M2Encoder, Processor]
) -> None:
    found = run_evaluations(*learnt, tasks(colours))
    for language in ("en", "zh"):
        told = found[f"colours/test/{language}/hidden_words/accuracy"]
        blind = found[f"colours/test/{language}/hidden_words/accuracy_blind"]
        assert told == 100 and blind < 85, f"the colour cannot be told from grey: {told}, {blind}"
        assert found[f"colours/test/{language}/hard_negatives_by_words/colour/accuracy"] == 100
    assert found["colours/test/en/hard_negatives/all/accuracy"] < 100  # the embeddings never learnt anything


def tell(
    mesh: Mesh, config: M2EncoderConfig, state: dict[str, torch.Tensor], weights: Path, asked: EvaluationConfig
) -> dict[str, float]:
    torch.set_num_threads(1)
    model = M2Encoder(config)
    model.load_state_dict(state)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    model.backbone_vl.register_forward_hook(count)
    found = run_evaluations(model.eval(), Processor(32, load_tokenizer(weights)), asked, group=mesh.data_parallel)
    assert len(set(all_gather_objects(forwards, mesh.world))) == 1, "partitioned weights need as many on every rank"
    return found


@pytest.mark.distributed
def test_several_ranks_tell_the_same(colours: Dataset, learnt: tuple[M2Encoder, Processor], weights: Path) -> None:
    model, _ = learnt
    alone = run_evaluations(*learnt, tasks(colours))
    for found in run_ranks(2, tell, model.config, dict(model.state_dict()), weights, tasks(colours)):
        assert found == pytest.approx(alone)


def test_the_report_shows_what_was_hidden_and_told(
    colours: Dataset, learnt: tuple[M2Encoder, Processor], tmp_path: Path
) -> None:
    content = evaluate(*learnt, tasks(colours), tmp_path)
    assert len(content["rebuilt"]) == 6 and all(len(each["pictures"]) == 3 for each in content["rebuilt"])
    for each in content["rebuilt"]:
        joined = "".join(word for word, _ in each["words"]).replace(" ", "")
        assert joined == each["text"].replace(" ", "") and any(guess is not None for _, guess in each["words"])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Hidden words and patches" in page and 'alt="rebuilt"' in page and ", by words told" in page


def test_patches_that_are_not_hidden_stay_and_hidden_ones_are_rebuilt(learnt: tuple[M2Encoder, Processor]) -> None:
    model, processor = learnt
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ids, mask = processor.texts(["a red square", "绿色方块"])
    hidden = hide_patches(Noise.of(1, torch.arange(2)), 16, 0.5)
    with torch.no_grad():
        found = pixels_of(rebuild_patches(model, images, ids, mask, hidden), 8)
    true = pixels_of(images, 8)
    torch.testing.assert_close(found[~hidden], true[~hidden])
    assert not torch.isclose(found[hidden], true[hidden]).all(-1).any()
    torch.testing.assert_close(found[hidden].mean(-1), true[hidden].mean(-1), atol=0.2, rtol=0)


def test_models_that_cannot_tell_are_refused(colours: Dataset, learnt: tuple[M2Encoder, Processor]) -> None:
    model, processor = learnt
    plain = M2Encoder(model.config.without_masked_heads())
    init_weights(plain, plain.config, seed=0)
    with pytest.raises(ValueError, match="trained with loss.cmlm.weight above 0"):
        run_evaluations(plain, processor, tasks(colours))
