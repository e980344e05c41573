"""The bytes that a forward keeps, by formula, against the storages that torch keeps of a real one."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_ds.engine.optim import freeze_unreached
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.random import Noise
from m2_ds.model.stack import Part
from m2_ds.model.weights import init_weights
from m2_ds.plan.activations import part_graph
from m2_ds.plan.layout import Load
from m2_ds.plan.work import tokens_of

PAIRS, LENGTH = 16, 12
SHAPED = {**PRESETS["test"], "hidden_size": 64, "num_layers": 3, "num_vl_layers": 2, "position_std": 0.02}


def kept(config: M2EncoderConfig, precision: str, lengths: list[int]) -> int:
    """Bytes of the storages, weights not counted, that a forward of both towers leaves behind."""
    model = M2Encoder(config)
    init_weights(model, config, seed=0)
    freeze_unreached(model, LossConfig())
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    images = torch.zeros(PAIRS, 3, config.image_size, config.image_size, dtype=torch.uint8)
    ids = torch.ones(PAIRS, LENGTH, dtype=torch.int64)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    noise = Noise.of(0, torch.arange(PAIRS)) if config.patch_drop else None
    given = {x.untyped_storage().data_ptr() for x in (images, ids, mask)}
    gc.collect()
    before = {x.untyped_storage().data_ptr() for x in living()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = model(images, ids, mask, noise, None)
    # Selective recomputation keeps products outside of what hooks see: they are among the living.
    gc.collect()
    everything = {}
    for x in [*saved, *living()] if config.recompute == "selective" else saved:
        storage = x.untyped_storage()
        everything[storage.data_ptr()] = storage.nbytes()
    assert out[0].vl.requires_grad
    return sum(size for place, size in everything.items() if place not in own | given | before)


def living() -> list[Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"]


def formula(config: M2EncoderConfig, precision: str, lengths: list[int]) -> float:
    load = Load(1, max(lengths), sum(lengths) / len(lengths))
    return part_graph(config, Part.whole(config), tokens_of(config, load, PAIRS, on_cpu=True), precision, True).kept


WHOLE = [LENGTH] * PAIRS
PADDED = [4 + i % 9 for i in range(PAIRS)]
CASES: list[tuple[dict[str, Any], str, list[int]]] = [
    *(({}, precision, lengths) for precision in ("fp32", "bf16") for lengths in (WHOLE, PADDED)),
    ({"num_vl_layers": 1}, "fp32", PADDED),
    ({"patch_drop": 0.5}, "fp32", WHOLE),
    ({"stem": "conv", "stem_width": 16, "stem_full_width": 8, "stem_depth": 2}, "bf16", WHOLE),
    ({"ffn_ratio": 2.0, "num_heads": 8}, "bf16", PADDED),
]


@pytest.mark.parametrize(("changes", "precision", "lengths"), CASES)
def test_the_formula_counts_what_is_kept(changes: dict[str, Any], precision: str, lengths: list[int]) -> None:
    config = M2EncoderConfig(**{**SHAPED, **changes})
    assert formula(config, precision, lengths) == pytest.approx(kept(config, precision, lengths), rel=0.03)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(("precision", "lengths"), [("fp32", WHOLE), ("bf16", PADDED)])
def test_recomputation_keeps_less(recompute: Any, precision: str, lengths: list[int]) -> None:
    config = M2EncoderConfig(**{**SHAPED, "recompute": recompute})
    found = kept(config, precision, lengths)
    assert formula(config, precision, lengths) == pytest.approx(found, rel=0.1)
    assert found < 0.7 * kept(config.model_copy(update={"recompute": "none"}), precision, lengths)
