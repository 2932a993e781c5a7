"""Write the tables of folders and modules into docs/architecture.md, from the packages' docstrings and files.

    python docs/make_module_tables.py            # from the repository's root

A table stands between `<!-- modules of FLOOR -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architecture.md")
TABLE = re.compile(r"(?<=<!-- modules of )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The text of the page with its tables written anew."""
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}\n" + "\n".join(_table(REPOSITORY / found[1])) + "\n\n", text)


def _table(floor: Path) -> Iterator[str]:
    yield from ("| folder | what is in it | modules |", "| --- | --- | --- |")
    for package in sorted(path.parent for path in floor.rglob("__init__.py")):
        modules = sorted(path.stem for path in package.glob("*.py") if path.name != "__init__.py")
        about = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
        first = " ".join(about.partition("\n\n")[0].split()).replace("|", "\\|")
        yield f"| `{package.relative_to(REPOSITORY)}/` | {first} | {', '.join(f'`{module}`' for module in modules)} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
