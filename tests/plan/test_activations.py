"""The bytes that a forward keeps, by formula, against the storages that torch keeps of a real one."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.engine.optim import freeze_unreached
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.masked import MaskedInputs
from m2_ds.model.masking import hide_patches
from m2_ds.model.pipeline import Asked, Pictures, Stage, parts
from m2_ds.model.random import Noise
from m2_ds.model.stack import Part
from m2_ds.model.weights import init_weights
from m2_ds.plan.activations import joint_graph, part_graph
from m2_ds.plan.joint import ENDS, joint_of
from m2_ds.plan.layout import Load
from m2_ds.plan.trial import trial_tree
from m2_ds.plan.work import tokens_of

PAIRS, LENGTH = 16, 12
SHAPED = {**PRESETS["test"], "hidden_size": 64, "num_layers": 3, "num_vl_layers": 2, "position_std": 0.02}


def kept(
    config: M2EncoderConfig,
    precision: str,
    lengths: list[int],
    loss: LossConfig | None = None,
    masked: MaskedInputs | None = None,
) -> int:
    """Bytes of the storages, weights not counted, that a forward of both towers leaves behind."""
    model = M2Encoder(config)
    init_weights(model, config, seed=0)
    freeze_unreached(model, loss or LossConfig())
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    images, ids, mask = given(config, lengths)
    noise = Noise.of(0, torch.arange(PAIRS)) if config.patch_drop else None
    inputs = (images, ids, mask, noise, None, masked)
    return left_behind(model, inputs, [images, ids, mask], config.recompute == "selective")[1]


def given(config: M2EncoderConfig, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.zeros(PAIRS, 3, config.image_size, config.image_size, dtype=torch.uint8)
    ids = torch.ones(PAIRS, LENGTH, dtype=torch.int64)
    return images, ids, (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


def left_behind(
    model: torch.nn.Module, inputs: tuple[Any, ...], there: list[Tensor], selective: bool = False
) -> tuple[Any, int]:
    """What a forward gives, and the bytes that it keeps beside weights and what is ``there``."""
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *there]}
    gc.collect()
    before = {x.untyped_storage().data_ptr() for x in living()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = model(*inputs)
    # Selective recomputation keeps products outside of what hooks see: they are among the living.
    gc.collect()
    everything = {}
    for x in [*saved, *living()] if selective else saved:
        storage = x.untyped_storage()
        everything[storage.data_ptr()] = storage.nbytes()
    assert any(x.requires_grad for x in _tensors(out))
    return out, sum(size for place, size in everything.items() if place not in own | before)


def _tensors(out: Any) -> list[Tensor]:
    """Of nested tuples."""
    return [out] if isinstance(out, Tensor) else [x for part in out or () for x in _tensors(part)]


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


MASKED: dict[str, dict[str, Any]] = {
    "words": {"cmlm": {"weight": 1.0, "share": 1.0}},
    "patches": {"cmim": {"weight": 1.0, "choose": "random"}},
    "both, attentive": {"cmlm": {"weight": 1.0, "share": 1.0}, "cmim": {"weight": 1.0}},
    "both, random": {"cmlm": {"weight": 1.0, "share": 1.0}, "cmim": {"weight": 1.0, "choose": "random"}},
    "codes": {"cmim": {"weight": 1.0, "targets": "codes", "visual_tokenizer": "any:one", "codes": 100}},
}


def masked_run(loss: str, precision: str, **model: Any) -> tuple[RunConfig, MaskedInputs]:
    """A recipe with masked objectives, and what is hidden: all tokens but ends of captions."""
    tree = trial_tree({**SHAPED, **model}, "zero1", PAIRS, PAIRS, precision) | {"loss": MASKED[loss]}
    config = RunConfig.model_validate(tree)
    cmim, patches = config.loss.cmim, config.model.num_patches
    noise, places = Noise.of(0, torch.arange(PAIRS)), torch.arange(LENGTH)
    words = (places > 0) & (places < torch.tensor(PADDED)[:, None] - 1)
    count = round(patches * cmim.share) if cmim.weight else 0
    random = cmim.weight > 0 and cmim.choose == "random"
    return config, MaskedInputs(
        words if config.loss.cmlm.weight else None,
        0,
        hide_patches(noise, patches, cmim.share) if random else None,
        count,
        torch.zeros(PAIRS, patches, dtype=torch.int64) if cmim.targets == "codes" else None,
        torch.ones(PAIRS, dtype=torch.bool),
    )


def masked_formula(config: RunConfig, part: Part) -> float:
    model, precision = config.model, config.engine.precision
    load = Load(1, max(PADDED), sum(PADDED) / len(PADDED))
    joint = joint_of(config, load, PAIRS)
    assert joint is not None and joint.words in (0, sum(n - ENDS for n in PADDED))
    of = tokens_of(model, load, PAIRS, on_cpu=True)
    graph = part_graph(model, part, of, precision, on_cpu=True)
    return graph.kept + joint_graph(model, part, joint, precision, on_cpu=True).kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", MASKED)
def test_joint_sequences_and_their_heads_are_counted(loss: str, precision: str) -> None:
    config, masked = masked_run(loss, precision)
    found = kept(config.model, precision, PADDED, config.loss, masked)
    assert found > 1.5 * kept(config.model, precision, PADDED)
    assert masked_formula(config, Part.whole(config.model)) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_joint_sequences_are_recomputed(recompute: Any, precision: str) -> None:
    config, masked = masked_run("both, attentive", precision, recompute=recompute)
    found = kept(config.model, precision, PADDED, config.loss, masked)
    assert masked_formula(config, Part.whole(config.model)) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("layers", [[2, 3], [4, 1]])
def test_stages_of_a_pipeline_keep_their_share_of_joint_sequences(layers: list[int]) -> None:
    """[4, 1] hands on class tokens of the backbone, too."""
    config, masked = masked_run("both, random", "fp32")
    images, ids, mask = given(config.model, PADDED)
    hidden, keys = masked.hidden_patches(), torch.arange(PAIRS)
    assert hidden is not None
    x: Any = Pictures(images, ids, mask, keys, keys, masked.ids(ids), hidden.to(torch.uint8))
    for part in parts(config.model, layers):
        stage = Stage(config.model, part)
        init_weights(stage.model, config.model, seed=0)
        freeze_unreached(stage.model, config.loss)
        stage.asked.append(Asked(images, ids, masked))
        came = 0 if part.is_first else x[0].nbytes  # of which pictures' tokens are a view
        x, found = left_behind(stage, (x,), [images, ids, mask, keys])
        assert masked_formula(config, part) == pytest.approx(found + came, rel=0.03)
        x = [y.detach().requires_grad_(y.is_floating_point()) for y in x]
