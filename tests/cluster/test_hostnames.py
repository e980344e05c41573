"""Lists of machines, and the hostfile made of them."""

from pathlib import Path

import pytest

from m2_ds.cluster.command import hostfile
from m2_ds.cluster.hostnames import expand
from tests.cluster.conftest import RECIPE


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (("gpu1",), ["gpu1"]),
        (("gpu[08-11]",), ["gpu08", "gpu09", "gpu10", "gpu11"]),
        (("a[1,3-4]-ib,login.site", "10.0.0.7"), ["a1-ib", "a3-ib", "a4-ib", "login.site", "10.0.0.7"]),
        (("r[1-2]n[1-2]",), ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_names(texts: tuple[str, ...], names: list[str]) -> None:
    assert expand(texts) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu[1-2", "brackets do not match"),
        ("gpu[2-1]", "'2-1' is no range"),
        ("gpu[a]", "'a' is no range"),
        ("gpu 1", "is no name of a machine"),
        ("a,b,a", "named twice: a"),
        ("", "no hosts"),
    ],
)
def test_what_is_no_list_of_names(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expand((text,))


def test_hostfile_and_the_commands_that_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hosts"
    hostfile(RECIPE, ("seed=3",), hosts=("gpu[1-2]",), gpus_per_node=8, out=out)
    assert out.read_text() == "gpu1 slots=8\ngpu2 slots=8\n"
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"deepspeed --hostfile {out} --module m2_ds.{name} --config {RECIPE} seed=3" for name in ("doctor", "train")
    ]
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(out))) == {"gpu1": 8, "gpu2": 8}
