"""The model and its processor in transformers: the goldens' numbers, files under the release's names, one processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

import m2_ds
from m2_ds.api import Processor
from m2_ds.convert.canonical import write_config
from m2_ds.convert.hugging_face import (
    M2EncoderConfig,
    M2EncoderImageProcessor,
    M2EncoderModel,
    M2EncoderProcessor,
    M2EncoderTokenizer,
)
from m2_ds.convert.hugging_face.export import export
from m2_ds.data.text import GlmTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from m2_ds.model.config import M2EncoderConfig as NetworkConfig
from m2_ds.model.encoder import M2Encoder, canonical_shapes
from m2_ds.model.loading import load_weights
from m2_ds.model.weights import init_weights
from tests.convert.conftest import GOLDENS, LONG, TEXTS, glm_model

EMBEDDING: dict[str, Any] = {"atol": 5e-6, "rtol": 0}
SCORE: dict[str, Any] = {"atol": 1e-4, "rtol": 0}
CASES = json.loads((GOLDENS.parent / "tokenizer_cases.json").read_text(encoding="utf-8"))
needs_glm = pytest.mark.skipif(not glm_model().is_file(), reason="no GLM model file: name one in M2_GLM_MODEL")


def golden(name: str, variant: str = "variant_a") -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / variant / f"{name}.safetensors")


@torch.no_grad()
def check_outputs(model: Any) -> None:
    inputs, want = golden("inputs"), golden("outputs")
    for pictures in (inputs["image"], inputs["image_uint8"]):
        found = model(input_ids=inputs["text_ids"], pixel_values=pictures, attention_mask=inputs["text_masks"])
        assert_close(found.image_embeds, want["image.cls_vlffn_feats"], **EMBEDDING)
        assert_close(found.text_embeds, want["text.cls_vlffn_feats"], **EMBEDDING)
        assert_close(found.logits_per_image, want["logits_per_image"], **SCORE)
        assert_close(found.logits_per_image.softmax(-1), want["probs_per_image"], **EMBEDDING)
        assert_close(found.logits_per_text.softmax(-1), want["probs_per_text"], **EMBEDDING)
    assert torch.equal(model.get_image_features(pictures), found.image_embeds)
    assert torch.equal(model.get_text_features(inputs["text_ids"], inputs["text_masks"]), found.text_embeds)
    assert_close(model.image_features(pictures).unimodal, want["image.cls_feats"], **EMBEDDING)


def test_goldens_survive_release_and_export(exported: Path) -> None:
    weights = golden("weights")
    found = load_file(exported / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[n], x) for n, x in weights.items())
    model = AutoModel.from_pretrained(exported)
    assert type(model) is M2EncoderModel and model.dtype == torch.float32 and not model.training
    check_outputs(model)


def test_a_canonical_folder_is_read_as_it_is(tmp_path: Path) -> None:
    write_config(tmp_path, NetworkConfig.from_release(json.loads((GOLDENS / "variant_a/config.json").read_text())))
    save_file(golden("weights"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_outputs(AutoModel.from_pretrained(tmp_path))


@torch.no_grad()
def test_joint_paths_are_the_networks_own(exported: Path) -> None:
    model, inputs = AutoModel.from_pretrained(exported), golden("inputs")
    want = golden("outputs_joint_extra")
    n = len(inputs["image"])
    valid = want["joint.encoder_padding_mask"] == 0
    found = model.fuse(inputs["image"], inputs["text_ids"][:n], inputs["text_masks"][:n])
    assert_close(found[valid], want["joint.vl_split"][valid], atol=1e-4, rtol=0)


def test_saved_and_loaded_again_bit_for_bit(exported: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(exported)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    assert again.config.network() == model.config.network()
    processor = AutoProcessor.from_pretrained(exported)
    processor.save_pretrained(tmp_path)
    one, two = (each(text=TEXTS, return_tensors="pt") for each in (processor, AutoProcessor.from_pretrained(tmp_path)))
    assert torch.equal(one["input_ids"], two["input_ids"])


@pytest.mark.parametrize(
    "changes", [{}, {"stem": "conv", "stem_full_width": 8, "logit_bias": True, "num_vl_layers": 2}]
)
def test_a_new_model_is_drawn_as_ours_under_the_canonical_names(changes: dict[str, Any]) -> None:
    network = NetworkConfig.preset("test", **changes)
    config = M2EncoderConfig(**network.model_dump())
    drawn = [
        torch.manual_seed(seed) and AutoModel.from_config(config).get_parameter("pooler.dense.weight")
        for seed in (4, 4, 5)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    model, ours = AutoModel.from_config(config), M2Encoder(network)
    torch.manual_seed(4)
    model.initialize_weights()
    torch.manual_seed(4)
    init_weights(ours, network, seed=int(torch.randint(2**31, ())))
    state, other = model.state_dict(), ours.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == canonical_shapes(network)
    assert all(torch.equal(state[name], other[name]) for name in other)
    pictures = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert_close(model.get_image_features(pictures), ours.encode_image(pictures), **EMBEDDING)


def test_loss_is_the_symmetric_cross_entropy(exported: Path) -> None:
    model, inputs = AutoModel.from_pretrained(exported), golden("inputs")
    n = len(inputs["image"])
    batch = {"pixel_values": inputs["image"], "input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"]}
    pairs = {name: x[:n] for name, x in batch.items()}
    found = model(**pairs, return_loss=True)
    logits = found.logits_per_image
    both = (logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal())
    assert_close(found.loss, -(both[0].mean() + both[1].mean()) / 2)
    found.loss.backward()
    assert all(
        model.get_parameter(f"backbone.encoder.layers.0.self_attn.{x}_proj.A.weight").grad is not None for x in "qkv"
    )
    loss, first, *_ = model(**pairs, return_loss=True, return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(first, logits)
    with pytest.raises(ValueError, match="return_loss needs pairs"):
        model(**{**pairs, "pixel_values": inputs["image"][:1]}, return_loss=True)


@torch.no_grad()
def test_half_precision_scores_in_fp32(exported: Path) -> None:
    model, inputs = AutoModel.from_pretrained(exported, dtype=torch.bfloat16), golden("inputs")
    found = model(inputs["text_ids"], inputs["image"].bfloat16(), inputs["text_masks"])
    assert model.dtype == torch.bfloat16 and found.logits_per_image.dtype == torch.float32
    assert_close(found.image_embeds, golden("outputs")["image.cls_vlffn_feats"], atol=3e-2, rtol=0)


def test_what_cannot_work_is_refused(exported: Path, tmp_path: Path) -> None:
    model, inputs = AutoModel.from_pretrained(exported), golden("inputs")
    with pytest.raises(ValueError, match="get_text_features"):
        model(pixel_values=inputs["image"])
    with pytest.raises(ValueError, match=r"takes \[B, 3, 32, 32\]"):
        model.get_image_features(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="leave it out"):
        AutoModel.from_pretrained(exported, attn_implementation="eager")
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        M2EncoderConfig(hidden_size=30, num_heads=4)
    state = model.state_dict()
    del state["backbone.encoder.layers.0.self_attn.k_proj.A.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*k_proj"):
        AutoModel.from_pretrained(tmp_path)


# -- processor --------------------------------------------------------------------------------------------------------


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    return [
        rgba,
        rgba.resize((20, 90)),
        *(rgba.convert("RGB").convert(mode) for mode in ("RGB", "L", "P", "1", "CMYK")),
    ]


def test_pictures_are_those_of_our_processor(exported: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(exported)
    assert type(processor) is M2EncoderImageProcessor
    ours = Processor(32, None).images(pictures())
    found = processor(pictures(), return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32 and torch.equal(found, ours.float() / 255)
    assert torch.equal(processor(pictures(), do_rescale=False, return_tensors="pt")["pixel_values"], ours)
    rgb = np.asarray(pictures()[2])
    assert torch.equal(processor(rgb, return_tensors="pt")["pixel_values"][0], ours[2].float() / 255)
    with pytest.raises(ValueError, match="do_center_crop"):
        processor(rgb, do_center_crop=True)
    with pytest.raises(ValueError, match="squares"):
        M2EncoderImageProcessor(size={"shortest_edge": 224})


def glm_like(tokenizer: Tokenizer) -> Tokenizer:
    return GlmTokenizer(glm_model().read_bytes(), max_length=12)


@pytest.mark.parametrize(
    "make",
    [
        lambda own: SentencePieceTokenizer(own._model, max_length=12),
        lambda own: SentencePieceTokenizer(own._model, max_length=12, truncation="left"),
        pytest.param(glm_like, marks=needs_glm),
    ],
    ids=["own", "own-left", "glm"],
)
def test_captions_are_those_of_our_processor(make: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = make(tokenizer)
    network = NetworkConfig.preset("test", vocab_size=ours.vocab_size, hidden_size=4, num_heads=1, max_text_length=12)
    export(M2Encoder(network), ours, tmp_path / "out")
    texts = [*TEXTS, LONG, "a    dog [MASK] [CLS] <|endoftext|> dog", " [UNK] ", "🦊 Fox"]
    ids, mask = ours.encode(texts)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor) is M2EncoderProcessor and type(processor.tokenizer) is M2EncoderTokenizer
    found = processor(text=texts, return_tensors="pt")
    assert torch.equal(found["input_ids"], ids) and torch.equal(found["attention_mask"], mask)
    assert ids.shape[1] == 12 and sorted(found) == ["attention_mask", "input_ids"]
    inner = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, row, valid in zip(texts, ids, mask.bool()):
        assert inner(text)["input_ids"] == row[valid].tolist()
        assert inner.tokenize(text) == ours.pieces(text)[1:-1]
        assert inner.decode(row, skip_special_tokens=True) == ours.decode(
            [i for i in row if int(i) not in ours.special_ids]
        )
    assert len(inner(LONG, truncation=False)["input_ids"]) == len(ours.pieces(LONG))
    wide = inner(TEXTS[:2], padding="max_length", return_tensors="pt")
    assert torch.equal(wide["input_ids"], ours.encode(TEXTS[:2], length=12)[0])
    assert inner.decode(inner("a dog")["input_ids"]).startswith("[CLS] a dog ")
    with pytest.raises(ValueError, match="no pairs"):
        inner("a dog", "a fox")


def test_our_own_tokenizer_folder_is_read_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = SentencePieceTokenizer(tokenizer._model, max_length=9, truncation="left")
    ours.save(tmp_path)
    found = M2EncoderTokenizer.from_pretrained(tmp_path)([LONG], return_tensors="pt")
    assert torch.equal(found["input_ids"], ours.encode([LONG])[0])


@needs_glm
def test_release_tokenizer_cases_are_exact() -> None:
    inner = M2EncoderTokenizer(str(glm_model()))
    ids = [inner(case["text"])["input_ids"] for case in CASES["cases"]]
    assert ids == [case["input_ids"] for case in CASES["cases"]]
    assert [inner.pad_token_id, inner.cls_token_id] == [CASES["pad_id"], CASES["cls_id"]]
    assert len(inner) == inner.vocab_size == CASES["vocab_size"]


# -- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "labels"), [("a photo of a {}", ["dog", "red fox", "square"]), ("一只{}", ["狗", "狐狸", "红色的狗"])]
)
@torch.no_grad()
def test_pipeline_gives_the_releases_probabilities(
    released: Path, exported: Path, template: str, labels: list[str]
) -> None:
    model, processor = m2_ds.load(released)
    image = model.encode_image(processor.images(pictures()[2:4]))
    text = model.encode_text(*processor.texts([template.format(label) for label in labels]))
    want = (model.logit_scale.exp() * F.cosine_similarity(image[:, None], text[None], dim=-1)).softmax(-1)
    for parts in (
        {"model": str(exported)},
        {
            "model": AutoModel.from_pretrained(exported),
            "image_processor": AutoImageProcessor.from_pretrained(exported),
            "tokenizer": AutoTokenizer.from_pretrained(exported),
        },
    ):
        classify = pipeline("zero-shot-image-classification", **parts)
        found = classify(pictures()[2:4], candidate_labels=labels, hypothesis_template=template)
        scores = torch.tensor([[{e["label"]: e["score"] for e in row}[label] for label in labels] for row in found])
        assert_close(scores, want, **EMBEDDING)


@needs_glm
@torch.no_grad()
def test_the_releases_own_example(tmp_path: Path) -> None:
    """A picture and seven captions through the public entry point of the release, at its tokenizer's real size."""
    network = NetworkConfig.from_release(json.loads((GOLDENS / "variant_real/config.json").read_text()))
    state = golden("weights_fp16_used_rows", "variant_real")
    table = torch.zeros(network.vocab_size, network.hidden_size, dtype=torch.float16)
    table[state.pop("text_embed.ids")] = state.pop("text_embed.rows")
    ours = M2Encoder(network)
    load_weights(ours, network, {**state, "backbone.text_embed.weight": table}, "golden")
    export(ours, load_tokenizer(glm_model(), max_length=network.max_text_length), tmp_path / "out")
    inputs, want = golden("inputs", "variant_real"), golden("outputs", "variant_real")
    texts = json.loads((GOLDENS / "variant_real/meta.json").read_text(encoding="utf-8"))["texts"]
    picture = Image.fromarray(inputs["image_decoded_uint8_hwc"].numpy())
    processor, model = AutoProcessor.from_pretrained(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out")
    batch = processor(images=picture, text=texts, padding="max_length", return_tensors="pt")
    assert torch.equal(batch["input_ids"], inputs["text_ids"]) and torch.equal(batch["pixel_values"], inputs["image"])
    assert_close(model(**batch).logits_per_image.softmax(-1), want["probs_per_image"], **EMBEDDING)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    found = {e["label"]: e["score"] for e in classify(picture, candidate_labels=texts, hypothesis_template="{}")}
    assert_close(torch.tensor([[found[text] for text in texts]]), want["probs_per_image"], **EMBEDDING)
