"""Operations by formula are those that torch counts."""

from typing import Any

import pytest

from m2_ds.engine.flops import StepFlops
from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.stack import Part
from m2_ds.plan.layout import Load
from m2_ds.plan.work import Tokens, Work, layer_work, loss_work, part_work, tokens_of


@pytest.mark.parametrize(
    "changes",
    [{}, {"patch_drop": 0.5}, {"ffn_ratio": 2.0, "num_vl_layers": 3}, {"stem": "conv", "stem_depth": 2}],
    ids=lambda c: ",".join(c) or "as it is",
)
def test_operations_are_what_torch_counts(changes: dict[str, Any]) -> None:
    config = M2EncoderConfig(**{**PRESETS["test"], **changes})
    flops = StepFlops(config)
    of = tokens_of(config, Load(2, 12, 12), 3, on_cpu=False)
    found = part_work(config, Part.whole(config), of, 4)
    assert found.operations == pytest.approx(3 * flops.image() + 6 * flops.text(12), rel=0.01)


def test_cuts_add_up_to_the_whole() -> None:
    config = M2EncoderConfig(**{**PRESETS["test"], "num_layers": 4, "num_vl_layers": 2})
    of = tokens_of(config, Load(1, 12, 12), 4, on_cpu=False)
    whole = part_work(config, Part.whole(config), of, 2)
    stages = [part_work(config, part, of, 2) for part in (Part(0, 3, True, False), Part(3, 6, False, True))]
    assert sum(x.operations for x in stages) == pytest.approx(whole.operations)
    assert part_work(config, Part.whole(config), of, 2, ranks=2).products < 0.6 * whole.products


def test_padding_runs_on_a_gpu_and_not_on_a_cpu() -> None:
    config = M2EncoderConfig(**PRESETS["test"])
    load = Load(1, 20, 8)
    assert tokens_of(config, load, 64, on_cpu=False)[1] == Tokens(64, 20, 1280, masked=True)
    assert tokens_of(config, load, 64, on_cpu=True)[1] == Tokens(64, 20, 512, packed=True)
    assert tokens_of(config, load, 63, on_cpu=True)[1].tokens == 512  # rounded up to 128
    assert tokens_of(config, load, 3, on_cpu=False, sequence_ranks=2)[0].tokens == 3 * 17 + 1


def test_the_loss_has_four_products_alone_and_six_in_company() -> None:
    config = M2EncoderConfig(**PRESETS["test"])
    logits = 2 * 8 * 16 * config.embed_dim
    assert loss_work(config, 8, 16, captions=1, levels=1, alone=True)[0] == 4 * logits
    assert loss_work(config, 8, 16, captions=2, levels=2, alone=False)[0] == 4 * 6 * logits


def test_class_tokens_alone_need_keys_and_values_of_all() -> None:
    config = M2EncoderConfig(**PRESETS["test"])
    of, width = Tokens(2, 10, 20), config.hidden_size
    found = layer_work(config, of, 4, first_only=True)
    assert found.products == 2 * (20 * 2 * width**2 + 2 * (2 * width**2 + 8 * width**2))
    assert found.attention == 4 * 2 * 10 * width
    assert Work() + found == found
