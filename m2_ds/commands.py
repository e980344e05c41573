"""What the console commands do that join several rooms. Data and tokenizer commands live in their own room."""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from pydantic import ValidationError

from m2_ds import launch
from m2_ds.api import load, resolve
from m2_ds.config import load_config
from m2_ds.data.reader import open_dataset
from m2_ds.data.text import load_tokenizer
from m2_ds.evaluate import DTYPES, Precision, Request, carry_out
from m2_ds.evaluation.class_names import load_classes
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.embed import default_batch, embed_split
from m2_ds.evaluation.embedding_files import write_embeddings
from m2_ds.evaluation.report import write_report
from m2_ds.evaluation.sources import FolderSource, ListSource, Source, open_source
from m2_ds.schema import explain

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]


def train(
    recipe: tyro.conf.Positional[Path], overrides: Overrides = (), *, ranks: int | None = None, restarts: int = 0
) -> int:
    """Train a recipe on this machine; run it again to go on from the newest checkpoint.

    For several machines call the deepspeed launcher yourself: docs/training.md.

    Args:
        recipe: YAML file, see ds_configs/recipes/.
        overrides: field=value, e.g. optim.lr=1e-3 data.sources.0.path=data/other.
        ranks: processes; by default one a GPU, or one a core. A run goes on with any other number.
        restarts: how often it is started again after a rank was lost, hung or was killed (docs/survival.md); not after
            a wrong input, and not when it was told to end.
    """
    load_config(recipe, overrides)  # complain here, once, before ranks are started
    if restarts < 0:
        raise ValueError(f"--restarts {restarts}: give 0 or more")
    return launch.train(recipe, ranks, overrides, restarts)


def config(recipe: tyro.conf.Positional[Path], overrides: Overrides = ()) -> None:
    """Check a recipe and print it with every field that it leaves at its default.

    Args:
        recipe: YAML file, see ds_configs/recipes/.
        overrides: field=value, e.g. optim.lr=1e-3.
    """
    print(load_config(recipe, overrides).to_yaml(), end="")


