"""One step of a real engine in some layout, compared with giant batches in one process.

The reference is written from the definitions: one dense loss a group by autograd, in fp64, averaged over groups.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.engine.masked import summarise
from m2_ds.engine.optim import build_optimizer, freeze_unreached, schedule_builder
from m2_ds.engine.setup import build_engine, build_model, deepspeed_config, opened
from m2_ds.engine.step import ContrastiveStep, StepResult
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.masking import hidden_count, hide_patches, hide_words
from m2_ds.model.random import Noise
from m2_ds.model.weights import Piece, init_weights, pieces
from m2_ds.parallel.collectives import all_gather_objects
from m2_ds.parallel.mesh import Mesh
from m2_ds.words import Words
from tests.engine.jobs import changed, config_of

PAIRS = 3  # of a micro-batch


@dataclass(frozen=True)
class Case:
    """One layout; ``strided`` groups; ``partial``: pairs of the last rank's last micro-batch.

    ``tensor`` and ``pipeline``: sizes of these axes; all other numbers of ranks are of data-parallel ones.
    """

    stage: str
    group: int
    micro_batches: int
    tensor: int = 1
    pipeline: int = 1
    kept: int = 1
    reduce_once: bool = True
    strided: bool = False
    partial: int = PAIRS
    changes: tuple[tuple[str, Any], ...] = ()

    def config(self, tree: dict[str, Any], files: dict[str, Path], ranks: int) -> RunConfig:
        settings = {
            "global_batch": ranks * self.micro_batches * PAIRS,
            "micro_batch": PAIRS,
            "engine.deepspeed": str(files[self.stage]),
            "engine.kept_graphs": self.kept,
            "engine.reduce_once": self.reduce_once,
            "model.drop_path": 0.3,
            "model.patch_drop": 0.25,
            "optim.rules": [],
            "optim.grad_clip": 0.5,
            "evaluation": {"tasks": []},
            "parallel.tensor_parallel_size": self.tensor,
            "parallel.pipeline_parallel_size": self.pipeline,
            "parallel.contrast_group.size": self.group,
            "parallel.contrast_group.placement": "strided" if self.strided else "contiguous",
        }
        return config_of(changed(tree, {**settings, **dict(self.changes)}))

    def groups(self, ranks: int) -> list[list[int]]:
        count = ranks // self.group
        if self.strided:
            return [list(range(first, ranks, count)) for first in range(count)]
        return [list(range(first, first + self.group)) for first in range(0, ranks, self.group)]


def pairs_of(case: Case, config: RunConfig, rank: int, ranks: int, step: int = 0) -> list[PairBatch]:
    """Random micro-batches, other ones for every case; some pairs of some groups repeat."""
    g = torch.Generator().manual_seed(hash((case.group, case.micro_batches, case.partial, ranks, step)) % 2**31)
    model, batches = config.model, []
    for micro, of in itertools.product(range(case.micro_batches), range(ranks)):
        length = int(torch.randint(4, 9, (), generator=g))
        mask = torch.arange(length) < torch.randint(2, length + 1, (2, PAIRS, 1), generator=g)
        batch = PairBatch(
            images=torch.randint(0, 256, (PAIRS, 3, model.image_size, model.image_size), generator=g).to(torch.uint8),
            ids=torch.randint(0, model.vocab_size, (2, PAIRS, length), generator=g),
            mask=mask.long(),
            language=torch.randint(0, 2, (2, PAIRS), generator=g),
            group=torch.randint(0, 2 * ranks * case.micro_batches, (PAIRS,), generator=g),
            slot=torch.randint(0, 10**9, (PAIRS,), generator=g),
            keys=[],
            skipped={},
        )
        last = micro == case.micro_batches - 1 and of == ranks - 1
        if of == rank:
            batches.append(cut(batch, case.partial) if last else batch)
    return batches


def cut(batch: PairBatch, pairs: int) -> PairBatch:
    fields = {n: getattr(batch, n)[:pairs] for n in ("images", "group", "slot")}
    return PairBatch(
        **fields, **{n: getattr(batch, n)[:, :pairs] for n in ("ids", "mask", "language")}, keys=[], skipped={}
    )


def prepare(model: M2Encoder, config: RunConfig) -> M2Encoder:
    init_weights(model, config.model, config.seed, opened)
    freeze_unreached(model, config.loss)
    if model.part.is_last:
        for scale, value in ((model.logit_scale, 1.7), (model.logit_vl_scale, 3.1)):
            with torch.no_grad(), opened(scale):  # far from where gradients are small
                scale.fill_(value)
    return model


def reference(case: Case, config: RunConfig, ranks: int) -> tuple[dict[str, Tensor], float]:
    """Gradients by name and the mean over groups of the groups' losses."""
    model = prepare(M2Encoder(config.model), config).double()
    everything = [pairs_of(case, config, rank, ranks) for rank in range(ranks)]
    losses = []
    for members in case.groups(ranks):
        batches = [batch for rank in members for batch in everything[rank] if len(batch.slot)]
        losses.append(group_loss(model, config, batches))
    loss = torch.stack(losses).mean()
    if config.loss.masked:
        loss = loss + masked_loss(model, config, [batch for of_rank in everything for batch in of_rank])
    loss.backward()
    gradients = ((n, p, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    return {piece.name: piece.tensor.float() for n, p, g in gradients for piece in pieces(n, p, g)}, loss.item()


def group_loss(model: M2Encoder, config: RunConfig, batches: list[PairBatch]) -> Tensor:
    levels: dict[str, tuple[list[Tensor], list[Tensor]]] = {"unimodal": ([], []), "vl": ([], [])}
    for batch in batches:
        image = model.image_features(batch.images, Noise.of(config.seed, batch.slot))
        text = [
            model.text_features(ids, mask, Noise.of(config.seed, batch.slot, view=1 + c))
            for c, (ids, mask) in enumerate(zip(batch.ids, batch.mask))
        ]
        for level, (images, texts) in levels.items():
            images.append(getattr(image, level))
            texts.append(torch.stack([getattr(t, level) for t in text]))
    group = torch.cat([batch.group for batch in batches])
    same, eye = group[:, None] == group, torch.eye(len(group), dtype=torch.bool)
    repeats, form, smooth = config.loss.repeats, config.loss.form, config.loss.label_smoothing
    right = (same if repeats == "positive" else eye).to(model.logit_scale.dtype)
    counts = ~(same & ~eye) if repeats == "exclude" else torch.ones_like(same)
    loss = torch.zeros((), dtype=model.logit_scale.dtype)
    for level, (images, texts) in levels.items():
        weight = config.loss.unimodal_weight if level == "unimodal" else config.loss.vl_weight
        prefix = "logit" if level == "unimodal" else "logit_vl"
        scale = getattr(model, f"{prefix}_scale").exp()
        for text in torch.cat(texts, 1):
            logits = scale * torch.cat(images) @ text.T
            if form == "sigmoid":
                logits = logits + getattr(model, f"{prefix}_bias")
                places = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
                loss = loss + weight * (places * counts).sum() / len(group) / 2
                continue
            target = (1 - smooth) * right / right.sum(1, keepdim=True) + smooth * counts / counts.sum(1, keepdim=True)
            for side in (logits, logits.T):
                log_p = side.masked_fill(~counts, -torch.inf).log_softmax(1).masked_fill(~counts, 0)
                loss = loss - weight * (target * log_p).sum(1).mean() / 2 / 2
    return loss


def words_of(vocab_size: int) -> Words:
    """Made-up words: some pieces go on, some end one, some are special."""
    ids = torch.arange(vocab_size)
    return Words(begins=ids % 3 != 0, ends=ids % 7 == 0, special=ids % 11 == 0, mask_id=4)


def mean_colour_codes(device: torch.device) -> Any:
    """A visual tokenizer: 16 grey levels of a patch (of 8 x 8 pixels)."""
    return lambda images: (images.float().unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5)).flatten(1) / 16).long()


