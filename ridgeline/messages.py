"""Messages to people by e-mail, webhook and other services, each recipient by itself."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

WAITS_SECONDS = (1.0, 5.0)  # before the second and the third try


@dataclass(frozen=True)
class Recipient:
    """A recipient.

    Attributes:
        url: Its Apprise URL, a secret.
    """

    url: str

    @property
    def digest(self) -> str:
        """A name that tells nothing about the URL: 16 hexadecimal digits."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:16]

    @property
    def scheme(self) -> str:
        """The kind of service, such as ``mailto``."""
        return self.url.partition("://")[0]

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
            "Cannot deliver the message %r: a recipient in RIDGELINE_NOTIFY or RIDGELINE_NOTIFY_FILE (%s://) refused "
            "it or did not respond. Check the URL.",
            title,
            self.scheme,
        )
        return False
