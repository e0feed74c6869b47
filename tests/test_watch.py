"""The ring that notices a death: who may stand in it. What it does at a death is tested in test_scale.py."""

import socket
import threading

import pytest

from amft_fast.engine import watch
from amft_fast.errors import UserError

SECRET = b"s" * 32


def ring(size, secrets=None, seconds=20.0):
    """`meet` of each rank, in threads: its two connections, or its error."""
    servers = [watch._listening("127.0.0.1") for _ in range(size)]
    places = [(*s.getsockname(), f"host, process {i}") for i, s in enumerate(servers)]
    found = [None] * size

    def run(rank):
        try:
            found[rank] = watch.meet(servers[rank], places, rank, (secrets or [SECRET] * size)[rank], seconds)
        except UserError as e:
            found[rank] = e

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]

    def end():
        for t in threads:
            t.join(60)
        for s in servers:
            s.close()
        return found

    return places, threads, end


@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_rank_meets_both_its_neighbours(size):
    _, threads, end = ring(size)
    for t in threads:
        t.start()
    found = end()
    for rank, (ahead, _) in enumerate(found):
        ahead.sendall(bytes([rank]))
    assert [behind.recv(1)[0] for _, behind in found] == [(rank - 1) % size for rank in range(size)]


def test_strangers_before_it_take_nobody_s_place():
    """One that says nothing, one that guesses, one that hangs up, one that sends a proof for another place."""
    places, threads, end = ring(2)
    address = places[0][:2]
    strangers = [socket.create_connection(address) for _ in range(4)]
    strangers[1].sendall(b"x" * 32)
    strangers[2].close()
    strangers[3].sendall(watch._proof(SECRET, "0 watches 1"))
    for t in threads:
        t.start()
    found = end()
    found[1][0].sendall(b"!")
    assert found[0][1].recv(1) == b"!"
    assert strangers[1].recv(1) == b"" and strangers[3].recv(1) == b"", "they were shown the door"


def test_a_rank_with_another_secret_is_not_met():
    _, threads, end = ring(2, [SECRET, b"t" * 32], seconds=1.0)
    for t in threads:
        t.start()
    for error in end():
        assert isinstance(error, UserError) and "could not meet its neighbours" in str(error)


def test_a_neighbour_that_answers_without_the_secret_is_refused():
    """Who answers at the neighbour's address must know the secret too."""
    server, false = watch._listening("127.0.0.1"), watch._listening("127.0.0.1")
    places = [(*server.getsockname(), "this"), (*false.getsockname(), "that")]

    def pretend():
        with socket.create_connection(places[0][:2]) as s, false.accept()[0] as other:
            s.sendall(watch._proof(SECRET, "1 watches 0"))  # overheard
            other.sendall(other.recv(32))
            s.recv(32)

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(UserError, match="another process answered"):
        watch.meet(server, places, 0, SECRET, 20.0)
    thread.join()


def test_it_listens_at_the_address_that_is_used(monkeypatch):
    """By which the meeting point is reached: here the loopback, which no other machine reaches."""
    with socket.create_server(("127.0.0.1", 0)) as meeting_point:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(meeting_point.getsockname()[1]))
        with watch._listening(watch._own_address()) as server:
            assert server.getsockname()[0] == "127.0.0.1"
