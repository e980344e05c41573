"""What the console commands do that join several rooms. Data and tokenizer commands live in their own room."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
import yaml
from pydantic import ValidationError

from m2_ds import launch
from m2_ds.api import load, resolve
from m2_ds.config import explain, load_config
from m2_ds.data.reader import open_dataset
from m2_ds.data.text import load_tokenizer
from m2_ds.evaluation import run as evaluation
from m2_ds.evaluation.config import EvaluationConfig, RetrievalTask
from m2_ds.evaluation.embed import embed_split, write_embeddings
from m2_ds.evaluation.report import write_report

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]


def train(recipe: tyro.conf.Positional[Path], overrides: Overrides = (), *, ranks: int | None = None) -> int:
    """Train a recipe on this machine; run it again to go on from the newest checkpoint.

    For several machines call the deepspeed launcher yourself: docs/training.md.

    Args:
        recipe: YAML file, see ds_configs/recipes/.
        overrides: field=value, e.g. optim.lr=1e-3 data.sources.0.path=data/other.
        ranks: processes; by default one a GPU, or one a core.
    """
    load_config(recipe, overrides)  # complain here, once, before ranks are started
    return launch.train(recipe, ranks, overrides)


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
    dataset: Path | None = None,
    splits: tuple[str, ...] = (),
    languages: tuple[str, ...] = ("en", "zh"),
    caption_kinds: tuple[str, ...] = (),
    out: Path | None = None,
    device: str | None = None,
) -> None:
    """Evaluate a model and print its recalls; details.json, metrics.json and report.html go to the output folder.

    What is evaluated: the tasks of `--recipe`; or retrieval on `--dataset` and `--splits`; or else the tasks of the run
    that the model comes from.

    Args:
        model: run folder, checkpoint, canonical folder or release .ckpt.
        recipe: file with an `evaluation` block, e.g. ds_configs/recipes/emoji_test.yaml.
        dataset: shard dataset for retrieval.
        splits: its splits; none: all of them.
        languages: languages to measure.
        caption_kinds: kinds of captions that count; none: all.
        out: output folder; by default the run folder, or ./evaluation.
        device: cpu, cuda, cuda:1 ...; by default a GPU where there is one.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run_folder = model if (model / "config.yaml").exists() else None
    if dataset is not None:
        names = list(splits or open_dataset(dataset).splits)
        task = RetrievalTask(
            dataset=dataset, splits=names, languages=list(languages), caption_kinds=list(caption_kinds) or None
        )
        settings = EvaluationConfig(tasks=[task])
    elif recipe is not None or run_folder is not None:
        settings = _evaluation_block(recipe or model / "config.yaml")
    else:
        raise ValueError(
            f"say what to evaluate {model} on: --dataset FOLDER, or --recipe FILE with an evaluation block"
        )
    source = resolve(model)
    loaded, processor = load(source, device)
    folder = out or run_folder or Path("evaluation")
    content = evaluation.evaluate(loaded, processor, settings, folder, facts={"model": str(source)}, device=device)
    print(evaluation.summary(content))
    print(f"\n{write_report(folder)}")


def _evaluation_block(path: Path) -> EvaluationConfig:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return EvaluationConfig.model_validate(tree["evaluation"])
    except ValidationError as error:
        raise ValueError(explain(error, f"{path}, evaluation")) from None
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no evaluation block that can be read: {error!r}") from None


def embed(
    model: tyro.conf.Positional[Path],
    *,
    dataset: Path,
    split: str,
    out: Path,
    languages: tuple[str, ...] = ("en", "zh"),
    caption_kinds: tuple[str, ...] = (),
    batch_size: int = 256,
    device: str | None = None,
) -> None:
    """Write embeddings of a split's pictures and captions to OUT/images.parquet and OUT/texts.parquet.

    Args:
        model: run folder, checkpoint, canonical folder or release .ckpt.
        dataset: shard dataset.
        split: its split.
        out: output folder.
        languages: languages of the captions.
        caption_kinds: kinds of captions; none: all.
        batch_size: pictures, or captions, in one forward pass.
        device: cpu, cuda, cuda:1 ...; by default a GPU where there is one.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, processor = load(model, device)
    found = open_dataset(dataset).split(split)
    kinds = list(caption_kinds) or None
    embeddings = embed_split(loaded, processor, found, batch_size, device, list(languages), kinds)
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
