"""Hosts among each other: real connections and clocks between threads, and what is made of what ranks say."""

import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from m2_ds.doctor import hosts
from m2_ds.doctor.hosts import Hello, Listener
from m2_ds.parallel.board import Board


def hello(rank: int, host: str = "a", local_rank: int = 0, address: str = "127.0.0.1", port: int = 0) -> Hello:
    return Hello(rank, local_rank, host, 100 + rank, address, port)


def test_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with Listener() as listener, socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert listener.address == "127.0.0.1"
        good = hello(1, "b", address=listener.address, port=listener.port)
        mute = hello(2, "c", port=silent.getsockname()[1])
        gone = hello(3, "d", port=closed.getsockname()[1])
        assert hosts.connections(hello(0), [good, good]) == []
        monkeypatch.setattr(hosts, "CONNECT_S", 0.5)
        troubles = hosts.connections(hello(0), [mute, gone])
    assert len(troubles) == 2
    assert "a (127.0.0.1) cannot connect to c (127.0.0.1)" in troubles[0] and "timed out" in troubles[0]
    assert f"to d (127.0.0.1), port {gone.port}" in troubles[1] and "refused" in troubles[1]
    result = hosts.connections_result(troubles, 4)
    assert result.status == "fail" and "open all ports" in result.remedy
    assert hosts.connections_result([], 4).status == "ok"


def test_own_address_is_that_of_the_interface_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # of no one
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert hosts.own_address() == "127.0.0.1"


@pytest.mark.parametrize(("ahead", "status"), [(0.0, "ok"), (30.0, "warn"), (-7200.0, "fail")])
def test_clocks(monkeypatch: pytest.MonkeyPatch, ahead: float, status: str) -> None:
    store, now = dist.HashStore(), time.time
    first, other = Board(store, 0, 2), Board(store, 1, 2)
    asking = threading.get_ident()
    # The thread that asks has the clock of another host.
    monkeypatch.setattr(hosts.time, "time", lambda: now() - (ahead if threading.get_ident() == asking else 0.0))
    threading.Thread(target=hosts.tock, args=(first, 1), daemon=True).start()
    offset, uncertainty = hosts.tick(other)
    assert abs(offset - ahead) <= uncertainty + 1e-3 and uncertainty < 1
    result = hosts.clocks_result({"b": (offset, uncertainty), "c": (0.0, 0.001)})
    assert result.status == status and (status == "ok" or "b is furthest" in result.found)


def test_presence() -> None:
    there = {rank: hello(rank, f"host{rank // 4}", rank % 4) for rank in (0, 1, 2, 3, 4, 6)}
    result = hosts.presence(there, 9, 60)
    assert result.status == "fail"
    assert "ranks 5, 7 to 8 of 9 did not come within 60 s" in result.found
    assert "host0 ranks 0 to 3, host1 ranks 4, 6" in result.found
    assert hosts.presence({0: hello(0)}, 1, 60).status == "ok"
    assert [one.rank for one in hosts.first_of_hosts(there)] == [0, 4]


def test_ranks_that_differ_are_named_with_their_hosts() -> None:
    there = {rank: hello(rank, f"host{rank // 2}", rank % 2) for rank in range(6)}
    facts: dict[int, dict[str, str | None]] = {rank: {"torch": "2.13", "numpy": "2.4"} for rank in range(6)}
    assert hosts.equal(facts, there, "software", hosts.HARD.__contains__).found == "equal on 6 rank(s) (2 compared)"
    assert hosts.equal({0: {}, 1: {}}, there, "recipe and data", lambda _: True).status == "skipped"
    facts[5]["numpy"] = "2.3"
    soft = hosts.equal(facts, there, "software", hosts.HARD.__contains__)
    assert soft.status == "warn" and soft.found == "numpy: 2.3 on rank 5 (host2), 2.4 elsewhere"
    facts[2]["torch"] = facts[3]["torch"] = None
    hard = hosts.equal(facts, there, "software", hosts.HARD.__contains__)
    assert hard.status == "fail" and "torch: none on ranks 2 to 3 (host1), 2.13 elsewhere" in hard.found


def test_a_file_of_another_host(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert not hosts.wait_for(path, 0.3)
    threading.Timer(0.2, path.touch).start()
    assert hosts.wait_for(path, 10)
    blind = hosts.shared_result(tmp_path, ["b", "c"], 4)
    assert blind.status == "fail" and "b, c do not see" in blind.found
    assert hosts.shared_result(tmp_path, [], 4).status == "ok"
