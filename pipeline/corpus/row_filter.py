"""Row filters such as `where: 'clip >= 0.28 and width*height > 5e5'`, in a small subset of Python.

Columns, numbers, 'texts', True and False; + - * /; < <= > >= == !=, also chained; `in` for membership in a list, or for a substring of a
column; `is None`; and, or, not. Python's parser reads the expression and pyarrow evaluates it: no code is executed. As in SQL, operations
with a missing value give unknown, and rows with an unknown result are not selected. Numbers are compared as float64.
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

Computation = Callable[[pa.Table], Any]  # returns a column, or a scalar if no column is used

_LANGUAGE = "supported are columns, numbers, 'texts', + - * /, comparisons, in, is None, and, or, not"
_MAX_CHARACTERS = 5_000
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
    """An expression over a table's columns. Raises ValueError, in one line, if `text` is invalid; so do its methods.

    `columns` are the columns it uses, `optional` those that it tests with `is None`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            if len(text) > _MAX_CHARACTERS:
                raise ValueError(f"it has more than {_MAX_CHARACTERS:,} characters")
            tree = ast.parse(text.strip(), mode="eval").body
            self._compute = _compile(tree)
        except SyntaxError as error:
            raise ValueError(f"where {_short(text)} is not an expression: {error.msg}") from None
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
        """Raise ValueError if a schema lacks a column, suggesting a similar one, or has a column of an unsuitable type."""
        unknown = unknown_column(self.columns, names=schema.names)
        if unknown:
            raise ValueError(f"where {_short(self.text)}: there is no column {unknown}")
        self.rows(schema.empty_table())

    def rows(self, table: pa.Table) -> NDArray[np.bool_]:
        """Whether each of the table's n rows is selected: (n,)."""
        try:
            selected = self._compute(table)
            if not pa.types.is_boolean(selected.type):
                raise ValueError("it is not a boolean: add a comparison")
        except ValueError as error:
            raise ValueError(f"where {_short(self.text)}: {error}") from None
        return pc.fill_null(selected, False).to_numpy()


def unknown_column(columns: Iterable[str], *, names: Collection[str]) -> str:
    """The first column not in `names`, with the most similar name, or all names; "" if there is none."""
    column = next((column for column in columns if column not in names), "")
    close = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names) or 'none'}"
    return column and f"{column}; {hint}"


def _compile(node: ast.expr) -> Computation:
    """Compile an expression. Raises ValueError for unsupported Python."""
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
    raise ValueError(f"{_short(ast.unparse(node))} is not supported: {_LANGUAGE}")


def _compile_comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> Computation:
    comparison = ast.Compare(left=left, ops=[op], comparators=[right])
    match op, left, right:
        case ast.Is(), _, ast.Constant(value=None):
            return _call("is_null", _compile(left), of=comparison)
        case ast.IsNot(), _, ast.Constant(value=None):
            return _call("is_valid", _compile(left), of=comparison)
        case ast.In(), ast.Constant(value=str() as text), ast.Name():
            return _call("match_substring", _compile(right), of=comparison, options=pc.MatchSubstringOptions(text))
        case ast.In(), _, ast.Tuple(elts=[_, *_] as items) | ast.List(elts=[_, *_] as items):
            equal = [_compile_comparison(left, ast.Eq(), item) for item in items]
            return reduce(lambda one, other: _call("or_kleene", one, other, of=comparison), equal)
        case ast.NotIn(), _, _:
            return _call("invert", _compile_comparison(left, ast.In(), right), of=comparison)
    if type(op) in _COMPARISONS:
        return _call(_COMPARISONS[type(op)], _compile(left), _compile(right), of=comparison)
    raise ValueError(f"{_short(ast.unparse(comparison))} is not supported: `in` needs a list or a column of texts, `is` needs None")


def _call(function: str, *parts: Computation, of: ast.expr, options: pc.FunctionOptions | None = None) -> Computation:
    def compute(table: pa.Table) -> Any:
        values = [part(table) for part in parts]
        try:
            return pc.call_function(function, values, options)
        except pa.ArrowException:
            types = " and ".join(str(value.type) for value in values)
            raise ValueError(f"{_short(ast.unparse(of))} cannot be computed with {types}") from None

    return compute


def _as_float(value: Any) -> Any:
    """Numbers as float64, to avoid overflow; other values unchanged."""
    is_number = pa.types.is_integer(value.type) or pa.types.is_floating(value.type) or pa.types.is_decimal(value.type)
    return pc.cast(value, pa.float64(), safe=False) if is_number else value


def _short(text: str) -> str:
    quoted = repr(" ".join(text.split()))
    return quoted if len(quoted) <= 80 else quoted[:77] + "..."
