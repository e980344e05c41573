"""Notes between ranks over the launcher's store, with threads in the place of ranks."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from m2_ds.parallel.board import Board


def boards(count: int) -> list[Board]:
    store = dist.HashStore()
    return [Board(store, rank, count) for rank in range(count)]


def test_a_note_is_waited_for() -> None:
    first, second = boards(2)
    threading.Timer(0.2, second.write, ("hello", {"host": "b", "numbers": [1, None, 2.5]})).start()
    assert first.read("hello", 1, 10) == {"host": "b", "numbers": [1, None, 2.5]}


def test_one_that_does_not_come_is_told_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 1 left no note 'hello' within 0 s"):
        boards(2)[0].read("hello", 1, 0.3)
    assert time.monotonic() - started < 5


def test_alone_it_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    board = Board.join(1)
    board.write("a", 1)
    assert board.read("a", 0, 1) == 1 and board.world_size == 1


def test_over_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=f"rank 1 cannot reach the first rank's store at 127.0.0.1:{port}"):
        Board.join(0.5)
    monkeypatch.setenv("RANK", "0")
    first = Board.join(10)
    monkeypatch.setenv("RANK", "1")
    second = Board.join(10)
    second.write("hello", "from 1")
    assert first.read("hello", 1, 10) == "from 1"


def test_ranks_agree_on_the_first_value_and_see_a_store_that_is_gone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = dist.TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False)
    one, other = Board(first, 0, 2), Board(dist.TCPStore("127.0.0.1", port, 2, False), 1, 2)
    assert other.agreed("stop") is None
    assert other.agree("stop", 7) == 7 == one.agree("stop", 8) == one.agreed("stop")
    del one, first
    with pytest.raises(RuntimeError, match="first rank's store is gone: Connection closed by peer"):
        for _ in range(3):
            other.agreed("stop")


def test_notes_are_read_together_and_counted() -> None:
    for some in (boards(2), boards(1)):
        for board in some:
            board.write("beat", {"rank": board.rank})
        board.write("beat", {"rank": "again"})  # the last one's newer note
        everyone = range(len(some))
        assert some[0].notes("beat", everyone) == {
            **{rank: {"rank": rank} for rank in everyone},
            board.rank: {"rank": "again"},
        }
        assert [board.count("read") for board in some] == [rank + 1 for rank in everyone]
        assert some[0].count("read", 0) == len(some)
        assert some[0].agreed("verdict") is None
        assert some[0].agree("verdict", {"code": 76}) == {"code": 76} == some[-1].agree("verdict", {"code": 2})
