"""The examination: what a rank looks at by itself, and the order in which ranks look at each other.

everyone       joins the board, says hello, looks at its own machine (one rank a host) and leaves what it found
first rank     waits for all of it, decides whether groups can be tried, tells everyone who is there
one a host     connects to the other hosts, asks the first rank for the time, looks for its file
everyone       makes the mesh and measures its groups
first rank     puts all of it together
"""

import contextlib
import dataclasses
import socket
import time
from collections.abc import Sequence
from os import getpid
from pathlib import Path
from typing import Any

from m2_ds.config import RunConfig, load_config
from m2_ds.doctor import disk, groups, hosts, machine, recipe
from m2_ds.doctor.check import Check, Result, TimeLimit, Verdict, ok, run_all, skipped, within
from m2_ds.doctor.groups import Measured
from m2_ds.doctor.hosts import Hello, line
from m2_ds.doctor.machine import Place
from m2_ds.doctor.report import Report
from m2_ds.doctor.sizes import numbers
from m2_ds.engine.environment import software
from m2_ds.parallel.board import Board
from m2_ds.parallel.mesh import Mesh

JOIN_S, LOCAL_S, MESH_S = 60.0, 900.0, 120.0


def examine(path: Path | None, overrides: Sequence[str] = ()) -> Report | None:
    """Everything, on every rank of the job that the launcher describes (none: a job of one process).

    Without a recipe: machines, and the network among all ranks.

    The first rank gets the report, the others None: they tell nothing themselves, except that they could not join.
    """
    place = Place.of_environment()
    config, configured = _configuration(path, overrides)
    name = "no recipe" if path is None else str(path)
    try:
        board = Board.join(JOIN_S)
    except ValueError as error:
        if place.rank:
            raise
        trouble, _, remedy = str(error).partition("; ")
        results = [configured, *alone(config, place), line("ranks", "present", "fail", trouble, remedy)]
        return Report(name, place.world_size, [socket.gethostname()], results)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(hosts.Listener()) if place.is_first_here else None
        address, port = (listener.address, listener.port) if listener else ("", 0)
        own = Hello(place.rank, place.local_rank, socket.gethostname(), getpid(), address, port)
        board.write("hello", dataclasses.asdict(own))
        found = alone(config, place) if place.is_first_here else []
        told = [result.model_dump() for result in found]
        board.write("alone", {"results": told, "valid": configured.status != "fail", **_facts(config)})
        if place.rank:
            _take_part(board, own, config)
            return None
        return _lead(board, own, config, Report(name, place.world_size, [], [configured]))


def alone(config: RunConfig | None, place: Place) -> list[Result]:
    """What a host finds out by itself."""
    checks = machine.checks(config, place)
    if config is not None:
        checks += [*disk.checks(config), *recipe.checks(config, place)]
    return run_all(checks, socket.gethostname())


def alone_here(path: Path | None, overrides: Sequence[str], ranks: int) -> list[Result]:
    """What this machine finds out for ``ranks`` that it would start, without starting them."""
    config, configured = _configuration(path, overrides)
    return [configured, *alone(config, Place(0, ranks, 0, ranks))]


def _configuration(path: Path | None, overrides: Sequence[str]) -> tuple[RunConfig | None, Result]:
    config: list[RunConfig] = []

    def look() -> Verdict:
        if path is None:
            return skipped("no recipe: machines and network only")
        config.append(load_config(path, overrides))
        return ok(f"{path}: {config[0].steps:,} steps of {config[0].global_batch:,} pairs into {config[0].folder}")

    result = Check("recipe", "configuration", look).run()
    return (config[0] if config else None), result


def _facts(config: RunConfig | None) -> dict[str, Any]:
    """What has to be equal on all ranks."""
    facts = software()
    packages = {**facts.pop("packages"), "python": facts["python"], "m2_ds": facts["m2_ds"], "commit": facts["commit"]}
    try:
        digests = within(60, lambda: recipe.digests(config)) if config else {}
    except TimeLimit:
        digests = {}  # lines of their own tell what does not answer
    return {"packages": packages, "digests": digests}


def _take_part(board: Board, own: Hello, config: RunConfig | None) -> None:
    """The part of every rank but the first."""
    plan = board.read("plan", 0, JOIN_S + LOCAL_S)
    if own.local_rank == 0:
        others = [Hello(**other) for other in plan["hosts"] if other["rank"] != own.rank]
        troubles = hosts.connections(own, others)
        clock = hosts.tick(board)
        seen = hosts.wait_for(Path(plan["file"])) if plan["file"] else True
        board.write("host", {"troubles": troubles, "clock": clock, "seen": seen})
    if plan["go"]:
        board.write("groups", _groups(config, [host["rank"] for host in plan["hosts"]]))


def _groups_limit_s(hosts: int) -> float:
    """For making the groups and all that is measured in them."""
    return MESH_S + 8 * groups.STEP_LIMIT_S + groups.links_limit_s(hosts)


