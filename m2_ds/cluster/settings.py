"""What the templates are filled with, checked before: a wrong value is told here, not by a cluster an hour later."""

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from m2_ds.config import RunConfig
from m2_ds.parallel.config import Layout, contrast_groups
from m2_ds.schema import Settings, explain

RESTART_CODES = (75, 76)  # with which a rank ends that was interrupted, or that lost another one: going on helps
KILLED_CODES = (134, 135, 137, 139)  # of srun, where a rank was ended by SIGABRT, SIGBUS, SIGKILL or SIGSEGV: likewise
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # of a Service, which begins with a letter (RFC 1035)
_CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_SLURM_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise ValueError("must be one line")
    return text


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text) or len(text) > 50:
        raise ValueError("must be a lower-case letter and lower-case letters, digits, '-': at most 50, as in m2-emoji")
    return text


def _claim(text: str) -> str:
    if not _CLAIM.fullmatch(text):
        raise ValueError("must be the name of a claim: lower-case letters, digits, '-' and '.'")
    return text


def _slurm_time(text: str) -> str:
    if not _SLURM_TIME.fullmatch(text):
        raise ValueError("must be a time as Slurm reads it: 90 (minutes), 12:00:00 or 2-00:00:00 (days-hours)")
    return text


def _quantity(text: str) -> str:
    if not _QUANTITY.fullmatch(text):
        raise ValueError("must be a quantity as Kubernetes reads it: 64Gi, 8, 500m")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Quantity = Annotated[str, AfterValidator(_quantity)]


class Shape(Settings):
    """Nodes and ranks of a job, and what every template needs."""

    recipe: Path = Field(description="YAML file of the run")
    overrides: tuple[Line, ...] = Field((), description="field=value")
    nodes: int = Field(ge=1, description="machines")
    gpus_per_node: int = Field(ge=0, description="0: the ranks compute on the CPU")
    ranks_per_node: int = Field(0, ge=0, description="0: one a GPU")
    interface: Line = Field("", description="network interface that joins the nodes, for NCCL and gloo")
    python: Line = Field("python", description="interpreter of the environment on the nodes")
    doctor: bool = Field(True, description="look at nodes, recipe and network first, and end if something is red")
    restarts: int = Field(20, ge=0, description="how often the job may be started again by itself")

    @model_validator(mode="after")
    def _ranks(self) -> Self:
        if not self.gpus_per_node and not self.ranks_per_node:
            raise ValueError("gpus_per_node is 0: say how many ranks_per_node compute on the CPUs")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(f"ranks_per_node {self.ranks_per_node} is more than gpus_per_node {self.gpus_per_node}")
        return self

    @property
    def ranks_here(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_here

    def check_layout(self, config: RunConfig) -> None:
        """Raises ValueError where the recipe's layout or batch do not divide over these ranks."""
        layout = Layout.of(config.parallel, self.world_size)
        config.batch_shape(layout.data)
        last = layout.pipeline - 1
        nodes = [f"node {layout.rank(0, data, last) // self.ranks_here}" for data in range(layout.data)]
        contrast_groups(layout.data, config.parallel.contrast_group, nodes)


class SlurmJob(Shape):
    """A batch script. Fields are Slurm's own where they have its names."""

    job_name: Line = "m2"
    port: int | None = Field(
        None, ge=1024, le=65000, description="at which the first rank listens, and the next one; None: by job number"
    )
    time: Annotated[str, AfterValidator(_slurm_time)] = Field("24:00:00", description="limit of one start")
    partition: Line = ""
    account: Line = ""
    cpus_per_rank: int = Field(8, ge=1, description="cores a rank, its loader processes included")
    signal_before: int = Field(
        120, ge=10, description="seconds before the limit at which the job is told to write a checkpoint"
    )
    sbatch: tuple[Line, ...] = Field((), description="more options of sbatch, e.g. --constraint=h100")
    srun: tuple[Line, ...] = Field((), description="more options of srun, e.g. --container-image=IMAGE")
    setup: tuple[Line, ...] = Field((), description="shell lines before anything starts, e.g. module load cuda")
    folder: Path = Field(description="where the job works: paths of the recipe start from it")

    @model_validator(mode="after")
    def _options(self) -> Self:
        for name in ("sbatch", "srun"):
            if wrong := [option for option in getattr(self, name) if not option.startswith("-")]:
                raise ValueError(f"{name}: {wrong} are no options; write them as --name=value")
        return self


class Volume(Settings):
    """A persistent volume claim and where it is mounted."""

    claim: Annotated[str, AfterValidator(_claim)]
    path: Annotated[str, Field(pattern=r"^/[^\s:]*$")]


def volume_fields(text: str) -> dict[str, str]:
    """CLAIM:PATH as the fields of a `Volume`."""
    claim, colon, path = text.partition(":")
    if not colon:
        raise ValueError(f"--volume {text!r}: write CLAIM:PATH, as in training-data:/data")
    return {"claim": claim, "path": path}


class KubernetesJob(Shape):
    """A manifest: the recipe as a ConfigMap, a headless Service for names, an Indexed Job of one pod a node."""

    name: Annotated[str, AfterValidator(_label)] = "m2"
    namespace: Annotated[str, AfterValidator(lambda text: _label(text) if text else text)] = ""
    image: Annotated[str, Field(min_length=1), AfterValidator(_one_line)] = Field(
        description="container image with the package and its requirements"
    )
    folder: Annotated[str, Field(pattern=r"^/")] = Field(description="where the job works in the container")
    port: int = Field(29500, ge=1024, le=65000, description="at which the first rank listens; the next one, too")
    volumes: tuple[Volume, ...] = ()
    cpus: Quantity = Field("8", description="cores a pod")
    memory: Quantity = Field("64Gi", description="memory a pod, shared memory included")
    shared_memory: Quantity = Field("16Gi", description="of that, room in /dev/shm")
    resources: dict[Line, Quantity] = Field(default_factory=dict, description="more a pod, e.g. rdma/ib: 1")
    node_selector: dict[Line, Line] = Field(default_factory=dict)
    environment: dict[Line, Line] = Field(default_factory=dict)
    grace_s: int = Field(120, ge=10, description="seconds that a pod has to write a checkpoint when it is taken away")

    @model_validator(mode="after")
    def _names(self) -> Self:
        if wrong := [name for name in self.environment if not _NAME.fullmatch(name)]:
            raise ValueError(f"environment: {wrong} are no names of variables")
        paths = [volume.path for volume in self.volumes]
        if len(set(paths)) < len(paths):
            raise ValueError(f"volumes: {paths} name a path twice")
        return self


def settled(kind: type[Shape], fields: dict[str, Any], where: str) -> Any:
    """Checked settings, or ValueError with every wrong field, its value and what would be accepted."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ValueError(explain(error, where, kind)) from None
