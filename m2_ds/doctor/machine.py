"""What a machine has: versions, devices, cores, memory, shared memory, file handles, network names."""

import os
import resource
import shutil
import socket
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from m2_ds.config import RunConfig
from m2_ds.doctor.check import Check, Verdict, fail, ok, size, skipped, warn
from m2_ds.doctor.sizes import batch_bytes, numbers, state_bytes
from m2_ds.engine.setup import deepspeed_config, zero_stage
from m2_ds.model.kernels import choose
from m2_ds.parallel.config import Layout
from m2_ds.parallel.mesh import Mesh

OPEN_FILES = 4096  # shards, checkpoint files, and a connection for every pair of ranks
NVIDIA_SMI_LIMIT_S = 20
_DEVICE_NODE = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Place:
    """Where a rank of the job stands."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_here: int = 1

    @staticmethod
    def of_environment() -> "Place":
        """As the launcher says it; of a process without one: alone."""
        read = os.environ.get
        return Place(
            int(read("RANK", "0")),
            int(read("WORLD_SIZE", "1")),
            int(read("LOCAL_RANK", "0")),
            int(read("LOCAL_WORLD_SIZE") or read("LOCAL_SIZE") or 1),
        )

    @property
    def is_first_here(self) -> bool:
        """True on one rank of every host."""
        return self.local_rank == 0


def checks(config: RunConfig | None, place: Place) -> list[Check]:
    """Those of one host. ``config`` None: only what needs none."""
    found = [
        Check("machine", "versions", versions),
        Check("machine", "device", lambda: devices(config, place), limit_s=90, hang="the driver does not answer: look "
              "at dmesg and nvidia-smi on this host, and leave it out"),
        Check("machine", "cores", lambda: cores(config, place)),
        Check("machine", "open files", open_files),
        Check("machine", "network", lambda: network(place), hang="the name service does not answer: add this host to "
              "/etc/hosts"),
    ]  # fmt: skip
    if config is not None:
        found += [
            Check("machine", "memory", lambda: memory(config, place), limit_s=90),
            Check("machine", "shared memory", lambda: shared_memory(config, place)),
            Check("machine", "kernels", lambda: kernels(config)),
        ]
    return found


def required() -> tuple[SpecifierSet, list[Requirement]]:
    """The range of Python versions and of packages: of the checkout that runs, else of what was installed."""
    parser = ConfigParser()
    if parser.read(Path(__file__).parents[2] / "setup.cfg") and parser.get("metadata", "name", fallback="") == "m2_ds":
        python, lines = parser["options"]["python_requires"], parser["options"]["install_requires"].split("\n")
    else:
        python, lines = ">=3.11", requires("m2_ds") or []
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return SpecifierSet(python), [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def versions() -> Verdict:
    """Python and packages against the ranges that the package asks for."""
    python, packages = required()
    here = ".".join(map(str, sys.version_info[:3]))
    wrong = [] if here in python else [f"python {here} is not {python}"]
    for one in packages:
        try:
            found = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is not installed")
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found} is not {one.specifier}")
    if wrong:
        return fail("; ".join(wrong), "pip install -r requirements.txt (in the environment that the job runs in)")
    shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "megatron-core", "transformers"))
    return ok(f"python {here}, {shown}; {len(packages)} packages in range")


def devices(config: RunConfig | None, place: Place) -> Verdict:
    """GPUs enough for the ranks of this host, empty, and of the precision asked for; or that there are none."""
    if not torch.cuda.is_available():
        if _DEVICE_NODE.exists():
            return fail(
                f"this host has an NVIDIA driver, torch {torch.__version__} finds no GPU",
                "install a CUDA build of torch, look at CUDA_VISIBLE_DEVICES, and compare the driver's version",
            )
        return ok(f"no GPU: the CPU, {torch.backends.cpu.get_cpu_capability()}, over gloo")
    count = torch.cuda.device_count()
    if place.ranks_here > count:
        return fail(
            f"{place.ranks_here} ranks on this host, and torch sees {count} GPU(s)",
            f"start at most {count} ranks here, or look at CUDA_VISIBLE_DEVICES",
        )
    if config is not None and config.engine.precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        return fail(
            f"{torch.cuda.get_device_name(0)} has no bf16 arithmetic", "set engine.precision: fp32, or take another GPU"
        )
    free, used = [], []
    for number in range(place.ranks_here):
        available, total = torch.cuda.mem_get_info(number)
        free.append(available)
        if available < 0.9 * total:
            used.append(f"GPU {number} has {size(available)} of {size(total)} free")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    shown = f"{count} x {torch.cuda.get_device_name(0)}, driver {_driver()}, CUDA {torch.version.cuda}, NCCL {nccl}"
    if used:
        return warn(f"{shown}; {', '.join(used)}", "end what else runs on it: nvidia-smi names the processes")
    need = _state(config, place)
    if need is not None and need > min(free):
        return fail(
            f"weights, gradients and optimizer take {size(need)} a rank, the GPU has {size(min(free))} free",
            "more ranks, a higher ZeRO stage, offload, or tensor and pipeline parallelism: docs/parallelism.md",
        )
    return ok(shown if need is None else f"{shown}; state takes {size(need)} of {size(min(free))} a rank")


def _state(config: RunConfig | None, place: Place) -> float | None:
    """Bytes of a rank's weights, gradients and optimizer; None where the configuration does not say (told elsewhere).

    What is offloaded counts as if it stayed.
    """
    if config is None:
        return None
    try:
        mesh = Mesh.imagined(Layout.of(config.parallel, place.world_size))
        settings = deepspeed_config(config, mesh)
        if any("offload" in name for name in settings["zero_optimization"]):
            return None
        return state_bytes(config, numbers(config), mesh.layout, zero_stage(settings))
    except ValueError:
        return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return "not told"
    return done.stdout.split("\n")[0].strip() or "not told"


def cores(config: RunConfig | None, place: Place) -> Verdict:
    """Threads of all ranks and their loader processes against the cores that this process may use."""
    there = len(os.sched_getaffinity(0))
    own = (config.engine.threads if config else None) or max(1, there // place.ranks_here)
    workers = config.data.workers if config else 0
    # On a GPU machine a rank computes elsewhere: its loader processes are what needs cores.
    threads = place.ranks_here * (workers if torch.cuda.is_available() else own)
    busy = os.getloadavg()[0]
    shown = f"{there} cores for {place.ranks_here} rank(s) of {own} thread(s) and {workers} loader process(es) each"
    if threads > there:
        return warn(
            f"{shown}: {threads} at once",
            f"set engine.threads and data.workers so that all ranks of a host together take at most {there}",
        )
    if busy > there / 2 + place.ranks_here:
        return warn(f"{shown}; load {busy:.1f}", "other processes use these cores: end them, or expect slower steps")
    return ok(f"{shown}; load {busy:.1f}")


def memory(config: RunConfig, place: Place) -> Verdict:
    """What loaders cache, and on a CPU (or offloaded) the training state, against this host's memory."""
    loaders = max(1, config.data.workers)
    cached = loaders * (config.data.picture_cache_mb + len(config.data.sources) * config.data.row_group_cache_mb) << 20
    need = float(place.ranks_here * cached)
    if not torch.cuda.is_available():
        need += place.ranks_here * (_state(config, place) or 0.0)
    found = psutil.virtual_memory()
    shown = f"{size(found.available)} of {size(found.total)} free; state and caches of {place.ranks_here} rank(s) may "
    shown += f"take {size(need)}"
    if need > found.total:
        return fail(shown, "lower data.workers, data.picture_cache_mb or data.row_group_cache_mb, or start fewer ranks")
    if need > found.available:
        return warn(shown, "end what else runs here, or lower data.workers and data.picture_cache_mb")
    return ok(shown)