def masked_loss(model: M2Encoder, config: RunConfig, batches: list[PairBatch]) -> Tensor:
    """Of both objectives over all pairs at once, a caption at a time."""
    words, seed, loss = words_of(config.model.vocab_size), config.seed, config.loss
    size, told, rebuilt = config.model.patch_size, [], []
    split = config.model.num_patches + 1
    for batch in batches:
        for c, (ids, mask) in enumerate(zip(batch.ids, batch.mask)):
            keys = Noise.of(seed, batch.slot, view=1 + c).keys
            hiding = Noise.of(seed, batch.slot, view=256 + c)
            for n in range(len(ids)):
                image, own, length = batch.images[n : n + 1], ids[n : n + 1], int(mask[n].sum())
                own, here = own[:, :length], Noise(hiding.keys[n : n + 1])
                valid = torch.ones(1, split + length, dtype=torch.bool)
                hidden = hide_words(own, torch.ones_like(own), words, loss.cmlm.share, here)
                if loss.cmlm.weight:
                    noise = Noise(keys[n : n + 1] ^ (1 << 22))
                    x = model.joint_tokens(model.backbone.vision_embed(image), own.masked_fill(hidden, 4))
                    x = model.backbone_vl(model.backbone.encoder(x, split, valid, noise), split, valid, noise)
                    head: Any = model.masked_text_head
                    scores = head.vocabulary(head.transform(x[0, split:][hidden[0]]))
                    told.append(F.cross_entropy(scores, own[0][hidden[0]], reduction="none"))
                if loss.cmim.weight:
                    noise = Noise(keys[n : n + 1] ^ (1 << (23 if loss.cmlm.weight else 22)))
                    patches = chosen_patches(model, config, batch, n, own, keys[n : n + 1], here)
                    x = model.joint_tokens(model.backbone.vision_embed(image, patches), own)
                    x = model.backbone_vl(model.backbone.encoder(x, split, valid, noise), split, valid, noise)
                    found = model.masked_image_head.out(model.masked_image_head.transform(x[0, 1:split][patches[0]]))
                    if loss.cmim.targets == "codes":
                        codes = mean_colour_codes(torch.device("cpu"))(image)[patches]
                        rebuilt.append(F.cross_entropy(found, codes, reduction="none"))
                        continue
                    squares = F.unfold(image.double() / 255, size, stride=size)[0].T[patches[0]]
                    squares = (squares - squares.mean(1, keepdim=True)) / (squares.var(1, False)[:, None] + 1e-6).sqrt()
                    rebuilt.append((found - squares).square().mean(1))
    zero = torch.zeros(1, dtype=torch.float64)
    means = [torch.cat(x).mean() if x else zero[0] for x in (told, rebuilt)]
    return loss.cmlm.weight * means[0] + loss.cmim.weight * means[1]


