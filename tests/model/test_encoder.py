"""What training adds to the network: random decisions, recomputation, cut captions, the conv stem."""

import pytest
import torch
from torch.testing import assert_close

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder, cut_to_longest, drop_patches
from m2_ds.model.multiway import ALL_A
from m2_ds.model.random import Noise, mix
from m2_ds.model.weights import init_weights


def build(**changes: object) -> M2Encoder:
    config = M2EncoderConfig.preset("test", **changes)
    model = M2Encoder(config).double()
    init_weights(model, config, 3)
    return model


def batch(model: M2Encoder, pairs: int = 6, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = model.config.image_size
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(5, 600, (pairs, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length - 2, (pairs, 1), generator=generator)).long()
    return images, ids, mask


def noise(pairs: int, first: int = 0) -> tuple[Noise, Noise]:
    slots = torch.arange(first, first + pairs)
    return Noise.of(11, slots), Noise.of(11, slots, view=1)


def gradients(model: M2Encoder, *inputs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    image, text, ((scale, vl_scale), _), _ = model(*inputs)
    weights = torch.linspace(-1, 1, image.vl.shape[1], dtype=torch.float64)
    total = sum((f * weights).sum() * (i + 1) for i, f in enumerate((*image, *text))) + scale.sum() * vl_scale.sum()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(recompute: str) -> None:
    changes = {"drop_path": 0.5, "patch_drop": 0.5}
    plain, saving = build(**changes), build(**changes, recompute=recompute)
    data = batch(plain)
    want, got = gradients(plain, *data, *noise(6)), gradients(saving, *data, *noise(6))
    assert want.keys() == got.keys() and len(want) > 50
    for name, grad in want.items():
        assert_close(got[name], grad, atol=1e-12, rtol=1e-10)


def test_recomputation_keeps_less() -> None:
    def saved_bytes(recompute: str) -> int:
        model, total = build(recompute=recompute), 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        images, ids, mask = batch(model)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(images, ids, mask)
        return total

    # Checkpointed regions use hooks of their own, which hide what they keep: "full" keeps layer inputs alone.
    assert saved_bytes("full") < 0.5 * saved_bytes("none")


def test_captions_are_cut_to_the_longest_without_changing_numbers() -> None:
    model = build()
    _, ids, mask = batch(model)
    cut, valid = cut_to_longest(ids, mask)
    assert cut.shape[1] == mask.sum(1).max() < ids.shape[1]
    assert valid is not None and valid.shape == cut.shape
    padded = model.text_features(torch.nn.functional.pad(ids, (0, 7), value=3), torch.nn.functional.pad(mask, (0, 7)))
    plain = model.text_features(ids, mask)
    assert torch.equal(padded.vl, plain.vl) and torch.equal(padded.unimodal, plain.unimodal)
    # And against the longest possible sequence, uncut.
    uncut = model.text_hidden(ids, mask.bool())[:, 0]
    assert_close(uncut, model.text_hidden(cut, valid)[:, 0], atol=1e-12, rtol=0)
    whole = torch.ones_like(ids)
    assert cut_to_longest(ids, whole)[1] is None


def test_random_decisions_follow_the_sample_not_the_batch() -> None:
    model = build(drop_path=0.5, patch_drop=0.5)
    images, ids, mask = batch(model)
    whole = model(images, ids, mask, *noise(6))
    part = model(images[2:5], ids[2:5], mask[2:5], *noise(3, first=2))
    for a, b in zip((*whole[0], *whole[1]), (*part[0], *part[1])):
        assert_close(a[2:5], b, atol=1e-12, rtol=0)
    again = model(images, ids, mask, *noise(6))
    assert torch.equal(whole[0].vl, again[0].vl)
    model.eval()  # nothing depends on the mode, only on whether noise is handed in
    assert torch.equal(model(images, ids, mask, *noise(6))[0].vl, whole[0].vl)
    assert not torch.equal(model(images, ids, mask, *noise(6, first=100))[0].vl, whole[0].vl)
    assert not torch.equal(model(images, ids, mask)[0].vl, whole[0].vl)


def test_drop_path_keeps_the_expected_share() -> None:
    keys = Noise.of(0, torch.arange(20_000))
    for decision in (0, 1, 7):
        u = keys.uniform(decision)
        assert u.min() >= 0 and u.max() < 1
        assert (u < 0.3).float().mean().item() == pytest.approx(0.3, abs=0.015)
    a, b = keys.uniform(0)[:, 0], keys.uniform(1)[:, 0]
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.03
    lanes = Noise.of(0, torch.arange(300)).uniform(5, 300)
    assert torch.corrcoef(lanes.T)[0, 1:].abs().mean() < 0.08 and lanes.unique().numel() > 89_000


def test_mix_is_splitmix64() -> None:
    # First outputs of the published generator for the seeds 0 and 1234567.
    def unsigned(x: int) -> int:
        return x % 2**64

    assert unsigned(int(mix(torch.tensor(0)))) == 0xE220A8397B1DCDAF
    assert unsigned(int(mix(torch.tensor(1234567)))) == 6457827717110365317


def test_patch_dropping_keeps_class_token_and_order() -> None:
    x = torch.arange(17.0).reshape(1, 17, 1).expand(5, 17, 2)
    kept = drop_patches(x, 0.5, Noise.of(1, torch.arange(5)))
    assert kept.shape == (5, 9, 2)
    assert (kept[:, 0] == 0).all() and (kept[:, 1:, 0].diff(dim=1) > 0).all()
    assert len({tuple(row.tolist()) for row in kept[:, :, 0]}) > 1


def test_conv_stem_gives_the_same_grid() -> None:
    model = build(stem="conv", stem_width=8, stem_depth=2)
    images, ids, mask = batch(model)
    assert model.backbone.vision_embed(images).shape == (6, 17, 32)
    assert all(torch.isfinite(g).all() for g in gradients(model, images, ids, mask).values())
    # No batch statistics: a picture's embedding does not depend on its neighbours.
    assert_close(model.encode_image(images)[1:2], model.encode_image(images[1:2]), atol=1e-12, rtol=0)


def test_a_caption_without_its_class_token_is_named() -> None:
    model = build()
    _, ids, mask = batch(model)
    mask[[1, 4]] = 0
    with pytest.raises(ValueError, match=r"captions \[1, 4\] of the batch have padding in place of their class token"):
        model.encode_text(ids, mask)


def test_wrong_picture_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\]"):
        build().encode_image(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match="position table of 128 rows"):
        build().text_hidden(torch.zeros(1, 200, dtype=torch.int64), None)


def test_low_precision_attention_is_widened_on_cpu() -> None:
    model = build().bfloat16()
    images, ids, mask = batch(model)
    got = model.encode_image(images)
    assert got.dtype == torch.float32
    assert_close(got.double(), build().encode_image(images), atol=0.05, rtol=0)
    assert_close(got.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)


def test_fitting_the_stem_takes_away_what_pictures_have_in_common() -> None:
    model = build(stem="conv", stem_width=16, stem_depth=2, stem_full_width=8, position_std=0.02)
    init_weights(model, model.config, 0)
    g = torch.Generator().manual_seed(1)
    pictures = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)  # drawings on white
    pictures[:, :, 8:24, 8:24] = torch.randint(0, 256, (64, 3, 1, 1), generator=g).to(torch.uint8)

    def likeness() -> float:
        with torch.no_grad():
            features = model.image_features(pictures).vl
        return float((features @ features.T).mean())

    before = likeness()
    model.backbone.vision_embed.fit(pictures)
    with torch.no_grad():
        tokens = model.backbone.vision_embed(pictures)[:, 1:].flatten(0, 1)
    # Up to the 1e-3 that is added to each deviation.
    assert_close(tokens.mean(0), torch.zeros_like(tokens[0]), atol=1e-4, rtol=0)
    assert_close(tokens.std(0), torch.ones_like(tokens[0]), atol=0.1, rtol=0)
    assert before > 0.9 and likeness() < before - 0.2


