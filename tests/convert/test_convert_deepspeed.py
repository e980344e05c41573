"""Folders of DeepSpeed's save_checkpoint, from real engines on two ranks, against DeepSpeed's own reader."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import m2_ds
from m2_ds.convert.canonical import read_weights, write_config
from m2_ds.convert.source import open_source
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder, canonical_shapes
from m2_ds.model.weights import from_canonical, init_weights, to_canonical
from m2_ds.parallel.mesh import Mesh
from tests.convert.checkpoints import assert_same_bits, converted, left_in
from tests.convert.test_convert_damaged import damaged
from tests.convert.test_convert_hostile import hostile
from tests.support.ranks import run_ranks

CONFIG = M2EncoderConfig.preset("test", num_layers=1)
STAGES = (0, 1, 2, 3)


class Foreign(nn.Module):
    """A module of another program: canonical names, nothing fused, inside a wrapper."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.module = nn.Module()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            node = self.module
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = getattr(node, parent)
            node.register_parameter(last, nn.Parameter(torch.randn(shape or (1,))))


def save(model: nn.Module, stage: int, bf16: bool, folder: Path, **more: Any) -> None:
    """As after some steps: frozen weights, two groups, fp32 weights that the forward's are roundings of."""
    import deepspeed

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    inner = engine.optimizer
    for flat in getattr(inner, "single_partition_of_fp32_groups", ()) or getattr(
        inner, "fp32_partitioned_groups_flat", ()
    ):
        flat.data.add_(torch.linspace(1e-5, 1e-3, flat.numel()))
    engine.save_checkpoint(str(folder))
    if torch.distributed.get_rank() == 0:  # noqa: TID251
        write_config(folder, CONFIG)


def write_all(mesh: Mesh, folder: Path) -> None:
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    from m2_ds.model.pipeline import Stage, parts

    for stage in STAGES:
        torch.manual_seed(stage)
        save(Foreign(canonical_shapes(CONFIG)), stage, stage != 2, folder / f"foreign-{stage}")
        model = M2Encoder(CONFIG)
        init_weights(model, CONFIG, stage)
        save(model, stage, True, folder / f"ours-{stage}")
    for bf16 in (False, True):  # last: DeepSpeed keeps a pipeline's groups for whatever comes after
        module = PipelineModule(
            [LayerSpec(Stage, CONFIG, part) for part in parts(CONFIG, [1, 1])],
            topology=PipeModelDataParallelTopology(2, 1, 1),
            loss_fn=lambda a, b: a,
            partition_method="uniform",
        )
        init_weights(module.forward_funcs[0].model, CONFIG, 5)
        save(module, 1, bf16, folder / f"pipe-{'bf16' if bf16 else 'fp32'}", gradient_accumulation_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, write_all, folder)
    return folder


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: x for inner, tensor in state.items() for name, x in to_canonical(inner.removeprefix("module."), tensor)
    }


def by_deepspeed(folder: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return canonical(get_fp32_state_dict_from_zero_checkpoint(str(folder)))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["foreign", "ours"])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_the_ones_that_deepspeed_finds(folder: Path, tmp_path: Path, kind: str, stage: int) -> None:
    source = folder / f"{kind}-{stage}"
    found = read_weights(converted(source, tmp_path / "out"))
    shapes = canonical_shapes(CONFIG)
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    if stage == 0:
        content = torch.load(source / "global_step0/mp_rank_00_model_states.pt", weights_only=False)["module"]
        wanted = {name.removeprefix("module."): x for name, x in content.items()}
        assert open_source(source).notes and {x.dtype for x in found.values()} == {torch.bfloat16}
    else:
        wanted = by_deepspeed(source)
        trained = {x.dtype for name, x in found.items() if "pooler" not in name}
        assert trained == {torch.float32}, "the rounded weights were taken"
        missing = shapes.keys() - wanted.keys()  # DeepSpeed leaves frozen weights of ZeRO 1 out
        assert missing == ({"pooler.dense.weight", "pooler.dense.bias"} if stage == 1 else set())
        if stage == 1:
            content = torch.load(source / "global_step0/mp_rank_00_model_states.pt", weights_only=False)["module"]
            wanted |= {name: x for name, x in canonical(content).items() if name in missing}
    for name, shape in shapes.items():
        assert torch.equal(found[name].float(), wanted[name].float().reshape(shape)), name
    assert torch.isfinite(m2_ds.load(tmp_path / "out")[0].encode_image(torch.zeros(1, 3, 32, 32))).all()


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_of_a_pipeline_are_put_together(folder: Path, tmp_path: Path, precision: str) -> None:
    source = folder / f"pipe-{precision}"
    opened = open_source(source)
    assert opened.layout == "ZeRO 1, 1 data-parallel rank(s), pipeline of 2 stages"
    assert opened.named.prefixes.keys() == {"N.model.", "model."}
    found = read_weights(converted(source, tmp_path / "out"))
    tag = source / "global_step0"
    wanted: dict[str, Tensor] = {}
    for path in sorted(tag.glob("layer_*")):
        layer = torch.load(path, weights_only=False)
        wanted |= {name.removeprefix("model."): x for name, x in layer.items()}
    optimizers = sorted(tag.glob("*_optim_states.pt"))
    for path in optimizers:  # one data-parallel rank: each says where in it every weight lies
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for flat, places in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"]):
            for name, place in places.items():
                inner = name.split(".model.", 1)[1]
                part = flat[place.start : place.start + place.numel]
                whole = M2Encoder(CONFIG).get_parameter(inner).shape
                wanted |= dict(to_canonical(inner, part.reshape(whole)))
    assert_same_bits(found, {name: wanted[name] for name in found})
    assert len(optimizers) == 2 and found.keys() == canonical_shapes(CONFIG).keys()
    rounded = M2Encoder(CONFIG)
    init_weights(rounded, CONFIG, 5)
    for name, start in rounded.state_dict().items():
        assert (found[name].float() - start).abs().max() < (2e-3 if precision == "fp32" else 2e-2), name


