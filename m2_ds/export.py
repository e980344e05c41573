"""Export commands that join conversion and evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro

from m2_ds.api import load
from m2_ds.convert.onnx.export import export
from m2_ds.convert.onnx.folder import Precision
from m2_ds.convert.onnx.graph import DEFAULT_OPSET
from m2_ds.convert.onnx.report import differences, recall_table, summary
from m2_ds.convert.onnx.session import OnnxModel
from m2_ds.data.reader import open_dataset
from m2_ds.data.text import load_tokenizer
from m2_ds.evaluation.config import EvaluationConfig, RetrievalTask
from m2_ds.evaluation.embed import list_split
from m2_ds.evaluation.run import run_evaluations


def onnx(
    model: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    *,
    opset: int = DEFAULT_OPSET,
    int8: bool = False,
    dataset: Path | None = None,
    splits: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--split"])] = (),
    languages: tuple[str, ...] = ("en", "zh"),
    caption_kinds: tuple[str, ...] = (),
    tokenizer: Path | None = None,
) -> None:
    """Write both towers of a model as ONNX graphs to the folder OUT, and compare them with torch: docs/onnx.md.

    Pictures and captions to the embeddings that the release scores; batch and length stay open. With `--dataset` the
    recall of what was written is measured, and with `--int8` what the smaller weights cost of it.

    Args:
        model: run folder, checkpoint, canonical folder or release .ckpt.
        out: folder that does not exist yet.
        opset: version of the ONNX operators, 18 to 22.
        int8: write graphs with weights of 8 bits, too.
        dataset: shard dataset to measure recall on.
        splits: its splits.
        languages: languages of its captions.
        caption_kinds: kinds of its captions that count; none: all.
        tokenizer: tokenizer folder or sentencepiece .model file; by default what lies beside the weights.
    """
    config = _retrieval(dataset, splits, languages, caption_kinds)
    loaded, processor = load(model)
    if tokenizer is not None:
        processor.tokenizer = load_tokenizer(tokenizer, max_length=loaded.config.max_text_length)
    metrics: dict[Precision, dict[str, float]] = {}

    def measure(models: Mapping[Precision, OnnxModel]) -> dict[str, object]:
        assert config is not None
        for precision, each in models.items():
            metrics[precision] = run_evaluations(each, processor, config, device="cpu")
        facts = {"model": str(model), "dataset": str(dataset), "splits": splits, "caption_kinds": caption_kinds}
        lost = {"difference": differences(metrics["fp32"], metrics["int8"])} if int8 else {}
        return {"facts": facts, **{str(precision): each for precision, each in metrics.items()}, **lost}

    found = export(loaded, processor.tokenizer, out, opset=opset, int8=int8, measure=measure if config else None)
    print(summary(found))
    if metrics:
        print(f"\n{recall_table(metrics)}")
    elif int8:
        print("The recall of int8 was not measured: for that give --dataset FOLDER --split NAME.")
    print(f"\n{out}\n\nmodel, processor = m2_ds.load_onnx({str(out)!r}{', precision=' + repr('int8') if int8 else ''})")


def _retrieval(
    dataset: Path | None, splits: tuple[str, ...], languages: tuple[str, ...], caption_kinds: tuple[str, ...]
) -> EvaluationConfig | None:
    """What is to be measured. Raises ValueError for what a data set lacks, before minutes are spent on an export."""
    if dataset is None:
        if splits or caption_kinds:
            raise ValueError("--splits and --caption-kinds belong to --dataset FOLDER, which is not given")
        return None
    opened = open_dataset(dataset)
    if not splits:
        raise ValueError(f"--split: name at least one of the splits of {dataset}: {', '.join(opened.splits)}")
    kinds = list(caption_kinds) or None
    for name in splits:
        listing = list_split(opened.split(name))
        for language in languages:
            if not listing.texts(language, kinds)[0]:
                raise ValueError(
                    f"split {name!r} of {dataset} has no captions in {language!r}"
                    f"{f' of kinds {kinds}' if kinds else ''}; look at what it has with `m2 data inspect`"
                )
    task = RetrievalTask(dataset=dataset, splits=list(splits), languages=list(languages), caption_kinds=kinds)
    return EvaluationConfig(tasks=[task])
