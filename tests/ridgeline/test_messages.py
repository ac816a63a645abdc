"""Messages to real servers on this machine: they take them, fail, hang, or are not there."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from ridgeline.messages import Recipient

pytestmark = [
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning"),  # apprise imports it
    pytest.mark.filterwarnings("ignore:Session.login_data is deprecated:DeprecationWarning"),
]
NO_WAIT = (0.0, 0.0)


@pytest.fixture
def webhook() -> Iterator[SimpleNamespace]:
    """A webhook: the messages that it received, and the statuses that it responds with, the last one for ever."""
    hook = SimpleNamespace(received=[], statuses=[200], hangs_seconds=0.0, url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(hook.hangs_seconds)
            self.send_response(hook.statuses.pop(0) if len(hook.statuses) > 1 else hook.statuses[0])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hook.url = f"json://127.0.0.1:{server.server_port}/hook"
        yield hook
        server.shutdown()


class Inbox:
    """What a mail server received, and what it responds with."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.response = "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        self.messages.append(envelope.content.decode())
        return self.response


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def mail() -> Iterator[tuple[Inbox, str]]:
    """A mail server's inbox, and the URL of a recipient there."""
    inbox, port = Inbox(), free_port()
    controller = Controller(inbox, hostname="127.0.0.1", port=port)
    controller.start()
    yield inbox, f"mailto://127.0.0.1:{port}?mode=insecure&smtp=127.0.0.1&from=ridgeline@example.org&to=ann@example.org"
    controller.stop()


def test_an_e_mail_arrives(mail: tuple[Inbox, str]) -> None:
    inbox, url = mail
    assert Recipient(url).send("shoes: version 3 was pushed", "accuracy 0.9100")
    assert len(inbox.messages) == 1
    assert "shoes: version 3 was pushed" in inbox.messages[0]
    assert "accuracy 0.9100" in inbox.messages[0]


def test_an_e_mail_that_the_server_refuses_is_tried_three_times(
    mail: tuple[Inbox, str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("apprise.NotifyBase.request_rate_per_sec", 0)  # Apprise waits 5.5 s between two e-mails
    inbox, url = mail
    inbox.response = "554 Transaction failed"
    assert not Recipient(url).send("title", "body", NO_WAIT)
    assert len(inbox.messages) == 3
    assert "Cannot deliver the message 'title': a recipient" in caplog.text


def test_a_webhook_that_fails_first_receives_the_message_again(webhook: SimpleNamespace, caplog: Any) -> None:
    webhook.statuses = [500, 503, 200]
    assert Recipient(webhook.url).send("title", "body", NO_WAIT)
    assert [(m["title"], m["message"]) for m in webhook.received] == [("title", "body")] * 3
    assert "Cannot deliver" not in caplog.text


def test_a_webhook_that_does_not_respond_is_given_up(webhook: SimpleNamespace) -> None:
    webhook.hangs_seconds = 3.0
    start = time.monotonic()
    assert not Recipient(f"{webhook.url}?rto=0.2").send("title", "body", NO_WAIT)
    assert time.monotonic() - start < 3.0
    assert len(webhook.received) == 3


def test_a_server_that_is_not_there_raises_nothing(caplog: Any) -> None:
    for url in (f"json://127.0.0.1:{free_port()}", f"mailto://127.0.0.1:{free_port()}?smtp=127.0.0.1&to=a@example.org"):
        assert not Recipient(url).send("title", "body", NO_WAIT)
    assert caplog.text.count("Cannot deliver the message") == 2


def test_the_name_of_a_recipient_tells_nothing_about_its_url() -> None:
    digest = Recipient("mailto://ann:hunter22@example.org").digest
    assert len(digest) == 16
    assert digest != Recipient("mailto://bob:hunter22@example.org").digest
