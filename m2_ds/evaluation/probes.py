"""Fine-grained probe: does a picture prefer its caption to one that differs in a single known way?

Shapes: N pictures, U different texts, P (true caption, hard negative) pairs, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2_ds.evaluation.embed import Listing


@dataclass(frozen=True)
class ProbeResult:
    """Shares: of pairs whose true caption scores higher (equal scores count half, so guessing gives 0.5), and of
    pictures that prefer every true caption to every negative of the kind."""

    pairs: dict[str, float]  # by kind of negative, and "all"
    pictures: dict[str, float]
    count: dict[str, int]  # pairs

    def metrics(self) -> dict[str, float]:
        """Percentages: <kind>/accuracy, <kind>/strict."""
        found = {}
        for kind in self.pairs:
            found[f"{kind}/accuracy"] = 100 * self.pairs[kind]
            found[f"{kind}/strict"] = 100 * self.pictures[kind]
        return found


@dataclass(frozen=True)
class ProbePairs:
    """Pairs of one language: `texts` [U], and of each pair the picture and the two captions' rows in it (int64 [P])."""

    texts: list[str]
    picture: Tensor
    true: Tensor
    negative: Tensor
    kinds: list[str]  # P


def probe_pairs(listing: Listing, language: str, caption_kinds: Sequence[str] | None = None) -> ProbePairs:
    """Every true caption of a picture against every hard negative of it, in one language."""
    rows: dict[str, int] = {}
    found: list[tuple[int, int, int]] = []
    kinds: list[str] = []
    for picture, (captions, negatives) in enumerate(zip(listing.captions, listing.hard_negatives)):
        true = [
            caption["text"]
            for caption in captions
            if caption["language"] == language and (caption_kinds is None or caption["kind"] in caption_kinds)
        ]
        for negative in negatives:
            if negative["language"] == language:
                for text in true:
                    wrong = rows.setdefault(negative["text"], len(rows))
                    found.append((picture, rows.setdefault(text, len(rows)), wrong))
                    kinds.append(negative["kind"])
    picture, true_row, negative_row = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    return ProbePairs(list(rows), picture, true_row, negative_row, kinds)


def probe(image: Tensor, features: Tensor, pairs: ProbePairs) -> ProbeResult:
    """image fp32 [N, E], features fp32 [U, E] of `pairs.texts`."""
    own = image[pairs.picture]
    return judge((own * features[pairs.true]).sum(1), (own * features[pairs.negative]).sum(1), pairs, len(image))


def judge(true: Tensor, wrong: Tensor, pairs: ProbePairs, pictures: int) -> ProbeResult:
    """From scores fp32 [P] of the true captions and of the negatives; ``pictures``: N."""
    if not bool((true.isfinite() & wrong.isfinite()).all()):
        raise ValueError("the scores hold NaN or infinity: the weights they came from have diverged")
    won = (true > wrong).double() + 0.5 * (true == wrong).double()
    result = ProbeResult({}, {}, {})
    for kind in [*sorted(set(pairs.kinds)), "all"]:
        chosen = torch.tensor([kind in ("all", other) for other in pairs.kinds])
        lost = torch.zeros(pictures, dtype=torch.bool)
        lost[pairs.picture[chosen & (won < 1)]] = True
        asked = pairs.picture[chosen].unique()
        result.pairs[kind] = float(won[chosen].mean())
        result.pictures[kind] = float((~lost[asked]).double().mean())
        result.count[kind] = int(chosen.sum())
    return result