def chosen_patches(
    model: M2Encoder, config: RunConfig, batch: PairBatch, n: int, ids: Tensor, keys: Tensor, hiding: Noise
) -> Tensor:
    cmim, patches = config.loss.cmim, config.model.num_patches
    if cmim.choose == "random":
        return hide_patches(hiding, patches, cmim.share)
    states = model.image_hidden(batch.images[n : n + 1], noise=Noise.of(config.seed, batch.slot[n : n + 1]))
    each = F.normalize(model.itc_image_proj.fc(states[0, 1:]), dim=-1)
    text = model.text_features(ids, torch.ones_like(ids), Noise(keys)).unimodal[0]
    found = torch.zeros(1, patches, dtype=torch.bool)
    found[0, (each @ text).topk(hidden_count(patches, cmim.share)).indices] = True
    return found


def reference_curve(case: Case, config: RunConfig, ranks: int, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a plain loop in one process, by the definitions again; fp32."""
    model = prepare(M2Encoder(config.model), config)
    optimizer = build_optimizer(model, config.optim)
    schedule = schedule_builder(config.steps, config.optim.schedule)(optimizer)
    found = []
    for step in range(steps):
        everything = [pairs_of(case, config, rank, ranks, step) for rank in range(ranks)]
        losses = [
            group_loss(model, config, [batch for rank in members for batch in everything[rank]])
            for members in case.groups(ranks)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def run_curves(
    mesh: Mesh, tree: dict[str, Any], files: dict[str, Path], cases: list[Case], steps: int
) -> list[tuple[Case, list[tuple[float, float]], list[tuple[float, float]]]]:
    """By case, loss and gradient norm of every step: those found and those of `reference_curve`."""
    curves = []
    for case in cases:
        ranks = mesh.world_size // (case.tensor * case.pipeline)
        config = case.config(tree, files, ranks)
        wanted = reference_curve(case, config, ranks, steps)
        here = mesh.with_layout(config.parallel)
        settings = deepspeed_config(config, here)
        module, model = build_model(config, settings, here)
        engine = build_engine(prepare(model, config), config, settings, here, module)
        engine.train()
        step = ContrastiveStep(engine, config, here, languages=2)
        found = []
        for number in range(steps):
            result = step(pairs_of(case, config, here.data_parallel.rank, ranks, number))
            assert result.grad_norm is not None
            found.append((mean_loss(result, config, here), float(result.grad_norm)))
        curves.append((case, found, wanted))
        engine.destroy()
    return curves


def mean_loss(result: StepResult, config: RunConfig, mesh: Mesh) -> float:
    """Over all pairs of the step, weighted over levels, as a log line tells it."""
    total = torch.cat([result.loss.sum(1), result.count.sum()[None]])
    total = torch.stack(all_gather_objects(total, mesh.data_parallel)).sum(0)
    weights = torch.tensor([w for w in (config.loss.unimodal_weight, config.loss.vl_weight) if w])
    of_masked, _ = summarise([result.masked] if result.masked else [], ["en", "zh"], mesh.data_parallel)
    return float((weights * total[:-1]).sum() / total[-1]) + of_masked


@dataclass
class Report:
    case: Case
    error: float
    worst: str
    norm: float
    wanted_norm: float
    loss: float
    wanted_loss: float
    pairs: int


def run_cases(mesh: Mesh, tree: dict[str, Any], files: dict[str, Path], cases: list[Case]) -> list[Report]:
    def data_ranks(case: Case) -> int:
        return mesh.world_size // (case.tensor * case.pipeline)

    # References first: ZeRO-3 replaces torch's linear layer for good.
    wanted = [reference(case, case.config(tree, files, data_ranks(case)), data_ranks(case)) for case in cases]
    reports, here, last = [], mesh, None
    for case, (gradients, loss) in sorted(zip(cases, wanted), key=lambda pair: pair[0].stage):
        config = case.config(tree, files, data_ranks(case))
        if config.parallel != last:
            here, last = mesh.with_layout(config.parallel), config.parallel
        pairs = pairs_of(case, config, here.data_parallel.rank, data_ranks(case))
        result, found = one_step(here, config, pairs)
        # What no rank reaches (a token that is not there) has a zero gradient or none.
        errors = {piece.name: relative(piece, gradients) for piece in found}
        worst = max(errors, key=lambda n: errors[n])
        reached = set().union(*all_gather_objects([piece.name for piece in found], mesh.world))
        assert all(name in reached for name, g in gradients.items() if g.abs().max() > 0)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        mean = mean_loss(result, config, here)
        assert result.grad_norm is not None
        reports.append(
            Report(case, errors[worst], worst, float(result.grad_norm), norm, mean, loss, int(result.contrastive_batch))
        )
    return reports


def relative(piece: Piece, wanted: dict[str, Tensor]) -> float:
    """The largest difference of a gradient's piece, as a share of the whole gradient's largest number.

    That of a key's bias is zero but for rounding: it is measured by the query's.
    """
    whole = wanted.get(piece.name)
    whole = torch.zeros(piece.whole_shape) if whole is None else whole
    mine, yours = piece.tensor, whole
    if piece.split is not None:
        mine, yours = piece.split.filled(mine), piece.split.of(whole)
    scale = wanted.get(piece.name.replace(".k_proj.", ".q_proj."), whole).abs().max()
    error = float((mine - yours).abs().max() / scale.clamp(min=1e-4))
    return error if math.isfinite(error) else math.inf


def one_step(mesh: Mesh, config: RunConfig, batches: list[PairBatch]) -> tuple[StepResult, list[Piece]]:
    """The result, and the gradient of every piece of this rank as the engine holds it right before its update."""
    from deepspeed.utils import safe_get_full_grad

    settings = deepspeed_config(config, mesh)
    module, model = build_model(config, settings, mesh)
    engine = build_engine(prepare(model, config), config, settings, mesh, module)
    found: list[Piece] = []
    update = engine._take_model_step

    def spied(*arguments: Any) -> None:
        for name, parameter in model.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                whole = gradient.detach().float().clone().view(getattr(parameter, "ds_shape", parameter.shape))
                found.extend(pieces(name, parameter, whole))
        update(*arguments)

    engine._take_model_step = spied
    engine.train()
    words = words_of(config.model.vocab_size)
    result = ContrastiveStep(engine, config, mesh, languages=2, words=words)(batches)
    engine.destroy()
    return result, found


def check(reports: list[Report]) -> None:
    for report in reports:
        assert report.error < 1e-5, report
        assert report.norm == pytest.approx(report.wanted_norm, rel=1e-5), report
        assert report.wanted_norm > 0.5, f"clipping was not active: {report}"
        if report.case.partial == PAIRS:
            assert report.loss == pytest.approx(report.wanted_loss, rel=1e-5), report
            assert report.pairs == report.case.group * report.case.micro_batches * PAIRS
