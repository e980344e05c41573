"""The export as a command: int8 and what it costs, and what ends it without leaving anything."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx.numpy_helper import to_array

import m2_ds
from m2_ds import cli
from m2_ds.convert.onnx import export as exporting
from m2_ds.convert.onnx.export import export
from m2_ds.convert.onnx.folder import graph_name
from m2_ds.convert.onnx.graph import Tower
from m2_ds.convert.onnx.report import recall_table
from m2_ds.data.text import Tokenizer
from m2_ds.evaluation.config import EvaluationConfig, RetrievalTask
from m2_ds.evaluation.run import run_evaluations
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from tests.support.pairs import make_dataset


@pytest.fixture
def traced(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds, and the goldens' model has been traced: its graphs are read again instead."""

    def again(_: M2Encoder, tower: Tower, opset: int) -> onnx_ir.Model:
        return onnx_ir.load(onnx_folder / graph_name(tower, "fp32"))

    monkeypatch.setattr(exporting, "trace", again)


def test_int8_is_where_the_weights_are(onnx_folder: Path) -> None:
    for tower, products in (("image", 14), ("text", 13)):
        proto, whole = (onnx.load(onnx_folder / f"{tower}{end}.onnx") for end in (".int8", ""))
        weights = {each.name: to_array(each) for each in proto.graph.initializer}
        operators = [node.op_type for node in proto.graph.node]
        assert operators.count("MatMulInteger") == products
        (head,) = (node for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in weights)
        assert weights[head.input[1]].dtype == np.float32 and weights[head.input[1]].shape == (32, 32)
        per_output = [
            name
            for name, array in weights.items()
            if array.dtype == np.float32 and name.endswith("_scale") and array.ndim == 1 and len(array) > 1
        ]
        assert len(per_output) == products
        if tower == "text":
            table = next(to_array(each) for each in whole.graph.initializer if each.name.endswith("text_embed.weight"))
            (rows,) = (array for name, array in weights.items() if name.endswith("text_embed.weight_quantized"))
            (scale,) = (array for name, array in weights.items() if name.endswith("text_embed.weight_scale"))
            assert rows.dtype == np.int8 and scale.shape == (len(table), 1)
            assert (np.abs(rows * scale - table) <= scale / 2 * 1.001).all()
            assert (np.abs(rows.astype(int)).max(1) == 127).all()
            assert not [name for name, array in weights.items() if array.shape == table.shape and array is not rows]


def test_int8_is_near_fp32(onnx_folder: Path) -> None:
    (fine, processor), (coarse, _) = m2_ds.load_onnx(onnx_folder), m2_ds.load_onnx(onnx_folder, "int8")
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    texts = processor.texts(["a red fox jumps", "狗", "两个蓝色的圆"])
    for want, found in (
        (fine.encode_image(pictures), coarse.encode_image(pictures)),
        (fine.encode_text(*texts), coarse.encode_text(*texts)),
    ):
        assert_unit(found)
        assert 0.99 < float((want * found).sum(1).min()) < 1 - 1e-7


def assert_unit(features: torch.Tensor) -> None:
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)), atol=1e-5, rtol=0)


