"""Operations by formula are those that torch counts."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2_ds.config import RunConfig
from m2_ds.engine.flops import StepFlops
from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.masked import MaskedInputs
from m2_ds.model.stack import Part
from m2_ds.plan.joint import ENDS, head_work, joint_of, joint_work, scores_again
from m2_ds.plan.layout import Load
from m2_ds.plan.trial import trial_tree
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
    assert found.attention == {10: 4 * 2 * 10 * width}
    assert Work() + found == found


def masked_run(loss: dict[str, Any], pairs: int = 3) -> RunConfig:
    return RunConfig.model_validate(trial_tree({"preset": "test"}, "zero1", pairs, pairs, "fp32") | {"loss": loss})


@pytest.mark.parametrize(
    "loss",
    [
        {"cmlm": {"weight": 1.0, "share": 1.0}},
        {"cmim": {"weight": 1.0}},
        {"cmlm": {"weight": 1.0, "share": 1.0}, "cmim": {"weight": 1.0, "choose": "random"}},
    ],
    ids=["words", "patches, attentive", "both"],
)
def test_masked_objectives_are_what_torch_counts(loss: dict[str, Any]) -> None:
    config, pairs, length = masked_run(loss), 3, 12
    model = M2Encoder(config.model)
    joint = joint_of(config, Load(1, length, length), pairs)
    assert joint is not None
    images = torch.zeros(pairs, 3, 32, 32)
    ids, mask = torch.ones(pairs, length, dtype=torch.int64), torch.ones(pairs, length)
    places = torch.arange(length).expand(pairs, -1)
    patches = torch.arange(config.model.num_patches).expand(pairs, -1)
    masked = MaskedInputs(
        (places > 0) & (places < length - 1) if config.loss.cmlm.weight else None,
        0,
        patches < joint.patches // pairs if config.loss.cmim.weight and not joint.attentive else None,
        joint.patches // pairs,
        None,
        torch.ones(pairs, dtype=torch.bool),
    )
    found = []
    for asked in (None, masked):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(images, ids, mask, None, None, asked)
        found.append(counter.get_total_flops())
    part = Part.whole(config.model)
    work = joint_work(config.model, part, joint, 4) + head_work(config.model, part, joint, 4)
    assert work.operations == pytest.approx(found[1] - found[0], rel=0.001)


def test_heads_are_on_the_last_stage_and_their_vocabulary_is_cut() -> None:
    config = masked_run({"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0}})
    model = config.model
    joint = joint_of(config, Load(2, 12, 8), 3)
    assert joint is not None and (joint.of.samples, joint.of.length) == (12, 17 + 12)
    assert joint.words == 6 * (8 - ENDS) / 2 and joint.patches == 6 * 6
    first, last = Part(0, 2, True, False), Part(2, 3, False, True)
    assert head_work(model, first, joint, 4) == scores_again(model, first, joint) == Work()
    whole = joint_work(model, Part.whole(model), joint, 4)
    assert sum(joint_work(model, p, joint, 4).operations for p in (first, last)) == pytest.approx(whole.operations)
    again = scores_again(model, last, joint).operations
    assert again == 2 * joint.words * 600 * model.hidden_size
    assert scores_again(model, last, joint, ranks=7).operations == again * 86 / 600
    assert joint_of(masked_run({}), Load(1, 12, 12), 3) is None
