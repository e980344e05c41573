"""A model cut over tensor-parallel ranks or into a pipeline's stages gives the reference's numbers, and its whole."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from m2_ds.engine.pipeline import StagedEncoder
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder, canonical_shapes
from m2_ds.model.layers import Layers
from m2_ds.model.pipeline import Pictures, Stage, features_of, parts
from m2_ds.model.stack import Part
from m2_ds.model.weights import init_weights, pieces
from m2_ds.parallel.config import ParallelConfig
from m2_ds.parallel.mesh import Group, Mesh
from tests.model.test_goldens import EMBEDDING, GOLDENS, build, check_embeddings, check_joint_paths, config_of, loaded
from tests.support.ranks import run_ranks


def tensor_layers(mesh: Mesh, sequence_parallel: bool) -> Layers:
    from m2_ds.parallel.tensor import TensorParallelLayers

    return TensorParallelLayers(mesh.tensor, sequence_parallel)


@torch.no_grad()
def goldens_of_cut_layers(mesh: Mesh) -> int:
    mesh, checked = mesh.with_layout(ParallelConfig(tensor_parallel_size=2)), 0
    for sequence_parallel in (False, True):
        layers = tensor_layers(mesh, sequence_parallel)
        for variant in ("variant_a", "variant_real"):
            check_embeddings(variant, build(variant, torch.float32, layers))
            checked += 1
    check_joint_paths(build("variant_a", torch.float32, tensor_layers(mesh, False)))
    joint = load_file(GOLDENS / "variant_a/inputs.safetensors")
    try:
        model = build("variant_a", torch.float32, tensor_layers(mesh, True))
        model.fuse(joint["image"][:1], joint["text_ids"][:1], joint["text_masks"][:1])
    except ValueError as error:
        assert "sequence_parallel: false" in str(error)
        return checked
    return 0


@pytest.mark.distributed
def test_goldens_under_tensor_parallelism() -> None:
    assert run_ranks(2, goldens_of_cut_layers) == [4, 4]


@torch.no_grad()
def goldens_of_stages(mesh: Mesh) -> int:
    mesh, checked = mesh.with_layout(ParallelConfig(pipeline_parallel_size=2)), 0
    for variant in ("variant_a", "variant_real"):
        config = config_of(variant)
        depth = config.num_layers + config.num_vl_layers
        for first in range(1, depth):
            part = parts(config, [first, depth - first])[mesh.pipeline.rank]
            stage = Stage(config, part).eval()
            loaded(stage.model, variant)
            inputs = load_file(GOLDENS / variant / "inputs.safetensors")
            want = load_file(GOLDENS / variant / "outputs.safetensors")
            encoder = StagedEncoder(stage, mesh)
            assert_close(encoder.encode_image(inputs["image"]), want["image.cls_vlffn_feats"], **EMBEDDING)
            text = encoder.encode_text(inputs["text_ids"], inputs["text_masks"])
            assert_close(text, want["text.cls_vlffn_feats"], **EMBEDDING)
            checked += 1
    return checked


@pytest.mark.distributed
def test_goldens_under_pipeline_parallelism() -> None:
    assert run_ranks(2, goldens_of_stages) == [3, 3]  # places at which the two models can be cut


@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [1, 1, 1]])
@torch.no_grad()
def test_stages_one_after_another_are_the_model(sizes: list[int]) -> None:
    config = M2EncoderConfig.preset("test", patch_drop=0.25, drop_path=0.3)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=g).to(torch.uint8)
    ids = torch.randint(0, config.vocab_size, (6, 9), generator=g)
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 2, 9, 5])[:, None]).to(torch.uint8)
    keys = [torch.randint(0, 2**40, (n,), generator=g) for n in (3, 6)]
    state: tuple[torch.Tensor, ...] = tuple(Pictures(images, ids, mask, *keys))
    whole = M2Encoder(config)
    init_weights(whole, config, seed=0)
    for part in parts(config, sizes):
        stage = Stage(config, part)
        init_weights(stage.model, config, seed=0)
        state = stage(state)
    from m2_ds.model.random import Noise

    found, wanted = features_of(state, unimodal=True), whole(images, ids, mask, *map(Noise, keys))
    for mine, yours in zip((*found[0], *found[1], *found[2].scale), (*wanted[0], *wanted[1], *wanted[2].scale)):
        assert_close(mine, yours, atol=1e-6, rtol=0)


def test_stages_that_do_not_hold_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has 3, and every stage"):
        parts(M2EncoderConfig.preset("test"), [2, 2])
    with pytest.raises(ValueError, match="every stage needs one"):
        parts(M2EncoderConfig.preset("test"), [3, 0])


def sizes_of_every_rank(mesh: Mesh, preset: str, tensor: int, stages: list[int]) -> tuple[int, int, dict[str, int]]:
    """Parameters over all ranks of tensor x pipeline, filling rows aside and over all; rows by canonical name."""
    from m2_ds.parallel.tensor import TensorParallelLayers

    config = M2EncoderConfig.preset(preset)
    counted, filling, rows = 0, 0, dict.fromkeys(canonical_shapes(config), 0)
    for part in parts(config, stages):
        for rank in range(tensor):
            with torch.device("meta"):
                model = M2Encoder(config, TensorParallelLayers(Group(rank, tensor, None)), part)
            for name, parameter in model.named_parameters():
                for piece in pieces(name, parameter):
                    if piece.split is None:
                        counted += piece.tensor.numel() * (rank == 0)
                        continue
                    real = piece.split.filled(piece.tensor)
                    assert real.device.type == "meta"
                    counted += real.numel()
                    filling += piece.tensor.numel() - real.numel()
                    rows[piece.name] += piece.split.length
    return counted, filling, rows


@pytest.mark.distributed
def test_ten_billion_parameters_over_tensor_8_and_pipeline_4() -> None:
    shapes = canonical_shapes(M2EncoderConfig.preset("10b"))
    ((counted, filling, rows),) = run_ranks(1, sizes_of_every_rank, "10b", 8, [6, 6, 6, 6])
    assert counted == 10_182_004_738
    # 115,244 words do not divide by 8: the last rank's table has four rows that stand for nothing.
    assert filling == 4 * 4096
    cut = {name: total for name, total in rows.items() if total}
    # The token table; of a layer's branch, weight and bias of q, k, v, fc1 and two norms, and two row-parallel weights.
    assert len(cut) == 1 + 24 * 2 * 14
    assert all(total in (shapes[name][0], shapes[name][-1]) for name, total in cut.items())


def test_a_part_knows_its_layers() -> None:
    config = M2EncoderConfig.preset("test")  # 2 backbone layers, 1 vl layer
    first, last = parts(config, [1, 2])
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    assert list(last.layers(0, 2)) == [1] and list(last.layers(2, 1)) == [0] and not list(first.layers(2, 1))
    assert last.has_backbone_end(config) and not first.has_backbone_end(config)
    assert Part.whole(config).has_backbone_end(config)
    names = [{n for n, _ in M2Encoder(config, part=part).named_parameters()} for part in (first, last)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {n for n, _ in M2Encoder(config).named_parameters()}
