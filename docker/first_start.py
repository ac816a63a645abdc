"""What must be true before a server starts, made true or refused with advice: ``python first_start.py STAGE``.

``secrets`` checks that the volumes can be written and makes the secrets that are missing. ``database`` waits for
PostgreSQL, makes Airflow's tables in an empty database, and refuses one that another version of Airflow left.
Both may run again at any time: what is there stays as it is.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

VOLUMES = {
    "artifacts": Path("/var/lib/ridgeline"),
    "logs": Path("/var/log/ridgeline"),
    "secrets": Path("/secrets"),
    "service-secrets": Path("/service-secrets"),
}
DATABASE_SECONDS = 120


class Refusal(RuntimeError):
    """The stack can't start as things are; the text says what to do."""


def check_volumes(volumes: dict[str, Path]) -> None:
    """Refuse volumes that this user can't write to.

    Args:
        volumes: Where each is mounted, by its name in the compose file.

    Raises:
        Refusal: If one can't be written to.
    """
    for name, folder in volumes.items():
        probe = folder / f".probe-{secrets.token_hex(8)}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise Refusal(
                f"Expected to write to the volume {name!r}, mounted at {folder}, as user {os.getuid()}; received: "
                f"{error.strerror}. Give it to that user: run `chown -R {os.getuid()}:{os.getgid()} FOLDER` as root "
                f"in the folder that `docker volume inspect` or `podman volume inspect` names, then `make up`."
            ) from error


def make_secrets(private: Path, services: Path, users: str) -> None:
    """Make the secrets that are missing; what is there is never replaced.

    Args:
        private: For Airflow only.
        services: For the database and the broker, which run as other users.
        users: Airflow's ``simple_auth_manager_users``: ``name:role``, separated by commas.
    """
    password = _secret(services / "database_password", secrets.token_urlsafe(32), 0o444)
    broker_password = secrets.token_urlsafe(32)
    redis = _secret(services / "redis.conf", f"requirepass {broker_password}\nappendonly yes\ndir /data\n", 0o444)
    broker_password = redis.split()[1]
    _secret(private / "database_url", f"postgresql+psycopg2://airflow:{password}@database:5432/airflow")
    _secret(private / "broker_url", f"redis://:{broker_password}@broker:6379/0")
    _secret(private / "fernet_key", base64.urlsafe_b64encode(os.urandom(32)).decode())
    _secret(private / "jwt_secret", secrets.token_urlsafe(64))
    _secret(private / "api_secret_key", secrets.token_urlsafe(64))
    passwords = private / "passwords.json"
    known: dict[str, str] = json.loads(passwords.read_text()) if passwords.exists() else {}
    names = [user.split(":")[0].strip() for user in users.split(",")]
    if missing := [name for name in names if name not in known]:
        known |= {name: secrets.token_urlsafe(16) for name in missing}
        _replace(passwords, json.dumps(known, indent=2) + "\n", 0o600)


def _secret(path: Path, new: str, mode: int = 0o400) -> str:
    if not path.exists():
        _replace(path, new, mode)
        print(f"made {path}")
    return path.read_text()


def _replace(path: Path, text: str, mode: int) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.chmod(mode)
    unfinished.rename(path)


def prepare_serving(serving: Path) -> None:
    """Give TF Serving a configuration without models, until the first push writes one.

    Args:
        serving: The folder that it reads.
    """
    serving.mkdir(parents=True, exist_ok=True)
    config = serving / "models.config"
    if not config.exists():
        config.write_text("model_config_list {\n}\n")


def wait_for_database(url: str) -> None:
    """Wait until the database answers.

    Args:
        url: Its address, user and password.

    Raises:
        Refusal: If it does not in `DATABASE_SECONDS`, or refuses the password.
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
                    "Expected the database to take the password of the volume 'secrets'; received: password "
                    "authentication failed. The volumes 'database', 'secrets' and 'service-secrets' belong together: "
                    "restore all three from one backup."
                ) from error
            if time.monotonic() > deadline:
                raise Refusal(
                    f"Expected the database to answer in {DATABASE_SECONDS} s; received: {cause}. Its log says why: "
                    "`make logs SERVICE=database`."
                ) from error
            time.sleep(2)


def prepare_database(migrate: bool) -> None:
    """Make Airflow's tables, or bring them to this Airflow's version if that was asked for.

    Args:
        migrate: Whether an older database may be changed.

    Raises:
        Refusal: If the database is another version's, or is encrypted with another key.
    """
    import airflow
    from airflow.utils import db
    from airflow.utils.session import create_session

    with create_session() as session:
        current = db._get_current_revision(session)
    revisions = db._get_script_object()
    versions = {revision: version for version, revision in db._REVISION_HEADS_MAP.items()}
    if current and current not in {script.revision for script in revisions.walk_revisions()}:
        raise Refusal(
            f"Expected a database of Airflow {airflow.__version__} or older; received revision {current}, which "
            "this version does not know: a newer Airflow made it. Start the image that made it, or restore the "
            "backup from before the upgrade."
        )
    if current and current != revisions.get_current_head() and not migrate:
        raise Refusal(
            f"Expected a database of Airflow {airflow.__version__}; received one of "
            f"{versions.get(current, f'an older version (revision {current})')}. There is no way back but a backup: "
            "make one (docs/server.md, `Backup and restore`), then run `make up MIGRATE=1`."
        )
    if current != revisions.get_current_head():
        subprocess.run(["airflow", "db", "migrate"], check=True)
        print(f"database: made ready for Airflow {airflow.__version__}")
    _check_key()


def _check_key() -> None:
    """Refuse a Fernet key that does not open what the database holds."""
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
            "Expected the key in the volume 'secrets' (fernet_key) to open the variables and connections in the "
            "database; received another key. Restore the volume 'secrets' from the backup that belongs to this "
            "database."
        ) from error


def main(stage: str) -> None:
    """Run a stage.

    Args:
        stage: ``secrets`` or ``database``.
    """
    try:
        if stage == "secrets":
            check_volumes(VOLUMES)
            users = os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"]
            make_secrets(VOLUMES["secrets"], VOLUMES["service-secrets"], users)
            prepare_serving(Path(os.environ["RIDGELINE_SERVING"]))
        else:
            wait_for_database((VOLUMES["secrets"] / "database_url").read_text())
            prepare_database(migrate=bool(os.environ.get("RIDGELINE_MIGRATE")))
    except Refusal as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
