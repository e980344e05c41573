"""The published folder: it loads where m2_ds is not, its card says what the run says, and what cannot be is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel

import m2_ds
from m2_ds import cli
from m2_ds.convert.canonical import write_config
from m2_ds.convert.hugging_face.code import published_code, relative_imports
from m2_ds.convert.hugging_face.export import export
from m2_ds.convert.hugging_face.run_facts import run_facts
from m2_ds.convert.run_folder import CHECKSUMS
from m2_ds.data.shards import Caption, Record, ShardWriter
from m2_ds.data.text import Tokenizer
from m2_ds.files import sha256
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights
from tests.convert.conftest import GOLDENS

ELSEWHERE = """
import json, logging, sys
sys.modules["m2_ds"] = None  # importing it fails
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

folder, goldens, out = sys.argv[1:]
told = {"trust_remote_code": True}
model, processor = AutoModel.from_pretrained(folder, **told), AutoProcessor.from_pretrained(folder, **told)
assert type(model).__module__.startswith("transformers_modules.")
inputs = load_file(f"{goldens}/inputs.safetensors")
with torch.no_grad():
    found = model(inputs["text_ids"], inputs["image"], inputs["text_masks"])
texts = processor(text=["a red fox", "\u4e00\u53ea\u72d0\u72f8"], return_tensors="pt")
kept = {"image": found.image_embeds, "text": found.text_embeds, "logits": found.logits_per_image, **texts}
save_file({name: tensor.contiguous() for name, tensor in kept.items()}, f"{out}/found.safetensors")
classify = pipeline("zero-shot-image-classification", model=folder, **told)
scores = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=["a dog", "\u72d7"], hypothesis_template="{}")
json.dump(scores, open(f"{out}/scores.json", "w"))
# Saved from there, with its code, and loaded again.
model.save_pretrained(f"{out}/again"), processor.save_pretrained(f"{out}/again")
again = AutoModelForZeroShotImageClassification.from_pretrained(f"{out}/again", **told)
AutoProcessor.from_pretrained(f"{out}/again", **told)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
assert not [name for name in sys.modules if name.startswith("m2_ds.")]
"""


def test_the_folder_loads_where_m2_ds_is_not(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved.elsewhere"
    shutil.copytree(exported, folder)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(GOLDENS / "variant_a"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=250)
    assert run.returncode == 0, run.stderr
    assert "is not supported" not in run.stderr  # what the pipeline says of models that its table does not name
    found, want = load_file(tmp_path / "found.safetensors"), load_file(GOLDENS / "variant_a/outputs.safetensors")
    assert_close(found["image"], want["image.cls_vlffn_feats"], atol=5e-6, rtol=0)
    assert_close(found["text"], want["text.cls_vlffn_feats"], atol=5e-6, rtol=0)
    assert_close(found["logits"].softmax(-1), want["probs_per_image"], atol=5e-6, rtol=0)
    inputs, here = load_file(GOLDENS / "variant_a/inputs.safetensors"), AutoModel.from_pretrained(exported)
    with torch.no_grad():
        logits = here(inputs["text_ids"], inputs["image"], inputs["text_masks"]).logits_per_image
    assert torch.equal(logits, found["logits"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {each["label"] for each in scores} == {"a dog", "狗"} and sum(
        each["score"] for each in scores
    ) == pytest.approx(1)


def test_code_is_complete_and_names_no_package_of_ours() -> None:
    code = published_code()
    assert {"modeling_m2_encoder.py", "processing_m2_encoder.py", "configuration_m2_encoder.py"} < code.keys()
    for name, text in code.items():
        compile(text, name, "exec")
        assert not re.search(r"^\s*(from|import) m2_ds", text, re.MULTILINE), name
        assert {f"{module}.py" for module in re.findall(r"^from \.(\w+) import", text, re.MULTILINE)} <= code.keys()
        assert text.splitlines()[0].startswith("# From m2_ds.")


def test_imports_become_relative() -> None:
    text, needed = relative_imports(
        "import re\nfrom m2_ds.model.config import (\n    A as B,\n)\nfrom torch import nn\n"
    )
    assert text == "import re\nfrom .model_config import (\n    A as B,\n)\nfrom torch import nn\n"
    assert needed == ["m2_ds.model.config"]
    for source in ("import m2_ds.model", "from . import config"):
        with pytest.raises(AssertionError):
            relative_imports(source)


def test_weights_in_several_files_and_in_half_precision(tokenizer: Tokenizer, tmp_path: Path) -> None:
    network = M2EncoderConfig.preset("test")
    model = M2Encoder(network)
    init_weights(model, network, seed=1)
    export(model, tokenizer, tmp_path / "parts", dtype="bfloat16", max_file_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "parts").iterdir())
    found = AutoModel.from_pretrained(tmp_path / "parts")
    assert found.dtype == torch.bfloat16
    want = model.state_dict()
    assert all(torch.equal(tensor, want[name].bfloat16()) for name, tensor in found.state_dict().items())
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"pooler.dense.weight .* not finite in float16"):
        export(model, tokenizer, tmp_path / "half", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"]


def test_what_cannot_be_published_is_refused(released: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: Any) -> None:
    small = M2Encoder(M2EncoderConfig.preset("test", vocab_size=100))
    with pytest.raises(ValueError, match="without a tokenizer"):
        export(small, None, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} pieces, the model's table 100 rows"):
        export(small, tokenizer, tmp_path / "out")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("mine")
    for arguments, message in (
        ([str(released), str(tmp_path / "kept")], "not empty"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "does not exist"),
        ([str(released), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "none")], "no tokenizer at"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", "hugging-face", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/file").read_text() == "mine"


# -- the model card ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with one checkpoint, evaluated, and the data set that it names."""
    monkeypatch.chdir(tmp_path)
    with ShardWriter(tmp_path / "data/toys", "toys") as writer:
        for number in range(3):
            captions = [Caption("a fox", "en"), Caption("狐狸", "zh")]
            licence = "cc-by-4.0" if number else "ofl-1.1"
            writer.add("train", Record(str(number), b"x", captions, str(number), "drawings", licence, 1, 1))
    network = M2EncoderConfig.preset("test")
    checkpoint = tmp_path / "runs/fox/checkpoints/step-00000004"
    folder = checkpoint / "model"
    folder.mkdir(parents=True)
    model = M2Encoder(network)
    init_weights(model, network, seed=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, network)
    tokenizer.save(folder)
    config = {
        "folder": "runs/fox",
        "steps": 9,
        "global_batch": 8,
        "tokenizer": "data/tokenizer",
        "model": {"preset": "test"},
        "data": {"sources": [{"path": str(tmp_path / "data/toys")}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    from m2_ds.config import load_config

    (checkpoint / "config.yaml").write_text(load_config(tmp_path / "recipe.yaml").to_yaml(), encoding="utf-8")
    told = {"step": 4, "samples": 32, "data": [sha256(tmp_path / "data/toys/manifest.json")]}
    (checkpoint / "state.json").write_text(json.dumps(told))
    listed = {f"model/{path.name}": sha256(path) for path in folder.iterdir()}
    listed |= {name: sha256(checkpoint / name) for name in ("config.yaml", "state.json")}
    (checkpoint / CHECKSUMS).write_text(json.dumps(listed))
    metrics = {
        f"toys/test/{language}/{metric}": start + number
        for start, language in ((10, "en"), (20.25, "zh"))
        for number, metric in enumerate(
            ("image_to_text/r1", "image_to_text/r5", "image_to_text/r10", "mean_recall", "zeroshot/top1")
        )
    }
    content = {"facts": {"model": str(folder)}, "metrics": metrics}
    (tmp_path / "runs/fox/metrics.json").write_text(json.dumps(content))
    return tmp_path / "runs/fox"


def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "published/m2-fox"
    cli.run(
        cli.load("export hugging-face"), "m2", [str(run), str(out), "--license", "cc-by-4.0", "--dtype", "bfloat16"]
    )
    assert f"AutoModel.from_pretrained({str(out)!r}" in capsys.readouterr().out
    card = (out / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "language": ["en", "zh"],
        "tags": ["m2-encoder", "image-text-retrieval", "bilingual"],
        "license": "cc-by-4.0",
    }
    parameters = sum(p.numel() for p in m2_ds.load(run)[0].parameters())
    for line in (
        "# m2-fox",
        f"| parameters | {parameters:,}, stored as bfloat16 |",
        "| width, heads | 32, 4 |",
        "| tokenizer | sentencepiece, trained by m2_ds |",
        "Of the weights after step 4.",
        "| data set/split, measure (%) | English | 中文 |",
        "| toys/test, pictures to captions R@1/5/10 | 10.0 / 11.0 / 12.0 | 20.2 / 21.2 / 22.2 |",
        "| toys/test, mean of the six recalls | 13.0 | 23.2 |",
        "| toys/test, zero-shot top1 | 14.0 | 24.2 |",
        "| steps | 4 of 9 |",
        "| pairs seen | 32 |",
        "| batch | 8 pairs |",
        "| toys/train | 3 | drawings (3) | cc-by-4.0 (2), ofl-1.1 (1) |",
    ):
        assert f"{line}\n" in text, line
    assert str(tmp_path) not in card and "runs/fox" not in card
    blocks = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert blocks["optim"]["lr"] == 1e-3 and blocks["data"]["languages"] == {"en": 1.0, "zh": 1.0}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, "card", "exec")


def test_numbers_and_counts_of_something_else_are_left_out(run: Path, tmp_path: Path) -> None:
    weights = run / "checkpoints/step-00000004/model"
    content = json.loads((run / "metrics.json").read_text())
    content["facts"]["model"] = str(run / "checkpoints/step-00000009/model")
    (run / "metrics.json").write_text(json.dumps(content))
    facts = run_facts(weights)
    assert facts is not None and facts.metrics == {} and facts.sources[0].rows == 3
    (run / "evaluation").mkdir()
    while_training = {"step": 4, "metrics": {"toys/val/en/mean_recall": 5.0}}
    (run / "evaluation/step-00000004.json").write_text(json.dumps(while_training))
    manifest = tmp_path / "data/toys/manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # another version of the data set
    facts = run_facts(weights)
    assert facts is not None and facts.metrics == while_training["metrics"]
    assert facts.sources[0].rows is None and facts.sources[0].licences == {}
    shutil.copytree(weights, tmp_path / "alone")
    assert run_facts(tmp_path / "alone") is None
    (weights.parent / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json cannot be read"):
        run_facts(weights)


def test_a_card_without_a_run_names_the_network_alone(exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "## Size" in card and "## Evaluation" not in card and "## Training" not in card and "license" not in card


def test_our_load_reads_the_folder(released: Path, exported: Path) -> None:
    (source, _), (back, processor) = m2_ds.load(released), m2_ds.load(exported)
    assert source.config == back.config
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), back.parameters()))
    assert processor.tokenizer is not None and processor.tokenizer.max_length == source.config.max_text_length
