"""The release's way of counting, against a derivation of its own: plain loops over whole matrices."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from m2_ds.api import load
from m2_ds.data.decode import decode
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.embed import TextEmbeddings
from m2_ds.evaluation.release import Listed, clean, release_recall
from m2_ds.evaluation.retrieval import retrieval
from m2_ds.evaluation.run import evaluate, summary
from m2_ds.evaluation.sources import decode_as_release


def one_by_one(lines, image_of, text_of):
    """Percentages as the release gets them. lines: (path, captions); image_of, text_of: fp32 features of one."""
    lines = [(path, [text.lower().replace("“", '"').replace("”", '"') for text in texts]) for path, texts in lines]
    pictures = [path for path, _ in lines]
    captions = [text for _, texts in lines for text in texts]
    image_rows = [image_of(path) for path in pictures]
    text_rows = [text_of(text) for text in captions]
    scores = np.array(text_rows, dtype=np.float64) @ np.array(image_rows, dtype=np.float64).T
    other_way = np.array(image_rows, dtype=np.float64) @ np.array(text_rows, dtype=np.float64).T
    last_place = {text: place for place, text in enumerate(captions)}
    last_line = {path: number for number, path in enumerate(pictures)}
    found = {}
    for way, matrix in (("text_to_image", scores), ("image_to_text", other_way)):
        hits = {1: 0, 5: 0, 10: 0}
        for row, order in enumerate(np.argsort(-matrix, axis=1)):
            if way == "text_to_image":
                right = {last_line[path] for path, texts in lines if captions[row] in texts}
            else:
                right = {last_place[text] for path, texts in lines if path == pictures[row] for text in texts}
            for k in hits:
                hits[k] += any(int(place) in right for place in order[:k])
        found.update({f"{way}/r{k}": count / len(matrix) * 100 for k, count in hits.items()})
    return {**found, "mean_recall": sum(found.values()) / 6}


def made_up_set(seed, pictures=40):
    """Lines with repeated captions, within a line and across lines, and pictures that several lines name."""
    draw = random.Random(seed)
    lines = []
    for number in range(pictures):
        path = f"{number}.png" if number < 5 or draw.random() < 0.8 else f"{draw.randrange(number)}.png"
        lines.append((path, [f"Text “{draw.randrange(60)}”" for _ in range(draw.randint(1, 4))]))
    return lines


def listed(lines):
    """As numbers: (Listed, pictures, texts)."""
    pictures = list(dict.fromkeys(path for path, _ in lines))
    texts = list(dict.fromkeys(clean(text) for _, captions in lines for text in captions))
    rows = [[texts.index(clean(text)) for text in captions] for _, captions in lines]
    return Listed.of([pictures.index(path) for path, _ in lines], rows), pictures, texts


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["ties", "equal pictures", "all alike"])
def test_equals_a_plain_derivation_to_the_last_bit(seed, kind):
    lines = made_up_set(seed, pictures=5 + 6 * seed)
    numbers, pictures, texts = listed(lines)
    generator = torch.Generator().manual_seed(seed)
    # Quarters: their products and sums are exact, and meet often.
    image = torch.randint(-2, 3, (len(pictures), 6), generator=generator) / 4
    text = torch.randint(-2, 3, (len(texts), 6), generator=generator) / 4
    if kind == "equal pictures":
        image[1::2] = image[: len(image[1::2])]
    if kind == "all alike":
        image, text = torch.ones_like(image), torch.ones_like(text)
    found = release_recall(image, text, numbers)
    rows = {name: row.tolist() for name, row in [*zip(pictures, image), *zip(texts, text)]}
    assert found == one_by_one(lines, rows.__getitem__, rows.__getitem__)


def test_both_ways_of_counting_agree_where_nothing_repeats_or_ties():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(40, 8, generator=generator), torch.randn(120, 8, generator=generator)
    rows = [[3 * line, 3 * line + 1, 3 * line + 2] for line in range(40)]
    owner = torch.arange(40).repeat_interleave(3)
    texts = TextEmbeddings([f"t{row}" for row in range(120)], text, torch.arange(120), owner)
    assert release_recall(image, text, Listed.of(range(40), rows)) == pytest.approx(retrieval(image, texts).metrics())


def test_blocks_do_not_matter(monkeypatch):
    numbers, pictures, texts = listed(made_up_set(3, 60))
    image, text = torch.randn(len(pictures), 8), torch.randn(len(texts), 8)
    whole = release_recall(image, text, numbers)
    monkeypatch.setattr("m2_ds.evaluation.release.BLOCK", 7)
    assert release_recall(image, text, numbers) == whole


def test_only_the_last_place_of_a_repeated_caption_is_right():
    # Both lines list "dog", the same text at places 0 and 1. Only place 1 is right, and numpy puts 0 first.
    numbers, _, _ = listed([("a.png", ["dog"]), ("b.png", ["dog"])])
    found = release_recall(torch.eye(2), torch.tensor([[1.0, 0.0]]), numbers)
    assert found["image_to_text/r1"] == 0 and found["image_to_text/r5"] == 100
    assert found["text_to_image/r1"] == 100


def test_fewer_than_ten_candidates_and_features_that_are_not_finite():
    numbers, _, _ = listed([("a.png", ["x"]), ("b.png", ["y"])])
    assert release_recall(torch.eye(2), torch.eye(2), numbers)["mean_recall"] == 100
    with pytest.raises(ValueError, match="diverged"):
        release_recall(torch.eye(2) * torch.nan, torch.eye(2), numbers)


def test_texts_and_pictures_are_prepared_as_the_release_does():
    assert clean("A “Red” Fox’s Ünï") == 'a "red" fox’s ünï'
    turned, out = Image.new("RGBA", (2, 1), (255, 0, 0, 0)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(out, "PNG", exif=exif)
    as_release, ours = decode_as_release(out.getvalue()), decode(out.getvalue())
    assert (as_release.size, as_release.getpixel((0, 0))) == ((2, 1), (255, 0, 0))
    assert (ours.size, ours.getpixel((0, 0))) == ((1, 2), (255, 255, 255))
    with pytest.raises(ValueError, match="broken picture"):
        decode_as_release(b"nonsense")


def test_a_list_is_measured_as_one_by_one_evaluation_measures_it(weights, tmp_path):
    """Through files, tokenizer and network: repeated captions, equal pictures, a picture that two lines name."""
    network, processor = load(weights)
    draw = np.random.default_rng(0)
    lines = made_up_set(1, 50)
    for number in range(50):
        picture = Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{number}.png")
    for number in range(0, 10, 2):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / f"{number + 1}.png").read_bytes())
    content = [json.dumps({"image": path, "caption": captions}) for path, captions in lines]
    (tmp_path / "list.jsonl").write_text("\n".join(content), encoding="utf-8")

    def image_of(path):
        picture = Image.open(tmp_path / path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        return network.encode_image(torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255)[0].tolist()

    def text_of(text):
        ids, mask = processor.tokenizer.encode([text], length=32)
        return network.encode_text(ids, mask)[0].tolist()

    with torch.no_grad():
        expected = one_by_one(lines, image_of, text_of)
    task = {"kind": "retrieval", "list": tmp_path / "list.jsonl", "language": "en", "protocol": "release"}
    found = evaluate(network, processor, EvaluationConfig(tasks=[{**task, "name": "made-up"}], batch_size=7))
    assert found["metrics"] == {f"made-up/list/en/{name}": value for name, value in expected.items()}
    (entry,) = found["entries"]
    assert entry["facts"]["captions"] == sum(len(captions) for _, captions in lines)
    assert entry["facts"]["fair"]["mean_recall"] != entry["metrics"]["mean_recall"]
    assert "counted as the release counts" in summary(found)
