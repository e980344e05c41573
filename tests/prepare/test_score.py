"""Similarity, users' scores and rewriting: what each setting makes of a caption, and how wrong functions are told."""

import io
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2_ds.api import load
from m2_ds.prepare import scorers
from m2_ds.prepare.scorers import HuggingFaceScorer, M2Scorer
from tests.prepare.raw import dropped, image, plain, prepare, rules, write_tar
from tests.support.pairs import ByteTokenizer

FUNCTIONS = '''
"""A user's functions."""
from PIL import Image


def brightness(items):
    assert all(isinstance(item.picture, Image.Image) and item.captions for item in items)
    return [sum(item.picture.convert("L").resize((1, 1)).getdata()) / 255 for item in items]


class Rewriter:
    made = 0

    def __init__(self):
        Rewriter.made += 1
        assert Rewriter.made == 1

    def __call__(self, items):
        answers = []
        for item in items:
            number = int(item.key.rsplit("/")[-1])
            answers.append({0: None, 1: "bad", 2: f"a better fitting text {number}"}[number % 3])
        return answers


def translate(items):
    return [{"text": f"第{item.key[-1]}张图片的中文说明", "language": "zh"} for item in items]


def fails(items):
    raise RuntimeError("out of luck")


def short(items):
    return [1.0]


def text(items):
    return ["no number" for _ in items]


number = 3
'''


class Fake:
    """Similarity by words: 0.5 for 'fitting' and 'fits', 0.1 for 'bad' pairs, 0.3 for others."""

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], of: Sequence[int]) -> np.ndarray:
        assert len(texts) == len(of) and set(of) <= set(range(len(pictures)))
        return np.array([0.5 if "fit" in text else 0.1 if "odd" in text else 0.3 for text in texts])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("m2_ds.prepare.score.scorer_of", lambda config: Fake())
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    scorers.open_function.cache_clear()
    return tmp_path


def pairs(folder: Path, captions: dict[int, Any]) -> str:
    records = [(f"{n}", {"png": image(n), "json": json.dumps({"caption": c}).encode()}) for n, c in captions.items()]
    return str(write_tar(folder / "in.tar", records))


SIMILARITY = {"model": "unused", "min": 0.2}
MIXED = {0: ["an odd text here", "one that fits"], 1: "an odd text again", 2: "nothing special"}


def test_captions_below_the_threshold_go(home: Path) -> None:
    ledger, records = prepare(home / "out", pairs(home, MIXED), similarity=SIMILARITY)
    assert [[c.text for c in r.captions] for r in records] == [["one that fits"], ["nothing special"]]
    assert rules(home / "out") == {"1": "low_similarity"} and ledger.balanced()
    assert ledger.dropped["caption", "low_similarity", "raw", "en"] == 1
    assert sum(ledger.histograms["similarity\ten"].values()) == 4


def test_captions_below_the_threshold_are_marked(home: Path) -> None:
    _, records = prepare(home / "out", pairs(home, MIXED), similarity=SIMILARITY | {"below": "mark"})
    assert [[c.kind for c in r.captions] for r in records] == [["weak", "caption"], ["weak"], ["caption"]]


def test_captions_are_rewritten(home: Path) -> None:
    texts: dict[int, Any] = {n: "an odd text" if n < 6 else "nothing special" for n in range(8)} | {8: MIXED[0]}
    options = {"similarity": SIMILARITY | {"below": "rewrite"}, "rewrite": {"function": "mine.py:Rewriter"}}
    ledger, records = prepare(home / "out", pairs(home, texts), **options)
    found = {r.key[-1]: [(c.text, c.kind) for c in r.captions] for r in records}
    assert found["2"] == [("an odd text", "original"), ("a better fitting text 2", "rewritten")]
    assert found["8"][0][1] == "original" and found["8"][1] == ("one that fits", "caption")
    assert found["6"] == [("nothing special", "caption")]
    assert rules(home / "out") == {str(n): "not_rewritten" for n in (0, 1, 3, 4)}
    assert ledger.captions_added == {"rewritten": 5} and ledger.balanced()
    assert ledger.dropped["caption", "short_caption", "raw", "en"] == 2


