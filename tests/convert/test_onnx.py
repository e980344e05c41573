"""The ONNX graphs: the reference's numbers at every length, in another runtime, with weights beside them, as they load.

Legend: B pictures or captions, L tokens.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import m2_ds
from m2_ds.convert.onnx.export import export
from m2_ds.convert.onnx.folder import graph_name
from m2_ds.convert.onnx.graph import INPUTS, TOWERS
from m2_ds.data.text import Tokenizer
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights
from tests.convert.conftest import GOLDENS, LONG, TEXTS

BAR: dict[str, Any] = {"atol": 1e-5, "rtol": 0}  # ten times as tight as what an export lets pass


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "variant_a" / f"{name}.safetensors")


def test_goldens_survive_release_and_export(onnx_folder: Path) -> None:
    model, processor = m2_ds.load_onnx(onnx_folder)
    inputs, want = golden("inputs"), golden("outputs")
    text = model.encode_text(inputs["text_ids"], inputs["text_masks"])
    assert_close(text, want["text.cls_vlffn_feats"], **BAR)
    for pictures in (inputs["image"], inputs["image_uint8"]):
        image = model.encode_image(pictures)
        assert_close(image, want["image.cls_vlffn_feats"], **BAR)
    probabilities = (np.exp(model.config.logit_scale) * image @ text.T).softmax(-1)
    assert_close(probabilities, want["probs_per_image"], **BAR)
    assert processor.image_size == 32 and processor.tokenizer is not None and processor.tokenizer.max_length == 16


def test_every_batch_and_length_is_the_references(onnx_folder: Path) -> None:
    """By plain onnxruntime: one pair, all, captions cut to their tokens, captions padded far beyond their end."""
    inputs, want = golden("inputs"), golden("outputs")
    image, text = (onnxruntime.InferenceSession(onnx_folder / f"{tower}.onnx") for tower in TOWERS)
    ids, mask = inputs["text_ids"].numpy(), inputs["text_masks"].numpy()
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 2 and ids.shape[1] == 16 == lengths.max()
    for number, length in enumerate(lengths.tolist()):
        alone = {"input_ids": ids[number : number + 1, :length], "attention_mask": mask[number : number + 1, :length]}
        assert_close(text.run(None, alone)[0][0], want["text.cls_vlffn_feats"][number].numpy(), **BAR)
    room = ((0, 0), (0, 128 - 16))
    padded = {"input_ids": np.pad(ids, room, constant_values=599), "attention_mask": np.pad(mask, room)}
    assert_close(text.run(None, padded)[0], want["text.cls_vlffn_feats"].numpy(), **BAR)
    pixels = inputs["image"].numpy()
    for batch in (pixels, pixels[:1]):
        found = image.run(None, {"pixel_values": batch})[0]
        assert_close(found, want["image.cls_vlffn_feats"].numpy()[: len(batch)], **BAR)


def test_lengths_without_a_golden_are_torchs(released_file: Path, onnx_folder: Path) -> None:
    torch_model, (exported, processor) = m2_ds.load(released_file)[0], m2_ds.load_onnx(onnx_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for batch, length in ((1, 1), (3, 1), (1, 16), (4, 7), (2, torch_model.config.text_positions - 2)):
            ids = torch.randint(600, (batch, length), generator=generator)
            mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)).long()
            assert_close(exported.encode_text(ids, mask), torch_model.encode_text(ids, mask), **BAR)
        texts = processor.texts([*TEXTS, LONG])
        assert_close(exported.encode_text(*texts), torch_model.encode_text(*texts), **BAR)
        pictures = processor.images([Image.new("L", (9, 40), 80), Image.new("RGB", (300, 20), "red")])
        assert_close(exported.encode_image(pictures), torch_model.encode_image(pictures), **BAR)


def test_the_graphs_are_valid_onnx_that_another_runtime_takes(onnx_folder: Path) -> None:
    inputs, want = golden("inputs"), golden("outputs")
    feeds = {"pixel_values": inputs["image"], "input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"]}
    for tower in TOWERS:
        path = onnx_folder / graph_name(tower, "fp32")
        onnx.checker.check_model(path, full_check=True)
        found = ReferenceEvaluator(str(path)).run(None, {name: feeds[name].numpy() for name in INPUTS[tower]})
        assert_close(found[0], want[f"{tower}.cls_vlffn_feats"].numpy(), **BAR)


def test_inputs_are_named_typed_and_open_where_they_should(onnx_folder: Path) -> None:
    def described(values: Any) -> list[tuple[str, str, list[int | str]]]:
        return [(each.name, each.type, each.shape) for each in values]

    for precision in ("fp32", "int8"):
        image, text = (
            onnxruntime.InferenceSession(onnx_folder / graph_name(tower, precision))  # type: ignore[arg-type]
            for tower in TOWERS
        )
        assert described(image.get_inputs()) == [("pixel_values", "tensor(float)", ["batch", 3, 32, 32])]
        assert described(text.get_inputs()) == [
            (name, "tensor(int64)", ["batch", "length"]) for name in ("input_ids", "attention_mask")
        ]
        for session in (image, text):
            assert described(session.get_outputs()) == [("embeddings", "tensor(float)", ["batch", 32])]


def reshaped_weights(proto: onnx.ModelProto) -> list[str]:
    """Weights that are transposed or cut at every call: in memory twice, and no quantiser sees them."""
    weights = {each.name for each in proto.graph.initializer}
    return [
        node.input[0]
        for node in proto.graph.node
        if node.op_type in ("Transpose", "Slice") and node.input[0] in weights
    ]


def test_files_hold_weights_ready_to_use_and_nothing_of_this_machine(onnx_folder: Path) -> None:
    here = str(Path(__file__).parents[2]).encode()
    for path in onnx_folder.iterdir():
        assert here not in path.read_bytes(), path
    for tower in TOWERS:
        proto = onnx.load(onnx_folder / f"{tower}.onnx")
        assert proto.opset_import[0].version == 18 and proto.producer_name == "m2_ds"
        weights = {each.name for each in proto.graph.initializer}
        assert not reshaped_weights(proto)
        products = [node for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        # Patches; q k v, out and two of the feed-forward in a layer; q and k v apart in the last.
        assert len(products) == 2 * 4 + 5 + (tower == "image")


def test_weights_lie_beside_large_graphs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With the other stem, all that training adds, the newest operators, and weights larger than exporters fold."""
    config = M2EncoderConfig.preset("test", stem="conv", stem_full_width=8, logit_bias=True, num_layers=1, ffn_ratio=8,
                                    hidden_size=192, drop_path=0.5, patch_drop=0.5, recompute="full")  # fmt: skip
    model = M2Encoder(config)
    init_weights(model, config, seed=3)
    found = export(model.eval(), tokenizer, tmp_path / "out", opset=22, int8=True, max_bytes_inside=30_000)
    assert max(found.difference.values()) < 1e-6 and found.cosine.keys() == set(TOWERS)
    names = [f"{tower}{int8}.onnx" for tower in TOWERS for int8 in ("", ".int8")]
    assert found.sizes.keys() == {name + end for name in names for end in ("", ".data")}
    assert all(found.sizes[f"{tower}.onnx"] < 40_000 < found.sizes[f"{tower}.onnx.data"] for tower in TOWERS)
    # The quantiser adds a scale and a zero for each output, lists that never lie beside the graph; weights do.
    for name in names:
        inside = onnx.load(tmp_path / "out" / name, load_external_data=False).graph.initializer
        outside = [each for each in inside if each.data_location == onnx.TensorProto.EXTERNAL]
        assert outside and all(each.ByteSize() < 8_000 for each in inside if each not in outside), name
    for tower in TOWERS:
        graph = onnx.load(tmp_path / f"out/{tower}.onnx", load_external_data=False)
        assert graph.opset_import[0].version == 22 and not reshaped_weights(graph)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    ids, mask = torch.randint(600, (3, 9)), torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8])
    with torch.no_grad():
        image, text = model.encode_image(pictures), model.encode_text(ids, mask)
    for precision, least in (("fp32", 1 - 1e-6), ("int8", 0.99)):
        there, _ = m2_ds.load_onnx(tmp_path / "moved", precision)  # type: ignore[arg-type]
        assert (there.encode_image(pictures) * image).sum(1).min() > least
        assert (there.encode_text(ids, mask) * text).sum(1).min() > least
    (tmp_path / "moved/text.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"text\.onnx\.data is missing"):
        m2_ds.load_onnx(tmp_path / "moved")


def test_the_readme_is_true(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(onnx_folder.parent)
    Image.new("RGB", (50, 20), "red").save("picture.png")
    text = (onnx_folder / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], names)
    assert names["probabilities"].shape == (1, 2) and names["probabilities"].sum() == pytest.approx(1)
    with_m2_ds = names["image"].numpy()
    exec(blocks[1], names)
    assert_close(names["image"], with_m2_ds, **BAR)
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["logit_scale"] == pytest.approx(float(golden("weights")["logit_scale"]))
    assert config["precisions"] == ["fp32", "int8"] and config["preprocessing"]["resample"] == "bicubic"


def test_what_is_wrong_with_a_folder_is_said(onnx_folder: Path, tmp_path: Path) -> None:
    def copy() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(onnx_folder, tmp_path / "copy"))

    content = bytearray((copy() / "text.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "copy/text.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.onnx is damaged"):
        m2_ds.load_onnx(tmp_path / "copy")
    (copy() / "checksums.json").write_bytes(b"[1]")
    with pytest.raises(ValueError, match=r"checksums\.json cannot be read"):
        m2_ds.load_onnx(tmp_path / "copy")
    for content, message in (
        (b"{", "config.json cannot be read"),
        (b'{"hidden_size": 32}', "not written by `m2 export onnx`"),
        (b'{"format": "m2_ds-onnx"}', "not written by this version"),
    ):
        (copy() / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            m2_ds.load_onnx(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        m2_ds.load_onnx(tmp_path / "nothing")
    with pytest.raises(ValueError, match="onnxruntime has no CUDAExecutionProvider here; it has .*CPU"):
        m2_ds.load_onnx(onnx_folder, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_inputs_that_the_model_does_not_take_are_refused(onnx_folder: Path) -> None:
    model, _ = m2_ds.load_onnx(onnx_folder, threads=1)
    with pytest.raises(ValueError, match=r"\[1, 3, 16, 32\]; this model takes \[B, 3, 32, 32\]"):
        model.encode_image(torch.zeros(1, 3, 16, 32))
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="padding in place of its class token"):
        model.encode_text(ids, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"ids \[2, 4\] and mask \[2, 3\]"):
        model.encode_text(ids, torch.ones(2, 3))
    longest = model.config.text_positions
    with pytest.raises(ValueError, match=f"{longest + 1} tokens; this model takes at most {longest}"):
        model.encode_text(torch.zeros(1, longest + 1, dtype=torch.int64), torch.ones(1, longest + 1))
