"""The machines that a run is planned for: a small YAML file, a preset of ds_configs/clusters, or this one, measured.

A rank is a GPU (or, without one, a process). Bandwidths are GB/s (1e9 bytes) each way, latencies microseconds of a hop.
"""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from m2_ds.schema import Settings, load_settings

PRESETS = Path(__file__).resolve().parents[2] / "ds_configs" / "clusters"
Basis = Literal["data sheet", "measured"]
Collective = Literal["all_reduce", "all_reduce_bf16", "all_gather", "reduce_scatter", "send"]


class Rate(Settings):
    """Speed of a layer's four matrix products at one width, TFLOP/s of a rank."""

    width: int = Field(gt=0, description="hidden size D; products are D x 3 D, D x D, D x 4 D and 4 D x D")
    forward_tflops: float = Field(gt=0)
    backward_tflops: float = Field(gt=0)


class AttentionRate(Settings):
    """Speed of attention (both products and the softmax between them) at one length, TFLOP/s of a rank."""

    length: int = Field(gt=0, description="tokens of a sequence")
    forward_tflops: float = Field(gt=0)
    backward_tflops: float = Field(gt=0)


class Partitioned(Settings):
    """What ZeRO 3 takes. A quarter of the tensors are counted as large enough to be gathered."""

    gather_ns: float = Field(ge=0, description="of a parameter, each time that it is gathered, sending included")
    gather_us: float = Field(ge=0, description="of a tensor, each time")
    update_ns: float = Field(ge=0, description="of a parameter, from its gradient to its new value")
    tensor_us: float = Field(ge=0, description="of a trained tensor and step, beside what other stages take")


class Arithmetic(Settings):
    """How fast a rank computes in one precision."""

    products: list[Rate] = Field(min_length=1, description="matrix products by width; between widths interpolated")
    attention: list[AttentionRate] = Field(min_length=1, description="by length; between lengths interpolated")
    pointwise_forward_gbs: float = Field(
        gt=0, description="bytes a second that norms, GELU and residuals read and write"
    )
    pointwise_backward_gbs: float = Field(gt=0)
    layer_forward_us: float = Field(0.0, ge=0, description="of a layer and modality, whatever its size: dispatch")
    layer_backward_us: float = Field(0.0, ge=0)
    cut_layer_forward_us: float = Field(
        0.0, ge=0, description="of a layer and modality that tensor-parallel ranks share, beside the above"
    )
    cut_layer_backward_us: float = Field(0.0, ge=0)
    gradient_ns: float = Field(gt=0, description="of a trained parameter: its gradient to the bucket and out of it")
    update_ns: float = Field(gt=0, description="of a parameter that a rank updates: norm, copies, AdamW, new weight")
    whole_update_ns: float | None = Field(
        None, gt=0, description="of a parameter at ZeRO 0, from its gradient to its new value; none: the two above"
    )
    partitioned: Partitioned | None = Field(None, description="at ZeRO 3; none: by the first two, bytes and messages")
    step_ms: float = Field(0.0, ge=0, description="of a step, whatever its size: Python of engine and loss")
    tensor_us: float = Field(0.0, ge=0, description="of a trained tensor and step: the engine's loops over them")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, key, rates in (("products", "width", self.products), ("attention", "length", self.attention)):
            keys = [getattr(rate, key) for rate in rates]
            if keys != sorted(set(keys)):
                raise ValueError(f"{name} must be ordered by {key}, each once; the {key}s are {keys}")
        return self

    def product_tflops(self, width: float) -> tuple[float, float]:
        """(forward, backward) at a width."""
        return _interpolated([(r.width, r.forward_tflops, r.backward_tflops) for r in self.products], width)

    def attention_tflops(self, length: float) -> tuple[float, float]:
        """(forward, backward) at a length."""
        return _interpolated([(r.length, r.forward_tflops, r.backward_tflops) for r in self.attention], length)

    def covers(self, width: float) -> bool:
        return self.products[0].width <= width <= self.products[-1].width


def _interpolated(rates: list[tuple[int, float, float]], at: float) -> tuple[float, float]:
    """Linear in the logarithm of the size that rates are ordered by, constant beyond the first and the last."""
    below = [rate for rate in rates if rate[0] <= at]
    above = [rate for rate in rates if rate[0] >= at]
    low, high = below[-1] if below else rates[0], above[0] if above else rates[-1]
    if low[0] == high[0]:
        return low[1:]
    share = math.log(at / low[0]) / math.log(high[0] / low[0])
    return low[1] + share * (high[1] - low[1]), low[2] + share * (high[2] - low[2])


