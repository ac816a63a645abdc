"""Settings that differ between machines; read from the environment when used, never at import."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ridgeline.access import expect_readable
from ridgeline.component import Component, Workers
from ridgeline.connections import ENTRY, ENTRY_FORM, Connection, apprise_urls, storage_options
from ridgeline.decisions import KINDS
from ridgeline.masking import HIDDEN, mask, remember, remember_secret
from ridgeline.messages import Recipient
from ridgeline.object_registry import ObjectRegistry
from ridgeline.object_store import S3, open_url
from ridgeline.registry import Registry
from ridgeline.resources import StepResources, parse_resources
from ridgeline.store import Store, StoreError, mirror_of
from ridgeline.workers import workers_of_environment

PREFIX = "RIDGELINE_"
BASE_PATH = f"{PREFIX}SERVING_BASE_PATH"
SECRET_OPTION = re.compile(r"--\w*(?:secret|password|token)\w*=(.+)", re.DOTALL)
AIRFLOW = "airflow://"  # begins what names an Airflow connection
PATTERN = "*?[\\"
MAX_DEADLINE_MINUTES = 10 * 366 * 24 * 60
MAX_NAME_BYTES = 255  # of a file or folder, in the usual file systems
MAX_RETENTION_DAYS = 100 * 366
MAX_APPROVAL_HOURS = 72  # a weekend
MIN_RETENTION_DAYS = 5  # longer than a run may take, so that none in progress is deleted
PUSHED = "pushed"  # the schedule of a DAG that runs whenever a DAG has changed the champion
MESSAGES = ("failed", "late", *KINDS)


class SettingsError(ValueError):
    """An environment variable has a value that can't be used."""


def _json_object(value: Any) -> Any:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError('a JSON object such as {"STEP.PARAMETER": 3}')
    return found


def _store(value: str) -> str:
    from fsspec import available_protocols

    scheme, mark, place = value.partition("://")
    if not mark:
        _folder(value)
    elif scheme in S3 and not place.partition("/")[0]:
        raise ValueError("the name of a bucket after s3://")
    elif unknown := set(scheme.split("::")) - {*available_protocols(), "local"}:
        raise ValueError(f"a folder, or a URL that fsspec can open, which has no {'::'.join(sorted(unknown))}://")
    return value


def _folder(value: Any) -> Any:
    if "://" in str(value):
        raise ValueError("a folder of this machine")
    try:
        names = [part.encode() for part in Path(str(value)).parts]
    except UnicodeEncodeError:
        raise ValueError("a folder whose path is UTF-8") from None
    if any(len(name) > MAX_NAME_BYTES for name in names):
        raise ValueError(f"a folder whose path has names of at most {MAX_NAME_BYTES} bytes")
    try:
        return Path(value).expanduser() if isinstance(value, str | Path) else value
    except RuntimeError:  # ~name of an unknown user
        raise ValueError("a folder; there is no such user") from None


def _serving(value: Any) -> Any:
    if str(value).partition("://")[0] in S3:
        return _store(str(value)).rstrip("/")
    try:
        return _folder(value)
    except ValueError as error:
        raise ValueError(f"{error}, or an s3:// URL") from None


def check_schedule(value: str) -> str:
    """Return a schedule if it is a cron expression, a preset or ``never``.

    Raises:
        ValueError: If it is none of these.
    """
    from croniter import croniter

    try:
        if value not in ("never", "@quarterly"):  # Airflow's own preset
            croniter(value).get_next()
    except (ValueError, KeyError, AttributeError):
        raise ValueError("a cron expression such as 0 6 * * 0, a preset such as @weekly, or never") from None
    return value


def _inference_schedule(value: str) -> str:
    try:
        return value if value == PUSHED else check_schedule(value)
    except ValueError as error:
        raise ValueError(f"{error}; or {PUSHED}, whenever a DAG has changed the champion") from None


