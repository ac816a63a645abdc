import json
from pathlib import Path

import pytest

from ridgeline.artifacts import base
from ridgeline.artifacts.base import Artifact, ArtifactError, Facts, FileEntry, canonical_json, digest_of, verify


class NoteFacts(Facts):
    words: int


class Note(Artifact[NoteFacts]):
    facts_type = NoteFacts


class Other(Artifact[NoteFacts]):
    facts_type = NoteFacts


def make_note(folder: Path, text: str = "two words") -> Note:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "note.txt").write_text(text)
    return Note.seal(folder, NoteFacts(words=len(text.split())))


def test_sealed_artifact_loads_with_its_facts(tmp_path):
    note = make_note(tmp_path / "note")
    loaded = Note.load(tmp_path / "note")
    assert loaded.facts == NoteFacts(words=2)
    assert loaded.digest == note.digest
    assert loaded.ref == f"Note/{note.digest}"


class CountFacts(Facts):
    counts: dict[str, int]


class Count(Artifact[CountFacts]):
    facts_type = CountFacts


def test_facts_have_the_same_order_before_and_after_they_are_read(tmp_path):
    (tmp_path / "count").mkdir()
    count = Count.seal(tmp_path / "count", CountFacts(counts={"train": 1, "test": 2}))
    assert list(count.facts.counts) == list(Count.load(tmp_path / "count").facts.counts)


def test_digest_is_golden_and_depends_on_content_alone(tmp_path):
    first, second = make_note(tmp_path / "a"), make_note(tmp_path / "b")
    assert first.digest == second.digest == "a5d6e724223ca41818cb7ec40b2a49146bbe3798567f4eb48d1433f00b284579"
    assert make_note(tmp_path / "c", "other words").digest != first.digest


def test_canonical_json_is_sorted_and_refuses_nan():
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    assert digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7])
def test_the_digest_of_a_mapping_is_that_of_its_whole_json(monkeypatch, size):
    monkeypatch.setattr(base, "BATCH_SIZE", 3)
    values = {f'{number % 5}ü"{number}': number for number in reversed(range(size))}
    assert base.digest_of_mapping(values) == base.digest_of(values)


def test_one_flipped_byte_is_found(tmp_path):
    make_note(tmp_path / "note")
    path = tmp_path / "note" / "deep" / "note.txt"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"SHA-256; missing, changed or extra: \['deep/note\.txt'\]"):
        Note.load(tmp_path / "note")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_or_extra_file_is_found(tmp_path, change):
    make_note(tmp_path / "note")
    if change == "missing":
        (tmp_path / "note" / "deep" / "note.txt").unlink()
    else:
        (tmp_path / "note" / "extra.txt").write_text("")
    with pytest.raises(ArtifactError, match="missing, changed or extra"):
        verify(tmp_path / "note")


def test_changed_facts_are_found(tmp_path):
    make_note(tmp_path / "note")
    path = tmp_path / "note" / "manifest.json"
    path.write_text(path.read_text().replace('"words": 2', '"words": 3'))
    with pytest.raises(ArtifactError, match="it was changed"):
        Note.load(tmp_path / "note")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}'])
def test_broken_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Note.load(tmp_path)


def test_other_schema_version_is_refused(tmp_path):
    make_note(tmp_path / "note")
    path = tmp_path / "note" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(ArtifactError, match="schema version 1 .* received 2"):
        Note.load(tmp_path / "note")


def test_other_type_is_refused(tmp_path):
    make_note(tmp_path / "note")
    with pytest.raises(ArtifactError, match="type Other; received Note"):
        Other.load(tmp_path / "note")


def test_missing_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no readable"):
        Note.load(tmp_path / "nowhere")


def test_symbolic_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="symbolic link"):
        Note.seal(tmp_path, NoteFacts(words=0))


def test_facts_of_another_type_are_refused(tmp_path):
    with pytest.raises(TypeError, match="NoteFacts for a Note; received Facts"):
        Note.seal(tmp_path, Facts())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._note.txt", ".nfs00000000001a2b3c"])
@pytest.mark.parametrize("folder", ["", "deep/", "other/"])
def test_files_of_operating_systems_are_ignored(tmp_path, name, folder):
    before = make_note(tmp_path / "note").digest
    path = tmp_path / "note" / f"{folder}{name}"
    path.parent.mkdir(exist_ok=True)
    path.write_text("by the system")
    assert Note.load(tmp_path / "note").digest == before
    (tmp_path / "note" / "manifest.json").unlink()
    assert Note.seal(tmp_path / "note", NoteFacts(words=2)).digest == before


def test_a_file_of_that_name_that_the_manifest_lists_is_verified(tmp_path):
    make_note(tmp_path / "note")
    path = tmp_path / "note" / "manifest.json"
    manifest = Note.load(tmp_path / "note").manifest
    listed = manifest.model_copy(update={"files": {**manifest.files, "._old": FileEntry(bytes=0, sha256="0" * 64)}})
    path.write_text(listed.model_copy(update={"digest": listed.expected_digest()}).model_dump_json())
    with pytest.raises(ArtifactError) as caught:
        Note.load(tmp_path / "note")
    assert caught.value.files == ("._old",)


def test_an_error_names_the_files(tmp_path):
    make_note(tmp_path / "note")
    (tmp_path / "note" / "extra").touch()
    (tmp_path / "note" / "deep" / "note.txt").write_text("other")
    with pytest.raises(ArtifactError) as caught:
        Note.load(tmp_path / "note")
    assert caught.value.files == ("deep/note.txt", "extra")
