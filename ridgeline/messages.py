"""Messages to people by e-mail, webhook and other services, each recipient by itself."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

WAITS_SECONDS = (1.0, 5.0)  # before the second and the third try


@dataclass(frozen=True)
class Recipient:
    """A recipient.

    Attributes:
        url: Its Apprise URL, a secret; empty if there is a problem.
        name: What the settings call it, if that is not the URL: an Airflow connection, such as ``airflow://ops``.
        problem: Why nothing can be sent to it; empty if nothing prevents that.
    """

    url: str = field(repr=False)
    name: str = ""
    problem: str = ""

    @property
    def digest(self) -> str:
        """A name that tells nothing about the URL: 16 hexadecimal digits. A new password of a connection keeps it."""
        return hashlib.sha256((self.name or self.url).encode()).hexdigest()[:16]

    def send(self, title: str, body: str, waits_seconds: tuple[float, ...] = WAITS_SECONDS) -> bool:
        """Send a message; try again if that fails. Nothing is raised.

        A service that takes the message and then does not respond in time counts as failed, so it may receive the
        message again.

        Args:
            title: The title, or subject.
            body: The text.
            waits_seconds: The time before each further try.

        Returns:
            Whether the recipient took it.
        """
        if self.problem:
            log.error("Cannot deliver the message %r: %s", title, self.problem)
            return False
        from apprise import Apprise, NotifyFormat

        service = Apprise()
        service.add(self.url)
        for wait in (0.0, *waits_seconds):
            time.sleep(wait)
            try:
                if service.notify(title=title, body=body, body_format=NotifyFormat.TEXT):
                    return True
            except Exception as error:  # whatever a service's code raises
                log.debug("%s", type(error).__name__)
        log.error(
            "Cannot deliver the message %r: a recipient in RIDGELINE_NOTIFY or RIDGELINE_NOTIFY_FILE (%s) refused "
            "it or did not respond. Check it.",
            title,
            self.name or f"{self.url.partition('://')[0]}://",
        )
        return False
