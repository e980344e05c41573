"""The network against reference outputs: every path, fp64 and fp32, both checkpoint layouts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import m2_ds
from m2_ds.api import Processor
from m2_ds.convert.release import read_release
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.layers import WHOLE, Layers
from m2_ds.model.loading import load_weights

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
HIDDEN, EMBEDDING, EXACT = {"atol": 1e-4, "rtol": 0}, {"atol": 5e-6, "rtol": 0}, {"atol": 1e-10, "rtol": 0}


def config_of(variant: str) -> M2EncoderConfig:
    return M2EncoderConfig.from_release(json.loads((GOLDENS / variant / "config.json").read_text()))


def build(variant: str, dtype: torch.dtype, layers: Layers = WHOLE) -> M2Encoder:
    return loaded(M2Encoder(config_of(variant), layers).to(dtype).eval(), variant)


def loaded(model: M2Encoder, variant: str) -> M2Encoder:
    config = model.config
    if variant == "variant_a":
        state = load_file(GOLDENS / variant / "weights.safetensors")
    else:  # of the large token table only the rows in use were kept
        state = load_file(GOLDENS / variant / "weights_fp16_used_rows.safetensors")
        table = torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.float16)
        table[state.pop("text_embed.ids")] = state.pop("text_embed.rows")
        state["backbone.text_embed.weight"] = table
    load_weights(model, config, state, variant)
    return model


@pytest.fixture(params=["variant_a", "variant_real"])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_embeddings_fp32(variant: str) -> None:
    check_embeddings(variant, build(variant, torch.float32))


def check_embeddings(variant: str, model: M2Encoder) -> None:
    inputs, want = (
        load_file(GOLDENS / variant / "inputs.safetensors"),
        load_file(GOLDENS / variant / "outputs.safetensors"),
    )
    image = model.image_features(inputs["image"])
    text = model.text_features(inputs["text_ids"], inputs["text_masks"])
    assert_close(image.unimodal, want["image.cls_feats"], **EMBEDDING)
    assert_close(image.vl, want["image.cls_vlffn_feats"], **EMBEDDING)
    assert_close(text.unimodal, want["text.cls_feats"], **EMBEDDING)
    assert_close(text.vl, want["text.cls_vlffn_feats"], **EMBEDDING)
    scores = model.logit_scale.exp() * image.vl @ text.vl.T
    assert_close(scores, want["logits_per_image"], atol=1e-4, rtol=0)
    assert_close(scores.softmax(-1), want["probs_per_image"], **EMBEDDING)
    assert_close(scores.T.softmax(-1), want["probs_per_text"], **EMBEDDING)


@torch.no_grad()
def test_hidden_states_fp32() -> None:
    model = build("variant_a", torch.float32)
    inputs, want = (
        load_file(GOLDENS / "variant_a/inputs.safetensors"),
        load_file(GOLDENS / "variant_a/outputs.safetensors"),
    )
    seen = {}
    for stack, name in ((model.backbone.encoder, "backbone"), (model.backbone_vl, "vl")):
        for i, layer in stack.layers.items():
            layer.register_forward_hook(lambda m, a, out, key=f"{name}.layer_{i}": seen.__setitem__(key, out))
            layer.self_attn.register_forward_hook(
                lambda m, a, out, key=f"{name}.layer_{i}.self_attn": seen.__setitem__(key, out)
            )
        stack.register_forward_hook(lambda m, a, out, key=f"{name}.final_norm": seen.__setitem__(key, out))
    assert_close(model.backbone.vision_embed.normalise(inputs["image"]), want["image.normalised"], **EMBEDDING)
    assert_close(model.backbone.vision_embed(inputs["image_uint8"]), want["image.vision_embed"], **HIDDEN)
    model.backbone_vl(model.image_hidden(inputs["image_uint8"]), -1)
    assert len(seen) == 8
    for key, value in seen.items():
        assert_close(value, want[f"image.{key}"], **HIDDEN)
    valid = inputs["text_masks"].bool()
    model.backbone_vl(model.text_hidden(inputs["text_ids"], valid), -1, valid)
    for key, value in seen.items():
        # Layers see captions packed; a stack gives them back padded.
        value = value[valid] if key.endswith("final_norm") else value[0, : int(valid.sum())]
        assert_close(value, want[f"text.{key}"][valid], **HIDDEN)


@torch.no_grad()
def test_everything_fp64() -> None:
    model = build("variant_a", torch.float64)
    inputs, want = (
        load_file(GOLDENS / "variant_a/inputs.safetensors"),
        load_file(GOLDENS / "variant_a/outputs_fp64.safetensors"),
    )
    images = inputs["image"].double()
    valid = inputs["text_masks"].bool()
    image, text = model.image_features(images), model.text_features(inputs["text_ids"], inputs["text_masks"])
    hidden = model.image_hidden(images)
    text_hidden = model.text_hidden(inputs["text_ids"], valid)
    got = {
        "image.backbone.final_norm": hidden,
        "image.vl.final_norm": model.backbone_vl(hidden, -1),
        "image.cls_feats": image.unimodal,
        "image.cls_vlffn_feats": image.vl,
        "text.cls_feats": text.unimodal,
        "text.cls_vlffn_feats": text.vl,
        "logit_scale_exp": model.logit_scale.exp()[0],
        "logits_per_image": model.logit_scale.exp() * image.vl @ text.vl.T,
    }
    for key, value in got.items():
        assert_close(value, want[key], **EXACT)
    assert_close(text_hidden[valid], want["text.backbone.final_norm"][valid], **EXACT)


@torch.no_grad()
def test_joint_paths() -> None:
    check_joint_paths(build("variant_a", torch.float32))


def check_joint_paths(model: M2Encoder) -> None:
    inputs = load_file(GOLDENS / "variant_a/inputs.safetensors")
    want = load_file(GOLDENS / "variant_a/outputs_joint_extra.safetensors")
    n = len(inputs["image"])
    ids, mask = inputs["text_ids"][:n], inputs["text_masks"][:n]
    valid = want["joint.encoder_padding_mask"] == 0
    hidden = model.joint_hidden(inputs["image"], ids, mask)
    assert_close(hidden[valid], want["joint.backbone.final_norm"][valid], **HIDDEN)
    assert_close(model.fuse(inputs["image"], ids, mask)[valid], want["joint.vl_split"][valid], **HIDDEN)
    assert_close(model.backbone_vl(hidden, -1, valid)[valid], want["joint.vl_allA"][valid], **HIDDEN)
    causal = model.joint_hidden(inputs["image"], ids, mask, attention_mask=inputs["joint_attn_mask_blocked"] == 0)
    assert_close(causal[valid], want["joint.causal_backbone"][valid], **HIDDEN)
    masked = model.image_hidden(inputs["image"], inputs["joint_vision_masked_position"].bool())
    assert_close(masked, want["joint.masked_image_backbone"], **HIDDEN)


@torch.no_grad()
def test_fewer_captions_than_pictures_are_repeated() -> None:
    model = build("variant_a", torch.float32)
    inputs = load_file(GOLDENS / "variant_a/inputs.safetensors")
    images, ids, mask = inputs["image"][:2], inputs["text_ids"][1:2], inputs["text_masks"][1:2]
    assert_close(model.fuse(images, ids, mask), model.fuse(images, ids.expand(2, -1), mask.expand(2, -1)))
    with pytest.raises(ValueError, match="cannot be repeated"):
        model.fuse(inputs["image"][:3], inputs["text_ids"][:2], inputs["text_masks"][:2])


@pytest.mark.parametrize("layout", ["ckpt_pl.ckpt", "ckpt_deepspeed.ckpt"])
@torch.no_grad()
def test_load_release_checkpoint(layout: str, tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "variant_a" / layout, tmp_path / "m2.ckpt")
    shutil.copy(GOLDENS / "variant_a/config.json", tmp_path / "m2.json")
    model, processor = m2_ds.load(tmp_path / "m2.ckpt")
    inputs, want = (
        load_file(GOLDENS / "variant_a/inputs.safetensors"),
        load_file(GOLDENS / "variant_a/outputs.safetensors"),
    )
    assert_close(model.encode_image(inputs["image_uint8"]), want["image.cls_vlffn_feats"], **EMBEDDING)
    assert_close(model.encode_text(inputs["text_ids"], inputs["text_masks"]), want["text.cls_vlffn_feats"], **EMBEDDING)
    with pytest.raises(ValueError, match="without a tokenizer"):
        processor.texts(["a cat"])


def test_both_layouts_hold_the_same() -> None:
    pl, ds = (read_release(GOLDENS / "variant_a" / f"ckpt_{kind}.ckpt") for kind in ("pl", "deepspeed"))
    weights = load_file(GOLDENS / "variant_a/weights.safetensors")
    assert pl.keys() == ds.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(pl[name], tensor) and torch.equal(ds[name], tensor)


def test_state_dict_round_trip() -> None:
    model = build("variant_a", torch.float32)
    weights = load_file(GOLDENS / "variant_a/weights.safetensors")
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(
        torch.equal(state[name], tensor) and state[name].shape == tensor.shape for name, tensor in weights.items()
    )
    other = M2Encoder(model.config)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_processor_resizes_as_the_release() -> None:
    inputs = load_file(GOLDENS / "variant_real/inputs.safetensors")
    picture = Image.fromarray(inputs["image_decoded_uint8_hwc"].numpy())
    assert torch.equal(Processor(64, None).images([picture])[0].permute(1, 2, 0), inputs["image_resized_uint8_hwc"])