class Link(Settings):
    """What joins ranks. ``shares`` of the bandwidth are what a collective reaches where it is not all of it.

    An all-reduce of bf16 has a share of its own where sums are as dear as sending (gloo)."""

    bandwidth_gbs: float = Field(gt=0, description="between ranks of a node: of a rank; between nodes: of a node")
    latency_us: float = Field(ge=0, description="of one hop of a ring")
    shares: dict[Collective, float] = Field(default_factory=dict, description="by collective; 1 where not named")

    def bytes_per_s(self, collective: Collective) -> float:
        plain = collective if collective in self.shares else collective.removesuffix("_bf16")
        return self.bandwidth_gbs * 1e9 * next((s for name, s in self.shares.items() if name == plain), 1.0)


class Host(Settings):
    """Of a node: where offloaded state lives."""

    memory_gb: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0, description="memory bandwidth of the node, shared by its ranks")
    to_device_gbs: float = Field(gt=0, description="between the host and one rank's device (PCIe)")


class Measurement(Settings):
    """Speeds of this many ranks that work at once on one machine."""

    ranks: int = Field(gt=0)
    arithmetic: dict[Literal["fp32", "bf16"], Arithmetic]
    link: Link | None = Field(None, description="between these ranks; none with one")


class Cluster(Settings):
    """Nodes of equal ranks."""

    name: str
    basis: Basis = Field(
        description="data sheet: makers' numbers times the shares in notes; measured: m2 plan --measure"
    )
    device: Literal["gpu", "cpu"]
    nodes: int = Field(1, gt=0)
    ranks_per_node: int = Field(gt=0)
    memory_gb: float = Field(gt=0, description="of one rank")
    reserve_gb: float = Field(ge=0, description="of it, taken by context, communicators, libraries and fragmentation")
    peak_tflops: dict[Literal["fp32", "bf16"], float] = Field(
        default_factory=dict, description="dense peak of a rank, for MFU"
    )
    arithmetic: dict[Literal["fp32", "bf16"], Arithmetic]
    intra: Link = Field(description="between ranks of one node")
    inter: Link = Field(description="between nodes")
    overlap: float = Field(
        0.0, ge=0, le=1, description="share of the backward pass behind which ZeRO 2 and 3 hide their collectives"
    )
    host: Host | None = None
    at_fewer_ranks: list[Measurement] = Field(
        default_factory=list, description="measured machines: speeds where fewer ranks work at once"
    )
    notes: list[str] = Field(default_factory=list, description="what the numbers assume; printed with every plan")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def with_size(self, nodes: int | None, ranks_per_node: int | None) -> Self:
        """Another number of nodes, or of ranks a node; of a measured machine with the speeds of that many ranks.

        Raises ValueError for more ranks than a measured machine has been measured with.
        """
        changes: dict[str, object] = {"nodes": nodes or self.nodes}
        wanted = ranks_per_node or self.ranks_per_node
        if wanted != self.ranks_per_node:
            changes["ranks_per_node"] = wanted
            if self.basis == "measured":
                known = {m.ranks: m for m in self.at_fewer_ranks}
                if wanted not in known:
                    counts = ", ".join(map(str, [*known, self.ranks_per_node]))
                    raise ValueError(
                        f"{self.name} was measured with {counts} rank(s), not {wanted}; measure it again with "
                        f"--ranks {wanted}"
                    )
                changes["arithmetic"] = known[wanted].arithmetic
                changes["memory_gb"] = self.memory_gb * self.ranks_per_node / wanted
                changes["intra"] = known[wanted].link or self.intra
        return self.model_copy(update=changes)

    def for_precision(self, precision: Literal["fp32", "bf16"]) -> Arithmetic:
        if precision not in self.arithmetic:
            raise ValueError(
                f"{self.name} has no speeds for engine.precision {precision}, only for {', '.join(self.arithmetic)}; "
                "measure them, or add them to its file"
            )
        return self.arithmetic[precision]


def load_cluster(name: str) -> Cluster:
    """A preset by name (a100-80, h100, h200) or a file. Raises ValueError that names the file and the field."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
            raise ValueError(
                f"--cluster {name}: there is no such preset; there are {known}. Give a .yaml file of your own, or "
                "measure this machine: m2 plan --measure this.yaml"
            )
    return load_settings(Cluster, path, (), "cluster file")
