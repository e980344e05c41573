"""The rules of the house, held by reading the source: arrows between rooms, collectives, file lengths, words.

Each rule is a function from one file's source to complaints. It is run over the package, and over a bad piece of code
to show that it complains.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "m2_ds"
MAX_LINES = 400

# A room is a folder or a file of m2_ds. Arrows run down only: from a floor to the ones below it, or inside a room.
FLOORS: dict[str, int] = {
    room: floor
    for floor, rooms in enumerate(
        [
            ("schema", "files", "words"),
            ("parallel", "data"),
            ("model", "loss"),
            ("evaluation", "convert", "prepare", "config", "api"),
            ("engine", "plan", "cluster"),
            ("train", "evaluate", "export", "launch", "restarts", "cli", "commands", "quickstart", "doctor", "watch"),
        ]
    )
    for room in rooms
}
# Arrows on one floor: the run's configuration is put together from the rooms' own blocks, the door to Python reads what
# convert wrote, and the console starts everything else.
ALONG_A_FLOOR = {("config", "evaluation"), ("api", "convert")}
# A preparation scores pairs by a model that it opens as any user does.
ALONG_A_FLOOR |= {("prepare", "api")}
# A plan asks the engine how it cuts a pipeline, which weights it trains and what it would refuse.
ALONG_A_FLOOR |= {("plan", "engine")}
ALONG_A_FLOOR |= {("cli", "train"), ("cli", "launch"), ("cli", "quickstart")}
ALONG_A_FLOOR |= {("quickstart", "launch"), ("commands", "launch"), ("commands", "evaluate"), ("doctor", "launch")}
ALONG_A_FLOOR |= {("launch", "restarts")}
# Down, but not meant: a model file holds mathematics, and so does a loss.
NOT_DOWN = {("model", "data"), ("loss", "data")}

COLLECTIVES = {
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_coalesced"),
    *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single"),
    *("barrier", "monitored_barrier", "broadcast", "broadcast_object_list"),
    *("gather", "gather_object", "scatter", "scatter_object_list", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("send", "recv", "isend", "irecv", "send_object_list", "recv_object_list", "P2POp"),
}
COMMUNICATION = ("torch.distributed", "deepspeed.comm")
MESH = f"{PACKAGE}/parallel/mesh.py"

WORDS = re.compile(
    r"\b(todo|fixme|xxx|hack|placeholders?|stub|stubbed|tbd|coming soon|not implemented yet|lorem ipsum)\b"
    r"|\bissues? #?\d+|(?<![\w.])/(work|root|home)/|\b(pypi\.org|python"
    r"hosted\.org|npmjs\.(org|com))\b",
    re.IGNORECASE,
)


def room_of(path: str) -> str:
    """'m2_ds/data/sources/emoji.py' -> 'data'; 'm2_ds/train.py' -> 'train'; 'm2_ds/__init__.py' -> '__init__'."""
    return Path(path).parts[1].removesuffix(".py")


def imported_modules(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import anywhere in a file, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(Path(path).parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def arrows(source: str, path: str) -> list[str]:
    """Imports that do not run down."""
    room = room_of(path)
    if room == "__init__":
        return []  # the door: it hands out names of the rooms and imports them on first use
    if room not in FLOORS:
        return [f"{path}: {room} is on no floor; give it one in {Path(__file__).name}"]
    found = []
    for line, module in imported_modules(ast.parse(source), path):
        parts = module.split(".")
        if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == "__version__":
            continue
        target = parts[1]
        if target == room:
            continue
        down = target in FLOORS and FLOORS[target] < FLOORS[room] and (room, target) not in NOT_DOWN
        if not down and (room, target) not in ALONG_A_FLOOR:
            found.append(f"{path}:{line}: {room} must not know {target}")
    return found


def local_names(tree: ast.AST) -> dict[str, str]:
    """What each imported local name stands for, in dotted form."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full dotted name of an expression such as dist.group.WORLD; '' where it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def communicates(name: str) -> bool:
    return any(name.startswith(f"{module}.") for module in COMMUNICATION)


def named_group(call: ast.Call) -> ast.expr | None:
    """The value of a call's group=, unless it is None."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == "group"), None)
    return None if isinstance(value, ast.Constant) and value.value is None else value


def collectives(source: str, path: str) -> list[str]:
    """Collectives that do not name their group."""
    tree = ast.parse(source)
    names = local_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and communicates(name := dotted(node.func, names)):
            function = name.rsplit(".", 1)[1]
            if function in COLLECTIVES and named_group(node) is None:
                found.append(f"{path}:{node.lineno}: {function} without group=")
    return found


def world(source: str, path: str) -> list[str]:
    """The world group, groups made, or megatron.core's parallel state, outside the rooms where they belong."""
    tree = ast.parse(source)
    names = local_names(tree)
    found = []
    if path != MESH:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "WORLD" and communicates(dotted(node, names)):
                found.append(f"{path}:{node.lineno}: the world group")
            elif isinstance(node, ast.Call) and communicates(name := dotted(node.func, names)):
                function = name.rsplit(".", 1)[1]
                of_a_group = bool(node.args) or named_group(node) is not None
                if function in ("get_rank", "get_world_size", "get_backend") and not of_a_group:
                    found.append(f"{path}:{node.lineno}: {function} of the world; ask the Mesh or the group")
                elif function in ("new_group", "new_subgroups", "split_group", "init_process_group"):
                    found.append(f"{path}:{node.lineno}: {function}; groups are made in {MESH}")
    if room_of(path) != "parallel":
        for line, module in imported_modules(tree, path):
            if module.startswith("megatron.core") and re.search(r"\b(parallel_state|mpu)\b", module):
                found.append(f"{path}:{line}: megatron.core's parallel state; take a Mesh")
    return found


