"""Texts with HTML are escaped on every page. `tests/ridgeline/airflow/plugin/test_app.py` asks a real server."""


def test_html_in_every_text(torture):
    torture("web", "HTML", scale=0.5)
