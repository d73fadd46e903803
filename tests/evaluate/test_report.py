import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from tests.evaluate.sample_facts import RECIPE, sample_facts

from limbeck.evaluate import figures
from limbeck.evaluate.facts import (
    Controls,
    ModelFacts,
    ReportFacts,
    RunFacts,
    Sample,
    SpeedMeasurement,
    StageFacts,
    Verdict,
    read_facts,
)
from limbeck.evaluate.report import render_html, render_markdown, write_report
from limbeck.evaluate.verdict import verdict

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> ``` | ![x](http://e.x/y) </pre></svg> {{ 7*7 }} $\\frac{1}$"
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, their attributes, ids and text; refuses what is not closed properly."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], []
        self.attributes = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        for name, value in attrs:
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")
            if name.endswith("href"):
                self.references.append(value.removeprefix("#"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the report of the sample facts."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert write_report(folder, sample_facts()) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def content(written):
    return (written / "report.html").read_text()


def bare_facts():
    """The least a report can hold."""
    return ReportFacts(
        run=RunFacts(name="bare", date="2025-01-01", seeds=[0]), student=ModelFacts(parameters=10, parameter_bytes=40)
    )


def test_all_three_files_are_written(written):
    assert sorted(path.name for path in written.iterdir()) == ["report.html", "report.json", "report.md"]
    back = read_facts(written / "report.json")
    assert back.verdict == verdict(sample_facts())
    assert back.model_copy(update={"verdict": None}) == sample_facts()


def test_writing_again_from_the_json_gives_the_same_bytes(written, tmp_path):
    write_report(tmp_path, read_facts(written / "report.json"))
    for name in ("report.json", "report.html", "report.md"):
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_verdict_that_is_there_is_kept(tmp_path):
    facts = bare_facts()
    needed = verdict(facts).teacher_needed
    facts.verdict = Verdict(headline="Judged by hand.", teacher_needed=needed)
    write_report(tmp_path, facts)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["headline"] == "Judged by hand."
    assert "Judged by hand." in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("kind", ["html", "md"])
def test_the_figures_that_matter_are_there(written, kind):
    facts = sample_facts()
    text = (written / f"report.{kind}").read_text()
    words = Page(text).words if kind == "html" else text
    judged = verdict(facts)
    for sentence in [
        judged.headline,
        *judged.gained,
        *judged.lost,
        *judged.teacher_needed.statements,
        *judged.warnings,
    ]:
        assert sentence in words
    figures_shown = [
        "24.10",
        "19.60",
        "35.20",
        "25.30",
        "18.70",
        "124.8",
        "1.120",
        "0.310",
        "71.3 %",
        "1.20 M",
        "×0.0208",
    ]
    environment = ["2.13.0", "5.23.0", "an imaginary processor", "between 212 documents", "3.15 ms", "×0.601"]
    for figure in [*figures_shown, *environment, "0.0829", "its learned positions end at 8192 tokens"]:
        assert figure in words, figure
    assert " ".join(RECIPE.split()) in " ".join(words.split())
    assert "Norway is Oslo, on the Oslofjord." in words


def test_the_verdict_comes_before_every_table(content):
    assert content.index('class="headline"') < content.index("Was the teacher needed?") < content.index("<table")


def test_the_page_is_well_formed_and_loads_nothing(content):
    page = Page(content)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not re.search(r"(?:src|href)=\"(?!#)", content)
    assert "@import" not in content
    assert "default-src 'none'" in content
    assert page.tags.count("svg") == 3 + 1 + 4 + 1
    assert len(content) < 1_500_000


def test_figures_hold_real_text_and_the_pages_colours():
    panels = [
        *figures.loss_curves(sample_facts()),
        *figures.layer_errors(sample_facts()),
        *figures.cost_against_context(sample_facts()),
        *figures.quality_against_speed(sample_facts()),
    ]
    for svg in panels:
        root = ElementTree.fromstring(svg)
        assert root.get("viewBox")
        assert root.get("width") is None
        assert any(element.tag.endswith("text") for element in root.iter())
        assert "var(--ink)" in svg
        assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", svg)
    assert "16,384" in panels[4]


def test_hostile_text_is_only_text():
    facts = sample_facts()
    facts.run.name = facts.run.recipe = facts.run.teacher_source = HOSTILE
    facts.run.machine = {HOSTILE: HOSTILE}
    facts.run.wall_seconds = {HOSTILE: 1.0}
    facts.protocol = {HOSTILE: HOSTILE}
    facts.layers[0].note = facts.layers[0].mixer = HOSTILE
    facts.speed.note = HOSTILE
    facts.speed.rows[0].teacher = SpeedMeasurement(context=256, skipped=HOSTILE, memory_method=HOSTILE)
    facts.student.samples = [Sample(prompt=HOSTILE, text=HOSTILE)]
    facts.student.texts[0].name = HOSTILE
    facts.student.stages = [StageFacts(name=HOSTILE, kind=HOSTILE, loss_curve=[(1, 2.0), (2, 1.0)])]
    content = render_html(facts)
    page = Page(content)
    assert not {"script", "img", "a"} & set(page.tags)
    assert "onerror" not in page.attributes
    assert "{{ 7*7 }}" in page.words
    assert page.words.count("<script>alert(1)</script>") > 10


def test_hostile_text_cannot_break_the_markdown():
    facts = sample_facts()
    facts.student.samples = [Sample(prompt="a", text="````\n# not a heading\n````")]
    facts.layers[0].note = HOSTILE
    facts.run.name = "two\nlines # | `x`"
    content = render_markdown(facts)
    assert content.startswith("# two lines # \\| \\`x\\`\n")
    assert "`````\n````\n# not a heading\n````\n`````" in content
    row = next(line for line in content.splitlines() if line.startswith("| 0 | hyena"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert "\\<script\\>" in row
    assert not re.search(r"(?<!\\)<script", content)


def test_markdown_tables_are_whole():
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", render_markdown(sample_facts()), flags=re.MULTILINE)
    assert len(blocks) >= 9
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1
        assert re.match(r"\| (---:?)( \| ---:?)* \|$", block.splitlines()[1])


@pytest.mark.parametrize(
    "without", ["controls", "speed", "floor", "layers", "teacher", "samples", "protocol", "stages"]
)
def test_any_part_may_be_missing(tmp_path, without):
    facts = sample_facts()
    if without == "controls":
        facts.controls = Controls()
    elif without in ("layers", "protocol"):
        setattr(facts, without, [] if without == "layers" else {})
    elif without in ("samples", "stages"):
        for model in facts.models().values():
            setattr(model, without, [])
    else:
        setattr(facts, without, None)
    Page(write_report(tmp_path, facts).read_text())


def test_a_bare_report(tmp_path):
    words = Page(write_report(tmp_path, bare_facts()).read_text()).words
    assert "could not be measured" in words
    assert "Not measured." in words


def test_losses_that_are_not_numbers_leave_gaps_only():
    facts = bare_facts()
    curve = [(1.0, None), (2.0, 3.0), (3.0, None), (4.0, 2.0)]
    facts.student.stages = [StageFacts(name="a", kind="tune", loss_curve=curve), StageFacts(name="b", kind="tune")]
    assert len(figures.loss_curves(facts)) == 1
    facts.student.stages = [StageFacts(name="a", kind="tune", loss_curve=[(1.0, None)])]
    assert figures.loss_curves(facts) == []


def test_long_curves_are_thinned_and_keep_their_end(monkeypatch):
    facts = bare_facts()
    curve = [(float(step), 1 / step) for step in range(1, 10_001)]
    facts.student.stages = [StageFacts(name="a", kind="tune", loss_curve=curve)]
    (_, points), *_ = figures._curves_of(facts, "tune")
    assert len(points) <= figures.MAX_CURVE_POINTS
    assert points[-1] == curve[-1]
