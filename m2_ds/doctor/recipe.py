"""What a recipe asks for is there and fits together: layout, tokenizer, data, evaluation sets, initial weights."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import cast

from m2_ds.config import RunConfig
from m2_ds.convert.source import locate
from m2_ds.data.batch import PairBatch
from m2_ds.data.config import SourceConfig
from m2_ds.data.reader import Dataset, Split, open_dataset
from m2_ds.data.stream import build_loader
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.doctor.check import Check, Verdict, fail, ok, size, skipped, warn
from m2_ds.doctor.machine import Place
from m2_ds.engine import preflight
from m2_ds.engine.setup import deepspeed_config, zero_stage
from m2_ds.engine.start import read
from m2_ds.evaluation.sources import open_source
from m2_ds.model.loading import fitted
from m2_ds.parallel.config import Layout
from m2_ds.parallel.mesh import Mesh

VERIFIED_BYTES = 256 << 20  # of shards whose checksums are compared, a source: the first, the last, those between
CAPTIONS = 256
UNKNOWN_SHARE, CUT_SHARE = 0.02, 0.05  # of tokens that the tokenizer does not know, of captions that are too long
_NO_TOKENIZER = "the tokenizer cannot be used: see above"
_STORE = "the store does not answer: look at its mount, address and credentials on this host"


def checks(config: RunConfig, place: Place) -> list[Check]:
    """Those of one host that reads the recipe's files."""
    found = [
        Check("recipe", "layout", lambda: layout(config, place)),
        Check("recipe", "tokenizer", lambda: tokenizer(config), hang=_STORE),
        Check("recipe", "initial weights", lambda: initial_weights(config), limit_s=600, hang=_STORE),
        Check("recipe", "evaluation", lambda: evaluation(config), limit_s=120, hang=_STORE),
        Check("recipe", "loggers", lambda: loggers(config)),
    ]
    for number, source in enumerate(config.data.sources):
        name = f"{source.path}, {source.split}"
        found += [
            Check("data", name, partial(source_opens, config, source), limit_s=60, hang=_STORE),
            Check("data", f"{name}: checksums", partial(checksums, source), limit_s=300, hang=_STORE),
            Check("data", f"{name}: captions", partial(captions, config, number), limit_s=60, hang=_STORE),
        ]
    return [*found, Check("data", "first batch", lambda: first_batch(config, place), limit_s=180, hang=_STORE)]


def layout(config: RunConfig, place: Place) -> Verdict:
    """The ranks divide into the layout, the batch into its ranks, and the DeepSpeed file fits both."""
    mesh = Mesh.imagined(Layout.of(config.parallel, place.world_size))
    settings = deepspeed_config(config, mesh)
    pairs, count = config.batch_shape(mesh.data_parallel.size)
    shape = mesh.layout
    return ok(
        f"{place.world_size} rank(s): {shape.tensor} tensor x {shape.data} data x {shape.pipeline} pipeline; "
        f"{count} micro-batch(es) of {pairs} pairs; ZeRO {zero_stage(settings)}, {config.engine.precision}"
    )


def tokenizer(config: RunConfig) -> Verdict:
    """It can be read, has its special pieces, and the model has a row for every piece."""
    found = preflight.open_tokenizer(config)
    rows, spare = config.model.vocab_size, config.model.vocab_size - found.vocab_size
    return ok(
        f"{found.kind}, {found.vocab_size:,} pieces of {rows:,} rows; pad {found.pad_id}, start {found.cls_id}, "
        f"end {found.eos_id}, mask {found.mask_id}" + (f"; {spare:,} rows are never used" if spare else "")
    )


def initial_weights(config: RunConfig) -> Verdict:
    """`init_from` can be read and has the names and shapes of the model."""
    if config.init_from is None:
        return skipped("init_from is not set: fresh weights")
    source = locate(config.init_from)
    resized: list[str] = []
    tensors = fitted(config.model, read(source), str(source), resized.append)
    count = sum(tensor.numel() for tensor in tensors.values())
    return ok(f"{source}: {len(tensors)} tensors, {count / 1e6:,.1f} M weights" + "".join(f"; {t}" for t in resized))


def evaluation(config: RunConfig) -> Verdict:
    """Every task's data can be opened."""
    if not config.evaluation.tasks:
        return skipped("no tasks")
    shown = []
    for task in config.evaluation.tasks:
        for part in task.parts:
            shown.append(f"{task.title}/{part} ({len(open_source(task, part)):,})")
    return ok(", ".join(shown))


def loggers(config: RunConfig) -> Verdict:
    preflight.check_loggers(config)
    if config.log.wandb_project:
        return ok(f"JSONL, TensorBoard, Weights & Biases ({config.log.wandb_project})")
    return ok("JSONL, TensorBoard")


def source_opens(config: RunConfig, source: SourceConfig) -> Verdict:
    """Manifest and table of shards; shards there and of their sizes; first and last row group; languages."""
    dataset, split = _open(source)
    groups = len(split.group_sizes)
    if not len(split):
        return fail("no pairs", "name another split of the data set (m2 data inspect)")
    for group in {0, groups - 1}:
        split.row_groups.table(group)
    shown = ", ".join(f"{language} {count:,}" for language, count in split.languages.items())
    found = f"{len(split):,} pairs ({shown} captions) in {len(split.index)} shard(s), {size(split.index.total_bytes)}"
    wanted = [*(source.languages or config.data.languages)]
    missing = [language for language in wanted if not split.languages.get(language)]
    if missing and (config.data.captions == "each" or source.languages or len(missing) == len(wanted)):
        return fail(
            f"{found}; no captions in {', '.join(missing)}",
            "data.captions: one, other data.languages (or languages of the source), or a data set that has them",
        )
    if len(split) < config.global_batch:
        return warn(f"{found}: fewer than the {config.global_batch} of a step", "lower global_batch, or add data")
    return ok(f"{found}; {dataset.name}, {dataset.digest[:12]}")


