"""Templates to files."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from m2_ds.cluster.settings import KILLED_CODES, RESTART_CODES, KubernetesJob, SlurmJob
from m2_ds.config import RunConfig
from m2_ds.files import write_atomically

STOP_CODES = (2, 3)  # wrong input, and what the doctor found: the same again would end the same way


def slurm(job: SlurmJob, command: str) -> str:
    """A batch script. ``command``: what wrote it, for its first lines."""
    return _template("slurm.sh.j2").render(job=job, command=command, restart_codes=RESTART_CODES + KILLED_CODES)


def kubernetes(job: KubernetesJob, config: RunConfig, command: str) -> str:
    """A manifest of three objects. ``config``: the resolved recipe, which goes into it."""
    text = _template("kubernetes.yaml.j2").render(
        job=job, command=command, restart_codes=RESTART_CODES, stop_codes=STOP_CODES, recipe=config.to_yaml()
    )
    documents = list(yaml.safe_load_all(text))
    assert [document["kind"] for document in documents] == ["ConfigMap", "Service", "Job"]
    return text


def hostfile(hosts: list[str], slots: int) -> str:
    """Lines as the deepspeed launcher reads them."""
    return "".join(f"{host} slots={slots}\n" for host in hosts)


def write(path: Path | None, text: str, executable: bool = False) -> None:
    """To a file, or to the terminal."""
    if path is None:
        print(text, end="")
        return
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")
    write_atomically(path, text.encode())
    if executable:
        path.chmod(0o755)


def _template(name: str) -> Any:
    # Neither file is HTML. Words of a shell go through ``q``, strings of YAML through ``tojson``.
    environment = Environment(
        loader=PackageLoader("m2_ds.cluster"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["q"] = lambda value: shlex.quote(str(value))
    return environment.get_template(name)
