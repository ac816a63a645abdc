"""Hosts whose HTTP requests to an object store are answered one at a time, in an order that is drawn from a seed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.faulty_proxy import Handler, Proxy

PATIENCE_SECONDS = 0.1  # a host that sends no request for as long waits for another one, or sleeps


class Turns:
    """Draws whose request is answered next. A host may have to wait for long, as if it was stopped.

    Args:
        seed: Of the draws.
        lost: Share of the requests whose answer is lost, so that the driver repeats them.
    """

    def __init__(self, seed: int, lost: float = 0.03) -> None:
        self.seed, self._random, self._lost = seed, random.Random(seed), lost
        self._stays = self._random.choice((0.0, 0.7, 0.95))  # how likely the next turn is the same host's
        self._changed = threading.Condition()
        self._waiting: Counter[str] = Counter()
        self._hosts: list[str] = []
        self._turn, self._is_busy = "", False
        self.order: list[str] = []

    def run(self, hosts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Run what each host does, and return the results or errors."""
        results: dict[str, Any] = {}

        def act(host: str) -> None:
            try:
                results[host] = hosts[host]()
            except Exception as error:
                results[host] = error
            finally:
                with self._changed:
                    self._hosts.remove(host)
                    self._draw()

        self._hosts = sorted(hosts)
        threads = [threading.Thread(target=act, args=(host,)) for host in self._hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    @contextmanager
    def turn(self, host: str, request: str) -> Iterator[bool]:
        """Wait for the turn of a host; yield whether the answer is lost."""
        with self._changed:
            self._waiting[host] += 1
            while self._hosts and (self._is_busy or self._turn != host):
                was_notified = self._changed.wait(PATIENCE_SECONDS)
                if not self._is_busy and (not self._turn or not (was_notified or self._waiting[self._turn])):
                    self._turn = host
            self._waiting[host] -= 1
            self._is_busy = True
            is_lost = bool(self._hosts) and self._random.random() < self._lost
            self.order.append(f"{host} {request}{' (lost)' if is_lost else ''}")
        try:
            yield is_lost
        finally:
            with self._changed:
                self._is_busy = False
                self._draw()

    def _draw(self) -> None:
        if self._hosts and (self._turn not in self._hosts or self._random.random() >= self._stays):
            self._turn = self._random.choice(self._hosts)
        self._changed.notify_all()


class HostProxy(Proxy):
    """A proxy for the requests of one host.

    Args:
        endpoint: Address of the server.
        host: Name of the host.
        turns: Draws the order.
    """

    def __init__(self, endpoint: str, host: str, turns: Turns) -> None:
        self.host, self.turns = host, turns
        super().__init__(endpoint, handler=_InTurn)


class _InTurn(Handler):
    server: HostProxy

    def pass_on(self) -> None:
        with self.server.turns.turn(self.server.host, f"{self.command} {self.path}") as is_lost:
            self.answer("reset_after" if is_lost else "")
