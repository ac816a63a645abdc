import re
from pathlib import Path

from ridgeline.run_summary import summary


def test_summary_lists_the_outcome_of_each_step(synthetic):
    settings, records = synthetic
    lines = list(
        summary(
            settings,
            {record.component: record for record in records}
            | {"notify": ("skipped", "Nobody to notify."), "archive": ("failed", "")},
        )
    )
    assert lines[1].split(maxsplit=3)[:2] == ["ingest", "complete"]
    assert lines[1].endswith("first run of ingest")
    assert lines[len(records) + 1].split(maxsplit=2) == ["notify", "skipped", "Nobody to notify."]
    assert lines[len(records) + 2] == "archive      failed"
    text = "\n".join(lines)
    assert "SYNTHETIC" in text
    assert "test images of synthetic_garments:1.0.0" in text
    assert "blessed: accuracy" in text
    assert f"served       synthetic_garments version 1 in {settings.serving_dir()}" in text
    assert re.search(r"^size         [\d,]+ weights, [\d.]+ MiB, [\d,]+ multiply-adds an image$", text, re.MULTILINE)
    reports = [line.split()[1] for line in lines if line.startswith("report")]
    assert "data         0 errors" in text
    assert len(reports) == 3
    assert re.search(r"^labels       \d+ of 6,000 suspicious", text, re.MULTILINE)
    assert all(Path(report).is_file() for report in reports)
