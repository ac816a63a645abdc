"""What every artifact is: a directory with a manifest, named by the digest of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BATCH_SIZE = 10_000


# Files that operating systems and network file systems put into any folder.
OS_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
OS_PREFIXES = ("._", ".nfs")


class ArtifactError(RuntimeError):
    """An artifact is missing, damaged, or not of the expected type.

    Attributes:
        files: Names, relative to the artifact, of the files that are missing, changed or extra; empty if none is known.
    """

    def __init__(self, message: str, files: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.files = tuple(files)


class Facts(BaseModel):
    """The typed facts that an artifact's manifest states about its content.

    Nothing that differs between two equal runs belongs here: no time, host, path or run id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class FileEntry(BaseModel):
    """One file of an artifact: its size in bytes and its SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of ``manifest.json``.

    Attributes:
        schema_version: Version of this layout; a reader refuses any other.
        type: Name of the artifact type, for example ``Examples``.
        facts: The type's own facts.
        files: Every other file, by path relative to the artifact's directory.
        digest: SHA-256 of the four fields above as canonical JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    type: str
    facts: dict[str, Any]
    files: dict[str, FileEntry]
    digest: str

    def expected_digest(self) -> str:
        """Return the digest that the other fields give."""
        return digest_of(self.model_dump(exclude={"digest"}))


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN.

    Example:
        >>> canonical_json({"b": [1, 2.5], "a": None})
        '{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: object) -> str:
    """Return the SHA-256, as 64 hexadecimal digits, of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_of_mapping(values: Mapping[str, Any]) -> str:
    """Return what `digest_of` does, for a large mapping: its JSON is never in memory as a whole.

    Args:
        values: The values by name.

    Example:
        >>> digest_of_mapping({"b": 1, "a": None}) == digest_of({"b": 1, "a": None})
        True
    """
    sha256, names = hashlib.sha256(b"{"), sorted(values)
    for start in range(0, len(names), BATCH_SIZE):
        text = canonical_json({name: values[name] for name in names[start : start + BATCH_SIZE]})[1:-1]
        sha256.update(f"{',' if start else ''}{text}".encode())
    sha256.update(b"}")
    return sha256.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Return a file's size and SHA-256."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(bytes=file.tell(), sha256=sha256)


def is_os_file(name: str) -> bool:
    """Return whether a file's name is one that an operating system or a network file system makes by itself.

    Example:
        >>> [is_os_file(name) for name in ("a/.DS_Store", ".nfs0000000000a1b2c3", "model.weights.h5")]
        [True, True, False]
    """
    own = name.rpartition("/")[2]
    return own in OS_FILES or own.startswith(OS_PREFIXES)


def different_files(found: dict[str, Path], expected: dict[str, FileEntry]) -> list[str]:
    """Return the names of the files that are missing, changed or extra; those of operating systems are never extra.

    Args:
        found: Paths by name.
        expected: What the files are expected to be, by name.
    """
    extra = {name for name in found.keys() - expected.keys() if not is_os_file(name)}
    changed = {name for name in found.keys() & expected.keys() if file_entry(found[name]) != expected[name]}
    return sorted(extra | changed | (expected.keys() - found.keys()))


