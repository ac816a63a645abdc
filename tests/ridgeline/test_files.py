import json

import pytest

from ridgeline import files


def flips(content: bytes):
    """Yield a text with each of its bits flipped in turn."""
    for place in range(len(content)):
        for bit in range(8):
            yield content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_signed_text_is_json_and_gives_its_object_back(indent):
    text = json.dumps({"version": 3, "reason": 'worse, "sha256": "' + "0" * 64 + '"}'}, indent=indent)
    signed = files.sign(text)
    assert json.loads(files.unsign(signed)) == json.loads(text)
    assert json.loads(signed).keys() == {"version", "reason", "sha256"}


def test_a_text_without_a_checksum_is_returned_as_it_is():
    assert files.unsign('{"version": 3}') == '{"version": 3}'


def test_every_flipped_bit_is_found():
    signed = files.sign('{"version": 3, "reason": "worse"}')
    for damaged in flips(signed.encode()):
        try:
            found = json.loads(files.unsign(damaged.decode()))
        except ValueError:
            continue
        assert "sha256" in found or found.keys() - {"version", "reason"}  # which the models of records refuse


def test_a_folder_is_created_with_its_parents(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.make_folder(tmp_path / "file" / "b")


def test_a_file_is_replaced_whole(tmp_path):
    files.write(tmp_path / "file", "one")
    files.write(tmp_path / "file", "two\n")
    assert (tmp_path / "file").read_bytes() == b"two\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_removing_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "none"):
        files.remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, files.SMALL_BYTES - 1, files.SMALL_BYTES, files.SMALL_BYTES * 3 + 1])
def test_a_file_of_any_size_is_read_whole(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert files.read(str(tmp_path / "file")) == content[:size]
