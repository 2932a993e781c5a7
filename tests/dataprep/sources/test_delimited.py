"""CSV and TSV: a stray quotation mark costs at most its own row, legal multi-line fields are read, every line is accounted for."""

from __future__ import annotations

import csv
import io
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataprep.sources.tabular.delimited import DelimitedRow, read_delimited

WORDS = ["red fox", "a, b", "two\nlines", "\nleads", "trails\n", "\n", 'say "hi"', '"', "", "x,\ny", ",", 'a,"\nb', "tab\tin", "dot. 5 in"]


def rows_of(text: str | bytes, *, delimiter: str = ",", encoding: str = "") -> list[DelimitedRow]:
    return list(read_delimited(io.BytesIO(text.encode() if isinstance(text, str) else text), delimiter=delimiter, encoding=encoding))


def good(rows: list[DelimitedRow]) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for _, row in rows if isinstance(row, dict)]


def written(rows: list[tuple[str, ...]], *, delimiter: str, end: str, quoting: int) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)  # pyright: ignore[reportArgumentType]
    return text.getvalue()


def random_table(rng: random.Random, *, columns: int) -> list[tuple[str, ...]]:
    """Rows with an unmistakable first field."""
    return [
        (f"im/{number}.jpg", *(rng.choice(WORDS) if rng.random() < 0.6 else f"cap {number}" for _ in range(columns - 1)))
        for number in range(rng.randint(2, 9))
    ]


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quote_anywhere_costs_at_most_its_own_row(delimiter: str, end: str) -> None:
    rng = random.Random(f"{delimiter}{end}")
    for _ in range(250):
        columns = rng.randint(2, 4)
        table = random_table(rng, columns=columns)
        if delimiter == "\t":  # TSV as people have it; fields over several lines are for spreadsheets
            table = [tuple(" ".join(field.split()).replace('"', "'") for field in row) for row in table]
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        lines = [written([row], delimiter=delimiter, end=end, quoting=quoting) for row in table]
        header = delimiter.join("abcd"[:columns]) + end
        assert good(rows_of(header + "".join(lines), delimiter=delimiter)) == table
        hurt = rng.randrange(len(lines))
        at = rng.randrange(len(lines[hurt].rstrip("\r\n")) + 1)
        lines[hurt] = lines[hurt][:at] + '"' + lines[hurt][at:]
        rows = rows_of(header + "".join(lines), delimiter=delimiter)
        intact = [row for number, row in enumerate(table) if number != hurt]
        found = good(rows)
        assert [row for row in found if row in intact] == intact, (header, lines, hurt, rows)
        assert len(rows) >= len(table), "the row is neither kept nor reported"


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=3, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_csv_writes_is_read_back(rows: list[list[str]], end: str, quoting: int) -> None:
    quoting = quoting if end == "\r\n" else csv.QUOTE_ALL  # the writer quotes no line end but its own
    table = [tuple(row) for row in rows]
    found = rows_of("a,b,c" + end + written(table, delimiter=",", end=end, quoting=quoting))
    assert good(found) == table
    assert len(found) == len(table)


@settings(deadline=None, max_examples=200)
@example(['"', "\n", "\xff", '"', ","])
@given(st.lists(st.sampled_from(['"', ",", "\n", "a", "b.jpg", '""', "\r", "\0", "\xff"]), max_size=40))
def test_every_line_is_part_of_a_row_or_reported(parts: list[str]) -> None:
    text = "h,i\n" + "".join(parts)
    rows = rows_of(text.encode("latin-1"))
    numbers = [number for number, _ in rows]
    assert numbers == sorted(set(numbers))
    lines = io.StringIO(text, newline=None).read().split("\n")
    for number, line in enumerate(lines[1:], start=2):
        first = max((begin for begin in numbers if begin <= number), default=0)
        row = dict(rows).get(first)
        named = re.search(rf"of a row in lines {first} to (\d+)\)", row) if isinstance(row, str) else None
        goes_on = isinstance(row, dict) or (named is not None and number <= int(named[1]))
        is_inside = first == number or (first < number and goes_on)
        assert is_inside or not line, (text, rows, number)