def checksums(source: SourceConfig) -> Verdict:
    """Shards of the split read whole and compared, spread over it, up to `VERIFIED_BYTES`."""
    dataset, split = _open(source)
    count = len(split.index)
    order = sorted(range(count), key=lambda shard: (shard not in (0, count - 1), _spread(shard, count)))
    read_bytes, verified = 0, 0
    for shard in order:
        info = split.index[shard]
        if verified and read_bytes + info.bytes > VERIFIED_BYTES:
            break
        dataset.verify_shard(info)
        read_bytes, verified = read_bytes + info.bytes, verified + 1
    return ok(f"{verified} of {count} shard(s), {size(read_bytes)}, are as the manifest says")


def _spread(place: int, count: int) -> str:
    """A key that puts places far from each other one after another, the same on every call."""
    return hashlib.sha256(f"{place}/{count}".encode()).hexdigest()


def captions(config: RunConfig, number: int) -> Verdict:
    """What the tokenizer makes of the first captions, by language: tokens, those it does not know, texts it cuts."""
    source = config.data.sources[number]
    if (found := _tokenizer(config)) is None:
        return skipped(_NO_TOKENIZER)
    _, split = _open(source)
    texts: dict[str, list[str]] = {language: [] for language in source.languages or config.data.languages}
    for row in split.read(range(min(CAPTIONS, len(split)))):
        for caption in row.captions:
            if caption.language in texts and source.caption_kinds.get(caption.kind, 1.0) > 0:
                texts[caption.language].append(caption.text)
    shown, troubles = [], []
    for language, some in texts.items():
        if not some:
            continue
        tokens, unknown, cut = _tokens(found, some[:CAPTIONS])
        shown.append(f"{language}: {tokens:.1f} tokens a caption, {cut:.0%} cut, {unknown:.1%} unknown")
        if unknown > UNKNOWN_SHARE:
            troubles.append(f"train a tokenizer on {language} text (m2 tokenizer train)")
        if cut > CUT_SHARE:
            troubles.append(f"raise model.max_text_length ({config.model.max_text_length}) for {language}")
    if not shown:
        return skipped(f"none in {', '.join(texts)} among the first {CAPTIONS} pairs")
    return warn("; ".join(shown), ", ".join(troubles)) if troubles else ok("; ".join(shown))


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float, float]:
    """Mean tokens of a caption, share of unknown ones among them, share of captions that are cut."""
    ids, mask = tokenizer.encode(texts)
    known = mask.bool()
    unknown = int(((ids == tokenizer.unk_id) & known).sum()) / int(known.sum())
    cut = sum(len(tokenizer.pieces(text)) > tokenizer.max_length for text in texts)
    return int(known.sum()) / len(texts), unknown, cut / len(texts)


def first_batch(config: RunConfig, place: Place) -> Verdict:
    """One micro-batch as the run will make it: read, decoded, varied, tokenized; how fast one process does it."""
    if (found := _tokenizer(config)) is None:
        return skipped(_NO_TOKENIZER)
    try:
        pairs = config.batch_shape(Layout.of(config.parallel, place.world_size).data)[0]
    except ValueError:
        pairs = config.micro_batch or config.global_batch
    pairs = min(pairs, 256)
    data = config.data.model_copy(update={"workers": 0, "prefetch": 1})
    loader = build_loader(data, found, global_batch=pairs, micro_batch=pairs, seed=config.seed)
    with contextlib.closing(cast(Generator[PairBatch, None, None], iter(loader))) as batches:
        next(batches)
        started = time.perf_counter()
        batch = next(batches)
        seconds = time.perf_counter() - started
    shape = " x ".join(map(str, batch.images.shape))
    shown = (
        f"pictures {shape}, captions {' x '.join(map(str, batch.ids.shape))}; {pairs / seconds:,.0f} pairs/s a process"
    )
    if bad := sum(batch.skipped.values()):
        reasons = ", ".join(f"{reason} {count}" for reason, count in batch.skipped.items())
        verdict = f"{shown}; {bad} of {pairs} pairs could not be used: {reasons}"
        if bad > 0.1 * pairs:
            return warn(verdict, "look at the data set (m2 data verify, m2 data inspect)")
        return ok(verdict)
    return ok(shown)


def digests(config: RunConfig) -> dict[str, str]:
    """What has to be equal on every rank: configuration, DeepSpeed file, tokenizer, data sets; short SHA-256 each."""
    found = {
        "recipe": _digest(lambda: config.to_yaml().encode()),
        "DeepSpeed file": _digest(config.engine.deepspeed.read_bytes),
        "tokenizer": _digest(lambda: load_tokenizer(config.tokenizer).__getstate__()["model"]),
    }
    for source in config.data.sources:
        found[f"data set {source.path}"] = _digest(partial(_manifest, source))
    return found


def _manifest(source: SourceConfig) -> bytes:
    return open_dataset(source.path).digest.encode()


def _digest(read: Callable[[], bytes]) -> str:
    try:
        return hashlib.sha256(read()).hexdigest()[:12]
    except (OSError, ValueError):
        return "unreadable"  # lines of their own say why; another rank may be able to read it


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """None where a line of its own says what is wrong with it."""
    try:
        return preflight.open_tokenizer(config)
    except ValueError:
        return None


def _open(source: SourceConfig) -> tuple[Dataset, Split]:
    dataset = open_dataset(source.path)
    return dataset, dataset.split(source.split)
