"""Prepare the stack before its servers start: ``python first_start.py STAGE``.

``secrets`` checks the settings and that the volumes are writable, and creates missing secrets. ``database`` waits for
PostgreSQL, creates Airflow's tables in an empty database, refuses the database of another version of Airflow, and
creates the pool of tasks that use TensorFlow. ``store`` checks that workers on several hosts can share the object
store. All stages can run again at any time: they do not change what exists.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ridgeline.files import move
from ridgeline.masking import mask

VOLUMES = {
    "artifacts": Path("/var/lib/ridgeline"),
    "logs": Path("/var/log/ridgeline"),
    "secrets": Path("/secrets"),
    "service-secrets": Path("/service-secrets"),
}
AWS_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
DATABASE_SECONDS, STORE_SECONDS = 120, 120


class Refusal(RuntimeError):
    """The stack cannot start; the text says what to do."""


def check_settings() -> None:
    """Check the variables that users set.

    Raises:
        Refusal: If one has a value that can't be used.
    """
    from ridgeline.settings import Settings, SettingsError

    try:
        Settings()
    except SettingsError as error:
        raise Refusal(str(error)) from None


def check_volumes(volumes: dict[str, Path]) -> None:
    """Check that this user can write to the volumes.

    Args:
        volumes: The mount points, by name in the compose file.

    Raises:
        Refusal: If a volume is not writable.
    """
    for name, folder in volumes.items():
        probe = folder / f".probe-{secrets.token_hex(8)}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise Refusal(
                f"Cannot write to the volume {name!r}, mounted at {folder}, as user {os.getuid()}: {error.strerror}. "
                f"Run `chown -R {os.getuid()}:{os.getgid()} FOLDER` as root with the folder that `docker volume "
                "inspect` or `podman volume inspect` shows, then `make up`."
            ) from error


def make_secrets(
    private: Path, services: Path, users: str, notify: str = "", aws: Mapping[str, str] | None = None
) -> None:
    """Create the missing secrets; existing ones are never replaced, except what the settings state.

    Args:
        private: The folder for Airflow only.
        services: The folder for the database and the broker, which run as other users.
        users: Airflow's ``simple_auth_manager_users``: ``name:role``, separated by commas.
        notify: The recipients of messages, as in ``RIDGELINE_NOTIFY``.
        aws: The credentials of an object store, by the names of AWS's variables; without a key, the driver looks for
            credentials elsewhere, such as the machine's role. None for the stack's own object store.
    """
    private.chmod(0o700)  # an earlier version left it open to the group
    password = _secret(services / "database_password", secrets.token_urlsafe(32), 0o444)
    broker_password = secrets.token_urlsafe(32)
    redis = _secret(services / "redis.conf", f"requirepass {broker_password}\nappendonly yes\ndir /data\n", 0o444)
    broker_password = redis.split()[1]
    _secret(private / "database_url", f"postgresql+psycopg2://airflow:{password}@database:5432/airflow")
    _secret(private / "broker_url", f"redis://:{broker_password}@broker:6379/0")
    _secret(private / "fernet_key", base64.urlsafe_b64encode(os.urandom(32)).decode())
    _secret(private / "jwt_secret", secrets.token_urlsafe(64))
    _secret(private / "api_secret_key", secrets.token_urlsafe(64))
    _replace(private / "notify", notify, 0o400)
    own = _secret(services / "object_store", f"{secrets.token_hex(10)} {secrets.token_hex(20)}\n", 0o444).split()
    keys = dict(zip(AWS_VARIABLES, own, strict=False)) if aws is None else aws
    lines = [f"{name.lower()} = {value}" for name, value in keys.items() if value]
    _replace(private / "aws_credentials", "\n".join(["[default]", *lines, ""]), 0o400)
    passwords = private / "passwords.json"
    known: dict[str, str] = json.loads(passwords.read_text()) if passwords.exists() else {}
    names = [user.split(":")[0].strip() for user in users.split(",")]
    if missing := [name for name in names if name not in known]:
        known |= {name: secrets.token_urlsafe(16) for name in missing}
        _replace(passwords, json.dumps(known, indent=2) + "\n", 0o600)


def _secret(path: Path, new: str, mode: int = 0o400) -> str:
    if not path.exists():
        _replace(path, new, mode)
        print(f"created {path}")
    return path.read_text()


def _replace(path: Path, text: str, mode: int) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.chmod(mode)
    move(unfinished, path)


def prepare_serving(serving: Path) -> None:
    """Create a configuration without models for TensorFlow Serving; the first push replaces it.

    Args:
        serving: The folder that TensorFlow Serving reads.
    """
    serving.mkdir(parents=True, exist_ok=True)
    config = serving / "models.config"
    if not config.exists():
        config.write_text("model_config_list {\n}\n")


def expect_shared(name: str, url: str) -> None:
    """Check that workers on several hosts can reach a place.

    Args:
        name: The variable that names it.
        url: Its value.

    Raises:
        Refusal: If they can't.
    """
    from ridgeline import object_store

    if url.partition("://")[0] not in object_store.S3:
        raise Refusal(
            f"Expected an s3:// URL as {name} for the profile celery; received {url!r}. The workers share no folder. "
            f"Unset {name}, or name an object store."
        )


def check_store(url: str, connection: str, create_bucket: bool) -> None:
    """Check that workers on several hosts can share an object store: that it can be written and has conditional writes.

    Args:
        url: The store's root.
        connection: The Airflow connection with its credentials; with one, only the steps themselves can check it.
        create_bucket: Whether to wait for the stack's own object store, and to create the missing bucket.

    Raises:
        Refusal: If they can't.
    """
    from ridgeline import object_store

    if connection:
        print(f"store: not checked, its credentials are in the Airflow connection {connection!r}")
        return
    root = object_store.open_url(url, {"config_kwargs": {"retries": {"max_attempts": 1}}} if create_bucket else {})
    deadline = time.monotonic() + STORE_SECONDS
    while create_bucket:
        try:
            root.fs.call_s3("create_bucket", Bucket=root.path.partition("/")[0])
        except FileExistsError:
            break
        except Exception as error:
            if not object_store.is_transient(error) or time.monotonic() > deadline:
                raise Refusal(
                    f"Cannot reach the object store: {error}. See `make logs SERVICE=object-store`."
                ) from error
            time.sleep(2)
        else:
            break
    try:
        object_store.entries(root)
        object_store.expect_conditional_writes(root)
    except object_store.ConditionalWritesError as error:
        raise Refusal(
            f"Expected an object store with conditional writes for several workers; received {url}: {error}. Two "
            "workers would do the same work, and lose pushes. Use S3 or a service that has them, or leave out the "
            "profile celery."
        ) from error
    except Exception as error:
        if not (found := object_store.explain(error)):
            raise
        raise Refusal(f"Cannot use the store {url}: {found[0]}. {found[1]}, then run `make up`.") from error


def wait_for_database(url: str) -> None:
    """Wait until the database accepts connections.

    Args:
        url: The address, with user and password.

    Raises:
        Refusal: If the database does not respond within `DATABASE_SECONDS`, or refuses the password.
    """
    import psycopg2

    deadline = time.monotonic() + DATABASE_SECONDS
    while True:
        try:
            psycopg2.connect(url.replace("+psycopg2", ""), connect_timeout=5).close()
            return
        except psycopg2.OperationalError as error:
            cause = str(error).strip()
            if "password authentication failed" in cause:
                raise Refusal(
                    "Cannot log in to the database with the password in the volume 'secrets': password authentication "
                    "failed. The volumes 'database', 'secrets' and 'service-secrets' belong together: restore all "
                    "three from one backup."
                ) from error
            if time.monotonic() > deadline:
                raise Refusal(
                    f"Cannot connect to the database within {DATABASE_SECONDS} s: {cause}. See its log: `make logs "
                    "SERVICE=database`."
                ) from error
            time.sleep(2)


def prepare_database(migrate: bool) -> None:
    """Create Airflow's tables and the pool, or migrate the tables to this version of Airflow.

    Args:
        migrate: Whether to migrate the database of an older version.

    Raises:
        Refusal: If the database belongs to another version, or is encrypted with another key.
    """
    import airflow
    from airflow.utils import db
    from airflow.utils.session import create_session

    from ridgeline.airflow.pool import create_pool

    with create_session() as session:
        current = db._get_current_revision(session)
    revisions = db._get_script_object()
    versions = {revision: version for version, revision in db._REVISION_HEADS_MAP.items()}
    if current and current not in {script.revision for script in revisions.walk_revisions()}:
        raise Refusal(
            f"Expected a database of Airflow {airflow.__version__} or older; received revision {current} of a newer "
            "Airflow. Start the image of that version, or restore the backup from before the upgrade."
        )
    if current and current != revisions.get_current_head() and not migrate:
        raise Refusal(
            f"Expected a database of Airflow {airflow.__version__}; received one of "
            f"{versions.get(current, f'an older version (revision {current})')}. The migration cannot be "
            "undone: make a backup (docs/server.md, `Backup and restore`), then run `make up MIGRATE=1`."
        )
    if current != revisions.get_current_head():
        subprocess.run(["airflow", "db", "migrate"], check=True)
        print(f"database: migrated to Airflow {airflow.__version__}")
    _check_key()
    create_pool()


def _check_key() -> None:
    """Check that the Fernet key decrypts the contents of the database."""
    from airflow.models.connection import Connection
    from airflow.models.crypto import get_fernet
    from airflow.models.variable import Variable
    from airflow.utils.session import create_session
    from cryptography.fernet import InvalidToken
    from sqlalchemy import select

    with create_session() as session:
        encrypted = [
            *session.scalars(select(Variable._val).where(Variable.is_encrypted).limit(1)),
            *session.scalars(select(Connection._password).where(Connection.is_encrypted).limit(1)),
        ]
    try:
        for value in filter(None, encrypted):
            get_fernet().decrypt(value.encode())
    except InvalidToken as error:
        raise Refusal(
            "Cannot decrypt the variables and connections in the database: they were encrypted with another key than "
            "the one in the volume 'secrets' (fernet_key). Restore the volume 'secrets' from the backup of this "
            "database."
        ) from error


def main(stage: str) -> None:
    """Run a stage.

    Args:
        stage: ``secrets``, ``database`` or ``store``.
    """
    try:
        if stage == "secrets":
            check_settings()
            check_volumes(VOLUMES)
            users = os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"]
            notify = os.environ.get("RIDGELINE_NOTIFY", "")
            own_store = bool(os.environ.get("RIDGELINE_CREATE_BUCKET"))
            aws = None if own_store else {name: os.environ.get(name, "") for name in AWS_VARIABLES}
            make_secrets(VOLUMES["secrets"], VOLUMES["service-secrets"], users, notify, aws)
            prepare_serving(Path(os.environ["RIDGELINE_SERVED_FOLDER"]))
        elif stage == "store":
            connection = os.environ.get("RIDGELINE_STORE_CONNECTION", "")
            create_bucket = bool(os.environ.get("RIDGELINE_CREATE_BUCKET"))
            for name in ("RIDGELINE_STORE", "RIDGELINE_SERVING"):
                expect_shared(name, os.environ[name])
            check_store(os.environ["RIDGELINE_STORE"], connection, create_bucket)
        else:
            wait_for_database((VOLUMES["secrets"] / "database_url").read_text())
            prepare_database(migrate=bool(os.environ.get("RIDGELINE_MIGRATE")))
    except Refusal as error:
        sys.exit(f"error: {mask(error)}")


if __name__ == "__main__":
    main(sys.argv[1])