def shared_memory(config: RunConfig, place: Place) -> Verdict:
    """Room in /dev/shm for the batches of loader processes and for NCCL."""
    there = shutil.disk_usage("/dev/shm").free
    try:
        pairs = config.batch_shape(Layout.of(config.parallel, place.world_size).data)[0]
    except ValueError:
        pairs = config.micro_batch or config.global_batch
    made = config.data.workers * config.data.prefetch * batch_bytes(config, pairs)
    need = place.ranks_here * (made + ((64 << 20) if torch.cuda.is_available() else 0))
    shown = f"{size(there)} free in /dev/shm, batches and communication take up to {size(need)}"
    if need > there:
        return fail(
            shown,
            "give the container more (docker --shm-size, an emptyDir of medium Memory on Kubernetes), or lower "
            "data.workers or data.prefetch",
        )
    return ok(shown)


def open_files() -> Verdict:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        wanted = OPEN_FILES if hard < 0 else min(OPEN_FILES, hard)
        return warn(
            f"a process may open {soft} files, {OPEN_FILES} are advised",
            f"ulimit -n {wanted} before the job (the limit that a user may set here is {hard})",
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").exists() and locked >= 0 and any(Path("/sys/class/infiniband").iterdir()):
        return warn(
            f"RDMA adapters are there, and a process may lock {size(locked)} only",
            "ulimit -l unlimited for the job (memlock in /etc/security/limits.conf, or the service's LimitMEMLOCK)",
        )
    return ok(f"{soft} files a process" if soft >= 0 else "any number of files a process")


def network(place: Place) -> Verdict:
    """Interfaces that variables name exist; the host's name is known and, with several hosts, no loopback address."""
    there = psutil.net_if_addrs()
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        asked = os.environ.get(variable, "")
        if not asked or asked.startswith("^"):
            continue
        # NCCL takes names as beginnings, '=' asks for the whole name; gloo takes the whole.
        whole = variable.startswith("GLOO") or asked.startswith("=")
        for name in asked.lstrip("=").split(","):
            if not any(known == name if whole else known.startswith(name) for known in there):
                return fail(f"{variable} is {asked}, no such interface here: {', '.join(there)}", f"set {variable}")
    name, several = socket.gethostname(), place.ranks_here < place.world_size
    try:
        address = socket.gethostbyname(name)
    except OSError:
        if several and not os.environ.get("GLOO_SOCKET_IFNAME"):
            return fail(f"the name of this host, {name}, is not known to itself", "add it to /etc/hosts or to DNS")
        return ok(f"{name}; interfaces {', '.join(there)}")
    if several and address.startswith("127.") and not os.environ.get("GLOO_SOCKET_IFNAME"):
        return warn(
            f"{name} is {address} to itself, by which other hosts cannot reach it",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to the others, or correct "
            "/etc/hosts",
        )
    return ok(f"{name} is {address}; interfaces {', '.join(there)}")


def kernels(config: RunConfig) -> Verdict:
    """Optional parts that the recipe asks for."""
    asked = []
    if config.engine.apex or config.engine.fp8:
        choose(config.engine.apex, config.engine.fp8, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        asked.append("apex" if config.engine.apex else "transformer_engine")
    if config.engine.build_ops:
        if shutil.which("g++") is None or shutil.which("ninja") is None:
            return fail("engine.build_ops compiles at the start, and g++ or ninja is missing", "install both, or set "
                        "engine.build_ops: false")  # fmt: skip
        asked.append("compiled operations")
    if config.lora is not None:
        if find_spec("peft") is None:
            return fail("lora needs peft, which is not installed", "pip install peft")
        asked.append("peft")
    return ok(f"there: {', '.join(asked)}") if asked else skipped("the recipe asks for none")
