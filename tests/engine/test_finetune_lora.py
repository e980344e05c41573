"""Adapters on the network: what is adapted, that they start as nothing, that merging is what they compute."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from m2_ds.files import write_json
from m2_ds.model import lora
from m2_ds.model.config import LoraConfig, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.layers import QueryKeyValue
from m2_ds.model.weights import adapter_of, freeze_unused, init_weights, is_adapter, merged, pieces
from tests.model.test_goldens import build, check_embeddings, check_joint_paths

SMALL = M2EncoderConfig.preset("test")
QKV = "backbone.encoder.layers.0.self_attn.qkv_proj.A"


def nothing(_: Any) -> Any:
    import contextlib

    return contextlib.nullcontext()


def small() -> M2Encoder:
    model = M2Encoder(SMALL)
    init_weights(model, SMALL, seed=1)
    freeze_unused(model)
    return model


def adapt(model: M2Encoder, **changes: Any) -> M2Encoder:
    config = LoraConfig(**changes)
    layers = lora.adaptable(model, config.pattern)
    digest = lora.digest_of({n: lora.tensor_digest(model.state_dict()[n]) for n in lora.adapted_weights(layers)})
    lora.add_adapters(model, config, layers, "base.ckpt", digest)
    lora.draw_adapters(model, 5, nothing)
    return model


def fill_b(model: M2Encoder) -> M2Encoder:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def unadapted(model: M2Encoder) -> M2Encoder:
    """A plain model with the adapters merged, by the definition."""
    plain = M2Encoder(model.config).to(next(model.parameters()).dtype)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            adapter = adapter_of(model, name)
            whole = parameter if adapter is None else merged(parameter, *adapter)
            state.update((piece.name, piece.tensor.detach()) for piece in pieces(name, parameter, whole))
    plain.load_state_dict(state)
    return plain


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, SMALL.vocab_size, (3, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()
    return torch.rand(3, 3, 32, 32, generator=generator, dtype=dtype), ids, mask


@torch.no_grad()
@pytest.mark.parametrize("variant", ["variant_a", "variant_real"])
def test_a_fresh_adapter_leaves_released_weights_what_they_are(variant: str) -> None:
    model = adapt(build(variant, torch.float32))
    check_embeddings(variant, model)
    if variant == "variant_a":
        check_joint_paths(model)


@torch.no_grad()
def test_an_adapted_model_is_the_merged_one() -> None:
    model = fill_b(adapt(small().double(), rank=3, alpha=4.5, pattern=r"proj|ffn|fc"))
    plain = unadapted(model)
    images, ids, mask = inputs(torch.float64)
    for mine, yours in zip(model(images, ids, mask)[:2], plain(images, ids, mask)[:2]):
        assert_close(mine.unimodal, yours.unimodal, atol=1e-12, rtol=0)
        assert_close(mine.vl, yours.vl, atol=1e-12, rtol=0)
    for mine, yours in zip(model(images, ids, mask)[:2], small().double()(images, ids, mask)[:2]):
        assert (mine.vl - yours.vl).abs().max() > 1e-2  # it does something
    valid = torch.cat([torch.ones(3, 17), mask], 1).bool()  # B branches of vl layers are not adapted
    assert_close(model.fuse(images, ids, mask)[valid], plain.fuse(images, ids, mask)[valid], atol=1e-12, rtol=0)


def test_what_is_adapted() -> None:
    layers = lora.adaptable(small(), LoraConfig().pattern)
    each = [f"self_attn.{part}_proj.{branch}" for part in ("qkv", "out") for branch in "AB"]
    each += [f"ffn.{branch}.{part}" for part in ("fc1", "fc2") for branch in "AB"]
    wanted = {f"backbone.encoder.layers.{layer}.{name}" for layer in (0, 1) for name in each}
    wanted |= {f"backbone_vl.layers.0.{name}" for name in each if "B" not in name.split(".")}  # nothing reaches these
    assert set(layers) == wanted
    assert lora.adaptable(small(), r"layers\.0.*k_proj\.A$") == [QKV, "backbone_vl.layers.0.self_attn.qkv_proj.A"]
    assert lora.adaptable(small(), "^itc_vl") == ["itc_vl_text_proj.fc", "itc_vl_image_proj.fc"]
    with pytest.raises(ValueError, match=r"lora.pattern 'text_embed' finds no linear layer that trains.*q_proj.A"):
        lora.adaptable(small(), "text_embed")


def test_adapters_are_drawn_by_seed_and_name() -> None:
    one, other = adapt(small()), adapt(small(), pattern=r"q_proj\.A")
    for name, parameter in other.named_parameters():
        if is_adapter(name):
            assert torch.equal(parameter, dict(one.named_parameters())[name])
            assert bool(parameter.any()) == (".lora_A." in name)
    a = dict(one.named_parameters())[f"{QKV}.lora_A.default.weight"]
    assert a.shape == (8, 32) and 0.9 < a.abs().max() * 32**0.5 <= 1
    lora.draw_adapters(one, 6, nothing)
    assert not torch.equal(a, dict(adapt(small()).named_parameters())[f"{QKV}.lora_A.default.weight"])


def test_which_weights_train_is_not_changed_by_adapting() -> None:
    before = {name: p.requires_grad for name, p in small().named_parameters()}
    for name, parameter in adapt(small()).named_parameters():
        wanted = True if is_adapter(name) else before[name.replace(".base_layer.", ".")]
        assert parameter.requires_grad == wanted, name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters and a trained logit scale as a checkpoint has them."""
    model = fill_b(adapt(small()))
    factors = {f"{lora.PREFIX}{p.name}": p.tensor.detach() for n, w in model.named_parameters() if is_adapter(n)
               for p in pieces(n, w)}  # fmt: skip
    save_file(factors, tmp_path / lora.ADAPTERS)
    save_file({"logit_vl_scale": torch.tensor(3.5)}, tmp_path / lora.TRAINED)
    write_json(tmp_path / lora.CONFIG, lora.settings_of(model))
    return tmp_path


