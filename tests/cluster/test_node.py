"""Starting the ranks of a node: exit codes, signals, and an end for those that do not end."""

import sys
import time

import pytest

from m2_ds.cluster.node import main, run_node


def ranks(code: str, count: int, grace_s: float = 5.0) -> int:
    return run_node([sys.executable, "-S", "-c", f"import os, sys, time; rank = int(os.environ['RANK']); {code}"],
                    node=1, nodes=2, ranks=count, grace_s=grace_s)  # fmt: skip


def test_the_first_bad_code_counts() -> None:
    assert ranks("sys.exit(0)", 2) == 0
    assert ranks("time.sleep({2: 0.8, 3: 0}[rank]); sys.exit({2: 1, 3: 75}[rank])", 2) == 75


def test_a_killed_rank_is_told_by_its_signal() -> None:
    assert ranks("os.kill(os.getpid(), 9)", 1) == 137


def test_what_does_not_end_is_ended() -> None:
    started = time.monotonic()
    code = "import signal; signal.signal(15, signal.SIG_IGN) if rank == 2 else None; "
    assert ranks(code + "sys.exit(1) if rank == 3 else time.sleep(99)", 3, grace_s=0.3) == 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("given", [["--node", "2"], ["--node", "-1"], ["--node", "0", "--ranks", "0"]])
def test_a_node_that_there_is_not_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--nodes", "2", "--ranks", "1", *given, "m2_ds.train"])
    assert ended.value.code == 2 and "there is no such node" in capsys.readouterr().err