def _groups(config: RunConfig | None, first_ranks: list[int]) -> list[dict[str, Any]]:
    """What this rank measures in its groups."""
    minutes = _groups_limit_s(len(first_ranks)) / 60  # not the backend's own: NCCL's would end the process
    try:
        mesh = within(MESH_S, lambda: Mesh.start(config.parallel if config else None, timeout_minutes=minutes))
    except TimeLimit:
        return groups.as_note([Measured("groups", "making them", error=f"no answer within {MESH_S:.0f} s")])
    except (RuntimeError, ValueError) as error:
        return groups.as_note([Measured("groups", "making them", error=str(error).splitlines()[0])])
    found = groups.measure(mesh, config.engine.precision if config else "fp32", first_ranks)
    if not any(one.error for one in found):
        mesh.stop()
    return groups.as_note(found)


def _lead(board: Board, own: Hello, config: RunConfig | None, report: Report) -> Report:
    """The part of the first rank."""
    hellos = _collect(board, "hello", range(board.world_size), JOIN_S)
    there = {rank: Hello(**note) for rank, note in hellos.items()}
    report.hosts = [hello.host for hello in hosts.first_of_hosts(there)]
    notes = _collect(board, "alone", there, LOCAL_S)
    for rank in sorted(notes):
        report.results += [Result.model_validate(one) for one in notes[rank]["results"]]
    if board.world_size == 1:
        return report
    report.results.append(hosts.presence(there, board.world_size, JOIN_S))
    if late := sorted(there.keys() - notes.keys()):
        found = (
            f"{len(late)} rank(s), the first {late[0]} on {there[late[0]].host}, did not finish within {LOCAL_S:.0f} s"
        )
        report.results.append(line("ranks", "own checks", "fail", found, "look at their output above"))
    report.results += [
        hosts.equal(
            {rank: note["packages"] for rank, note in notes.items()}, there, "software", hosts.HARD.__contains__
        ),
        hosts.equal({rank: note["digests"] for rank, note in notes.items()}, there, "recipe and data", lambda _: True),
    ]
    valid = all(note["valid"] for note in notes.values())
    go = valid and len(notes) == board.world_size
    first = hosts.first_of_hosts({rank: there[rank] for rank in notes})
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(disk.scratch(config.folder)) if config and len(first) > 1 else None
        if shared is not None:
            try:
                shared.write_bytes(b"m2")
            except OSError:
                shared = None  # told by the check of the run folder
        where = "" if shared is None else str(shared)
        board.write("plan", {"go": go, "hosts": [dataclasses.asdict(host) for host in first], "file": where})
        if len(first) > 1:
            report.results += _between_hosts(board, own, first, shared)
    if not go:
        reason = "not all ranks are there" if valid else "not every rank has a valid recipe"
        report.results.append(line("network", "groups", "skipped", reason))
        return report
    measured = {0: _groups(config, [host.rank for host in first])}
    others = _collect(board, "groups", range(1, board.world_size), _groups_limit_s(len(first)))
    if silent := sorted(set(range(1, board.world_size)) - others.keys()):
        found = f"{len(silent)} rank(s), the first {silent[0]} on {there[silent[0]].host}, left no answer"
        report.results.append(line("network", "groups", "fail", found, "look at their output above"))
    found_by = {rank: [Measured(**one) for one in note] for rank, note in {**measured, **others}.items()}
    names = {rank: f"rank {rank} ({hello.host})" for rank, hello in there.items()}
    report.results += groups.results(found_by, names, _gradients(config) if config else 0.0)
    return report


def _gradients(config: RunConfig) -> float:
    try:
        return groups.gradients(config, numbers(config).trained)
    except ValueError:
        return 0.0  # the recipe's own line tells why


def _between_hosts(board: Board, own: Hello, first: list[Hello], shared: Path | None) -> list[Result]:
    """Connections, clocks and the shared folder; a host that leaves no note is one that does not answer."""
    troubles = hosts.connections(own, first[1:])
    clocks, blind, silent = {}, [], []
    for host in first[1:]:
        try:
            hosts.tock(board, host.rank)
            note = board.read("host", host.rank, 2 * hosts.SEEN_S + hosts.CONNECT_S * len(first))
        except TimeoutError:
            silent.append(host.name)
            continue
        troubles += note["troubles"]
        clocks[host.name] = (note["clock"][0], note["clock"][1])
        if not note["seen"]:
            blind.append(host.name)
    found = [hosts.connections_result(troubles, len(first))]
    if silent:
        found.append(
            line("ranks", "hosts", "fail", f"{', '.join(silent)} stopped answering", "look at their output above")
        )
    if clocks:
        found.append(hosts.clocks_result(clocks))
    if shared is not None:
        found.append(hosts.shared_result(shared.parent, blind, len(first)))
    return found


def _collect(board: Board, name: str, ranks: Any, limit_s: float) -> dict[int, Any]:
    """The notes of that name that are there before the limit, by rank."""
    deadline, found = time.monotonic() + limit_s, {}
    for rank in ranks:
        with contextlib.suppress(TimeoutError):
            found[rank] = board.read(name, rank, deadline - time.monotonic())
    return found