def _expect_recipients(text: str) -> None:
    """Refuse recipients that can't be used; URLs are never shown, since any part of one may be secret."""
    entries = text.split()
    for entry in entries:
        if entry.startswith(AIRFLOW) and not ENTRY.fullmatch(entry):
            raise ValueError(f"{ENTRY_FORM}; received {AIRFLOW}{HIDDEN}")
    for url in _unusable(entry for entry in entries if not entry.startswith(AIRFLOW)):
        shown = f"{url.partition('://')[0]}://{HIDDEN}" if "://" in url else "a text that is no URL"
        raise ValueError(f"Apprise URLs, separated by spaces; received {shown}")


def _unusable(urls: Iterable[str]) -> list[str]:
    """Return the URLs that Apprise can't use."""
    urls = list(urls)
    if not urls:
        return []
    log = logging.getLogger("apprise")  # prints the URLs that it refuses
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings(action="ignore"):
            from apprise import Apprise

            return [url for url in urls if Apprise.instantiate(url) is None]
    finally:
        log.disabled = before


def _notify(value: SecretStr) -> SecretStr:
    _expect_recipients(value.get_secret_value())
    return value


def _notify_file(value: Path) -> Path:
    try:
        text = value.read_text(encoding="utf-8")
        for url in text.split():
            remember(url)
        _expect_recipients(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"a file that can be read ({reason})") from None
    return value


def _messages(value: Any) -> Any:
    words = tuple(value.split()) if isinstance(value, str) else value
    if unknown := [word for word in words if word not in MESSAGES]:
        raise ValueError(f"some of {', '.join(MESSAGES)}, separated by spaces; received {' '.join(unknown)}")
    return words


def _users(value: Any) -> Any:
    if isinstance(value, str) and set(",;") & set(value):
        raise ValueError("ids of users, separated by spaces")
    return tuple(value.split()) if isinstance(value, str) else value


def _options(value: Any) -> Any:
    try:
        words = tuple(shlex.split(value)) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"words as in a shell; received others ({error})") from None
    if any(not word.startswith("--") for word in words):
        raise ValueError("options of Apache Beam as --name or --name=value; received other words")
    for word in words:
        if match := SECRET_OPTION.fullmatch(word):
            remember_secret(match[1])
    return words


def _store_connection(value: str, info: ValidationInfo) -> str:
    if "://" not in info.data.get("store", "://"):
        raise ValueError("none, since RIDGELINE_STORE is a folder")
    return value


Folder = Annotated[Path | None, BeforeValidator(_folder)]
Schedule = Annotated[str, AfterValidator(check_schedule)]