def evaluate(
    model: tyro.conf.Positional[Path],
    *,
    recipe: Path | None = None,
    dataset: str | None = None,
    splits: tuple[str, ...] = (),
    caption_kinds: tuple[str, ...] = (),
    list: Path | None = None,
    images: Path | None = None,
    language: str | None = None,
    imagenet: Path | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] = (),
    predictions: bool = False,
    languages: tuple[str, ...] = (),
    protocol: Literal["fair", "release"] = "fair",
    limit: int | None = None,
    skip_broken: bool | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    out: Path | None = None,
    keep: bool = True,
    cache: Path | None = None,
    precision: Precision = "fp32",
    device: str | None = None,
    ranks: int = 1,
) -> int:
    """Evaluate a model and print its numbers; details.json, metrics.json and report.html go to the output folder.

    What is evaluated: the tasks of `--recipe`; or retrieval on `--dataset` and `--splits`, or on a JSONL `--list`; or
    zero-shot classification of an `--imagenet` folder; or else the tasks of the run that the model comes from. A second
    call goes on where a first one was ended, and embeds nothing again that is there (docs/evaluation.md).

    Args:
        model: run folder, checkpoint, canonical folder or release .ckpt.
        recipe: file with an `evaluation` block, e.g. ds_configs/recipes/public_test.yaml.
        dataset: shard dataset for retrieval, a folder or URL.
        splits: its splits; none: all of them.
        caption_kinds: kinds of its captions that count; none: all.
        list: JSONL file for retrieval, a line a picture, with fields image (path) and caption (texts).
        images: folder that the list's paths start from; by default that of the list.
        language: of the list's captions, e.g. zh.
        imagenet: folder of pictures, a folder a class (or a flat one with `--labels`).
        labels: text file for a flat folder, a line a picture: path and class.
        classes: file of class names, or LANGUAGE=FILE for each language.
        predictions: write each picture's five likeliest classes to a Parquet file.
        languages: languages to measure; none: en and zh, or those of the class names.
        protocol: release: prepare and count as the M2-Encoder release does (with `--list`), read pictures as it does
            (with `--imagenet`).
        limit: only the first pictures.
        skip_broken: leave out pictures that can't be decoded, and count them; by default they end the evaluation.
        batch_size: pictures in one forward pass, four times as many texts; by default the recipe's, or 16 on a
            CPU and 256 on a GPU.
        threads: threads a process that decode pictures; 2 unless the recipe says otherwise.
        out: output folder; by default the run folder, or ./evaluation.
        keep: keep embeddings, and take those that an earlier evaluation kept.
        cache: where embeddings are kept; by default OUT/embeddings.
        precision: of weights and arithmetic.
        device: cpu, cuda, cuda:1 ...; by default a GPU where there is one.
        ranks: processes; on GPUs each has one of its own.
    """
    run_folder = model if (model / "config.yaml").exists() else None
    places = {"--recipe": recipe, "--dataset": dataset, "--list": list, "--imagenet": imagenet}
    release = protocol if protocol != "fair" else None
    own: dict[str, dict[str, Any]] = {
        "--dataset": {"--splits": splits, "--caption-kinds": caption_kinds, "--languages": languages, "--limit": limit},
        "--list": {"--images": images, "--language": language, "--protocol": release, "--limit": limit},
        "--imagenet": {"--labels": labels, "--classes": classes, "--predictions": predictions, "--protocol": release,
                       "--languages": languages, "--limit": limit},
    }  # fmt: skip
    _check_options(places, own)
    if dataset is not None:
        task: dict[str, Any] = {"kind": "retrieval", "dataset": dataset, "languages": languages or ("en", "zh")}
        task |= {"splits": splits or tuple(open_dataset(dataset).splits), "caption_kinds": caption_kinds or None}
    elif list is not None:
        task = {"kind": "retrieval", "list": list, "images": images, "language": language, "protocol": protocol}
    elif imagenet is not None:
        task = {"kind": "zeroshot", "folder": imagenet, "labels": labels, "protocol": protocol}
        task |= {"predictions": predictions, **_class_files(classes, languages)}
    elif recipe is not None or run_folder is not None:
        task = {}
    else:
        raise ValueError(
            f"say what to evaluate {model} on: --dataset FOLDER, --list FILE, --imagenet FOLDER, or --recipe FILE with "
            "an evaluation block"
        )
    block = {"tasks": [{**task, "limit": limit}]} if task else _evaluation_fields(recipe or model / "config.yaml")
    asked = {"batch_size": batch_size, "threads": threads, "skip_broken": skip_broken}
    block |= {name: value for name, value in asked.items() if value is not None}
    settings = _evaluation_settings(block, "what was asked for" if task else str(recipe or model / "config.yaml"))
    folder = out or run_folder or Path("evaluation")
    request = Request(model=model, evaluation=settings, out=folder, precision=precision, keep=keep, cache=cache)
    if ranks > 1:
        return _on_ranks(request, ranks, device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    carry_out(request, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return 0


def _check_options(places: dict[str, Any], own: dict[str, dict[str, Any]]) -> None:
    """At most one place, and only the options that belong to it."""
    given = [name for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are given: name one of them (a recipe of `m2 evaluate` may hold several tasks)"
        )
    allowed = own.get(given[0], {}) if given else {}
    for place, options in own.items():
        for name, value in options.items():
            if value and name not in allowed:
                raise ValueError(f"{name} belongs to {place}, and {given[0] if given else 'none of them'} is given")


def _on_ranks(request: Request, ranks: int, device: str | None) -> int:
    if device is not None:
        raise ValueError("--device is for one process: of --ranks each takes a GPU of its own, or the CPU without GPUs")
    if 0 < (gpus := torch.cuda.device_count()) < ranks:
        raise ValueError(f"--ranks {ranks}, but this machine has {gpus} GPUs: give at most as many")
    resolve(request.model)  # complain here, once, before ranks are started
    for task in request.evaluation.tasks:
        for part in task.parts:
            open_source(task, part)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(request.model_dump_json(), encoding="utf-8")
        return launch.evaluate(path, ranks)


def _class_files(classes: tuple[str, ...], languages: tuple[str, ...]) -> dict[str, Any]:
    """`classes` and `languages` of a zero-shot task."""
    if not classes:
        raise ValueError("--imagenet needs the names of its classes: --classes FILE, or en=FILE zh=FILE")
    by_language = dict(entry.split("=", 1) for entry in classes if "=" in entry)
    if len(by_language) == len(classes):
        return {"classes": by_language, "languages": languages or tuple(by_language)}
    if len(classes) > 1:
        raise ValueError(f"--classes {' '.join(classes)}: several files need their language, en=FILE zh=FILE")
    return {"classes": classes[0], "languages": languages or tuple(load_classes(classes[0]).names)}


def _evaluation_fields(path: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["evaluation"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no evaluation block that can be read: {error!r}") from None


def _evaluation_settings(block: dict[str, Any], where: str) -> EvaluationConfig:
    try:
        return EvaluationConfig.model_validate(block)
    except ValidationError as error:
        raise ValueError(explain(error, f"{where}, evaluation", EvaluationConfig)) from None


def _evaluation_block(path: Path) -> EvaluationConfig:
    return _evaluation_settings(_evaluation_fields(path), str(path))


def embed(
    model: tyro.conf.Positional[Path],
    *,
    out: Path,
    dataset: str | None = None,
    split: str | None = None,
    list: Path | None = None,
    images: Path | None = None,
    language: str | None = None,
    imagenet: Path | None = None,
    labels: Path | None = None,
    languages: tuple[str, ...] = (),
    caption_kinds: tuple[str, ...] = (),
    batch_size: int | None = None,
    threads: int = 2,
    precision: Precision = "fp32",
    device: str | None = None,
) -> None:
    """Write embeddings of pictures and captions to OUT/images.parquet and OUT/texts.parquet.

    They come from a `--split` of a `--dataset`, a JSONL `--list`, or an `--imagenet` folder (pictures alone).

    Args:
        model: run folder, checkpoint, canonical folder or release .ckpt.
        out: output folder.
        dataset: shard dataset, a folder or URL.
        split: its split.
        list: JSONL file, a line a picture, with fields image (path) and caption (texts).
        images: folder that the list's paths start from; by default that of the list.
        language: of the list's captions, e.g. zh.
        imagenet: folder of pictures, a folder a class (or a flat one with `--labels`).
        labels: text file for a flat folder, a line a picture: path and class.
        languages: languages of a dataset's captions; none: en and zh.
        caption_kinds: kinds of a dataset's captions; none: all.
        batch_size: pictures in one forward pass, four times as many texts; by default 16 on a CPU, 256 on a GPU.
        threads: threads that decode pictures.
        precision: of weights and arithmetic; what is written is fp32.
        device: cpu, cuda, cuda:1 ...; by default a GPU where there is one.
    """
    own: dict[str, dict[str, Any]] = {
        "--dataset": {"--split": split, "--languages": languages, "--caption-kinds": caption_kinds},
        "--list": {"--images": images, "--language": language},
        "--imagenet": {"--labels": labels},
    }
    _check_options({"--dataset": dataset, "--list": list, "--imagenet": imagenet}, own)
    if dataset is not None:
        if split is None:
            raise ValueError(f"--split: name one of the splits of {dataset}: {', '.join(open_dataset(dataset).splits)}")
        source: Source = open_dataset(dataset).split(split)
        wanted = languages or ("en", "zh")
    elif list is not None:
        if language is None:
            raise ValueError("--language: say which language the list's captions are in, e.g. zh")
        source, wanted = ListSource(list, images, language), (language,)
        source.check(len(source))
    elif imagenet is not None:
        source, wanted = FolderSource(imagenet, labels), ()
        source.check(len(source))
    else:
        raise ValueError("say what to embed: --dataset FOLDER --split NAME, --list FILE, or --imagenet FOLDER")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, processor = load(resolve(model).absolute(), device, DTYPES[precision])
    kinds = [*caption_kinds] or None
    size = batch_size or default_batch(device)
    embeddings = embed_split(loaded, processor, source, size, device, wanted, kinds, threads=threads)
    write_embeddings(embeddings, out)
    texts = {language: len(t.texts) for language, t in embeddings.texts.items()}
    print(f"{len(embeddings.keys)} pictures and {json.dumps(texts)} captions -> {out}")


def export_hugging_face(
    model: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tokenizer: Path | None = None,
    license: str | None = None,
) -> None:
    """Write a model to the folder OUT, which transformers loads anywhere with `trust_remote_code=True`.

    With it come its code, its tokenizer and a model card from what the run folder says: docs/hugging_face.md.

    Args:
        model: run folder, checkpoint, canonical folder or release .ckpt.
        out: folder that does not exist yet.
        dtype: of the weights in the folder.
        tokenizer: tokenizer folder or sentencepiece .model file; by default what lies beside the weights.
        license: of the weights, as the model card is to name it, e.g. apache-2.0; by default none.
    """
    # transformers takes seconds to import, and no other command needs it.
    from m2_ds.convert.hugging_face.export import export
    from m2_ds.convert.hugging_face.run_facts import run_facts

    source = resolve(model)
    loaded, processor = load(source)
    found = processor.tokenizer
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, max_length=loaded.config.max_text_length)
    run = run_facts(source) if source.is_dir() else None
    export(loaded, found, out, dtype=dtype, run=run, license=license)
    print(f"{out}\n\nfrom transformers import AutoModel")
    print(f"model = AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True)")


def report(run: tyro.conf.Positional[Path]) -> None:
    """Write RUN/report.html again from what the folder holds.

    Args:
        run: run folder, or a folder that `m2 evaluate` wrote.
    """
    print(write_report(run))
