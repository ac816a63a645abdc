"""Start a DAG when the content of a folder has changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk import Asset, AssetWatcher
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from ridgeline.access import message
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.component import SourceFolder
from ridgeline.masking import mask
from ridgeline.sources import fingerprint

LAST = "last_content"  # the key in Airflow's asset state store
# Airflow writes an event to its database within 2 s, and does not report that it has.
WRITTEN_SECONDS = 5.0


def watched_asset(name: str, folder: str) -> Asset:
    """Return an asset that gets an event for each new content of a folder, see `FolderTrigger`.

    Args:
        name: The asset's name.
        folder: An absolute path, or a `universal_pathlib` URL of an object store's prefix.
    """
    trigger = FolderTrigger(name, folder, AirflowSettings().still_seconds)
    return Asset(name, watchers=[AssetWatcher(name=f"{name}_watcher", trigger=trigger)])


class FolderTrigger(BaseEventTrigger):
    """Fires once for each content of a folder, after the folder has not changed for a while. Deletes nothing.

    It looks at the folder twice in that time, and compares its fingerprint, the one in the key of the step that reads
    it, with that of the last event, which Airflow's asset state store keeps. So a restart fires no second time, unless
    Airflow stops within `WRITTEN_SECONDS` of an event: an event is never lost, but may be repeated then.

    The first content fires, too. A folder that is missing, empty or can't be read is reported in the triggerer's log,
    and does not fire.

    Args:
        asset: Name of the asset: two assets that watch one folder have triggers of their own.
        folder: An absolute path, or a `universal_pathlib` URL.
        still_seconds: For how long the folder must not change.
    """

    def __init__(self, asset: str, folder: str, still_seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asset = asset
        self.folder = folder
        self.still_seconds = still_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and the arguments, from which the triggerer makes the trigger."""
        arguments = {"asset": self.asset, "folder": self.folder, "still_seconds": self.still_seconds}
        return f"{type(self).__module__}.{type(self).__qualname__}", arguments

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield an event for each content that is not that of the last event."""
        assert self.asset_state_store is not None
        last, stored = None, None  # the content of the last event, and what the store holds
        seen, since, problem = "", 0.0, ""
        while True:
            try:
                if last is None:
                    last = stored = await self.asset_state_store.aget(LAST, "")
                elif stored != last:
                    await self.asset_state_store.aset(LAST, last)
                    stored = last
                content, problem = await asyncio.to_thread(_fingerprint, self.folder), ""
            except Exception as error:  # a trigger that ends is started again at once
                content = ""
                if message(error) != problem:
                    problem = message(error)
                    self.log.warning("The watcher of %s can't read %s: %s", self.asset, mask(self.folder), problem)
            if content != seen:
                seen, since = content, time.monotonic()
            elif content not in ("", last) and time.monotonic() - since >= self.still_seconds:
                self.log.info("%s has new content, %s", mask(self.folder), content[:12])
                yield TriggerEvent({"folder": mask(self.folder), "content": content})  # type: ignore[no-untyped-call]
                last = content
                await asyncio.sleep(WRITTEN_SECONDS)
                continue
            await asyncio.sleep(self.still_seconds / 2)


def _fingerprint(folder: str) -> str:
    return fingerprint(SourceFolder(folder), AirflowSettings().open_store().local / "sources")
