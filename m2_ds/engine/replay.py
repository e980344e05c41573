"""A step of a run once more, without its update: which samples, which layer, which module were off.

One process computes the step's global batch in fp32, from the newest checkpoint before it, with the run's own code for
a step and the run's own noise. Pairs are compared within the whole batch (a run in several contrast groups compares
fewer).
"""

import base64
import contextlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor, nn

from m2_ds.config import RunConfig, load_config
from m2_ds.convert.run_folder import CHECKPOINTS, checkpoint_name, checkpoint_steps, verify
from m2_ds.data.batch import PairBatch
from m2_ds.data.stream import next_batch
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.files import write_atomically
from m2_ds.parallel.mesh import Mesh

_LARGEST = 32  # pairs of a micro-batch, where the run has larger ones
_PICTURE = 160  # pixels of a sample's side on the page, at least
_LAYER = re.compile(r"((?:backbone\.encoder|backbone_vl)\.layers\.\d+|backbone\.\w+|[^.]+)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One pair as the model saw it. ``picture``: uint8 [3, S, S]."""

    key: str
    slot: int
    loss: float
    captions: list[str]
    picture: Tensor


@dataclass(frozen=True)
class Replayed:
    """``layers``: name, norm of weights, norm of gradients; ``first_bad``: where numbers first were not finite."""

    step: int
    weights: str
    loss: float
    norm: float
    samples: list[Sample]
    layers: list[tuple[str, float, float]]
    first_bad: str | None


class _WithoutUpdates:
    """What a step asks of an engine, without an optimizer."""

    def __init__(self, module: nn.Module, micro_batches: int) -> None:
        self.module, self.micro_batches = module, micro_batches

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        pass

    def gradient_accumulation_steps(self) -> int:
        return self.micro_batches

    def zero_optimization_stage(self) -> int:
        return 1  # of which a step expects that it keeps the norm

    def bfloat16_enabled(self) -> bool:
        return False

    def get_global_grad_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])


def replay(
    run: tyro.conf.Positional[Path],
    *,
    step: int,
    worst: int = 12,
    micro_batch: int | None = None,
    out: Path | None = None,
) -> int:
    """Compute a step of a run again, without its update, and show which samples and layers were off.

    Prints the loss of every sample, norms by layer and the first module whose output is not finite; a page with the
    worst samples' pictures and captions goes to the run folder.

    Args:
        run: run folder.
        step: number of the step, from 1, as log.jsonl and anomalies.jsonl count.
        worst: samples on the page.
        micro_batch: pairs in one forward; by default the run's, at most 32. Changes rounding only.
        out: the page; by default RUN/replay-STEP.html.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = load_config(run / "config.yaml")
    config = config.model_copy(update={"folder": run})
    mesh = Mesh.start()
    try:
        found = again(config, step, mesh, micro_batch)
    finally:
        mesh.stop()
    page = out or run / f"replay-{step}.html"
    write_page(found, page, run.resolve().name, worst)
    tell(found)
    print(f"page: {page}")
    return 0


def again(config: RunConfig, step: int, mesh: Mesh, micro_batch: int | None = None) -> Replayed:
    """The step of the run in ``config.folder``, on the one rank of ``mesh``. Raises ValueError for one not there."""
    from m2_ds.data.stream import build_loader
    from m2_ds.engine.optim import freeze_unreached
    from m2_ds.engine.step import ContrastiveStep

    if not 1 <= step <= config.steps:
        raise ValueError(f"--step {step}: the run has steps 1 to {config.steps}")
    checkpoint = _checkpoint_before(config.folder, step)
    size = micro_batch or min(config.micro_batch or config.global_batch, _LARGEST)
    while config.global_batch % size:
        size -= 1
    config = config.model_copy(
        update={
            "micro_batch": size,
            "parallel": type(config.parallel)(),
            "lora": None,
            "data": config.data.model_copy(update={"workers": 0}),
            "engine": config.engine.model_copy(update={"precision": "fp32", "apex": False, "fp8": False}),
        }
    )
    tokenizer = load_tokenizer(config.tokenizer)
    model, weights = _model(config, checkpoint, mesh)
    freeze_unreached(model, config.loss)
    model.train()
    count = config.global_batch // size
    words = tokenizer.words() if config.loss.masked else None
    engine = _WithoutUpdates(model, count)
    compute = ContrastiveStep(engine, config, mesh, len(config.data.languages), words)
    loader = build_loader(
        config.data, tokenizer, global_batch=config.global_batch, micro_batch=size, accumulation=count,
        seed=config.seed, start_sample=_first_slot(config, step, checkpoint),
    )  # fmt: skip
    with contextlib.closing(iter(loader)) as stream:  # type: ignore[type-var]
        batches = [next(stream).to(mesh.device) for _ in range(count)]
    with _watched(model) as seen:
        result = compute(batches, step - 1)
    assert result.by_pair is not None and result.grad_norm is not None
    losses = result.by_pair.tolist()
    samples = list(_samples(batches, losses, tokenizer))
    samples.sort(key=lambda sample: -math.inf if not math.isfinite(sample.loss) else -sample.loss)
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad_weight = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    first_bad = None
    if bad_weight is not None:
        first_bad = f"the weights are not finite: {bad_weight} is the first"
    elif seen:
        first_bad = f"the first module with an output that is not finite: {seen[0]}"
    elif (name := next((n for n, p in trained if not p.isfinite().all()), None)) is not None:
        first_bad = f"outputs are finite, and the gradient of {name} is not"
    return Replayed(
        step, weights, sum(losses) / len(losses), float(result.grad_norm), samples, _layers(model), first_bad
    )


def _checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest good one of a step before this one."""
    for number in sorted(checkpoint_steps(folder / CHECKPOINTS), reverse=True):
        if number < step:
            path = folder / CHECKPOINTS / checkpoint_name(number)
            try:
                verify(path)
            except ValueError as error:
                log.warning("%s passed over: %s", path.name, error)
                continue
            return path
    return None