def _files_in(directory: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(
                f"Expected regular files in an artifact; received the symbolic link {path}. Write the file's content."
            )
        if path.is_file() and path != directory / MANIFEST:
            files[path.relative_to(directory).as_posix()] = path
    return files


F = TypeVar("F", bound=Facts)


class Artifact(Generic[F]):
    """A directory of files with a ``manifest.json``, immutable once sealed.

    On disk::

        <digest>/
          manifest.json    schema version, type, facts, every file's size and SHA-256, the digest of all that
          ...              the type's own files

    Attributes:
        path: The local directory.
        manifest: The manifest as read.
        facts: The manifest's facts, typed.
        report_name: Name of the HTML report among the type's files; None for a type without one.
    """

    facts_type: ClassVar[type[Facts]]
    report_name: ClassVar[str | None] = None

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.facts: F = self.facts_type.model_validate(manifest.facts)  # type: ignore[assignment]

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, which is also the artifact's name."""
        return self.manifest.digest

    @property
    def ref(self) -> str:
        """The store-relative name ``<Type>/<digest>``, the same wherever the store lies."""
        return f"{self.manifest.type}/{self.digest}"

    @property
    def report(self) -> Path | None:
        """The path of the artifact's HTML report; None if its type has none."""
        return self.path / self.report_name if self.report_name else None

    @property
    def problem(self) -> str | None:
        """Why the run must stop after the step that made this, for people; None to continue."""
        return None

    @classmethod
    def seal(cls, directory: Path, facts: F) -> Self:
        """Write the manifest of a directory whose files are complete.

        Args:
            directory: The directory that holds the artifact's files.
            facts: The type's facts.

        Returns:
            The sealed artifact.

        Raises:
            TypeError: If the facts are not this type's.
        """
        if not isinstance(facts, cls.facts_type):
            raise TypeError(
                f"Expected facts of type {cls.facts_type.__name__} for a {cls.__name__}; received "
                f"{type(facts).__name__}. Return the output type's own facts."
            )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            type=cls.__name__,
            facts=json.loads(canonical_json(facts.model_dump(mode="json"))),  # in the order in which they are read
            files={name: file_entry(path) for name, path in _files_in(directory).items() if not is_os_file(name)},
            digest="",
        )
        manifest = manifest.model_copy(update={"digest": manifest.expected_digest()})
        text = json.dumps(manifest.model_dump(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8")
        return cls(directory, manifest)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open a sealed artifact and verify every byte of it.

        Args:
            directory: The artifact's local directory.

        Returns:
            The artifact, whose content matches its digest.

        Raises:
            ArtifactError: If it is missing, damaged, of another type or of another schema version.
        """
        manifest = _read_manifest(directory)
        if manifest.type != cls.__name__:
            raise ArtifactError(
                f"Expected an artifact of type {cls.__name__}; received {manifest.type} at {directory}. "
                f"Pass the output of a step that yields {cls.__name__}."
            )
        verify(directory, manifest)
        try:
            return cls(directory, manifest)
        except ValidationError as error:
            raise ArtifactError(f"Expected the facts of a {cls.__name__} in {directory}; received: {error}") from error


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"Expected an artifact at {directory}; received: no readable {MANIFEST} ({error.strerror}). "
            "Rerun the step that writes it.",
            [MANIFEST],
        ) from error
    except ValueError as error:
        message = f"Expected JSON in {path}; received: {error}. The artifact is damaged."
        raise ArtifactError(message, [MANIFEST]) from error
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"Expected schema version {SCHEMA_VERSION} in {path}; received {version!r}. "
            "Rerun the step that writes it with this version of Ridgeline.",
            [MANIFEST],
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        message = f"Expected a manifest in {path}; received: {error}. The artifact is damaged."
        raise ArtifactError(message, [MANIFEST]) from error


def verify(directory: Path, manifest: Manifest | None = None) -> Manifest:
    """Check that a directory holds exactly the files that its manifest lists, those of operating systems left out.

    Args:
        directory: The artifact's local directory.
        manifest: Its manifest, if already read.

    Returns:
        The manifest.

    Raises:
        ArtifactError: If anything is missing, changed or added.
    """
    manifest = manifest or _read_manifest(directory)
    if manifest.expected_digest() != manifest.digest:
        message = f"Expected the digest {manifest.digest} of {directory / MANIFEST}; it was changed."
        raise ArtifactError(message, [MANIFEST])
    if different := different_files(_files_in(directory), manifest.files):
        raise ArtifactError(
            f"Expected in {directory} the files that its {MANIFEST} lists, with their SHA-256; missing, changed or "
            f"extra: {different}. The artifact is damaged.",
            different,
        )
    return manifest
