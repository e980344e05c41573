"""Layers cut over a tensor-parallel group, from Megatron-core's parameters and with exact LayerNorms.

Where a layer begins, all ranks hold the same tokens [..., D]; `ColumnLinear` gives each rank a share of the width
(whole heads, in attention), on which it works alone until `RowLinear` sums the shares (arXiv 1909.08053). With
``sequence_parallel`` tokens are cut, too, between the layers (arXiv 2205.05198): x is [1, N / r, D] there, gathered at
the beginning of a layer and scattered at its end; backward gathers it again rather than keep it.

Weights, their cut and their marks are Megatron-core's; the products are here because its sequence-parallel ones work on
CUDA alone and because what is sent is counted. On a GPU the sum of the input's gradients runs beside the weight's.
Legend: N tokens, D width, r ranks.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from m2_ds.parallel.collectives import all_gather_rows, all_reduce_sum, reduce_scatter_rows, start_all_reduce
from m2_ds.parallel.mesh import Group
from m2_ds.parallel.rows import told
from m2_ds.parallel.split import Split, mark

LAYERS, NORMS = "tensor parallel", "tensor parallel norms"  # kinds of traffic

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", module="megatron")
    _megatron: Any = importlib.import_module("megatron.core.tensor_parallel")
    _model_parallel_config: Any = importlib.import_module("megatron.core.model_parallel_config").ModelParallelConfig


class Region:
    """How tokens lie between layers: the same on every rank, or cut along the sequence."""

    def __init__(self, group: Group, sequence: bool) -> None:
        self.group, self.sequence = group, sequence

    def gathered(self, x: Tensor) -> Tensor:
        """All tokens, as a layer needs them."""
        return all_gather_rows(x[0], self.group, LAYERS)[None] if self.sequence else x

    def start_sum(self, x: Tensor) -> "_Sum":
        """The sum of the ranks' ``x`` (which is given up), as tokens lie between layers."""
        return _Sum(x, self)


class _Sum:
    def __init__(self, x: Tensor, region: Region) -> None:
        if region.sequence:
            self.reducing = None
            self.out = reduce_scatter_rows(x[0].contiguous(), region.group, LAYERS)[None]
        else:
            self.out = x.contiguous()
            self.reducing = start_all_reduce(self.out, region.group, LAYERS)

    def wait(self) -> Tensor:
        if self.reducing is not None:
            self.reducing.wait()
        return self.out


class _Product(Function):
    """x W^T + b for a W of which every rank holds some rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, region: Region) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.region = region
        return F.linear(region.gathered(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        summing = ctx.region.start_sum(gradient @ weight) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        d_weight = rows.T @ ctx.region.gathered(x).flatten(0, -2) if ctx.needs_input_grad[1] else None
        d_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return None if summing is None else summing.wait(), d_weight, d_bias, None


class _SumOverRanks(Function):
    """Backward hands every rank the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return region.start_sum(x.clone()).wait()  # selective recomputation may keep x itself

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.region.gathered(gradients[0]), None


class _SameOnAllRanks(Function):
    """Weights that every rank holds and applies to its own tokens: their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, group: Group, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packed = torch.stack(gradients)
        start_all_reduce(packed, ctx.group, LAYERS).wait()
        return (None, *packed)


class _Scatter(Function):
    """All tokens [1, N, D], the same on every rank, to a rank's own [1, N / r, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.size, 1)[group.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(gradients[0][0], ctx.group, LAYERS)[None], None


