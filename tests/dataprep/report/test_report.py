"""The report: what it says is what the corpus holds, whatever captions say stays text, and it is one page that asks nobody for anything."""

from __future__ import annotations

import base64
import io
import random
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataprep.index_tars import index
from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.charts import MAX_BINS, Histogram, histogram
from dataprep.report.html import ReportConfig, report
from dataprep.report.statistics import compute_statistics, plan_of
from dataprep.sidecars.annotate import annotate
from pipeline.corpus.corpus import Corpus, read_manifest
from pipeline.planning.planner import Planner
from pipeline.planning.summary import plan_summary
from tests.dataprep.helpers import digests, photo, photo_folder, table_rows, write_folder

VOID = {"meta", "img", "path"}
HOSTILE = '</p><script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(1)> & "quotes" \u202egnihtyreve'


class Page(HTMLParser):
    """A page's elements by class and name, its text, and its images; raises if elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.images: list[Image.Image] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "img":
            data = base64.b64decode(dict(attrs)["src"].removeprefix("data:image/jpeg;base64,"), validate=True)  # type: ignore[union-attr]
            self.images.append(Image.open(io.BytesIO(data)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    files = {f"{number}.jpg": photo(number, height=64 + 8 * number, width=200) for number in range(12)}
    files |= {"large.jpg": photo(90, height=400, width=480), "small.jpg": photo(90, height=200, width=240)}
    files |= {"thin.jpg": photo(91, height=20, width=400), "cut.jpg": photo(92)[:400], "mute.jpg": photo(93, height=300, width=300)}
    rows = [
        {"file_name": name, "text": "" if name == "mute.jpg" else f"{HOSTILE} {name}", "clip": len(name) / 10, HOSTILE: 7} for name in files
    ]
    write_folder(folder / HOSTILE.replace("/", "-"), files, rows=[*rows, {"file_name": "0.jpg", "text": "again"}])
    prepare([str(folder / HOSTILE.replace("/", "-"))], out=folder / "C", config=PrepareConfig(), workers=2)
    return folder / "C"


@pytest.fixture(scope="module")
def page(corpus: Path) -> Page:
    return Page((corpus / "report.html").read_text("utf-8"))


def test_nothing_in_the_data_becomes_part_of_the_page(page: Page, corpus: Path) -> None:
    assert page.names["script"] == page.names["link"] == page.names["iframe"] == 0
    assert not any(
        name.startswith("on") or (name in ("src", "href") and not value.startswith("data:")) for _, name, value in page.attributes
    )
    text = (corpus / "report.html").read_text("utf-8")
    assert "http://" not in text.replace("https://example.org", "")
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert "\u202e" not in text
    assert '<script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(1)> & "quotes"' in page.text


def test_it_shows_what_there_is(page: Page, corpus: Path) -> None:
    manifest = read_manifest(corpus)
    for said in ("14 of 18 inputs kept in 1 shard", "no-caption", "aspect", "damaged", "duplicate", "thin.jpg", "looks like", "clip"):
        assert said in page.text or said == "looks like"
    assert manifest["rejected"] == {"aspect": 1, "duplicate": 1, "no-caption": 1, "damaged": 1}
    # 14 kept, the pair once more, and of the rejected those that could be decoded
    assert len(page.images) == 14 + 2 + 2
    assert all(max(image.size) <= 160 for image in page.images)
    assert sorted(image.size for image in page.images).count((160, 8)) == 1  # thin.jpg
    assert all(name in page.names for name in ("svg", "figure", "details", "table"))
    assert page.names["img"] == sum(1 for tag, name, _ in page.attributes if (tag, name) == ("img", "alt"))


def test_its_plan_is_the_planners(corpus: Path, page: Page, tmp_path: Path) -> None:
    plan = plan_of(32, max_tokens=64)
    planner = Planner([Corpus.open(corpus)], plan=plan, seed=0, width=1152, diffusion_share=0.5, consistency_share=0.1)
    tokens = planner.sample_counts["tokens_per_epoch"]
    assert "tokens, which fill no pack" in page.text
    plan = plan.model_copy(update={"packs_per_step": tokens // plan.tokens_per_pack})
    planner = Planner([Corpus.open(corpus)], plan=plan, seed=0, width=1152, diffusion_share=0.5, consistency_share=0.1)
    report([corpus], out=tmp_path / "r.html", config=ReportConfig(max_tokens=64))
    assert f"{plan_summary(planner, steps=1, ranks=8)['fill']:.1%}" in Page((tmp_path / "r.html").read_text("utf-8")).text
    census = compute_statistics(Corpus.open(corpus), manifest=read_manifest(corpus), plan=plan)
    assert census.tokens.total == census.pixels.total == census.aspects.total == sum(census.sizes.values()) == 14
    assert census.caption_lengths.total == 14
    near = census.lookalikes["near_duplicate_of"]
    assert near.kept == 1
    assert [(one.path.rpartition("/")[2], other and other.path.rpartition("/")[2]) for one, other in near.pairs] == [
        ("small.jpg", "large.jpg")
    ]


def test_called_again_it_writes_the_same_and_at_another_stride_another(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "C")
    before = digests(tmp_path / "C")
    found = report([tmp_path / "C"], config=ReportConfig(), workers=2)
    assert digests(tmp_path / "C") == before
    assert (found["report"], found["corpora"][0]["kept"]) == (tmp_path / "C/report.html", 14)
    report([tmp_path / "C"], out=tmp_path / "other.html", config=ReportConfig(stride=16))
    assert "stride 16" in Page((tmp_path / "other.html").read_text("utf-8")).text
    assert digests(tmp_path / "C") == before


def test_dropped_near_duplicates_are_shown_beside_what_stays(corpus: Path, tmp_path: Path) -> None:
    [source] = [path for path in corpus.parent.iterdir() if path != corpus]
    prepare([str(source)], out=tmp_path / "D", config=PrepareConfig.model_validate({"dedup": {"near": "drop"}}))
    census = compute_statistics(Corpus.open(tmp_path / "D"), manifest=read_manifest(tmp_path / "D"), plan=plan_of(32, max_tokens=1024))
    [(dropped, stays)] = census.lookalikes["near_duplicate_of"].pairs
    assert Image.open(io.BytesIO(dropped.image)).size == (160, 133)
    assert stays is not None
    assert stays.path.endswith("large.jpg")


def test_two_corpora_side_by_side(corpus: Path, tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "set", count=30, first=200)
    prepare([str(folder)], out=tmp_path / "D", config=PrepareConfig())
    found = report([corpus, tmp_path / "D"], out=tmp_path / "compare.html", config=ReportConfig())
    page = Page((tmp_path / "compare.html").read_text("utf-8"))
    assert [each["kept"] for each in found["corpora"]] == [14, 30]
    assert "C and D" in page.text
    assert "14 of 18" in page.text
    assert "30 of 30" in page.text
    assert {value for tag, name, value in page.attributes if (tag, name) == ("rect", "class")} == {"a", "b"}
    report([corpus, corpus], out=tmp_path / "same.html", config=ReportConfig())
    assert "(A)" in Page((tmp_path / "same.html").read_text("utf-8")).text
    old = Path(shutil.copytree(corpus, tmp_path / "old")) / "manifest.json"
    old.write_text(old.read_text().replace('"damaged"', '"truncated"'))  # as earlier versions called it
    report([corpus, old.parent], out=tmp_path / "old.html", config=ReportConfig())
    input_counts = Page((tmp_path / "old.html").read_text("utf-8")).text.partition("What became of the inputs")[2][:2000]
    assert input_counts.count("damaged") == 1
    assert "truncated" not in input_counts


def test_what_came_later_is_in_it_and_what_was_taken_down_is_not_shown(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "C")
    rows = [row for row in table_rows(corpus) if row["key"]]
    scores = [{"key": row["key"], "beauty": float(place), "caption": f"anew-{place}-"} for place, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(scores), tmp_path / "scores.parquet")
    annotate(tmp_path / "C", table=tmp_path / "scores.parquet", on="key", captions="only")
    report([tmp_path / "C"], config=ReportConfig())
    page = Page((tmp_path / "C/report.html").read_text("utf-8"))
    assert "beauty" in page.text
    assert all(f"anew-{place}-" in page.text for place in range(14))
    assert len(page.images) == 14 + 2 + 2

    report([corpus, tmp_path / "C"], out=tmp_path / "compare.html", config=ReportConfig())
    drawn = (tmp_path / "compare.html").read_text("utf-8").partition("<figcaption>beauty</figcaption>")[2].partition("</figure>")[0]
    assert Page(drawn.partition("<details>")[0]).names["rect"] == 14

    pq.write_table(pa.table({"key": [row["key"] for row in rows[:4]]}), tmp_path / "requests.parquet")
    annotate(tmp_path / "C", table=tmp_path / "requests.parquet", on="key", mark="takedown")
    report([tmp_path / "C"], config=ReportConfig(max_tokens=16))
    after = Page((tmp_path / "C/report.html").read_text("utf-8"))
    assert [f"anew-{place}-" in after.text for place in range(14)] == [False] * 4 + [True] * 10
    assert after.text.count("taken down") >= 4
    assert "takedown 4" in after.text
    assert len(after.images) < len(page.images) - 3


def test_an_index_has_one_too(corpus: Path, tmp_path: Path) -> None:
    shutil.copy(corpus / "000000.tar", tmp_path / "foreign.tar")
    index([str(tmp_path / "foreign.tar")], out=tmp_path / "I")
    report([tmp_path / "I"], out=tmp_path / "i.html", config=ReportConfig())
    assert len(Page((tmp_path / "i.html").read_text("utf-8")).images) == 14
    (tmp_path / "foreign.tar").unlink()
    report([tmp_path / "I"], out=tmp_path / "j.html", config=ReportConfig())
    assert not Page((tmp_path / "j.html").read_text("utf-8")).images


def test_it_stays_small_and_says_what_cannot_be_planned(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "text": "x" * 4000, **{f"score{i}": number * i for i in range(40)}} for number in range(300)]
    rng = np.random.default_rng(0)
    files = {f"{number}.png": photo(number, height=17 + int(rng.integers(9)), width=20, format="PNG") for number in range(300)}
    prepare([str(write_folder(tmp_path / "f", files, rows=rows))], out=tmp_path / "C", config=PrepareConfig())
    page = Page((tmp_path / "C/report.html").read_text("utf-8"))
    assert (tmp_path / "C/report.html").stat().st_size < 1_000_000
    assert len(page.images) == 24
    assert "16 more columns of numbers are not drawn" in page.text
    assert "no plan: all images together have 0 tokens" in page.text


def test_what_cannot_be_reported_is_told(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="not a corpus"):
        report([tmp_path], config=ReportConfig())
    with pytest.raises(ValueError, match="there is no folder"):
        report([corpus], out=tmp_path / "no/where.html", config=ReportConfig())
    shutil.copytree(corpus, tmp_path / "C")
    (tmp_path / "C/000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"^[^\n]*run `tim verify`[^\n]*$"):
        report([tmp_path / "C"], config=ReportConfig())


@given(st.lists(st.floats(width=32), max_size=60), st.integers(1, 5), st.randoms())
def test_histograms_hold_every_number_in_any_order(numbers: list[float], batches: int, shuffler: random.Random) -> None:
    shuffled = list(numbers)
    shuffler.shuffle(shuffled)
    first, second = Histogram(), Histogram()
    first.add(np.array(numbers, dtype=np.float64))
    for batch in np.array_split(np.array(shuffled, dtype=np.float64), batches):
        second.add(batch)
    finite = [number for number in numbers if np.isfinite(number)]
    assert first.total == second.total == len(finite)
    assert (first.counts, first.power if finite else 0) == (second.counts, second.power if finite else 0)
    assert len(first.counts) <= MAX_BINS
    for number in finite:
        assert np.floor(number / 2.0**first.power) in first.counts
    drawn = histogram("numbers", {"a": first}, label=lambda number: f"{number:.3g}")
    assert bool(drawn) == bool(finite)
    if drawn:
        Page(drawn)
        assert "nan" not in drawn


def test_histograms_that_lie_far_apart_are_drawn_together() -> None:
    near, far = Histogram(), Histogram()
    near.add(np.linspace(0, 1, 100))
    far.add(np.linspace(1e9, 1e9 + 1, 100))
    drawn = histogram("numbers", {"a": near, "b": far}, label=lambda number: f"{number:g}")
    assert Page(drawn).names["rect"] == 2
    assert drawn.count(": 100.0%</title>") == 2


def test_a_whole_number_stands_under_its_bar() -> None:
    captions = Histogram(finest=0)
    captions.add(np.array([1.0] * 5 + [3.0] * 20_000))
    drawn = histogram("captions", {"a": captions}, label=lambda number: f"{number:g}", is_whole=True)
    for said in ("<title>1: 5</title>", "<title>3: 20,000</title>", ">2</text>", ">20 k</text>"):
        assert said in drawn
    assert ">1.5</text>" not in drawn
