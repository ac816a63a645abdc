import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for link in LINK.findall(document.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_named_in_the_readme():
    links = set(LINK.findall((ROOT / "README.md").read_text()))
    documents = {str(path.relative_to(ROOT)) for path in DOCUMENTS} - {"README.md"}
    assert documents <= links


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_documents_that_sources_name_exist():
    folders = ("benchmarks", "components", "dags", "docker", "ridgeline")
    files = [ROOT / "Makefile", *(path for name in folders for path in (ROOT / name).rglob("*") if path.is_file())]
    for file in [file for file in files if file.suffix not in (".pyc", ".env")]:
        text = file.read_text()
        for name, _, title in re.findall(r"(docs/\w+\.md|README)(?:, ([\"'`])(.+?)\2)?", text):
            document = ROOT / (name if name.endswith(".md") else "README.md")
            assert document.exists(), (file, name)
            assert not title or title.lower().replace(" ", "-") in anchors(document), (file, name, title)
