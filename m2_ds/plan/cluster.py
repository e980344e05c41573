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


class Arithmetic(Settings):
    """How fast a rank computes in one precision."""

    products: list[Rate] = Field(min_length=1, description="matrix products by width; between widths interpolated")
    attention_forward_tflops: float = Field(gt=0)
    attention_backward_tflops: float = Field(gt=0)
    pointwise_forward_gbs: float = Field(
        gt=0, description="bytes a second that norms, GELU and residuals read and write"
    )
    pointwise_backward_gbs: float = Field(gt=0)
    layer_forward_us: float = Field(0.0, ge=0, description="of a layer and modality, whatever its size: dispatch")
    layer_backward_us: float = Field(0.0, ge=0)
    gradient_ns: float = Field(gt=0, description="of a trained parameter: its gradient to the bucket and out of it")
    update_ns: float = Field(gt=0, description="of a parameter that a rank updates: norm, copies, AdamW, new weight")
    whole_update_ns: float | None = Field(
        None, gt=0, description="of a parameter at ZeRO 0, from its gradient to its new value; none: the two above"
    )
    step_ms: float = Field(0.0, ge=0, description="of a step, whatever its size: Python of engine and loss")
    tensor_us: float = Field(0.0, ge=0, description="of a trained tensor and step: the engine's loops over them")

    @model_validator(mode="after")
    def _by_width(self) -> Self:
        widths = [rate.width for rate in self.products]
        if widths != sorted(set(widths)):
            raise ValueError(f"products must be ordered by width, each once; the widths are {widths}")
        return self

    def product_tflops(self, width: float) -> tuple[float, float]:
        """(forward, backward) at a width: linear in its logarithm, constant beyond the measured ones."""
        below = [rate for rate in self.products if rate.width <= width]
        above = [rate for rate in self.products if rate.width >= width]
        if not below or not above:
            only = self.products[0] if not below else self.products[-1]
            return only.forward_tflops, only.backward_tflops
        low, high = below[-1], above[0]
        if low.width == high.width:
            return low.forward_tflops, low.backward_tflops
        share = math.log(width / low.width) / math.log(high.width / low.width)
        return (
            low.forward_tflops + share * (high.forward_tflops - low.forward_tflops),
            low.backward_tflops + share * (high.backward_tflops - low.backward_tflops),
        )

    def covers(self, width: float) -> bool:
        return self.products[0].width <= width <= self.products[-1].width


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