@pytest.mark.distributed
def test_a_tag_a_file_and_what_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="m2 convert"):
        m2_ds.load(folder / "ours-1")
    tag = folder / "ours-1/global_step0"
    with pytest.raises(ValueError, match=r"does not say which network it is of.*--config FILE"):
        converted(tag, tmp_path / "out")
    config = folder / "ours-1/config.json"
    assert_same_bits(
        read_weights(converted(tag, tmp_path / "out", config=config)),
        read_weights(converted(folder / "ours-1", tmp_path / "same")),
    )
    file = converted(tag / "mp_rank_00_model_states.pt", tmp_path / "file", config=config)
    assert {x.dtype for x in read_weights(file).values()} == {torch.bfloat16}, "the forward's own weights"
    assert open_source(folder / "ours-1").other == ("optimizer's state",)
    inner = from_canonical({name: torch.zeros(shape) for name, shape in canonical_shapes(CONFIG).items()})
    assert any("qkv_proj" in name for name in inner), "fused weights were tried"


def changed_copy(folder: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    return out


@pytest.mark.distributed
def test_incomplete_and_cut_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(name: str, words: str, change: Any) -> None:
        source = changed_copy(folder / name, tmp_path / "in")
        change(source / "global_step0")
        with pytest.raises(ValueError, match=words) as told:
            converted(source, tmp_path / "out")
        assert str(source) in str(told.value) and left_in(tmp_path) == ["in"]

    last = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    first = last.replace("rank_1", "rank_0")
    refused("ours-1", "of 1 data-parallel ranks, and was written by 2", lambda tag: (tag / last).unlink())
    refused("ours-3", "of 1 data-parallel ranks, and was written by 2", lambda tag: (tag / last).unlink())
    refused("ours-1", "a rank before .*rank_1.* is missing", lambda tag: (tag / first).unlink())
    refused("ours-1", "lacks mp_rank_", lambda tag: (tag / "mp_rank_00_model_states.pt").unlink())
    refused("ours-3", "ZeRO 3, whose weights lie in", lambda tag: [path.unlink() for path in tag.glob("*_optim_*")])
    refused("pipe-bf16", "files of 1 of 2 stages", lambda tag: [path.unlink() for path in tag.glob("*rank_01_*")])
    refused("pipe-bf16", "tensor-parallel ranks.*Merge", lambda tag: [path.unlink() for path in tag.glob("layer_*")])
    refused(
        "pipe-bf16",
        "tensor-parallel ranks.*Merge",
        lambda tag: shutil.copy(tag / "layer_00-model_00-model_states.pt", tag / "layer_00-model_01-model_states.pt"),
    )
    refused("ours-1", "not known here", lambda tag: (tag / "layer_0_expert_1_mp_rank_00_model_states.pt").touch())
    refused("ours-1", "names '../x', which is no folder", lambda tag: (tag.parent / "latest").write_text("../x"))
    refused("ours-1", "names 'gone', which is no folder", lambda tag: (tag.parent / "latest").write_text("gone\n"))


@pytest.mark.distributed
def test_damaged_and_hostile_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    chance, source = random.Random(7), tmp_path / "in"
    files = [path for name in ("ours-1", "ours-3", "pipe-bf16") for path in sorted((folder / name).rglob("*.pt"))]
    passed = 0
    for turn in range(60):
        path = files[turn % len(files)]
        changed_copy(path.parents[1], source)
        file, content = source / "global_step0" / path.name, path.read_bytes()
        ends = [range(min(len(content), 9000)), range(max(0, len(content) - 3000), len(content))]
        file.write_bytes(damaged(content, chance, ends))
        try:
            converted(source, tmp_path / "out")
        except ValueError as error:
            assert str(source) in str(error) and left_in(tmp_path) == ["in"]
        else:
            passed += 1
            shutil.rmtree(tmp_path / "out")
    assert passed < 40
    changed_copy(folder / "ours-1", source)
    for file in sorted((source / "global_step0").iterdir()):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "extra": hostile(tmp_path / "ran")[:2]}, file)
        with pytest.raises(ValueError, match="is refused"):
            converted(source, tmp_path / "out")
        torch.save(content, file)
    assert left_in(tmp_path) == ["in"]
