"""Names, initial values and loading."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.loading import load_weights, resize_positions
from m2_ds.model.weights import VISION_POSITIONS, freeze_unused, init_weights

POS = Path(__file__).parents[1] / "fixtures" / "goldens" / "pos_embed"


@pytest.mark.parametrize(
    ("preset", "tensors", "parameters"),
    [("0.4b", 505, 263_289_602), ("1b", 985, 730_416_130), ("10b", 985, 10_182_004_738)],
)
def test_released_sizes(preset: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = M2Encoder(M2EncoderConfig.preset(preset))
    state = model.state_dict()
    assert len(state) == tensors
    assert sum(t.numel() for t in state.values()) == parameters
    assert state["logit_scale"].shape == ()


def test_parts_in_use_of_1b() -> None:
    with torch.device("meta"):
        model = M2Encoder(M2EncoderConfig.preset("1b"))
    freeze_unused(model)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    vl_b = sum(p.numel() for n, p in model.named_parameters() if n.startswith("backbone_vl") and ".B." in n)
    assert vl_b == 37_821_440
    # In use at inference, plus the auxiliary heads and logit_vl_scale.
    assert sum(trained.values()) == 689_444_865 + 2_097_152 + 1


CASES = json.loads((POS / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[c["tag"] for c in CASES])
def test_positions_resize(case: dict) -> None:
    tables = load_file(POS / "cases.safetensors")
    given, want = tables[case["tag"] + ".in"], tables[case["tag"] + ".out"]
    got = resize_positions(given, case["num_visual_token"] - 1)
    if case["tag"] in ("pl.truncate_36_to_16", "ds.quirk_dim_equals_nvt_plus_2", "ds.no_prefix_not_resized"):
        # Slips of the reference: larger tables cut, some not resized at all. Ours are resized.
        assert got.shape == (case["num_visual_token"] + 2, case["dim"])
        assert torch.equal(got[:3], given[:3])
        if case["tag"].startswith("pl.truncate"):
            twin = tables["ds.down_36_to_16.out"] if torch.equal(given, tables["ds.down_36_to_16.in"]) else None
            assert twin is None or torch.equal(got, twin)
            assert not torch.equal(got, want)
    else:
        assert_close(got, want, atol=1e-6, rtol=0)


def test_positions_that_are_no_square() -> None:
    with pytest.raises(ValueError, match="no square grid"):
        resize_positions(torch.zeros(3 + 10, 4), 16)


def test_larger_table_is_resized_and_told() -> None:
    small, large = M2EncoderConfig.preset("test"), M2EncoderConfig.preset("test", image_size=64)
    source = M2Encoder(large)
    init_weights(source, large, 0)
    target, told = M2Encoder(small), []
    load_weights(target, small, source.state_dict(), "somewhere", told.append)
    assert torch.equal(
        target.state_dict()[VISION_POSITIONS], resize_positions(source.state_dict()[VISION_POSITIONS], 16)
    )
    assert len(told) == 1 and "from 67 to 19 rows" in told[0]


def test_wrong_names_are_refused_and_listed() -> None:
    config = M2EncoderConfig.preset("test")
    model = M2Encoder(config)
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)missing \(145\).*unexpected \(145\)") as error:
        load_weights(model, config, state, "x.ckpt")
    assert "model.backbone.encoder.layer_norm.A.bias" in str(error.value) and "x.ckpt" in str(error.value)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    state = model.state_dict()
    del state["backbone.encoder.layers.0.self_attn.k_proj.A.weight"]
    with pytest.raises(ValueError, match="layers.0.self_attn.k_proj.A.weight"):
        load_weights(model, config, state, "x.ckpt")


def test_wrong_shapes_are_refused_and_listed() -> None:
    config = M2EncoderConfig.preset("test")
    state = M2Encoder(config).state_dict()
    state["pooler.dense.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"pooler.dense.weight is \[3, 3\], not \[32, 32\]"):
        load_weights(M2Encoder(config), config, state, "x.ckpt")


def test_initial_values_follow_the_reference() -> None:
    config = M2EncoderConfig.preset("test", hidden_size=256, num_heads=4, num_layers=9, num_vl_layers=3)
    model = M2Encoder(config)
    init_weights(model, config, 7)
    state = model.state_dict()
    layer = "backbone.encoder.layers.4."
    bound = 1 / math.sqrt(256)
    for part, gain in (("q", 1.0), ("k", 1.0), ("v", 1.7001), ("out", 1.7001)):
        for kind in ("weight", "bias"):
            largest = state[f"{layer}self_attn.{part}_proj.B.{kind}"].abs().max().item()
            assert 0.95 * bound * gain < largest <= bound * gain * 1.0001
    assert state["backbone_vl.layers.0.ffn.A.fc2.weight"].abs().max() == pytest.approx(1.3386 / 32, rel=2e-3)
    assert state["backbone.text_embed.weight"].std() == pytest.approx(1 / 16, rel=0.02)
    assert state["backbone.encoder.embed_positions.B.weight"].std() == pytest.approx(1, rel=0.02)
    assert state["itc_vl_text_proj.fc.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert state["logit_scale"] == pytest.approx(2.6593, abs=1e-4)
    assert (state["backbone.encoder.layer_norm.A.weight"] == 1).all()
    assert (state["backbone.vision_embed.cls_token"] == 0).all()
    a, b = (state[f"{layer}ffn.{x}.fc1.weight"] for x in "AB")
    assert not torch.equal(a, b)


def test_initial_values_depend_on_seed_and_name_only() -> None:
    shallow, deep = M2EncoderConfig.preset("test", num_layers=2), M2EncoderConfig.preset("test", num_layers=3)
    first, same, other, deeper = (M2Encoder(c) for c in (shallow, shallow, shallow, deep))
    for model, config, seed in ((first, shallow, 1), (same, shallow, 1), (other, shallow, 2), (deeper, deep, 1)):
        init_weights(model, config, seed)
    key = "backbone.encoder.layers.1.self_attn.q_proj.A.weight"
    assert torch.equal(first.state_dict()[key], same.state_dict()[key])
    assert torch.equal(first.state_dict()[key], deeper.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_presets_are_valid_and_unknown_ones_named() -> None:
    for name in PRESETS:
        M2EncoderConfig.preset(name)
    with pytest.raises(ValueError, match="0.4b, 1b, 10b"):
        M2EncoderConfig.preset("2b")
    with pytest.raises(ValueError, match="not a multiple of num_heads 5"):
        M2EncoderConfig.preset("tiny", num_heads=5)
