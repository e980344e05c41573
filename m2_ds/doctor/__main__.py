"""The launcher's target:  deepspeed --hostfile hosts --module m2_ds.doctor --config RECIPE [field=value ...]

The first rank prints the page and ends with 1 where something is red; the others end with 0, so that no launcher stops
the first one early.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="m2_ds.doctor", description="Look at machines, recipe and network; started by deepspeed, torchrun or srun."
    )
    parser.add_argument("--config", type=Path, help="recipe (YAML); none: machines and network only")
    parser.add_argument("--html", type=Path, help="also write the page to this file")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--silent", action="store_true", help="print no page")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. data.workers=2")
    options = parser.parse_args(arguments)
    from m2_ds.doctor import page
    from m2_ds.doctor.job import examine

    try:
        report = examine(options.config, options.overrides)
    except (ValueError, TimeoutError) as error:
        print(f"m2_ds.doctor, rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 0
    if report is None:
        return 0
    if options.json:
        page.write_report(report, options.json)
    if options.html:
        page.write_html(report, options.html)
    if not options.silent:
        page.print_page(report)
    return int(report.failed)


if __name__ == "__main__":
    from m2_ds.engine.setup import quiet

    quiet()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that were left behind in a dead file system or network would keep the process
