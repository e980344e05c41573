"""``m2 launch``: files that start a recipe on several machines, checked against it."""

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from m2_ds.cluster import render
from m2_ds.cluster.hostnames import expand
from m2_ds.cluster.settings import KubernetesJob, Shape, SlurmJob, settled, volume_fields
from m2_ds.config import load_config

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]
Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]  # one value each time that the option is given


def slurm(
    recipe: tyro.conf.Positional[Path],
    overrides: Overrides = (),
    *,
    nodes: int,
    gpus_per_node: int,
    ranks_per_node: int = 0,
    job_name: str | None = None,
    time: str = "24:00:00",
    partition: str = "",
    account: str = "",
    cpus_per_rank: int = 8,
    interface: str = "",
    python: str = "python",
    setup: Several = (),
    sbatch: Several = (),
    srun: Several = (),
    folder: Path | None = None,
    port: int | None = None,
    signal_before: int = 120,
    restarts: int = 20,
    doctor: bool = True,
    out: Path | None = None,
) -> None:
    """A batch script for Slurm: m2 doctor, then m2_ds.train, told before the time limit and requeued by itself.

    Args:
        recipe: YAML file, on a file system that all nodes see.
        overrides: field=value, as for m2 train.
        nodes: machines.
        gpus_per_node: GPUs of each; 0: train on CPUs.
        ranks_per_node: ranks of each, if not one a GPU.
        job_name: by default the recipe's name.
        time: limit of one start, as Slurm writes it; the run goes on in the next.
        partition: Slurm's partition.
        account: Slurm's account.
        cpus_per_rank: cores a rank, its loader processes included.
        interface: network interface that joins the nodes, e.g. ib0; by default NCCL's and gloo's choice.
        python: interpreter on the nodes.
        setup: a shell line before anything starts, e.g. 'module load cuda'; may be given several times.
        sbatch: another option of sbatch, written --sbatch=--constraint=h100; several times.
        srun: another option of srun, written --srun=--container-image=IMAGE; several times.
        folder: where the job works; by default here.
        port: at which the first rank listens, and for the doctor the next one; by default from the job's number.
        signal_before: seconds before the limit at which every rank gets SIGUSR1.
        restarts: how often the job may requeue itself.
        doctor: look at the nodes first, and do not train if something is red.
        out: file; by default the terminal.
    """
    config = load_config(recipe, overrides)
    fields = {
        "recipe": recipe, "overrides": overrides, "nodes": nodes, "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node, "job_name": job_name or recipe.stem, "time": time, "partition": partition,
        "account": account, "cpus_per_rank": cpus_per_rank, "interface": interface, "python": python, "setup": setup,
        "sbatch": sbatch, "srun": srun, "folder": (folder or Path()).absolute(), "port": port,
        "signal_before": signal_before, "restarts": restarts, "doctor": doctor,
    }  # fmt: skip
    job = settled(SlurmJob, fields, "m2 launch slurm")
    job.check_layout(config)
    render.write(out, render.slurm(job, _command()), executable=True)


def kubernetes(
    recipe: tyro.conf.Positional[Path],
    overrides: Overrides = (),
    *,
    image: str,
    nodes: int,
    gpus_per_node: int,
    ranks_per_node: int = 0,
    name: str | None = None,
    namespace: str = "",
    folder: str = "/workspace",
    volume: Several = (),
    cpus: str = "8",
    memory: str = "64Gi",
    shared_memory: str = "16Gi",
    resource: Several = (),
    node_selector: Several = (),
    environment: Several = (),
    interface: str = "",
    python: str = "python",
    port: int = 29500,
    grace: int = 120,
    restarts: int = 20,
    doctor: bool = True,
    out: Path | None = None,
) -> None:
    """One manifest for Kubernetes: the recipe, a headless Service and an Indexed Job of one pod a node.

    Args:
        recipe: YAML file; it goes into the manifest, with overrides and defaults.
        overrides: field=value, as for m2 train.
        image: container image with the package and its requirements.
        nodes: pods.
        gpus_per_node: GPUs of each; 0: train on CPUs.
        ranks_per_node: ranks of each, if not one a GPU.
        name: of the objects; by default m2- and the recipe's.
        namespace: by default that of kubectl.
        folder: where the job works in the container: paths of the recipe start from it.
        volume: CLAIM:PATH, a persistent volume claim and where it is mounted; several times.
        cpus: cores a pod.
        memory: memory a pod, shared memory included.
        shared_memory: room in /dev/shm.
        resource: another resource of a pod, e.g. rdma/ib=1; several times.
        node_selector: a label of the nodes to use, e.g. gpu=h100; several times.
        environment: a variable, e.g. NCCL_DEBUG=INFO; several times.
        interface: network interface that joins the pods; by default NCCL's and gloo's choice.
        python: interpreter in the image.
        port: at which the first rank listens; the doctor takes the next one.
        grace: seconds that a pod has to write a checkpoint when it is taken away.
        restarts: how often pods may fail, on average, before the job does.
        doctor: look at the pods first, and do not train if something is red.
        out: file; by default the terminal.
    """
    config = load_config(recipe, overrides)
    fields = {
        "recipe": recipe, "overrides": overrides, "image": image, "nodes": nodes, "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node, "name": name or _name(recipe.stem),
        "namespace": namespace, "folder": folder, "volumes": tuple(map(volume_fields, volume)), "cpus": cpus,
        "memory": memory, "shared_memory": shared_memory, "interface": interface,
        "resources": _pairs("--resource", resource), "node_selector": _pairs("--node-selector", node_selector),
        "environment": _pairs("--environment", environment), "python": python, "port": port,
        "grace_s": grace, "restarts": restarts, "doctor": doctor,
    }  # fmt: skip
    job = settled(KubernetesJob, fields, "m2 launch kubernetes")
    job.check_layout(config)
    render.write(out, render.kubernetes(job, config, _command()))


def hostfile(
    recipe: tyro.conf.Positional[Path],
    overrides: Overrides = (),
    *,
    hosts: tuple[str, ...],
    gpus_per_node: int,
    out: Path,
) -> None:
    """A hostfile for the deepspeed launcher, which reaches the machines by ssh; prints the commands that use it.

    Args:
        recipe: YAML file, on a file system that all hosts see.
        overrides: field=value, as for m2 train.
        hosts: names of machines, the first rank's first: gpu[01-04] or gpu01 gpu02.
        gpus_per_node: GPUs of each, or processes where there are none.
        out: file.
    """
    config, names = load_config(recipe, overrides), expand(hosts)
    fields = {"recipe": recipe, "overrides": overrides, "nodes": len(names), "gpus_per_node": gpus_per_node}
    shape = settled(Shape, fields, "m2 launch hostfile")
    shape.check_layout(config)
    render.write(out, render.hostfile(names, gpus_per_node))
    target = shlex.join(["--config", str(recipe), *overrides])
    print(f"deepspeed --hostfile {shlex.quote(str(out))} --module m2_ds.doctor {target}")
    print(f"deepspeed --hostfile {shlex.quote(str(out))} --module m2_ds.train {target}")


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE, each."""
    if wrong := [text for text in texts if not text.partition("=")[2]]:
        raise ValueError(f"{option} {' '.join(wrong)}: write NAME=VALUE")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _name(stem: str) -> str:
    return "m2-" + re.sub("[^a-z0-9]+", "-", stem.lower()).strip("-")


def _command() -> str:
    return shlex.join(["m2", *sys.argv[1:]]).replace("\n", " ")
