"""A few records of each rule, with small pictures, for the card: those whose keys' hashes are least."""

import base64
from collections.abc import Sequence
from typing import Any

from m2_ds.data.records import Caption
from m2_ds.prepare.pairs import draw
from m2_ds.prepare.picture import preview

Sample = dict[str, Any]  # draw, key, detail, captions, jpeg (base64, or None)


class Samples:
    """The `most` records of least hash a rule. Pictures are made small when they are taken, and taken seldom."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.rules: dict[str, list[Sample]] = {}

    def offer(self, rule: str, key: str, image: bytes | None, captions: Sequence[Caption], detail: str) -> None:
        taken = self.rules.setdefault(rule, [])
        number = draw(key, "sample")
        if self.most and (len(taken) < self.most or number < taken[-1]["draw"]):
            small = preview(image) if image else None
            self._take(
                taken,
                {
                    "draw": number,
                    "key": _writable(key),
                    "detail": _writable(detail[:200]),
                    "captions": [_writable(f"[{c.language}] {c.text[:200]}") for c in captions[:4]],
                    "jpeg": base64.b64encode(small).decode() if small else None,
                },
            )

    def _take(self, taken: list[Sample], sample: Sample) -> None:
        taken.append(sample)
        taken.sort(key=lambda entry: (entry["draw"], entry["key"]))
        del taken[self.most :]

    def add(self, plain: dict[str, list[Sample]]) -> None:
        """Another unit's samples, as `to_json` gave them."""
        for rule, found in plain.items():
            taken = self.rules.setdefault(rule, [])
            for sample in found:
                self._take(taken, sample)

    def to_json(self) -> dict[str, list[Sample]]:
        return dict(sorted(self.rules.items()))


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