@pytest.mark.parametrize("second", ['"untitled, too', 'ends in a quote"', '"a" b', 'height 5"', '"'])
def test_two_stray_quotes_cost_two_rows(second: str) -> None:
    captions = {5: '"untitled', 20: second}
    for delimiter in (",", "\t"):
        text = f"file{delimiter}caption\n" + "".join(f"im/{n}.jpg{delimiter}{captions.get(n, f'caption {n}')}\n" for n in range(30))
        found = {row["file"]: row["caption"] for _, row in rows_of(text, delimiter=delimiter) if isinstance(row, dict)}
        assert found.items() >= {f"im/{n}.jpg": f"caption {n}" for n in range(30) if n not in captions}.items()


def test_tsv_has_no_quoting_where_a_field_does_not_end_with_its_quote() -> None:
    text = 'file\tcaption\n1.jpg\t"untitled, oil on canvas\n2.jpg\t5" by 7"\n3.jpg\t"quoted ""as"" csv"\n4.jpg\t"a" b\n'
    assert good(rows_of(text, delimiter="\t")) == [
        ("1.jpg", '"untitled, oil on canvas'),
        ("2.jpg", '5" by 7"'),
        ("3.jpg", 'quoted "as" csv'),
        ("4.jpg", '"a" b'),
    ]


def test_short_long_and_blank_rows_nul_bytes_and_long_fields() -> None:
    big = "x" * 300_000  # csv's own limit is 131,072
    text = f'a,b\n1.jpg,one\n2.jpg\n\n3.jpg,x,y\n4.jpg,"{big}"\n5.jpg,n\0l\n6.jpg,six'
    rows = rows_of(text)
    assert good(rows) == [("1.jpg", "one"), ("4.jpg", big), ("6.jpg", "six")]
    assert [(number, row[:9]) for number, row in rows if isinstance(row, str)] == [(3, "1 columns"), (5, "3 columns"), (7, "a NUL at ")]


def test_lines_that_are_too_long_cost_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataprep.sources.tabular.delimited.MAX_LINE_BYTES", 50)
    rows = rows_of("a,b\n1.jpg," + "x" * 200 + "\n2.jpg,two\n")
    assert [isinstance(row, str) for _, row in rows] == [True, False]


def test_repeated_names_of_the_header_are_numbered() -> None:
    assert rows_of("file,caption,caption\n1.jpg,one,uno\n") == [(2, {"file": "1.jpg", "caption": "one", "caption_2": "uno"})]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-8-sig", "cp1252", "latin-1"])
def test_tables_in_other_encodings(codec: str) -> None:
    mark = "\ufeff" if codec == "utf-16-be" else ""
    text = f'{mark}file,caption\r\n1.jpg,"café, noir"\r\n2.jpg,crème\r\n'.encode(codec)
    stated = codec if codec in ("cp1252", "latin-1") else ""
    assert good(rows_of(text, encoding=stated)) == [("1.jpg", "café, noir"), ("2.jpg", "crème")]


def test_a_row_that_cannot_be_decoded_costs_itself() -> None:
    rows = rows_of(b"file,caption\n1.jpg,caf\xe9\n2.jpg,two\n")
    assert rows[1] == (3, {"file": "2.jpg", "caption": "two"})
    assert str(rows[0][1]).startswith("not UTF-8 at byte 9 (0xe9)")
    assert "NUL" in str(rows_of("file,caption\n1.jpg,one\n".encode("utf-16-le"))[0][1])


def test_no_encoding_is_advised_where_one_is_stated() -> None:
    for content in (b"file,caption\n1.jpg,caf\xe9\n", b"file,caption\n1.jpg,n\0l\n"):
        assert "columns.encoding" in str(rows_of(content)[0][1])
        assert "columns.encoding" not in str(rows_of(content, encoding="utf-8")[0][1])
