"""`where: 'clip >= 0.28 and width*height > 5e5'`: which rows of a table are meant, in a small part of Python's language.

Columns, numbers, 'texts', True and False; + - * /; < <= > >= == !=, in chains too; `in` for one of a list, or for a text within a column;
`is None`; and, or, not. Python's parser reads it and pyarrow computes it: nothing of it is ever run. As in SQL, what is computed with a
missing value is unknown, and a row for which the whole is unknown is not meant. Numbers are compared as float64.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Collection, Iterable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Computation = Callable[[pa.Table], Any]  # gives a column, or a scalar where no column is named

_LANGUAGE = "there are columns, numbers, 'texts', + - * /, comparisons, in, is None, and, or, not"
_LONGEST = 5_000
_UNARY = {ast.Not: "invert", ast.USub: "negate"}
_ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_JUNCTIONS = {ast.And: "and_kleene", ast.Or: "or_kleene"}
_COMPARISONS = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}


class Where:
    """An expression over a table's columns. Raises ValueError, in one line, if `text` is none; so do its methods.

    `columns` are those that it names, `optional` those of them of which it asks whether they are missing (`is None`).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            if len(text) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST:,} characters")
            tree = ast.parse(text.strip(), mode="eval").body
            self._compute = _compile(tree)
        except SyntaxError as error:
            raise ValueError(f"where {_short(text)} is no expression: {error.msg}") from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(f"where {_short(text)}: {error or 'it is nested too deeply'}") from None
        except ValueError as error:
            raise ValueError(f"where {_short(text)}: {error}") from None
        self.columns = tuple(sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}))
        if not self.columns:
            raise ValueError(f"where {_short(text)} names no column")
        asking = (node.left for node in ast.walk(tree) if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is))
        self.optional = frozenset(left.id for left in asking if isinstance(left, ast.Name))

    def check(self, schema: pa.Schema) -> None:
        """Raises ValueError if tables of this schema lack a column, naming the nearest, or have one of a type that does not fit."""
        strange = unknown_column(self.columns, names=schema.names)
        if strange:
            raise ValueError(f"where {_short(self.text)}: there is no column {strange}")
        self.rows(schema.empty_table())

    def rows(self, table: pa.Table) -> NDArray[np.bool_]:
        """Whether each of the table's n rows is meant: (n,)."""
        try:
            meant = self._compute(table)
            if not pa.types.is_boolean(meant.type):
                raise ValueError("it is neither true nor false: compare it with something")
        except ValueError as error:
            raise ValueError(f"where {_short(self.text)}: {error}") from None
        return pc.fill_null(meant, False).to_numpy()


def unknown_column(columns: Iterable[str], *, names: Collection[str]) -> str:
    """The first of the columns that is none of `names`, and the nearest of these, or all; "" if there is none."""
    column = next((column for column in columns if column not in names), "")
    close = difflib.get_close_matches(column, names, n=1)
    there = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names) or 'none'}"
    return column and f"{column}; {there}"


def _compile(node: ast.expr) -> Computation:
    """Raises ValueError for what is Python, but not of this language."""
    match node:
        case ast.Name(id=name):
            return lambda table: _as_float(table.column(name))
        case ast.Constant(value=bool() | int() | float() | str() as value):
            constant = _as_float(pa.scalar(float(value) if type(value) is int else value))
            return lambda table: constant
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _call(_UNARY[type(op)], _compile(operand), of=node)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _call(_ARITHMETIC[type(op)], _compile(left), _compile(right), of=node)
        case ast.BoolOp(op=op, values=values):
            return reduce(lambda one, other: _call(_JUNCTIONS[type(op)], one, other, of=node), map(_compile, values))
        case ast.Compare(left=left, ops=ops, comparators=rights):
            comparisons = map(_compile_comparison, [left, *rights], ops, rights)
            return reduce(lambda one, other: _call("and_kleene", one, other, of=node), comparisons)
    raise ValueError(f"{_short(ast.unparse(node))} is not of its language: {_LANGUAGE}")


def _compile_comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> Computation:
    said = ast.Compare(left=left, ops=[op], comparators=[right])
    match op, left, right:
        case ast.Is(), _, ast.Constant(value=None):
            return _call("is_null", _compile(left), of=said)
        case ast.IsNot(), _, ast.Constant(value=None):
            return _call("is_valid", _compile(left), of=said)
        case ast.In(), ast.Constant(value=str() as text), ast.Name():
            return _call("match_substring", _compile(right), of=said, options=pc.MatchSubstringOptions(text))
        case ast.In(), _, ast.Tuple(elts=[_, *_] as items) | ast.List(elts=[_, *_] as items):
            equal = [_compile_comparison(left, ast.Eq(), item) for item in items]
            return reduce(lambda one, other: _call("or_kleene", one, other, of=said), equal)
        case ast.NotIn(), _, _:
            return _call("invert", _compile_comparison(left, ast.In(), right), of=said)
    if type(op) in _COMPARISONS:
        return _call(_COMPARISONS[type(op)], _compile(left), _compile(right), of=said)
    raise ValueError(f"{_short(ast.unparse(said))} is not of its language: `in` wants a list or a column of texts, `is` wants None")


def _call(function: str, *parts: Computation, of: ast.expr, options: pc.FunctionOptions | None = None) -> Computation:
    def compute(table: pa.Table) -> Any:
        values = [part(table) for part in parts]
        try:
            return pc.call_function(function, values, options)
        except pa.ArrowException:
            types = " and ".join(str(value.type) for value in values)
            raise ValueError(f"{_short(ast.unparse(of))} cannot be computed of {types}") from None

    return compute


def _as_float(value: Any) -> Any:
    """Numbers as float64, so that none overflows; all else as it is."""
    is_number = pa.types.is_integer(value.type) or pa.types.is_floating(value.type) or pa.types.is_decimal(value.type)
    return pc.cast(value, pa.float64(), safe=False) if is_number else value


def _short(text: str) -> str:
    quoted = repr(" ".join(text.split()))
    return quoted if len(quoted) <= 80 else quoted[:77] + "..."