def test_a_folder_of_adapters_is_merged_into_the_weights_it_was_trained_on(folder: Path) -> None:
    model = small()
    lora.merge_adapter(model, folder)
    wanted = unadapted(fill_b(adapt(small())))
    for (name, mine), yours in zip(model.named_parameters(), wanted.parameters()):
        assert mine.item() == 3.5 if name == "logit_vl_scale" else torch.equal(mine, yours), name


@pytest.mark.parametrize("seed", [2, None])
def test_a_folder_of_adapters_is_refused_by_other_weights(folder: Path, seed: int | None) -> None:
    config = SMALL if seed else SMALL.model_copy(update={"num_layers": 1})
    model = M2Encoder(config)
    init_weights(model, config, seed or 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = "other weights than these: on base.ckpt, digest sha256:" if seed else "for another model"
    with pytest.raises(ValueError, match=words):
        lora.merge_adapter(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("file", [lora.CONFIG, lora.ADAPTERS, lora.TRAINED])
def test_a_damaged_folder_of_adapters_names_its_file(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        lora.merge_adapter(small(), folder)


@torch.no_grad()
def test_peft_reads_the_folder(folder: Path) -> None:
    """Anyone's peft, told only of the joint q, k, v that this network has."""
    settings = peft.LoraConfig.from_pretrained(str(folder))
    settings._register_custom_module({QueryKeyValue: lora.LoraQueryKeyValue})
    tuned = peft.PeftModel.from_pretrained(small(), str(folder), config=settings)
    images, ids, mask = inputs()
    wanted = fill_b(adapt(small()))(images, ids, mask)
    assert_close(tuned(images, ids, mask)[0].vl, wanted[0].vl)
    assert_close(tuned(images, ids, mask)[1].vl, wanted[1].vl)
    assert json.loads((folder / lora.CONFIG).read_text())["revision"].startswith("sha256:")
