"""What an Airflow connection says: the Apprise URLs of recipients, and the options of an object store's driver."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from ridgeline.masking import remember, remember_secret

ENTRY = re.compile(r"airflow://([^?\s]+)(?:\?to=([^?&\s]+))?")
ENTRY_FORM = "airflow://CONN_ID, or airflow://CONN_ID?to=ADDRESS for a mail server"
_SECRET = re.compile(r"key|secret|token|pass|auth|credential|sas|connection_string", re.IGNORECASE)
_ABOUT_SECRET = re.compile(  # auth_type, token_expiry, private_key_path
    r"(type|method|mode|mechanism|scheme|version|host|path|file|size|count|seconds|timeout|expiry|ttl)$", re.IGNORECASE
)
_WAYS_TO_LOG_IN = ("anon", "browser", "cache", "cloud", "google_default")  # gcsfs takes these as its token
_AWS = {  # keys of the extra of a connection of type `aws`: the parameters of s3fs
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "endpoint_url": "endpoint_url",
    "region_name": "region_name",
}


class Connection(Protocol):
    """The fields of Airflow's connection that are read here."""

    conn_type: str | None
    host: str | None
    port: int | None
    login: str | None
    password: str | None
    extra: str | None


def hide_secrets(connection: Connection) -> None:
    """Hide the secrets of a connection from now on in every text that `ridgeline.masking.mask` returns.

    These are the password, the login of type ``aws``, and of the extra each URL and what has the name of a secret.

    Args:
        connection: The connection.
    """
    remember_secret(connection.password or "")
    if connection.conn_type == "aws":
        remember_secret(connection.login or "")
    try:
        extra = _extra(connection)
    except ValueError:  # it is refused when it is used
        remember_secret(connection.extra or "")
        return
    for name, text in _texts("", extra):
        if _SECRET.search(name) and not _ABOUT_SECRET.search(name) and text not in _WAYS_TO_LOG_IN:
            remember_secret(text)
        if "://" in text and not name.endswith("endpoint_url"):
            remember(text)
            remember_secret(text.partition("://")[2])


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts and whole numbers in a JSON value, each with the name of the innermost key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(name, inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, str(value)
    elif isinstance(value, str):
        yield name, value
        with suppress(ValueError):  # Airflow's form stores JSON inside of JSON
            yield from _texts(name, json.loads(value))


def apprise_urls(connection: Connection, to: str = "") -> list[str]:
    """Return the Apprise URLs of the recipients in a connection.

    The type ``apprise`` is that of Airflow's Apprise provider: ``config`` in the extra is ``{"path": URL}``, or a list
    of these. The type ``smtp`` is that of its SMTP provider: the mail server and the sender, ``from_email``.

    Args:
        connection: The connection.
        to: Addresses for a mail server, separated by commas.

    Raises:
        ValueError: If the connection has another type or lacks something; the message has no value of the connection.
    """
    if connection.conn_type == "apprise":
        if to:
            raise ValueError("?to= is for connections of type smtp; this one has type apprise")
        return _configured_urls(_extra(connection).get("config"))
    if connection.conn_type == "smtp":
        return [_mail_url(connection, to)]
    raise ValueError(f"expected type apprise or smtp; received {connection.conn_type or 'none'}")


def _configured_urls(config: Any) -> list[str]:
    if isinstance(config, str):  # as Airflow's form stores it
        try:
            config = json.loads(config)
        except ValueError:
            config = None
    entries = config if isinstance(config, list) else [config]
    urls = [str(entry["path"]) for entry in entries if isinstance(entry, dict) and entry.get("path")]
    if not urls or len(urls) < len(entries):
        raise ValueError('expected config in its extra as {"path": "URL"} or a list of these; received something else')
    return urls


def _mail_url(connection: Connection, to: str) -> str:
    extra = _extra(connection)
    sender = str(extra.get("from_email") or connection.login or "")
    for found, missing in (
        (connection.host, "a host"),
        (to, "?to=ADDRESS after its name"),
        ("@" in sender, "from_email in its extra, the sender's address"),
    ):
        if not found:
            raise ValueError(f"type smtp needs {missing}")
    if extra.get("auth_type", "basic") != "basic":
        raise ValueError("expected auth_type basic; received another")
    mode = "ssl" if not extra.get("disable_ssl") else "insecure" if extra.get("disable_tls") else "starttls"
    host = str(connection.host)
    login, password = connection.login or "", connection.password or ""
    user = f"{quote(login, safe='')}:{quote(password, safe='')}@" if login and password else ""  # as Airflow logs in
    options = {"smtp": host, "from": sender, "to": to, "mode": mode}
    scheme = "mailto" if mode == "insecure" else "mailtos"
    return f"{scheme}://{user}{host}:{connection.port or 465}?{urlencode(options, safe='@,')}"


def storage_options(connection: Connection, protocol: str) -> dict[str, Any]:
    """Return the options of an fsspec driver in a connection.

    The type ``aws`` is that of Airflow's Amazon provider and serves s3:// URLs. The extra of the type ``generic`` holds
    the options of any driver under the names that the driver gives them.

    Args:
        connection: The connection.
        protocol: The URL's scheme, such as ``s3``.

    Raises:
        ValueError: If the connection has another type or can't be used; the message has no value of the connection.
    """
    extra = _extra(connection)
    if connection.conn_type == "aws" and protocol in ("s3", "s3a"):
        return _s3_options(connection, extra)
    if connection.conn_type != "generic":
        expected = "aws or generic" if protocol in ("s3", "s3a") else "generic"
        raise ValueError(f"expected type {expected} for {protocol}:// URLs; received {connection.conn_type or 'none'}")
    if connection.login or connection.password or not extra:
        raise ValueError("type generic needs the driver's options in its extra, and no login or password beside them")
    return extra


def _s3_options(connection: Connection, extra: dict[str, Any]) -> dict[str, Any]:
    if unknown := extra.keys() - _AWS.keys():
        raise ValueError(
            f"expected some of {', '.join(_AWS)} in its extra; received {', '.join(sorted(unknown))}. Use a connection "
            "of type generic with the parameters of s3fs.S3FileSystem for others"
        )
    login = {"key": connection.login, "secret": connection.password}
    found = {_AWS[name]: value for name, value in extra.items()} | {k: v for k, v in login.items() if v}
    if ("key" in found) != ("secret" in found):
        raise ValueError("expected an access key id and its secret; received one of the two")
    if region := found.pop("region_name", None):
        found["client_kwargs"] = {"region_name": region}
    return found


def _extra(connection: Connection) -> dict[str, Any]:
    try:
        extra = json.loads(connection.extra or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ValueError("its extra is not a JSON object")
    return extra
