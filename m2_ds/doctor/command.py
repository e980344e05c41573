"""``m2 doctor``: start the ranks of the examination, and make the page whatever becomes of them."""

import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from m2_ds import launch
from m2_ds.doctor import page
from m2_ds.doctor.check import Result
from m2_ds.doctor.report import Report

TAIL = 25  # lines of the ranks' output that are shown where they left no report


def doctor(
    recipe: tyro.conf.Positional[Path | None] = None,
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    processes: int | None = None,
    hostfile: Path | None = None,
    html: Path | None = None,
    json: Path | None = None,
) -> int:
    """Look at machine, disk, recipe, data, ranks and network before a run; ends with 1 where something is red.

    Nothing is trained and nothing stays behind. Under a cluster's launcher start `m2_ds.doctor` as you would
    `m2_ds.train`: docs/launching.md.

    Args:
        recipe: YAML file, see ds_configs/recipes/; none: machine and network only.
        overrides: field=value, as the run will get them.
        processes: ranks to start on this machine; by default one a GPU, or one a core, as m2 train does.
        hostfile: machines of the deepspeed launcher instead, a line a host: NAME slots=GPUS.
        html: also write the page to this file.
        json: also write everything to this file.
    """
    outputs = [part for name, path in (("--html", html), ("--json", json)) if path for part in (name, str(path))]
    if hostfile is not None:
        if processes is not None:
            raise ValueError("--processes is for this machine; of --hostfile each line says how many ranks it carries")
        if not hostfile.is_file():
            raise ValueError(f"--hostfile: there is no file {hostfile}; m2 launch hostfile writes one")
        return launch.doctor_on(hostfile, recipe, overrides, outputs)
    if processes is not None and processes < 1:
        raise ValueError(f"--processes is {processes}; give at least 1")
    return _here(recipe, overrides, processes or launch.ranks_of_this_machine(), html, json)


def _here(recipe: Path | None, overrides: tuple[str, ...], processes: int, html: Path | None, out: Path | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        code, output = launch.doctor(recipe, processes, overrides, path)
        if path.exists():
            report = page.read_report(path)
        else:
            from m2_ds.doctor.job import alone_here  # imports what the ranks import, and takes as long

            report = Report(
                str(recipe or "no recipe"), processes, ["this machine"], alone_here(recipe, overrides, processes)
            )
            tail = "\n".join(output.splitlines()[-TAIL:])
            found = f"the launcher ended with code {code} and no report:\n{tail}"
            report.results.append(Result(section="ranks", name="present", status="fail", found=found))
    if out is not None:
        page.write_report(report, out)
    if html is not None:
        page.write_html(report, html)
    page.print_page(report)
    return int(report.failed)
