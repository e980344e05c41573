"""The model card: README.md of a published folder, filled from the network and from what its run folder says."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from m2_ds import __version__
from m2_ds.convert.hugging_face.run_facts import RunFacts, Source
from m2_ds.model.config import M2EncoderConfig

LANGUAGES = {"en": "English", "zh": "中文"}
# Blocks of a run's configuration that say how it was trained, and name no path of the machine it ran on.
_SETTINGS = ("model", "loss", "optim")
_SHOWN = {
    "image_to_text": "pictures to captions",
    "text_to_image": "captions to pictures",
    "mean_recall": "mean of the six recalls",
    "zeroshot": "zero-shot",
    "hard_negatives": "against hard negatives",
    "mean_class": "mean over classes",
}


def model_card(
    name: str,
    network: M2EncoderConfig,
    parameters: int,
    dtype: str,
    tokenizer_kind: str,
    run: RunFacts | None = None,
    license: str | None = None,
) -> str:
    """Markdown with YAML in front. ``license``: of the weights; who publishes them decides, and it is left out else."""
    languages = list(run.config["data"]["languages"]) if run else list(LANGUAGES)
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "language": languages,
        "tags": ["m2-encoder", "image-text-retrieval", *(["bilingual"] if len(languages) == 2 else [])],
    }
    if license:
        front["license"] = license
    names = " and ".join(LANGUAGES.get(language, language) for language in languages)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n",
        f"An image-text encoder for {names} with the network of M2-Encoder (arXiv 2401.15896): pictures and "
        f"captions become embeddings of {network.embed_dim} numbers. "
        f"{'Trained and exported' if run else 'Exported'} by m2_ds {__version__}.\n",
        _usage(name),
        _sizes(network, parameters, dtype, tokenizer_kind),
    ]
    if run:
        parts += [_evaluation(run, languages), _training(run), _data(run.sources)]
    return "\n".join(parts)


def _usage(name: str) -> str:
    return f'''## Use

```
pip install "transformers>=5" torch pillow sentencepiece pydantic
```

The code comes with the weights: read it, then say `trust_remote_code=True`.

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{name}", trust_remote_code=True)
classify("picture.png", candidate_labels=["a cat", "a dog"], hypothesis_template="{{}}")
classify("picture.png", candidate_labels=["一只猫", "一只狗"], hypothesis_template="{{}}")
```

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(images=[Image.open("picture.png")], text=["a cat", "一只猫"], return_tensors="pt")
with torch.inference_mode():
    found = model(**inputs)
found.image_embeds, found.text_embeds  # unit vectors
found.logits_per_image.softmax(-1)  # exp(logit_scale) times the cosines, as the M2-Encoder release computes them
```
'''


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def _sizes(network: M2EncoderConfig, parameters: int, dtype: str, tokenizer_kind: str) -> str:
    tokenizer = {
        "glm": "that of the M2-Encoder release: the GLM-10B-Chinese sentencepiece model, a file of its own authors",
        "sentencepiece": "sentencepiece, trained by m2_ds",
    }
    patches = f"{network.image_size} px, {network.num_patches} patches of {network.patch_size} px"
    rows = [
        ("parameters", f"{parameters:,}, stored as {dtype}"),
        ("width, heads", f"{network.hidden_size}, {network.num_heads}"),
        ("layers", f"{network.num_layers}, and {network.num_vl_layers} vision-language layers"),
        ("picture", f"{patches}{', convolutional stem' if network.stem == 'conv' else ''}; resized without a crop"),
        ("caption", f"up to {network.max_text_length} tokens, of {network.vocab_size:,}"),
        ("tokenizer", tokenizer[tokenizer_kind]),
    ]
    return f"## Size\n\n{_table(('', ''), rows)}"


def _evaluation(run: RunFacts, languages: list[str]) -> str:
    if not run.metrics:
        return "## Evaluation\n\nThese weights were not evaluated before they were exported.\n"
    rows: dict[str, dict[str, list[str]]] = {}
    for name, value in run.metrics.items():
        data, split, language, metric = name.split("/", 3)
        row = rows.setdefault(f"{data}/{split}, {_measure(metric)}", {})
        row.setdefault(language, []).append(f"{value:.1f}")
    found = list(dict.fromkeys([*languages, *(language for row in rows.values() for language in row)]))
    header = ["data set/split, measure (%)", *(LANGUAGES.get(language, language) for language in found)]
    cells = [[row, *(" / ".join(values.get(language, [])) for language in found)] for row, values in rows.items()]
    return f"## Evaluation\n\nOf the weights after step {run.step:,}.\n\n{_table(header, cells)}"


def _measure(metric: str) -> str:
    """'text_to_image/r5' -> 'captions to pictures R@1/5/10': recalls of one direction share a row."""
    words = [_SHOWN.get(part, part.replace("_", " ")) for part in metric.split("/")]
    if words[-1] in ("r1", "r5", "r10"):
        words[-1] = "R@1/5/10"
    return " ".join(words)


def _training(run: RunFacts) -> str:
    config = run.config
    optimizer, loss, engine = config["optim"], config["loss"], config["engine"]
    rows = [
        ("steps", f"{run.step:,} of {config['steps']:,}"),
        ("pairs seen", f"{run.samples:,}"),
        ("batch", f"{config['global_batch']:,} pairs"),
        ("objective", f"contrastive, {loss['form']}; weights: backbone {loss['unimodal_weight']:g}, vision-language "
                      f"{loss['vl_weight']:g}"),
        ("optimizer", f"{optimizer['kind']}, learning rate {optimizer['lr']:g}, {optimizer['schedule']['kind']}"),
        ("precision", engine["precision"]),
        ("started from", "weights of another model" if config.get("init_from") else "random weights"),
        ("seed", str(config["seed"])),
    ]  # fmt: skip
    blocks = {name: config[name] for name in _SETTINGS}
    blocks["data"] = {
        name: value for name, value in config["data"].items() if name in ("languages", "captions", "augment")
    }
    settings = yaml.safe_dump(blocks, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"## Training\n\n{_table(('', ''), rows)}\n<details><summary>All settings of model, loss, optimizer and "
        f"augmentation</summary>\n\n```yaml\n{settings}```\n\n</details>\n"
    )


def _data(sources: list[Source]) -> str:
    rows = []
    for source in sources:
        pairs = f"{source.rows:,}" if source.rows is not None else "not at hand when this was written"
        rows.append((f"{source.name}/{source.split}", pairs, _counts(source.origins), _counts(source.licences)))
    return f"## Data\n\n{_table(('data set/split', 'pictures', 'sources', 'licences of the pictures'), rows)}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())