class _Gather(Function):
    """The inverse, for what every rank then computes alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_rows(x[0], group, LAYERS)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.group.size, 1)[ctx.group.rank].contiguous(), None


class _SplitNorm(Function):
    """LayerNorm over a width of which every rank holds x [..., D / r], with its part of weight and bias.

    Forward sums a token's sum and sum of squares over ranks, backward the two sums that its input's gradient needs: two
    numbers a token and direction, in one collective, in fp32 (or fp64). E[x^2] - E[x]^2 loses (mean / deviation)^2 of
    the precision, which is small where it is used: behind attention and GELU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: Group, width: int, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        sums = torch.stack([wide.sum(-1), torch.linalg.vecdot(wide, wide)])
        start_all_reduce(sums, group, NORMS).wait()
        mean = sums[0] / width
        scale = (sums[1] / width - mean * mean).clamp(min=0).add(eps).rsqrt()
        normed = (wide - mean[..., None]).mul_(scale[..., None])
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.group, ctx.width = group, width
        return torch.addcmul(bias.to(normed.dtype), normed, weight.to(normed.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        normed = (x.to(mean.dtype) - mean[..., None]).mul_(scale[..., None])
        rows, normed_rows = gradient.flatten(0, -2), normed.flatten(0, -2)
        d_weight = (rows * normed_rows).sum(0).to(weight.dtype)
        d_bias = rows.sum(0).to(weight.dtype)
        d_normed = gradient * weight.to(mean.dtype)
        sums = torch.stack([d_normed.sum(-1), torch.linalg.vecdot(d_normed, normed)])
        start_all_reduce(sums, ctx.group, NORMS).wait()
        sums = (sums / ctx.width)[..., None]
        d_x = d_normed.sub_(sums[0]).sub_(normed.mul_(sums[1])).mul_(scale[..., None])
        return d_x.to(x.dtype), d_weight, d_bias, None, None, None


class _Bare:
    """Without the entries that Megatron-core adds to a state dict for another library."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class ColumnLinear(_Bare, _megatron.ColumnParallelLinear):
    """x [..., D] -> this rank's [..., out / r]; rows of the weight and of the bias are cut."""

    def __init__(self, width: int, out: int, region: Region, parts: int = 1) -> None:
        """``parts``: matrices of ``out / parts`` rows that the weight stacks, each cut by itself."""
        super().__init__(width, out, **_options(region.group))
        self.region = region
        for parameter in (self.weight, self.bias):
            mark(parameter, Split(0, region.group.rank, region.group.size, out // parts))

    def forward(self, x: Tensor) -> Any:
        return _Product.apply(x, self.weight, self.bias, self.region)


class QueryKeyValueColumns(ColumnLinear):
    """q, k and v of this rank's heads, each [..., D / r]."""

    def __init__(self, width: int, region: Region) -> None:
        super().__init__(width, 3 * width, region, parts=3)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
        """With ``queries``: their q, and k and v of x."""
        if queries is None:
            return super().forward(x)
        own = len(self.weight) // 3
        q = _Product.apply(queries, self.weight[:own], self.bias[:own], self.region)
        return q, _Product.apply(x, self.weight[own:], self.bias[own:], self.region)


class RowLinear(_Bare, _megatron.RowParallelLinear):
    """This rank's [..., D / r] -> [..., out], summed over ranks; columns of the weight are cut, the bias is whole."""

    def __init__(self, width: int, out: int, region: Region) -> None:
        super().__init__(width, out, input_is_parallel=True, **_options(region.group))
        self.region = region
        mark(self.weight, Split(1, region.group.rank, region.group.size, width))

    def forward(self, x: Tensor) -> Tensor:
        y = _SumOverRanks.apply(F.linear(x, self.weight), self.region)
        (bias,) = _SameOnAllRanks.apply(self.region.group, self.bias) if self.region.sequence else (self.bias,)
        return y + bias


class TokenTable(_megatron.VocabParallelEmbedding):
    """ids -> [..., D]; rows of the table are cut, rounded up where the vocabulary does not divide."""

    def __init__(self, rows: int, width: int, group: Group) -> None:
        options = _options(group, linear=False)
        super().__init__(-(-rows // group.size) * group.size, width, **options)
        self.region = Region(group, sequence=False)
        mark(self.weight, Split(0, group.rank, group.size, rows))

    def forward(self, ids: Tensor) -> Any:
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        rows = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
        return _SumOverRanks.apply(rows.masked_fill(elsewhere[..., None], 0), self.region)


class VocabularyColumns(ColumnLinear):
    """Scores of every token, cut over ranks, rounded up where the vocabulary does not divide: [R, D] -> [R, V / r]."""

    def __init__(self, width: int, rows: int, group: Group) -> None:
        each = -(-rows // group.size)
        super().__init__(width, each * group.size, Region(group, sequence=False))
        self.out_features, self.held = each, Split(0, group.rank, group.size, rows)
        for parameter in (self.weight, self.bias):
            mark(parameter, self.held)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        """With ids [R]: their cross entropy and hits (`parallel.rows.told`), on every rank."""
        if targets is not None:
            return told(x, self.weight, self.bias, targets, _VocabularyShares(self.held, self.region.group))
        scores = super().forward(x)
        if self.held.length == self.out_features:
            return scores
        rows = torch.arange(self.out_features, device=x.device)
        return scores.masked_fill(rows >= self.held.length, -torch.inf)  # those that stand for no token


class _VocabularyShares:
    def __init__(self, held: Split, group: Group) -> None:
        self.start, self.length, self.group = held.start, held.length, group

    def whole(self, statistics: Tensor) -> Tensor:
        normaliser, best, wanted = all_gather_rows(statistics[None], self.group, LAYERS).unbind(1)
        return torch.stack([normaliser.logsumexp(0), best.amax(0), wanted.amax(0)])

    def summed(self, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient, self.group, LAYERS)


class TokenNorm(nn.LayerNorm):
    """LayerNorm of a rank's own tokens, with weights that all ranks share."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _SameOnAllRanks.apply(self.group, self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SplitNorm(nn.Module):
    """LayerNorm over a width that is cut over ranks: exact, and so are its gradients."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__()
        self.width, self.eps, self.group = width, eps, group
        self.weight = nn.Parameter(torch.ones(width // group.size))
        self.bias = nn.Parameter(torch.zeros(width // group.size))
        for parameter in (self.weight, self.bias):
            mark(parameter, Split(0, group.rank, group.size, width))

    def forward(self, x: Tensor) -> Any:
        return _SplitNorm.apply(x, self.weight, self.bias, self.group, self.width, self.eps)


class TensorParallelLayers:
    """What a model is built from when its layers are cut (whole ones: m2_ds.model.layers.WholeLayers).

    ``norm`` makes those over a whole width, where every rank has all tokens.
    """

    def __init__(
        self,
        group: Group,
        sequence_parallel: bool = False,
        norm: Callable[[int, float], nn.Module] = nn.LayerNorm,
    ) -> None:
        self.group, self._norm = group, norm
        self.region = Region(group, sequence_parallel)
        self.sequence_ranks = group.size if sequence_parallel else 1

    def query_key_value(self, width: int) -> nn.Module:
        return QueryKeyValueColumns(width, self.region)

    def column(self, width: int, out: int) -> nn.Module:
        return ColumnLinear(width, out, self.region)

    def row(self, width: int, out: int) -> nn.Module:
        return RowLinear(width, out, self.region)

    def norm(self, width: int, eps: float) -> nn.Module:
        return TokenNorm(width, eps, self.group) if self.region.sequence else self._norm(width, eps)

    def split_norm(self, width: int, eps: float) -> nn.Module:
        return SplitNorm(width, eps, self.group)

    def token_table(self, rows: int, width: int) -> nn.Module:
        return TokenTable(rows, width, self.group)

    def vocabulary(self, width: int, rows: int) -> nn.Module:
        return VocabularyColumns(width, rows, self.group)

    def scatter(self, x: Tensor) -> Any:
        return _Scatter.apply(x, self.group) if self.region.sequence else x

    def gather(self, x: Tensor) -> Any:
        return _Gather.apply(x, self.group) if self.region.sequence else x

    def own(self, x: Tensor) -> Tensor:
        """Of something that every token has one of, those of this rank's tokens."""
        return x.chunk(self.group.size)[self.group.rank] if self.region.sequence else x


def _options(group: Group, linear: bool = True) -> dict[str, Any]:
    config = _model_parallel_config(
        tensor_model_parallel_size=group.size,
        use_cpu_initialization=True,  # on the device of torch's context, without a draw: m2_ds.model.weights draws
        perform_initialization=False,
        params_dtype=torch.get_default_dtype(),
    )
    options = {"config": config, "init_method": None, "tp_group": group.process_group or _Place(group)}
    return {**options, "bias": True, "skip_bias_add": False} if linear else options


class _Place:
    """Stands for a group that does not exist: a layer's shapes can be asked for without its ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def size(self) -> int:
        return self._group.size

    def rank(self) -> int:
        return self._group.rank