def _model(config: RunConfig, checkpoint: Path | None, mesh: Mesh) -> tuple[Any, str]:
    """In fp32 on the mesh's device, and what its weights are."""
    from m2_ds.engine.start import given_weights
    from m2_ds.model.encoder import M2Encoder
    from m2_ds.model.loading import fill_whole
    from m2_ds.model.weights import init_weights

    with torch.device(mesh.device):
        model = M2Encoder(config.model)
    given = given_weights(config, model, checkpoint)
    if given is not None:
        fill_whole(model, given)
        return model, f"weights of {config.init_from if checkpoint is None else checkpoint}"
    if config.init_pictures:
        raise ValueError(
            f"{config.folder} holds no good checkpoint before this step, and its stem was fitted to pictures "
            "(init_pictures): there are no weights to begin with"
        )
    init_weights(model, config.model, config.seed)
    return model, "the fresh weights that the run began with"


def _first_slot(config: RunConfig, step: int, checkpoint: Path | None) -> int:
    """Where the global batch of a step begins: as an anomaly's record has it, else counted from the checkpoint."""
    from m2_ds.engine import resume
    from m2_ds.engine.anomalies import LEFT_OUT, RECORDS, saved_state

    if (path := config.folder / RECORDS).exists():
        records = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        if own := [record["samples"] for record in records if record["step"] == step]:
            return int(own[-1])
    left_out = set(saved_state(checkpoint).get("left_out", ()))
    if (path := config.folder / LEFT_OUT).exists():
        left_out |= set(json.loads(path.read_text(encoding="utf-8")))
    done, samples = (0, 0) if checkpoint is None else (resume.step(checkpoint), resume.samples(checkpoint))
    for _ in range(done, step - 1):
        samples = next_batch(samples, config.global_batch, left_out) + config.global_batch
    return next_batch(samples, config.global_batch, left_out)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose outputs are not finite, in the order in which they finish."""
    seen: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple | list) else []
        if any(isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all() for x in tensors):
            seen.append(name)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _samples(batches: list[PairBatch], losses: list[float], tokenizer: Tokenizer) -> Iterator[Sample]:
    places = [(batch, n) for batch in batches for n in range(len(batch.slot))]
    for (batch, n), loss in zip(places, losses):
        captions = [tokenizer.decode(ids[n][mask[n].bool()]) for ids, mask in zip(batch.ids, batch.mask)]
        yield Sample(batch.keys[n], int(batch.slot[n]), loss, captions, batch.images[n].cpu())


def _layers(model: nn.Module) -> list[tuple[str, float, float]]:
    squares: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        found = _LAYER.match(name)
        own = squares.setdefault(found[1] if found else name, [0.0, 0.0])
        own[0] += float(parameter.detach().double().square().sum())
        own[1] += 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())
    return [(name, math.sqrt(weight), math.sqrt(gradient)) for name, (weight, gradient) in squares.items()]


def _number(x: float) -> str:
    return f"{x:.4g}" if math.isfinite(x) else "not finite"


def tell(found: Replayed) -> None:
    """On the terminal."""
    print(f"step {found.step} with {found.weights}: loss {_number(found.loss)}, gradient norm {_number(found.norm)}")
    print(found.first_bad or "all outputs and gradients are finite")
    width = max(len(name) for name, _, _ in found.layers)
    print(f"\n{'layer'.ljust(width)}  {'weights':>10}  {'gradient':>10}")
    for name, weight, gradient in found.layers:
        print(f"{name.ljust(width)}  {_number(weight):>10}  {_number(gradient):>10}")
    print(f"\n{'loss':>10}  sample")
    for sample in found.samples:
        print(f"{_number(sample.loss):>10}  {sample.key}  {' | '.join(sample.captions)}")


def write_page(found: Replayed, path: Path, run: str, worst: int) -> None:
    """The page, with the ``worst`` samples that have the largest loss."""
    environment = Environment(
        loader=PackageLoader("m2_ds.engine"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("replay.html.j2").render(
        title=f"{run}, step {found.step} once more",
        lines=[
            f"Computed in fp32 with {found.weights}, without an update.",
            f"Loss {_number(found.loss)} (mean of {len(found.samples)} samples), gradient norm {_number(found.norm)}.",
        ],
        first_bad=found.first_bad,
        samples=[
            {
                "key": sample.key,
                "slot": sample.slot,
                "loss": _number(sample.loss),
                "finite": math.isfinite(sample.loss),
                "captions": sample.captions,
                "picture": _picture(sample.picture),
            }
            for sample in found.samples[:worst]
        ],
        layers=[(name, _number(weight), _number(gradient)) for name, weight, gradient in found.layers],
    )
    write_atomically(path, page.encode())


def _picture(pixels: Tensor) -> str:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if image.width < _PICTURE:
        factor = -(-_PICTURE // image.width)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