@pytest.mark.parametrize("kind", ["pictures", "captions packed", "captions padded"])
def test_first_tokens_alone_are_those_of_the_whole_layer(kind: str) -> None:
    model = build(drop_path=0.5, num_vl_layers=2)
    images, ids, mask = batch(model)
    valid = None if kind == "pictures" else mask.bool()
    hidden = model.image_hidden(images) if valid is None else model.text_hidden(ids, valid)
    dropped = noise(6)[0]

    def through(first_only: bool) -> torch.Tensor:
        if kind == "captions padded":  # as on a GPU
            assert valid is not None
            x, seen = hidden * valid[..., None], valid[:, None, None, :]
            return model.backbone_vl._layers_and_norm(x, ALL_A, seen, dropped, None, first_only)
        return model.backbone_vl(hidden, ALL_A, valid, dropped, first_only=first_only)

    part, full = through(True), through(False)
    assert part.shape == (6, 1, 32) and full.shape[1] > 1
    assert_close(part, full[:, :1], atol=1e-12, rtol=0)
    weights = [p for n, p in model.named_parameters() if "vl.layers" in n and ".A." in n]
    upstream = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=part.dtype)
    found = torch.autograd.grad((part[:, 0] * upstream).sum(), weights, retain_graph=True)
    wanted = torch.autograd.grad((full[:, 0] * upstream).sum(), weights)
    for a, b in zip(found, wanted):
        assert_close(a, b, atol=1e-12, rtol=1e-10)
