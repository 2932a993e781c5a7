from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.corpus.row_filter import Where

TABLE = pa.table(
    {
        "clip": pa.array([0.3, 0.2, None, 0.28], pa.float32()),
        "width": pa.array([100_000, 640, 3, 70_000], pa.int32()),
        "height": pa.array([100_000, 480, 3, 70_000], pa.int32()),
        "caption": ["a cat", "a dog", None, "cat"],
        "nsfw": [True, False, None, False],
        "captions": pa.array([["a"], [], None, ["b"]]),
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("clip >= 0.25 and width*height > 5e5", [0, 3]),  # beyond 32 bits, as products are
        ("0.1 < clip < 0.29", [1, 3]),
        ("not clip > 0.25", [1]),
        ("clip > 0.25 or nsfw", [0, 3]),
        ("nsfw is None or not nsfw", [1, 2, 3]),
        ("clip is not None", [0, 1, 3]),
        ("caption in ('a dog', 'cat')", [1, 3]),
        ("caption not in ['a dog']", [0, 3]),
        ("'cat' in caption", [0, 3]),
        ("'cat' not in caption", [1]),
        ("-width / 2 + 10 < -300 - 5", [0, 1, 3]),
        ("width / 0 > 1", [0, 1, 2, 3]),
        ("caption == 'cat' or caption != caption", [3]),
        ("nsfw == False", [1, 3]),
    ],
)
def test_what_is_meant(text: str, rows: list[int]) -> None:
    where = Where(text)
    where.check(TABLE.schema)
    assert where.rows(TABLE).nonzero()[0].tolist() == rows
    assert where.rows(TABLE.slice(0, 0)).shape == (0,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("clp > 0.2", "there is no column clp; did you mean clip?"),
        ("zzz > 0.2", "there is no column zzz; there are: clip, width, height, caption, nsfw, captions"),
        ("clip >", "is not an expression: invalid syntax"),
        ("", "is not an expression"),
        ("clip > 0.2\nimport os", "is not an expression"),
        ("__import__('os').system('true')", "is not supported"),
        ("clip.real > 0", "is not supported"),
        ("(lambda: clip)() > 0", "is not supported"),
        ("[x for x in clip]", "is not supported"),
        ("clip == None", "is not supported"),
        ("clip is 3", "`is` needs None"),
        ("caption in nsfw", "`in` needs a list or a column of texts"),
        ("clip in ()", "`in` needs a list"),
        ("2 ** 10 < clip", "is not supported"),
        ("caption > 5", "cannot be computed with string and double"),
        ("'a' in captions", "cannot be computed with list"),
        ("not caption", "cannot be computed with string"),
        ("clip + 1", "it is not a boolean"),
        ("1 < 2", "names no column"),
        ("clip < 1" + "0" * 400, "too large"),
        ("(" * 400 + "clip" + ")" * 400 + " > 1", "where"),
        ("-" * 4000 + "clip > 1", "where"),
        ("clip > 1 or " * 1000 + "clip > 2", "more than 5,000 characters"),
    ],
)
def test_what_is_none_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("?", r"\?")) as raised:
        Where(text).check(TABLE.schema)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
