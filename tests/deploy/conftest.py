"""Drawing the report's page takes seconds, and waiting for the disk too; both are tested elsewhere."""

import pytest


@pytest.fixture(autouse=True)
def quick_page(monkeypatch):
    monkeypatch.setattr("limbeck.evaluate.report.render_html", lambda facts: f"<pre>{facts.run.recipe}</pre>")
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
