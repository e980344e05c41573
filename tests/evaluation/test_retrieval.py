"""Retrieval against a brute force that lists every candidate, and cases whose answer is known."""

import random
from math import comb

import pytest
import torch

from m2_ds.evaluation.embed import TextEmbeddings
from m2_ds.evaluation.retrieval import Relevance, retrieval, top_k


def embeddings(captions, features):
    """captions: (text, picture) pairs; features: one row a different text, in order of appearance."""
    different = list(dict.fromkeys(text for text, _ in captions))
    text = torch.tensor([different.index(text) for text, _ in captions])
    return TextEmbeddings(different, features, text, torch.tensor([owner for _, owner in captions]))


def brute_force(image, texts, groups, k, direction):
    """Plain loops over the captions as listed; the chance over orders of ties by counting the subsets that miss."""
    groups = groups or [str(i) for i in range(len(image))]
    listed = list(zip(texts.text.tolist(), texts.owner.tolist()))
    right_groups = {t: {groups[owner] for other, owner in listed if other == t} for t, _ in listed}

    def is_right(picture, text):
        return groups[picture] in right_groups[text]

    def score(picture, text):
        return float(image[picture].double() @ texts.features[text].double())

    if direction == "image_to_text":
        queries = [[(score(i, t), is_right(i, t)) for t, _ in listed] for i in range(len(image))]
    else:
        queries = [[(score(i, t), is_right(i, t)) for i in range(len(image))] for t, _ in listed]
    queries = [query for query in queries if any(right for _, right in query)]
    total = 0.0
    for query in queries:
        best = max(value for value, right in query if right)
        above = sum(value > best for value, _ in query)
        tied = [right for value, right in query if value == best]
        room = max(0, min(k - above, len(tied)))
        total += 1 - comb(len(tied) - sum(tied), room) / comb(len(tied), room)
    return total / len(queries)


def random_case(seed):
    """Small integers as features: their products are exact, and ties abound. Texts repeat, groups repeat."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    pictures = draw.randint(3, 17)
    captions = [(f"t{draw.randint(0, 12)}", draw.randrange(pictures)) for _ in range(draw.randint(3, 25))]
    captions = list(dict.fromkeys(captions))
    different = len({text for text, _ in captions})
    image = torch.randint(-1, 2, (pictures, 4), generator=generator).float()
    texts = embeddings(captions, torch.randint(-1, 2, (different, 4), generator=generator).float())
    groups = [f"g{draw.randint(0, 9)}" for _ in range(pictures)]
    return image, texts, groups


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("grouped", [True, False])
def test_equals_brute_force(seed, grouped):
    image, texts, groups = random_case(seed)
    groups = groups if grouped else None
    for tile in (3, 7, 64):
        result = retrieval(image, texts, groups, tile=tile)
        for direction in ("image_to_text", "text_to_image"):
            for k, value in getattr(result, direction).recall.items():
                assert value == pytest.approx(brute_force(image, texts, groups, k, direction), abs=1e-12), (
                    direction,
                    k,
                )


def unique_captions(n, features):
    return embeddings([(f"caption {i}", i) for i in range(n)], features)


def test_constant_features_score_what_guessing_scores():
    n = 300
    constant = torch.nn.functional.normalize(torch.full((n, 33), 0.123), dim=1)
    result = retrieval(constant, unique_captions(n, constant), tile=37)
    for ranking in (result.image_to_text, result.text_to_image):
        for k, value in ranking.recall.items():
            assert value == pytest.approx(k / n, rel=1e-9)
        assert ranking.rank.mean() == pytest.approx((n + 1) / 2)


def test_perfect_and_reversed_features():
    n = 50
    image = torch.eye(n)
    assert retrieval(image, unique_captions(n, image)).metrics() == {
        **{f"{d}/r{k}": 100.0 for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
        "mean_recall": 100.0,
    }
    assert retrieval(image, unique_captions(n, -image)).mean_recall == 0


def test_a_repeated_caption_is_right_wherever_it_is_listed():
    # Pictures 0 and 1 both list "dog"; picture 1's own feature points to the text's, picture 0's does not.
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    texts = embeddings([("dog", 0), ("dog", 1), ("cat", 2)], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    result = retrieval(image, texts, ks=(1,))
    assert result.text_to_image.recall[1] == pytest.approx(2 / 3)  # "dog" twice found through picture 1; "cat" not
    assert result.text_to_image.weight.tolist() == [2, 1]
    # Picture 2 prefers "dog", listed twice: its own caption is third, not second.
    assert result.image_to_text.rank.tolist() == [2, 1, 3]


def test_groups_share_captions_in_one_language_only_where_asked():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = embeddings([("a", 0), ("b", 1)], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert retrieval(image, texts, ["same", "same"], ks=(1,)).mean_recall == 1
    assert retrieval(image, texts, None, ks=(1,)).mean_recall == 0


def test_a_picture_without_caption_is_a_candidate_but_no_query():
    image = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    texts = embeddings([("a", 1), ("b", 2)], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    result = retrieval(image, texts, ks=(1,))
    assert result.image_to_text.query.tolist() == [1, 2] and result.image_to_text.recall[1] == 1
    assert result.text_to_image.recall[1] == 0.5  # picture 0 stands before picture 1


def test_features_that_are_not_finite_are_refused():
    image = torch.eye(3)
    image[1, 1] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        retrieval(image, unique_captions(3, torch.eye(3)))


def test_relevance_lists_pairs_of_a_block():
    texts = embeddings([("a", 0), ("b", 0), ("a", 2)], torch.zeros(2, 1))
    relevance = Relevance(3, texts, ["g", "h", "g"])
    picture, text = relevance.pairs(1, 3)
    assert list(zip(picture.tolist(), text.tolist())) == [(1, 0), (1, 1)]
    assert relevance.right(0).tolist() == [0, 1] and relevance.right(1).tolist() == []


def test_top_k_over_tiles():
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    scores, rows = top_k(queries, candidates, 6, tile=7)
    expected = (queries @ candidates.T).topk(6)
    assert torch.equal(rows, expected.indices) and torch.allclose(scores, expected.values)
    assert top_k(queries, candidates[:3], 6)[1].shape == (5, 3)
    tied = top_k(torch.ones(1, 1), torch.ones(9, 1), 4, tile=2)[1]
    assert tied.tolist() == [[0, 1, 2, 3]]