def test_a_token_table_with_an_empty_row(onnx_folder: Path, tmp_path: Path) -> None:
    from m2_ds.convert.onnx.quantize import quantize

    graph = onnx_ir.load(onnx_folder / "text.onnx")
    name = next(name for name in graph.graph.initializers if name.endswith("text_embed.weight"))
    value = graph.graph.initializers[name].const_value
    assert value is not None
    table = value.numpy().copy()
    table[7] = 0
    graph.graph.initializers[name].const_value = onnx_ir.tensor(table, name=name)
    quantize(graph, "text", tmp_path / "text.int8.onnx", 1 << 30)
    weights = {each.name: to_array(each) for each in onnx.load(tmp_path / "text.int8.onnx").graph.initializer}
    assert weights[f"{name}_quantized"][7].tolist() == [0] * 32 and np.isfinite(weights[f"{name}_scale"]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["text.int8.onnx"]


def test_the_command_measures_what_int8_costs(
    released_file: Path, traced: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "toys", 3, val=40)
    out = tmp_path / "published/toys"
    measured = ["--dataset", str(tmp_path / "toys"), "--split", "val", "--caption-kinds", "caption"]
    command = cli.load("export onnx")
    cli.run(command, "m2 export onnx", [str(released_file), str(out), "--int8", *measured])
    printed = capsys.readouterr().out
    content = json.loads((out / "metrics.json").read_text())
    task = RetrievalTask(dataset=tmp_path / "toys", splits=["val"], caption_kinds=["caption"])
    for precision in ("fp32", "int8"):
        model, processor = m2_ds.load_onnx(out, precision)  # type: ignore[arg-type]
        assert content[precision] == run_evaluations(model, processor, EvaluationConfig(tasks=[task]), device="cpu")
    assert content["difference"] == {name: content["int8"][name] - value for name, value in content["fp32"].items()}
    assert content["facts"]["splits"] == ["val"]
    table = recall_table({"fp32": content["fp32"], "int8": content["int8"]})
    assert table in printed and table.count("\n") == 4 and "toys/val  zh        text -> image" in table
    assert "image.onnx: embeddings differ from torch's by at most" in printed and "not measured" not in printed


def test_int8_without_a_data_set_says_what_is_not_known(
    released_file: Path, traced: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(cli.load("export onnx"), "m2 export onnx", [str(released_file), str(tmp_path / "out"), "--int8"])
    printed = capsys.readouterr().out
    assert "text.int8.onnx: cosine to fp32 on built-in inputs 0.99" in printed
    assert "The recall of int8 was not measured" in printed and not (tmp_path / "out/metrics.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_table_of_recalls_by_hand() -> None:
    names = [f"a/b/zh/{way}/r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    fp32 = {**dict(zip(names, (10.0, 20.0, 30.0, 1.0, 2.0, 3.0))), "a/b/zh/mean_recall": 11.0}
    int8 = {**dict(zip(names, (9.5, 20.0, 30.25, 1.0, 2.0, 3.0))), "a/b/zh/mean_recall": 11.0}
    lines = recall_table({"fp32": fp32, "int8": int8}).splitlines()
    assert lines[0].split() == ["split", "language", "R@1/5/10", "fp32", "int8", "difference"]
    assert len(lines) == 3 and lines[1].startswith("a/b    zh        image -> text")
    numbers = re.findall(r"[+-]?\d+\.\d\d", lines[1])
    assert numbers == ["10.00", "20.00", "30.00", "9.50", "20.00", "30.25", "-0.50", "+0.00", "+0.25"]
    assert "difference" not in recall_table({"fp32": fp32})


@pytest.mark.parametrize("break_it", ["other weights", "nan"])
def test_graphs_that_are_not_the_model_are_not_published(
    released_file: Path, traced: None, tmp_path: Path, break_it: str
) -> None:
    model, processor = m2_ds.load(released_file)
    with torch.no_grad():
        weight = model.itc_vl_text_proj.fc.weight
        weight[0] += 1e-3 if break_it == "other weights" else float("nan")
    with pytest.raises(ValueError, match=r"captions \[1, 1\]: the exported graph differs from the model by"):
        export(model, processor.tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_fails_leaves_nothing(released_file: Path, traced: None, tmp_path: Path) -> None:
    def measure(_: Any) -> dict[str, object]:
        assert (tmp_path / ".out.part/image.onnx").exists()
        raise KeyboardInterrupt

    model, processor = m2_ds.load(released_file)
    with pytest.raises(KeyboardInterrupt):
        export(model, processor.tokenizer, tmp_path / "out", measure=measure)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(
    released_file: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = M2Encoder(M2EncoderConfig.preset("test", vocab_size=100))
    with pytest.raises(ValueError, match="without a tokenizer"):
        export(small, None, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} pieces, the model's table 100 rows"):
        export(small, tokenizer, tmp_path / "out")
    short = M2Encoder(M2EncoderConfig.preset("test", text_positions=34))
    with pytest.raises(ValueError, match="cuts captions to 52 tokens, the model has positions for 32"):
        export(short, tokenizer, tmp_path / "out")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("mine")
    make_dataset(tmp_path / "toys", 3, val=4)
    source, toys = str(released_file), str(tmp_path / "toys")
    val = [source, str(tmp_path / "out"), "--dataset", toys, "--split", "val"]
    refused: list[tuple[list[str], str]] = [
        ([source, str(tmp_path / "kept")], "not empty"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "does not exist"),
        ([source, str(tmp_path / "out"), "--opset", "17"], "18 to 22"),
        ([source, str(tmp_path / "out"), "--opset", "23"], "18 to 22"),
        ([source, str(tmp_path / "out"), "--tokenizer", str(tmp_path / "none")], "no tokenizer at"),
        ([source, str(tmp_path / "out"), "--split", "val"], "belong to --dataset"),
        ([source, str(tmp_path / "out"), "--dataset", toys], "name at least one of the splits"),
        ([source, str(tmp_path / "out"), "--dataset", toys, "--split", "dev"], "dev"),
        ([*val, "--languages", "fr"], "no captions in 'fr'"),
        ([*val, "--caption-kinds", "x"], "of kinds ['x']"),
        ([source, str(tmp_path / "kept/file/out")], "kept/file/out is not written"),
    ]  # fmt: skip
    for arguments, message in refused:
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", "onnx", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "toys"]
    assert (tmp_path / "kept/file").read_text() == "mine"


def test_loading_says_what_was_not_exported(released_file: Path, traced: None, tmp_path: Path) -> None:
    model, processor = m2_ds.load(released_file)
    export(model, processor.tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="holds fp32, not int8: export it again with --int8"):
        m2_ds.load_onnx(tmp_path / "out", "int8")
