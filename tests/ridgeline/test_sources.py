from __future__ import annotations

import importlib
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ridgeline import keys, sources
from ridgeline.component import Component, Source, SourceError, SourceFolder, TransientStepError
from ridgeline.executor import decide, execute
from ridgeline.sources import RECENT_NS, clear_unused, expect_unchanged, read_sources
from ridgeline.store import Store
from tests.faulty_proxy import Faults, Proxy

READ = """
from collections.abc import Mapping
from pathlib import Path
from ridgeline.component import Params, Source, SourceFolder, component
from toy_steps.number import Number, NumberFacts

class ReadParams(Params):
    folder: str = "."
    digits: int = 1

def find_sources(params: ReadParams) -> Mapping[str, SourceFolder]:
    return {"folder": SourceFolder(params.folder)}

@component(output=Number, sources=find_sources)
def read(params: ReadParams, output: Path, sources: Mapping[str, Source], previous: Number | None) -> NumberFacts:
    source = sources["folder"]
    known = (previous.path / "files.txt").read_text().split() if previous else []
    print(len(set(source.files.values()) - set(known)), "read")
    (output / "files.txt").write_text(" ".join(sorted(source.files.values())))
    return NumberFacts(digits=sum(len(source.read(name)) for name in source.files))
"""


@pytest.fixture
def read(toy_steps: Path) -> Component:
    """A step that reads a folder."""
    (toy_steps / "read.py").write_text(READ)
    keys.forget_code()
    step: Component = importlib.import_module("toy_steps.read").read
    return step


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """A folder of nine files, last changed a while ago."""
    folder = tmp_path / "products"
    for number in range(9):
        (folder / f"shelf {number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"shelf {number % 3}" / f"ü[{number}].jpg").write_bytes(bytes([number]) * (number + 1))
    return folder


def listing(folder: Path | str, cache: Path | None = None, outside_links: bool = False) -> Source:
    step: Any = Component("s", Path, None, {}, None, sources=lambda _: {"x": SourceFolder(folder, outside_links)})  # type: ignore[arg-type]
    return read_sources(step, None, cache)["x"]  # type: ignore[arg-type]


def let_time_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next index be made when all files are old enough to be recognized by their times."""
    import time

    real = time.time_ns
    monkeypatch.setattr("ridgeline.sources.time.time_ns", lambda: real() + 2 * RECENT_NS)


def change(folder: Path) -> None:
    for number in range(12):
        (folder / f"new {number}").write_text(f"new {number}")
    for number in range(3):
        (folder / f"shelf {number}" / f"ü[{number}].jpg").write_text(f"other {number}")
    (folder / "shelf 0" / "ü[3].jpg").unlink()
    (folder / "shelf 1" / "ü[4].jpg").rename(folder / "moved.jpg")


def test_a_changed_file_runs_the_step_and_the_reason_counts_the_changes(
    read: Component, store: Store, products: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_time_pass(monkeypatch)
    params = read.parse({"folder": str(products)})
    first = execute(store, read, {}, params, "a")
    assert (first.state, first.reason) == ("complete", "first run of read")
    assert execute(store, read, {}, params, "b").state == "cached"

    change(products)
    expected = "source products changed: 12 files added, 3 modified, 1 removed, 1 renamed"
    assert str(decide(store, read, {}, params)) == f"runs: {expected}"  # asked first, as `ridgeline explain` does
    second = execute(store, read, {}, params, "c")
    assert (second.state, second.reason) == ("complete", expected)
    assert capsys.readouterr().out.split("\n")[:2] == ["9 read", "15 read"]  # the rest is in the previous output

    other = execute(store, read, {}, read.parse({"folder": str(products), "digits": 2}), "d")
    assert other.reason == "parameter read.digits 1 → 2"
    assert capsys.readouterr().out == "20 read\n"  # an output of other parameters is no previous one


@pytest.mark.parametrize("action", ["touch", "copy", "hide", "restore"])
def test_what_leaves_names_and_contents_as_they_are_does_not_run_the_step(
    read: Component, store: Store, products: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_time_pass(monkeypatch)
    params = read.parse({"folder": str(products)})
    execute(store, read, {}, params, "a")
    file = products / "shelf 0" / "ü[0].jpg"
    if action == "touch":
        os.utime(file, (1, 1))
    elif action == "copy":  # other inodes and times
        shutil.copytree(products, products.with_name("copy"))
        shutil.rmtree(products)
        products.with_name("copy").rename(products)
    elif action == "hide":
        for name in (".DS_Store", "Thumbs.db", "._ü[0].jpg", "desktop.ini", ".hidden"):
            (products / "shelf 0" / name).write_text("x")
        (products / ".git").mkdir()
        (products / ".git" / "HEAD").write_text("x")
    else:
        content = file.read_bytes()
        file.write_text("other")
        file.write_bytes(content)
    assert execute(store, read, {}, params, "b").state == "cached"


def test_a_content_that_changes_with_the_same_size_and_time_is_noticed(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = products / "shelf 0" / "ü[0].jpg"
    for wait in (False, True):  # within the moment in which times do not change, and later
        if wait:
            let_time_pass(monkeypatch)
        before, status = listing(products, tmp_path / "cache"), file.stat()
        file.write_bytes(bytes([file.read_bytes()[0] + 1]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        after = listing(products, tmp_path / "cache")
        assert after.files[f"shelf 0/{file.name}"] != before.files[f"shelf 0/{file.name}"]
        assert after.digest == listing(products).digest


def test_an_unchanged_file_is_not_read_again(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_time_pass(monkeypatch)
    listing(products, tmp_path / "cache")
    (products / "new.jpg").write_text("new")
    read: list[str] = []
    real = sources._hash

    def hash_files(root: Path, names: list[str], sizes: list[int]) -> np.ndarray:
        read.extend(names)
        return real(root, names, sizes)

    monkeypatch.setattr(sources, "_hash", hash_files)
    listing(products, tmp_path / "cache")
    assert read == ["new.jpg"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", None])
def test_a_damaged_index_is_made_again(
    products: Path, tmp_path: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_time_pass(monkeypatch)
    whole = listing(products, tmp_path / "cache")
    index = next((tmp_path / "cache").rglob("index.npz"))
    content = index.read_bytes()
    digest = bytes.fromhex(whole.files["shelf 0/ü[0].jpg"])
    index.write_bytes(content.replace(digest, bytes(32)) if damage is None else damage)
    assert listing(products, tmp_path / "cache") == whole
    monkeypatch.setattr(sources, "_hash", None)
    assert listing(products, tmp_path / "cache") == whole


def test_links_inside_are_followed_and_others_are_refused_by_name(products: Path, tmp_path: Path) -> None:
    plain = listing(products)
    (products / "link.jpg").symlink_to(products / "shelf 0" / "ü[0].jpg")
    (products / "shelf 3").symlink_to("shelf 0")
    found = listing(products)
    assert found.files["link.jpg"] == found.files["shelf 3/ü[0].jpg"] == plain.files["shelf 0/ü[0].jpg"]

    (tmp_path / "secret").write_text("x")
    (products / "out.jpg").symlink_to("../secret")
    (products / "loop").symlink_to(".")
    (products / "nowhere.jpg").symlink_to("missing")
    with pytest.raises(SourceError) as caught:
        listing(products)
    assert str(caught.value).splitlines()[1:] == [
        "  loop: a link to a folder around it",
        "  nowhere.jpg: No such file or directory",
        f"  out.jpg: a link that leads out of the folder, to {tmp_path / 'secret'}",
    ]
    for name in ("loop", "nowhere.jpg"):
        (products / name).unlink()
    assert "out.jpg" in listing(products, outside_links=True).files


def test_what_is_no_file_or_has_no_utf8_name_is_named(products: Path) -> None:
    os.mkfifo(products / "pipe")
    (Path(os.fsdecode(os.fsencode(products) + b"/caf\xe9.jpg"))).write_text("x")
    with pytest.raises(SourceError, match=r"(?s)2 of its entries.*caf.*not UTF-8.*pipe: no file and no folder"):
        listing(products)


@pytest.mark.parametrize(("kind", "reason"), [("missing", "No such file"), ("file", "it is a file")])
def test_a_location_that_is_no_folder_is_refused(tmp_path: Path, kind: str, reason: str) -> None:
    if kind == "file":
        (tmp_path / kind).write_text("x")
    with pytest.raises(SourceError, match=f"Expected a folder that can be read; received {tmp_path}/{kind}: {reason}"):
        listing(tmp_path / kind)


def test_an_unwritable_cache_costs_only_time(products: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    assert listing(products, tmp_path / "cache") == listing(products)


def test_a_file_that_changes_during_the_step_is_noticed(products: Path) -> None:
    source = listing(products)
    assert source.read("shelf 1/ü[1].jpg") == b"\x01\x01"
    for action in ("change", "remove"):
        file = products / "shelf 1" / "ü[1].jpg"
        file.unlink() if action == "remove" else file.write_text("other")
        with pytest.raises(TransientStepError, match="to stay as they were"):
            source.read("shelf 1/ü[1].jpg")


def test_an_object_store_s_listing_is_never_an_old_one() -> None:
    from upath import UPath

    folder = UPath("memory://sources-test")
    for name in ("a/1.jpg", "a/.hidden", "b/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    first = listing("memory://sources-test")
    assert list(first.files) == ["a/1.jpg", "b/2.jpg"]
    assert first.read("b/2.jpg") == b"b/2.jpg"
    assert listing("memory://sources-test").digest == first.digest
    (folder / "a/3.jpg").write_bytes(b"3")
    assert list(listing("memory://sources-test").files) == ["a/1.jpg", "a/3.jpg", "b/2.jpg"]
    with pytest.raises(SourceError, match="memory://nothing, where there are none"):
        listing("memory://nothing")


def test_only_the_latest_listings_are_kept(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.sources.KEPT_LISTINGS", 2)
    for number in range(4):
        (products / "new").write_text(str(number))
        listing(products, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.json.gz"))) == 2


def test_a_file_that_changes_while_a_step_reads_past_the_listing_is_noticed(
    toy_steps: Path, store: Store, products: Path
) -> None:
    """As a library does that reads a folder by itself: the step never calls `Source.read`."""
    writes = READ.replace(
        "    source = ", "    (Path(params.folder) / 'shelf 0' / 'ü[0].jpg').write_text('other')\n    source = "
    )
    (toy_steps / "read.py").write_text(writes.replace("len(source.read(name))", "len(name)"))
    keys.forget_code()
    step = importlib.import_module("toy_steps.read").read
    params = step.parse({"folder": str(products)})
    with pytest.raises(TransientStepError, match=r"others, or none, for shelf 0/ü\[0\]\.jpg\. Run the step again"):
        execute(store, step, {}, params, "a")
    assert [execution.state for execution in store.executions()] == ["failed"]
    assert store.refs() == []
    assert execute(store, step, {}, params, "b").state == "complete"  # it writes the same again


@pytest.mark.parametrize("action", ["unlink", "folder", "pipe", "touch", "equal", "other"])
def test_what_became_of_a_file_during_a_step_is_noticed_unless_its_content_is_the_same(
    read: Component, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    let_time_pass(monkeypatch)
    params, cache, file = read.parse({"folder": str(products)}), tmp_path / "cache", products / "shelf 1" / "ü[1].jpg"
    listed = read_sources(read, params, cache)
    content = file.read_bytes()
    if action == "touch":
        os.utime(file, (1, 1))
    else:
        file.unlink()
    if action == "folder":
        file.mkdir()
    elif action == "pipe":
        os.mkfifo(file)
    elif action in ("equal", "other"):
        file.write_bytes(content if action == "equal" else content[::-1] + b"x")
    if action in ("touch", "equal"):
        expect_unchanged(read, params, listed, cache)
    else:
        with pytest.raises(TransientStepError, match=r"for shelf 1/ü\[1\]\.jpg\. Run the step again"):
            expect_unchanged(read, params, listed, cache)


def test_a_file_that_is_added_while_a_step_runs_belongs_to_the_next_execution(
    toy_steps: Path, store: Store, products: Path
) -> None:
    (toy_steps / "read.py").write_text(
        READ.replace("    source = ", "    (Path(params.folder) / 'new.jpg').write_text('new')\n    source = ")
    )
    keys.forget_code()
    step = importlib.import_module("toy_steps.read").read
    params = step.parse({"folder": str(products)})
    assert execute(store, step, {}, params, "a").state == "complete"
    assert execute(store, step, {}, params, "b").reason == "source products changed: 1 file added"
    assert execute(store, step, {}, params, "c").state == "cached"


def test_a_folder_at_another_place_is_compared_with_the_earlier_one(
    read: Component, store: Store, products: Path
) -> None:
    execute(store, read, {}, read.parse({"folder": str(products)}), "a")
    moved = products.rename(products.with_name("goods"))
    (moved / "new.jpg").write_text("new")
    reason = execute(store, read, {}, read.parse({"folder": str(moved)}), "b").reason
    assert "source goods changed: 1 file added" in reason


def test_objects_that_are_no_files_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from upath import UPath

    MemoryFileSystem = importlib.import_module("fsspec.implementations.memory").MemoryFileSystem  # noqa: N806

    folder = UPath("memory://sources-objects")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.jpg").write_bytes(b"1")
    real = MemoryFileSystem.find

    def find(fs: Any, path: str, **options: Any) -> Any:  # as s3fs: what a console makes for a folder
        return real(fs, path, **options) | {f"{folder.path}/": {"type": "file", "size": 0, "ETag": "x"}}

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "find", find)
        source = listing("memory://sources-objects")
    assert list(source.files) == ["1.jpg"]
    (folder / "1.jpg").write_bytes(b"longer")
    with pytest.raises(TransientStepError, match="received another 1.jpg, or none"):
        source.read("1.jpg")
    with pytest.raises(SourceError, match=r"received memory://sources-objects/1\.jpg, which is a file"):
        listing("memory://sources-objects/1.jpg")
    with pytest.raises(SourceError, match="Expected a folder or a URL that fsspec can open; received 'nosuch://x'"):
        listing("nosuch://x")


def test_an_object_store_that_does_not_answer_may_answer_later(monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryFileSystem = importlib.import_module("fsspec.implementations.memory").MemoryFileSystem  # noqa: N806

    def find(*_: Any, **__: Any) -> None:
        raise RuntimeError("no answer")  # drivers raise errors of their own libraries

    monkeypatch.setattr(MemoryFileSystem, "find", find)
    with pytest.raises(TransientStepError, match="Cannot list memory://x: RuntimeError: no answer"):
        listing("memory://x")


def test_what_s3_refuses_is_reported_with_advice(bucket: str, proxy: Proxy) -> None:
    advice = "Correct the credentials, or grant them the rights to list, read, write and delete"
    proxy.faults = Faults(answer=("403", "AccessDenied"))
    with pytest.raises(SourceError, match=f"Cannot list {bucket}/shop: AccessDenied at this time. {advice}"):
        listing(f"{bucket}/shop")
    proxy.faults = Faults()
    with pytest.raises(SourceError, match="Cannot list s3://nosuch/shop: .*Create the bucket, or correct its name"):
        listing("s3://nosuch/shop")


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_belongs_to_unused_locations_is_cleared(products: Path, tmp_path: Path, dry_run: bool) -> None:
    cache = tmp_path / "cache"
    listing(products, cache)
    (used,) = cache.iterdir()
    unused = shutil.copytree(used, cache / "unused")
    for path in (*unused.iterdir(), unused):
        os.utime(path, (1, 1))
    sizes = clear_unused(cache, timedelta(days=1), dry_run)
    assert sizes.keys() == {"unused"}
    assert sizes["unused"] > 0
    assert unused.exists() == dry_run
    assert used.exists()
    assert clear_unused(tmp_path / "missing", timedelta(days=1), dry_run) == {}


def test_what_this_user_may_not_read_is_named_with_its_owner(products: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    real = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("shelf 1"):  # tests run as root, who may read everything
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr("ridgeline.sources.os.scandir", scandir)
    with pytest.raises(SourceError, match="shelf 1/: Permission denied for the user .*; it belongs to "):
        listing(products)


def test_a_source_is_not_read_without_the_input_that_it_is_used_with(
    toy_steps: Path, store: Store, products: Path
) -> None:
    written = READ.replace("SourceFolder(params.folder)", 'SourceFolder(params.folder, used_with="other")')
    written = written.replace("previous: Number | None)", "other: Number | None = None)").replace(
        READ[READ.index('    source = sources["folder"]') : READ.index("    return NumberFacts")],
        '    (output / "number.txt").write_text(f"{len(sources)}")\n',
    )
    written = written.replace("sum(len(source.read(name)) for name in source.files)", "1")
    (toy_steps / "read.py").write_text(written)
    keys.forget_code()
    read, seed = (getattr(importlib.import_module(f"toy_steps.{name}"), name) for name in ("read", "seed"))
    other = execute(store, seed, {}, seed.parse({}), "a").output or ""
    params = read.parse({"folder": str(products)})
    for run, inputs, expected in (("without", {}, "0"), ("with", {"other": other}, "1")):
        made = execute(store, read, inputs, params, run)
        assert (store.path(made.output or "") / "number.txt").read_text() == expected
        assert len(made.parts.sources) == int(expected)
    shutil.rmtree(products)
    assert execute(store, read, {}, params, "again").state == "cached"
    with pytest.raises(SourceError, match="products"):
        execute(store, read, {"other": other}, params, "again")