class Settings(BaseSettings):
    """Locations and ways of running, each from an environment variable ``RIDGELINE_<NAME>``.

    All variables are checked when any is read, so that a bad one is refused before any work.

    Attributes:
        store: The store's root: a folder or any `universal_pathlib` URL.
        store_connection: The Airflow connection that holds the options of the store's driver, such as its credentials.
        cache_gib: GiB that the local copies of a store at a URL may take; those in use stay beyond it.
        serving: The registry of served models: a folder, which TF Serving reads, or an s3:// URL; ``serving`` inside
            the store if None.
        serving_base_path: The same folder as TF Serving sees it, for example inside its container; `serving` if None.
        keep_versions: How many of the newest versions of a model a push keeps.
        manual_dir: The folder with the dataset's downloaded files, for machines without a network.
        beam_pipeline_options: Options of Apache Beam, with which `ingest` decodes folders and prepares Beam datasets.
        image_dir: The folder of images of ``ingest.dataset=folder``: a folder or any `universal_pathlib` URL.
        replay_dir: Folder of unlabelled images for which `evaluate` compares a model with the champion: a folder or any
            `universal_pathlib` URL.
        schedule: Schedule of the training DAG: a cron expression or preset, UTC; ``never`` for manual triggers
            only.
        inference_schedule: Schedule of the DAG ``batch_inference``, like `schedule`; or ``pushed``, for a run after
            each change of the champion by a DAG.
        still_seconds: For how many seconds a watched folder must not change before it starts its DAG.
        defaults: Parameters by dotted name, as JSON, that replace the defaults on the DAGs' forms, and so in
            scheduled runs.
        deadline_minutes: Minutes after a DAG run was queued until it is reported as late.
        notify: Recipients of messages about decisions, failures and missed deadlines, besides the log: Apprise URLs,
            separated by spaces, such as ``mailto://user:password@example.org`` or, for a webhook, ``jsons://example.org/path``,
            or Airflow connections, ``airflow://CONN_ID``.
        notify_file: A file with further recipients, so that no environment variable holds a password.
        notify_about: What is sent, separated by spaces: ``failed`` (tasks and runs), ``late`` (runs), and kinds of
            `ridgeline.decisions.Decision`. By default all of them.
        stale_days: Age in days from which a champion is reported as stale, once.
        refused_in_a_row: Number of candidates, refused one after another for the same reason, from which the champion
            is reported as stale, once.
        approvers: Ids of the Airflow users who may approve a push, separated by spaces; if empty, every user who may
            trigger the DAG. The auth manager says what an id is: a name, or a number.
        approval_hours: Hours after which a push that nobody approved is rejected.
        tensorflow_slots: Slots of Airflow's pool ``tensorflow``: tasks that use TensorFlow at a time. It applies when
            the pool is created.
        step_resources: What the pods of steps get under Airflow's KubernetesExecutor: a JSON object, or a file with
            one, of cpu, memory, disk and gpu by step.
        maintenance_schedule: When the maintenance DAG runs, like `schedule`.
        keep_runs: Number of latest runs whose artifacts maintenance keeps.
        log_retention_days: Age in days after which maintenance deletes logs of tasks.
        metadata_retention_days: Age in days after which maintenance deletes runs from Airflow's database.

    Raises:
        SettingsError: If a variable has a value that can't be used.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    store: Annotated[str, AfterValidator(_store)] = "var/store"
    store_connection: Annotated[str, AfterValidator(_store_connection)] | None = None
    cache_gib: float = Field(20.0, gt=0.0, le=1e9, allow_inf_nan=False)
    serving: Annotated[Path | str | None, BeforeValidator(_serving)] = None
    serving_base_path: str | None = None
    keep_versions: int = Field(10, ge=1)
    manual_dir: Folder = None
    image_dir: Annotated[str, AfterValidator(_store)] | None = None
    beam_pipeline_options: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_options)] | None = None
    replay_dir: Annotated[str, AfterValidator(_store)] | None = None
    schedule: Schedule = "@weekly"
    inference_schedule: Annotated[str, AfterValidator(_inference_schedule)] = "never"
    still_seconds: float = Field(60.0, ge=1.0, le=86_400.0, allow_inf_nan=False)
    defaults: Annotated[dict[str, Any], NoDecode, BeforeValidator(_json_object)] = {}
    deadline_minutes: float = Field(120.0, gt=0.0, le=MAX_DEADLINE_MINUTES, allow_inf_nan=False)
    notify: Annotated[SecretStr, AfterValidator(_notify)] = SecretStr("")
    notify_file: Annotated[Path, AfterValidator(_notify_file)] | None = None
    notify_about: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_messages)] = MESSAGES
    stale_days: int = Field(30, ge=1, le=100 * 366)
    refused_in_a_row: int = Field(3, ge=1, le=1_000)
    approvers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_users)] = ()
    approval_hours: float = Field(12.0, gt=0.0, le=MAX_APPROVAL_HOURS, allow_inf_nan=False)
    tensorflow_slots: int = Field(2, ge=1, le=10_000)
    step_resources: Annotated[dict[str, StepResources], NoDecode, BeforeValidator(parse_resources)] = {}
    maintenance_schedule: Schedule = "0 6 * * 0"
    keep_runs: int = Field(50, ge=1)
    log_retention_days: int = Field(30, ge=1, le=MAX_RETENTION_DAYS)
    metadata_retention_days: int = Field(90, ge=MIN_RETENTION_DAYS, le=MAX_RETENTION_DAYS)

    def __init__(self, **values: Any) -> None:
        for name in type(self).model_fields:
            remember(str(values.get(name, os.environ.get(f"{PREFIX}{name.upper()}", ""))))
        try:
            super().__init__(**values)
        except ValidationError as error:
            message = mask(" ".join(_sentences(error)))
            raise SettingsError(f"{message} Correct or unset the environment variable.") from None

    @property
    def recipients(self) -> list[Recipient]:
        """The recipients that `notify` and `notify_file` name."""
        further = self.notify_file.read_text(encoding="utf-8") if self.notify_file else ""
        places = dict.fromkeys(further.split(), f"the file {self.notify_file}")
        places = dict.fromkeys(self.notify.get_secret_value().split(), f"{PREFIX}NOTIFY") | places
        return [recipient for entry, place in places.items() for recipient in self._recipients_of(entry, place)]

    def _recipients_of(self, entry: str, place: str) -> list[Recipient]:
        """Return the recipients that a URL names; one with a problem if it names a connection that can't be used."""
        if not entry.startswith(AIRFLOW):
            return [Recipient(entry)]
        conn_id, to = cast("re.Match[str]", ENTRY.fullmatch(entry)).groups("")
        try:
            urls = apprise_urls(self.look_up(conn_id), to)
            for url in urls:
                remember(url)
            if _unusable(urls):
                raise ValueError("expected an Apprise URL in it; received something else")
        except ValueError as error:
            problem = f"Cannot use the Airflow connection {conn_id!r} in {place}: {mask(error)}."
            return [Recipient("", entry, problem)]
        names = [entry, *(f"{entry} ({number})" for number in range(2, len(urls) + 1))]
        return [Recipient(url, name) for url, name in zip(urls, names, strict=True)]

    def look_up(self, conn_id: str) -> Connection:
        """Return an Airflow connection. Only a class of `ridgeline.airflow` can.

        Args:
            conn_id: Its id.

        Raises:
            ValueError: If there is none, or it can't be looked up.
        """
        raise ValueError("only Airflow can look it up, and this command runs outside of it")

    @cached_property
    def storage_options(self) -> dict[str, Any]:
        """The options of the store's driver that `store_connection` holds; they may be secret.

        Raises:
            SettingsError: If the connection can't be used.
        """
        if not self.store_connection:
            return {}
        try:
            return storage_options(self.look_up(self.store_connection), self.store.partition("://")[0])
        except ValueError as error:
            raise SettingsError(self._store_problem(mask(error))) from None

    def _store_problem(self, cause: str) -> str:
        return (
            f"Cannot use the Airflow connection {self.store_connection!r} for the store: {cause}. Correct it, or unset "
            "RIDGELINE_STORE_CONNECTION and give the driver its credentials in the environment."
        )

    @property
    def workers(self) -> Workers | None:
        """The workers of which this process is one, from ``TF_CONFIG``; None if it is alone.

        Raises:
            ParameterError: If ``TF_CONFIG`` can't be used.
        """
        return workers_of_environment()

    @property
    def longest_run(self) -> timedelta:
        """How long a run may take: its steps, and the wait for an approval."""
        return timedelta(hours=24 + self.approval_hours)

    def open_store(self) -> Store:
        """Return the store.

        Raises:
            PermissionError: If this user may not list it.
            SettingsError: If the connection that holds its driver's options can't be used.
        """
        options = self.storage_options
        try:
            store = Store(self.store, options=options, cache_bytes=int(self.cache_gib * 2**30))
            if options and store.root.protocol in ("s3", "s3a"):
                store.root.fs.connect()  # before this, s3fs looks at no option; it sends no request to the store
        except Exception as error:
            cause = error.__cause__ or error
            if not options or isinstance(cause, ImportError | OSError):
                raise
            raise SettingsError(
                self._store_problem(f"the driver refuses its options ({type(cause).__name__})")
            ) from None
        if not store.remote:
            expect_readable(store.local, depth=0)
            for name in ("artifacts", "executions"):
                expect_readable(store.local / name, depth=1)
        return store

    @property
    def serving_url(self) -> str:
        """The URL of the served models; empty if they are in a folder."""
        if self.serving is None and self.store.partition("://")[0] in S3:
            return f"{self.store.rstrip('/')}/serving"
        return self.serving if isinstance(self.serving, str) else ""

    def serving_dir(self) -> Path:
        """Return the folder of the served models; of those at a URL, the folder for their local copies.

        Raises:
            StoreError: If the store is at a URL other than s3://, and no folder is set.
        """
        if self.serving_url:
            return mirror_of(self.serving_url) / "serving"
        if self.serving is not None:
            return Path(self.serving).absolute()
        store = self.open_store()
        if store.remote:
            raise StoreError(
                f"Expected a local folder or an s3:// URL for served models with the store {self.store}; received "
                "none. Set RIDGELINE_SERVING."
            )
        return store.local / "serving"

    def expect_servable(self, folder: Path | None = None) -> None:
        """Check that models can be served from the folder of the served models, before a run makes one.

        Args:
            folder: Another folder that servers read; None for that of the settings.

        Raises:
            StoreError: If the store is remote and no folder is set, or the folder's path has a character that
                TensorFlow takes for a pattern: it would find no file of the model.
        """
        own = (str(folder), "as FOLDER") if folder else (str(self.serving_dir()), "in RIDGELINE_SERVING")
        for path, place in (own, (self.serving_base_path or "", f"in {BASE_PATH}")):
            if found := [character for character in PATTERN if character in path]:
                raise StoreError(
                    f"Expected a folder for served models without {' '.join(PATTERN)} in its path, which TensorFlow "
                    f"takes for a pattern; received {path}, with {' '.join(found)}. Name another folder {place}."
                )

    def open_registry(self) -> Registry:
        """Return the served models.

        Raises:
            StoreError: If the store is at a URL other than s3://, and no folder is set.
            PermissionError: If this user may not list the served models.
        """
        if self.serving_url:
            return self.open_object_registry(self.serving_dir())
        expect_readable(self.serving_dir(), depth=1)
        return Registry(self.serving_dir(), self.keep_versions, self.serving_base_path, self.open_store())

    def open_object_registry(self, mirror: Path, base_path: str | None = None) -> ObjectRegistry:
        """Return the served models at a URL.

        Args:
            mirror: The folder for local copies.
            base_path: This folder as TF Serving sees it; the folder's path if None.

        Raises:
            StoreError: If no URL is set.
        """
        url = self.serving_url
        if not url:
            raise StoreError(
                f"Expected an s3:// URL of served models in RIDGELINE_SERVING or RIDGELINE_STORE; received the folder "
                f"{self.serving_dir()}. Servers can read this folder itself."
            )
        same_driver = url.partition("://")[0] == self.store.partition("://")[0]
        path = open_url(url, self.storage_options if same_driver else {})
        return ObjectRegistry(path, mirror, self.keep_versions, base_path, self.open_store())

    def locations(self, component: Component) -> dict[str, Any]:
        """Return the values of a component's location parameters (``exclude=True``) that are set here."""
        fields = component.params.model_fields.items()
        values = {name: getattr(self, name, None) for name, field in fields if field.exclude}
        return {name: value for name, value in values.items() if value is not None}


def _sentences(error: ValidationError) -> Iterator[str]:
    """Yield a sentence about each bad variable: its name, what was expected, what was received."""
    for item in error.errors(include_url=False):
        expected = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"].split(", unable")[0]
        expected = expected.replace("Input should be ", "a number " if " than " in expected else "")
        received = "" if "; received " in expected else f"; received {item['input']!r}"
        yield f"Setting {PREFIX}{str(item['loc'][0]).upper()}: expected {expected}{received}."
