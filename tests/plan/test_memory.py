"""Memory of a rank: against peaks that were measured, and by hand where ZeRO shares it out."""

import json
from pathlib import Path
from typing import Any

import pytest

from m2_ds.config import RunConfig
from m2_ds.model.stack import Part
from m2_ds.plan.layout import ZERO, Candidate, Load
from m2_ds.plan.memory import BUCKET, Memory, memory_of, stage_parts
from m2_ds.plan.trial import trial_tree
from m2_ds.plan.weights import weights_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED = json.loads((RESULTS / "model_parallel_memory.json").read_text())
MODEL = {
    "hidden_size": 1024, "num_heads": 16, "num_layers": 4, "num_vl_layers": 2, "embed_dim": 1024, "image_size": 64,
    "vocab_size": 16384, "text_positions": 130, "max_text_length": 32,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tp 2": {"tensor_parallel_size": 2},
    "tp 2, sequence parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp 2, balanced by arithmetic": {"pipeline_parallel_size": 2},
    "pp 2, balanced by memory": {"pipeline_parallel_size": 2, "pipeline_balance": "memory"},
}


def predicted(tree: dict[str, Any], ranks: int, load: Load, on_cpu: bool = True) -> list[Memory]:
    config = RunConfig.model_validate(tree)
    candidate = Candidate.of(config, ranks)
    return memory_of(config, candidate, load, on_cpu, stage_parts(config, candidate.pipeline))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peaks_that_were_measured_are_predicted(precision: str, layout: str) -> None:
    """benchmarks/model_parallel.py memory; the library's own 60 to 100 MB are not in the prediction."""
    tree = trial_tree(MODEL, "zero1", 8, 4, precision) | {"parallel": LAYOUTS[layout]}
    ranks = MEASURED[precision][layout]
    stages = predicted(tree, len(ranks), Load(1, 16, 11.5))
    for number, measured in enumerate(ranks):
        found = stages[number if len(stages) > 1 else 0]
        for name, kinds in (("passes", found.passes), ("update", found.update)):
            assert sum(kinds.values()) + 0.08e9 == pytest.approx(measured[f"{name}_peak"], rel=0.04), (number, name)
        for kind in ("weights", "gradients", "optimizer"):
            assert found.update[kind] == pytest.approx(measured[kind], rel=0.02, abs=2e6)


def test_the_slice_of_the_largest_model_is_predicted() -> None:
    measured = json.loads((RESULTS / "model_parallel_slice.json").read_text())
    model = {"preset": "10b", "num_layers": 1, "num_vl_layers": 1, "vocab_size": 16384}
    for name, parallel in (("dense", {}), ("tp 2", {"tensor_parallel_size": 2})):
        tree = trial_tree(model, "zero1", 4, 4, "bf16") | {"parallel": parallel}
        (found,) = predicted(tree, len(measured[name]), Load(1, 16, 11.5))
        peak = max(measured[name][0]["passes_peak"], measured[name][0]["update_peak"])
        assert found.peak == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", ZERO)
def test_state_is_shared_out_as_the_stage_says(zero: str, precision: str) -> None:
    tree = trial_tree(MODEL, zero, 32, 1, precision)
    (found,) = predicted(tree, 4, Load(1, 16, 16), on_cpu=False)
    numbers = weights_of(RunConfig.model_validate(tree), Part.whole(RunConfig.model_validate(tree).model), 1)
    element = 4 if precision == "fp32" else 2
    stage, offload = ZERO[zero]
    part = numbers.trained / (4 if stage else 1)
    master = 8 if precision == "fp32" and stage in (0, 3) else 12
    whole = {"none": numbers.all * (element if stage < 3 else element / 4), "optimizer": numbers.all * element}
    assert found.passes["weights"] == pytest.approx(whole.get(offload, 0.0))
    assert found.update["optimizer"] == (part * master if offload == "none" else 0)
    assert (found.host > 0) == (offload != "none")
    if stage == 3:
        assert found.passes["gathered weights"] == numbers.all * element


def test_gradients_meet_activations_only_where_micro_batches_follow_each_other() -> None:
    load = Load(1, 32, 32)
    model = MODEL | {"image_size": 224, "vocab_size": 2000}
    (one,) = predicted(trial_tree(model, "zero1", 256, 256, "bf16"), 1, load, on_cpu=False)
    (two,) = predicted(trial_tree(model, "zero1", 512, 256, "bf16"), 1, load, on_cpu=False)
    assert one.passes["gradients"] == 0
    assert two.passes["gradients"] > 0 and two.passes["activations"] == one.passes["activations"]


def test_gradients_of_joint_sequences_wait_for_those_of_pictures_and_captions() -> None:
    load, loss = Load(1, 32, 32), {"loss": {"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0, "choose": "random"}}}
    plain, masked = (trial_tree(MODEL, "zero1", 8, 4, "bf16") | more for more in ({}, loss))
    whole = (
        2 * weights_of(RunConfig.model_validate(masked), Part.whole(RunConfig.model_validate(masked).model), 1).trained
    )
    assert predicted(plain, 1, load, on_cpu=False)[0].passes["gradients"] < whole
    (found,) = predicted(masked, 1, load, on_cpu=False)
    assert found.passes["gradients"] == 2 * whole  # those of the first micro-batch, and of the second
    wide = MODEL | {"image_size": 224, "vocab_size": 2000}
    graphs = [
        predicted(trial_tree(wide, "zero1", 256, 256, "bf16") | more, 1, load, on_cpu=False)[0] for more in ({}, loss)
    ]
    assert graphs[1].passes["activations"] > graphs[1].facts["graph"] > 3 * graphs[0].facts["graph"]
    cut = masked | {"parallel": {"pipeline_parallel_size": 2}, "global_batch": 32}
    first, last = predicted(cut, 2, load, on_cpu=False)
    assert first.facts["graph"] > 0 and last.passes["weights"] > first.passes["weights"]


def test_reducing_each_micro_batch_keeps_a_part_of_the_gradients() -> None:
    tree = trial_tree(MODEL | {"image_size": 224}, "zero2", 512, 64, "bf16")
    (once,) = predicted(tree, 4, Load(1, 32, 32), on_cpu=False)
    tree["engine"]["reduce_once"] = False
    (each,) = predicted(tree, 4, Load(1, 32, 32), on_cpu=False)
    assert each.peak < once.peak
    assert each.passes["buffers"] == 2 * BUCKET * 2  # two buckets of bf16, with overlap_comm


def test_recomputation_and_stages_take_less() -> None:
    tree = trial_tree(MODEL | {"image_size": 224}, "zero1", 2048, 256, "bf16")
    (whole,) = predicted(tree, 1, Load(1, 32, 32), on_cpu=False)
    tree["model"] = tree["model"] | {"recompute": "full"}
    (less,) = predicted(tree, 1, Load(1, 32, 32), on_cpu=False)
    assert less.passes["activations"] < 0.5 * whole.passes["activations"]
    stages = predicted(tree | {"parallel": {"pipeline_parallel_size": 3}}, 3, Load(1, 32, 32), on_cpu=False)
    assert [m.stage for m in stages] == [0, 1, 2]
    assert all(m.passes["weights"] < less.passes["weights"] for m in stages)
    # Earlier stages have more micro-batches under way.
    tree["model"] = tree["model"] | {"recompute": "none"}
    stages = predicted(tree | {"parallel": {"pipeline_parallel_size": 3}}, 3, Load(1, 32, 32), on_cpu=False)
    assert stages[0].passes["activations"] > 2 * stages[2].passes["activations"]
