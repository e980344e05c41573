"""Hard negatives: pairs of a listing, accuracy by kind, ties."""

import pytest
import torch

from m2_ds.evaluation.embed import list_split
from m2_ds.evaluation.probes import ProbePairs, probe, probe_pairs


def test_pairs_cross_true_captions_with_negatives_of_the_language(colours):
    listing = list_split(colours.split("test"))
    english = probe_pairs(listing, "en")
    assert len(english.kinds) == 6 * 2 * 2 and english.kinds.count("shape") == 12
    assert english.texts[int(english.true[0])] == "a red square"
    assert english.texts[int(english.negative[0])] == "a white square"
    assert len(probe_pairs(listing, "en", ["name"]).kinds) == 12
    assert len(probe_pairs(listing, "zh").kinds) == 6
    assert probe_pairs(listing, "fr").kinds == []


def test_accuracy_and_strict_share_by_hand():
    # Texts: 0 true, 1 worse, 2 better, 3 as good. Picture 0 wins once and loses once, picture 1 wins, picture 2 ties.
    features = torch.tensor([[0.8], [0.1], [0.9], [0.8]])
    pairs = ProbePairs(
        ["t", "w", "b", "s"],
        torch.tensor([0, 0, 1, 2]),
        torch.tensor([0, 0, 0, 0]),
        torch.tensor([1, 2, 1, 3]),
        ["swap", "swap", "swap", "size"],
    )
    result = probe(torch.ones(3, 1), features, pairs)
    assert result.pairs == {"size": 0.5, "swap": pytest.approx(2 / 3), "all": pytest.approx(2.5 / 4)}
    assert result.pictures == {"size": 0.0, "swap": 0.5, "all": pytest.approx(1 / 3)}
    assert result.count == {"size": 1, "swap": 3, "all": 4}
    assert result.metrics()["swap/accuracy"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="diverged"):
        probe(torch.full((3, 1), float("inf")), features, pairs)