def length(source: str, path: str) -> list[str]:
    """Files that nobody reads to the end."""
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines, {MAX_LINES} are allowed; find the part that is a file of its own"] * (
        lines > MAX_LINES
    )


def words(source: str, path: str) -> list[str]:
    """Words of unfinished work, and of places that only its author has."""
    return [
        f"{path}:{number}: {match[0]!r}"
        for number, line in enumerate(source.splitlines(), 1)
        for match in WORDS.finditer(line)
    ]


Rule = Callable[[str, str], list[str]]
RULES: list[Rule] = [arrows, collectives, world, length, words]


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Files of the given suffixes below folders of the repository, sorted."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(path for path in found if path.is_file())


def complaints(rule: Rule, paths: list[Path]) -> str:
    assert paths, "no files were looked at"
    lines = (rule(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) for path in paths)
    return "\n".join(line for some in lines for line in some)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    assert not (told := complaints(rule, files(PACKAGE))), f"\n{told}"


def test_what_is_shipped_beside_the_package_keeps_its_words() -> None:
    paths = files("tools", "benchmarks", "docs", "ds_configs", suffixes=(".py", ".md", ".yaml", ".sh"))
    assert not (told := complaints(words, [*paths, *sorted(ROOT.glob("*.md"))])), f"\n{told}"


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path.relative_to(ROOT).as_posix()) for path in files(PACKAGE)} - {"__init__"}
    assert rooms <= FLOORS.keys()


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (arrows, "m2_ds/data/stream.py", "from m2_ds.parallel.mesh import Mesh"),
        (arrows, "m2_ds/parallel/mesh.py", "import m2_ds.data"),
        (arrows, "m2_ds/model/encoder.py", "from m2_ds.loss.contrastive import Level"),
        (arrows, "m2_ds/model/encoder.py", "from m2_ds.data import text"),
        (arrows, "m2_ds/loss/contrastive.py", "def f():\n    from m2_ds.engine.step import Step"),
        (arrows, "m2_ds/convert/hub.py", "from m2_ds import api"),
        (arrows, "m2_ds/evaluation/run.py", "from m2_ds.convert.canonical import read_weights"),
        (arrows, "m2_ds/evaluation/run.py", "from ..engine import trainer"),
        (arrows, "m2_ds/engine/trainer.py", "from m2_ds.cli import main"),
        (arrows, "m2_ds/schema.py", "from m2_ds.files import sync"),
        (arrows, "m2_ds/unheard_of.py", ""),
        (collectives, "m2_ds/engine/step.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
        (collectives, "m2_ds/engine/step.py", "import torch\ntorch.distributed.barrier()"),
        (collectives, "m2_ds/engine/step.py", "from torch import distributed as d\nd.broadcast(x, 0, group=None)"),
        (collectives, "m2_ds/engine/step.py", "from torch.distributed import all_gather as g\ng(a, b)"),
        (collectives, "m2_ds/engine/step.py", "import torch.distributed.nn as n\nn.functional.reduce_scatter(a, b)"),
        (collectives, "m2_ds/engine/step.py", "from deepspeed import comm\ncomm.reduce_scatter_tensor(a, b)"),
        (world, "m2_ds/engine/step.py", "import torch.distributed as dist\ng = dist.group.WORLD"),
        (world, "m2_ds/engine/step.py", "import torch.distributed as dist\nn = dist.get_world_size()"),
        (world, "m2_ds/parallel/layers.py", "import torch.distributed as dist\nn = dist.new_group([0])"),
        (world, "m2_ds/model/layers.py", "from megatron.core import parallel_state"),
        (length, "m2_ds/api.py", "x = 1\n" * (MAX_LINES + 1)),
        (words, "m2_ds/api.py", "x = 1  # TODO: more"),
        (words, "m2_ds/api.py", '"""A placeholder."""'),
        (words, "m2_ds/api.py", "# see issue 12"),
        (words, "m2_ds/api.py", "FOLDER = '/work/somewhere'"),
        (words, "docs/data.md", "fetched from https://py" + "pi.org/simple"),
    ],
)  # fmt: skip
def test_a_rule_can_be_broken(rule: Rule, path: str, source: str) -> None:
    assert rule(source, path)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (arrows, "m2_ds/engine/trainer.py", "from m2_ds.model.encoder import M2Encoder\nfrom . import step"),
        (arrows, "m2_ds/config.py", "from m2_ds.evaluation.config import EvaluationConfig"),
        (arrows, "m2_ds/data/sources/emoji.py", "from ..shards import ShardWriter\nfrom m2_ds import __version__"),
        (arrows, "m2_ds/__init__.py", "from m2_ds.api import load"),
        (collectives, "m2_ds/loss/x.py", "import torch.distributed as dist\ndist.all_reduce(x, group=g)"),
        (collectives, "m2_ds/loss/x.py", "import torch\ntorch.gather(x, 0, i)\nqueue.send(x)"),
        (world, "m2_ds/parallel/mesh.py", "import torch.distributed as dist\ng = dist.group.WORLD"),
        (world, "m2_ds/loss/x.py", "import torch.distributed as dist\nn = dist.get_world_size(group)"),
        (length, "m2_ds/api.py", "x = 1\n" * MAX_LINES),
        (words, "m2_ds/api.py", "# a network, its home/work balance, 4 issues, hackathon"),
    ],
)  # fmt: skip
def test_a_rule_lets_good_code_pass(rule: Rule, path: str, source: str) -> None:
    assert not rule(source, path)


@pytest.mark.parametrize("module", ["m2_ds", "m2_ds.cli"])
def test_the_door_opens_without_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'deepspeed', 'transformers', 'pyarrow'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.strip()