def test_translations_are_added(home: Path) -> None:
    options = {"rewrite": {"function": "mine:translate", "when": "missing_language", "kind": "translated"}}
    _, records = prepare(home / "out", pairs(home, {1: "a text", 2: ["a text", "已经有中文说明了"]}), **options)
    assert [[(c.language, c.kind) for c in r.captions] for r in records] == [
        [("en", "caption"), ("zh", "translated")],
        [("en", "caption"), ("zh", "caption")],
    ]


def test_users_scores(home: Path) -> None:
    write_tar(home / "in.tar", map(plain, range(6)))
    levels = [np.asarray(Image.open(io.BytesIO(image(n))).convert("L")).mean() / 255 for n in range(6)]
    middle = float(np.median(levels))
    score = {"function": "mine.py:brightness", "rule": "dark", "min": middle, "batch_size": 4}
    _, records = prepare(home / "out", str(home / "in.tar"), scores=[score])
    assert [r.key[-1] for r in records] == [str(n) for n in range(6) if levels[n] > middle]
    assert set(rules(home / "out").values()) == {"dark"}
    assert dropped(home / "out")[0]["detail"].startswith("score 0.")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("mine.py:fails", "mine.py:fails.*raw/in/00000.*RuntimeError: out of luck"),
        ("mine.py:short", "gave 1 answers about the 3 records"),
        ("mine.py:text", "answered 'no number' about 'raw/in/00000'"),
        ("mine.py:none", "can't be opened.*none"),
        ("mine.py:number", "is no function but int"),
        ("other.py:f", "there is no file"),
        ("nosuchmodule:f", "nosuchmodule"),
        ("mine.py", "module:name or file.py:name"),
    ],
)
def test_functions_that_do_not_work(function: str, told: str, home: Path) -> None:
    write_tar(home / "in.tar", map(plain, range(3)))
    with pytest.raises(ValueError, match=told):
        prepare(home / "out", str(home / "in.tar"), scores=[{"function": function, "rule": "mine", "min": 0}])


def test_a_model_of_this_projects_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load("tiny")
    processor.tokenizer = ByteTokenizer()  # type: ignore[assignment]
    monkeypatch.setattr("m2_ds.api.load", lambda path, device: (model, processor))
    pictures, texts = [Image.open(io.BytesIO(image(n))) for n in range(2)], ["red fox", "猫", "a"]
    found = M2Scorer("runs/x", "cpu")(pictures, texts, [0, 1, 1])
    for value, text, place in zip(found, texts, [0, 1, 1]):
        with torch.inference_mode():
            one = model.encode_image(processor.images([pictures[place]]))[0]
            other = model.encode_text(*processor.texts([text]))[0]
        assert abs(value - float(one @ other / one.norm() / other.norm())) < 1e-5
    processor.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        M2Scorer("runs/x", "cpu")


def test_a_hugging_face_models_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features, normalised, whatever object they come in; the processor's padding and truncation are asked for."""

    class Batch(dict[str, Any]):
        def to(self, device: str) -> "Batch":
            return self

    class Model:
        def to(self, device: str) -> "Model":
            return self

        def eval(self) -> "Model":
            return self

        def get_image_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def get_text_features(self, x: torch.Tensor) -> Any:
            return type("Output", (), {"pooler_output": x})()

    def processor(images: Any = None, text: Any = None, **options: Any) -> Batch:
        if images is not None:
            return Batch(x=torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        assert options["truncation"] and options["padding"] is True
        return Batch(x=torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])[: len(text)])

    library = types.ModuleType("transformers")  # the real one takes seconds to import
    opened = types.SimpleNamespace(from_pretrained=lambda name: Model())
    vars(library).update(AutoModel=opened, AutoProcessor=types.SimpleNamespace(from_pretrained=lambda name: processor))
    monkeypatch.setitem(sys.modules, "transformers", library)
    scorer = HuggingFaceScorer("any", "cpu")
    found = scorer([Image.new("RGB", (4, 4))] * 2, ["a", "b", "c"], [0, 0, 1])
    assert np.allclose(found, [0.6, 0.8, 1.0])
