"""The commands as they are typed."""

from pathlib import Path

import pytest
import yaml

from m2_ds import cli
from tests.cluster.conftest import RECIPE
from tests.cluster.slurm import directives


def test_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"launch slurm {RECIPE} seed=4 --nodes 2 --gpus-per-node 8 --sbatch=--constraint=h100 --sbatch=--mem=0".split()
    )
    words += ["--setup", "module load cuda", "--setup", "source bin/activate", "--srun=--mpi=none", "--out"]
    cli.main([*words, str(tmp_path / "job.sh")])
    script = (tmp_path / "job.sh").read_text()
    found = directives(script)
    assert found["constraint"] == "h100" and found["mem"] == "0"
    assert "\nmodule load cuda\nsource bin/activate\n" in script and "--cpus-per-task=8 --mpi=none" in script
    assert f"--config {RECIPE} seed=4)" in script
    cli.main(words[:-1])  # without --out: to the terminal
    assert "#SBATCH --nodes=2" in capsys.readouterr().out


def test_kubernetes(tmp_path: Path) -> None:
    words = f"launch kubernetes {RECIPE} --image x/y:1 --nodes 2 --gpus-per-node 8 --volume a:/a --volume b:/b".split()
    words += ["--resource", "rdma/ib=1", "--resource", "x/z=2", "--environment", "FLAGS=-a b=c"]
    words += ["--node-selector", "gpu=h100", "--out"]
    cli.main([*words, str(tmp_path / "job.yaml")])
    job = list(yaml.safe_load_all((tmp_path / "job.yaml").read_text()))[2]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["metadata"]["name"] == "m2-10b" and pod["nodeSelector"] == {"gpu": "h100"}
    assert container["resources"]["limits"] | {"rdma/ib": "1", "x/z": "2"} == container["resources"]["limits"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]][2:] == ["/a", "/b"]
    assert {"name": "FLAGS", "value": "-a b=c"} in container["env"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("slurm {} --nodes 3 --gpus-per-node 1", "does not divide 3 rank(s)"),
        ("kubernetes {} --image x --nodes 2 --gpus-per-node 8 --name 1b", "name: must be a lower-case letter"),
        ("kubernetes {} --image x --nodes 2 --gpus-per-node 8 --resource rdma", "--resource rdma: write NAME=VALUE"),
        ("hostfile {} --hosts gpu[2-1] --gpus-per-node 8 --out hosts", "'2-1' is no range"),
        ("slurm none.yaml --nodes 1 --gpus-per-node 8", "no such recipe"),
    ],
)
def test_what_is_wrong_is_told_in_a_paragraph(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", *words.format(RECIPE).split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
