"""Settings that differ between machines; read from the environment when used, never at import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from ridgeline.component import Component
from ridgeline.registry import Registry
from ridgeline.store import Store, StoreError


class Settings(BaseSettings):
    """Locations and ways of running, each from an environment variable ``RIDGELINE_<NAME>``.

    Attributes:
        store: The store's root: a folder or any `universal_pathlib` URL.
        serving: The folder that TF Serving reads; ``serving`` inside a local store if None.
        serving_base_path: The same folder as TF Serving sees it, for example inside its container; `serving` if None.
        keep_versions: How many of the newest versions of a model a push keeps.
        manual_dir: The folder with the dataset's downloaded files, for machines without a network.
        schedule: Schedule of the training DAG: a cron expression or preset, UTC; ``never`` for manual triggers
            only.
        defaults: Parameters by dotted name, as JSON, that replace the defaults on the DAGs' forms, and so in
            scheduled runs.
        deadline_minutes: Minutes after a DAG run was queued until it is reported as late.
        notify: Recipients of failures and missed deadlines, besides the log: Apprise URLs, separated by spaces, such
            as ``mailto://user:password@example.org`` or, for a webhook, ``jsons://example.org/path``.
        tensorflow_slots: Slots of Airflow's pool ``tensorflow``: tasks that use TensorFlow at a time. It applies when
            the pool is created.
        maintenance_schedule: When the maintenance DAG runs, like `schedule`.
        keep_runs: Number of latest runs whose artifacts maintenance keeps.
        log_retention_days: Age in days after which maintenance deletes logs of tasks.
        metadata_retention_days: Age in days after which maintenance deletes runs from Airflow's database.
    """

    model_config = SettingsConfigDict(env_prefix="RIDGELINE_", env_ignore_empty=True, frozen=True)

    store: str = "var/store"
    serving: Path | None = None
    serving_base_path: str | None = None
    keep_versions: int = Field(10, ge=1)
    manual_dir: Path | None = None
    schedule: str = "@weekly"
    defaults: dict[str, Any] = {}
    deadline_minutes: float = Field(120.0, gt=0.0)
    notify: SecretStr = SecretStr("")
    tensorflow_slots: int = Field(2, ge=1)
    maintenance_schedule: str = "0 6 * * 0"
    keep_runs: int = Field(50, ge=1)
    log_retention_days: int = Field(30, ge=1)
    metadata_retention_days: int = Field(90, ge=2)

    def open_store(self) -> Store:
        """Return the store."""
        return Store(self.store)

    def serving_dir(self) -> Path:
        """Return the folder of the served models.

        Raises:
            StoreError: If the store is remote and no folder is set.
        """
        if self.serving is not None:
            return self.serving.expanduser().absolute()
        store = self.open_store()
        if store.remote:
            raise StoreError(
                f"Expected a local folder for served models with the remote store {self.store}; received none. "
                "Set RIDGELINE_SERVING."
            )
        return store.local / "serving"

    def open_registry(self) -> Registry:
        """Return the served models.

        Raises:
            StoreError: If the store is remote and no folder is set.
        """
        return Registry(self.serving_dir(), self.keep_versions, self.serving_base_path, self.open_store())

    def locations(self, component: Component) -> dict[str, Path]:
        """Return the values of a component's location parameters (``exclude=True``) that are set here."""
        fields = component.params.model_fields.items()
        values = {name: getattr(self, name, None) for name, field in fields if field.exclude}
        return {name: value for name, value in values.items() if value is not None}
