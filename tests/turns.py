"""Hosts whose requests to an object store alternate in an order that is drawn from a seed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ridgeline import object_store


class Turns:
    """Lets several hosts, each in a thread of its own, send their requests in a drawn order, one at a time.

    A host often sends several requests before another one does, so that a slow host is overtaken by far. Some requests
    are repeated in a later turn, as the driver does if a response was lost.

    Args:
        monkeypatch: Undoes the changes of `ridgeline.object_store` after the test.
        seed: Of the draws.
        repetitions: Share of the requests that are repeated.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, repetitions: float = 0.05) -> None:
        self._random, self._repetitions = random.Random(seed), repetitions
        self._stays = self._random.choice([0.0, 0.9, 0.98])
        self._condition = threading.Condition()
        self._hosts: dict[int, str] = {}  # by thread; other threads work for the host whose turn it is
        self._waiting: set[str] = set()
        self._turn = ""
        self.order: list[str] = []
        for name in ("repeated", "download", "upload"):
            monkeypatch.setattr(object_store, name, self._in_turn(getattr(object_store, name)))

    def _in_turn(self, request: Callable[..., Any]) -> Callable[..., Any]:
        def send(*args: Any, **kwargs: Any) -> Any:
            host = self._hosts.pop(threading.get_ident(), "")  # a request within this one needs no turn
            if not host:
                return request(*args, **kwargs)
            try:
                self._wait(host)
                if self._random.random() < self._repetitions:
                    request(*args, **kwargs)
                    self._wait(host)
                return request(*args, **kwargs)
            finally:
                self._hosts[threading.get_ident()] = host

        return send

    def _wait(self, host: str) -> None:
        with self._condition:
            self._waiting.add(host)
            self._draw()
            assert self._condition.wait_for(lambda: self._turn == host, timeout=60), self.order
            self._turn = ""
            self._waiting.remove(host)
            self.order.append(host)

    def _draw(self) -> None:
        if self._waiting and len(self._waiting) == self._left and not self._turn:
            last = self.order[-1] if self.order else ""
            stays = last in self._waiting and self._random.random() < self._stays
            self._turn = last if stays else self._random.choice(sorted(self._waiting))
            self._condition.notify_all()

    def run(self, actions: dict[str, Callable[[], object]]) -> dict[str, BaseException]:
        """Run the actions of all hosts to their ends.

        Args:
            actions: What each host does, by its name.

        Returns:
            The errors, by the names of the hosts whose action failed.
        """
        errors: dict[str, BaseException] = {}
        self._left = len(actions)

        def act(host: str, action: Callable[[], object]) -> None:
            self._hosts[threading.get_ident()] = host
            try:
                action()
            except BaseException as error:
                errors[host] = error
            finally:
                del self._hosts[threading.get_ident()]
                with self._condition:
                    self._left -= 1
                    self._draw()

        threads = [threading.Thread(target=act, args=item, daemon=True) for item in actions.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors
