"""The manual: links lead somewhere, generated parts are current, settings are valid, and commands run as they stand there."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import BaseModel, ConfigDict
from typer.main import get_command

from dataprep.job import PrepareConfig
from launch.cli import app, main
from launch.config.schema import Config
from tests import REPOSITORY
from tests.dataprep.helpers import photo, photo_folder, table_rows, write_folder, write_tar
from tests.isolation import isolated_process

FIRST_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
PAGES = [*(REPOSITORY / page for page in FIRST_PAGES), *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGURATION, MODULE_TABLES = (runpy.run_path(str(REPOSITORY / "docs" / f"make_{what}.py")) for what in ("configuration", "module_tables"))
MAX_README_LINES = 150
FENCE = re.compile(r"^```(\w+)?(.*)$")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:configs|dataprep|docs|examples|launch|pipeline|tests|tim)/[\w./-]+\.(?:py|md|yaml|png))`")
CORPUS = ("prepare", "images", "downloads/{00000..00001}.tar", "--out", "corpus")  # as README prepares it
# What the test adds to a command, before the overrides that the page itself gives: small networks and plans, few steps, one process.
SMALL_NETWORK = (
    *("network.params.depth=1", "network.params.hidden_size=32", "network.params.num_heads=2", "network.params.lora_hidden_size=8"),
    *("plan.tokens_per_pack=256", "plan.packs_per_step=2", "train.steps=2", "train.warmup=0", "loader.workers=0"),
)
SMALLER = {
    "plan": ("plan.max_tokens=16", "plan.tokens_per_pack=64"),
    "train": SMALL_NETWORK,
    "launch": SMALL_NETWORK,
}
ENDINGS = {"plan": ("--steps", "2"), "encode": ("--processes", "1")}
TRAINING = {"network": {"params": {"depth": 1, "hidden_size": 32, "num_heads": 2}}, "train": {"steps": 1}}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page: its language, the words after it, the line that it begins in, its text."""

    language: str
    words: tuple[str, ...]
    line: int
    text: str

    @property
    def runs(self) -> bool:
        return "skip" not in self.words

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, comments and line breaks after a backslash left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@cache
def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.match(line)
        if opened is None and match:
            opened, body = (number, match[1] or "", match[2]), []
        elif opened is not None and line == "```":
            found.append(Block(opened[1], tuple(opened[2].split()), opened[0], "\n".join(body) + "\n"))
            opened = None
        else:
            body.append(line)
    assert opened is None, f"{page.name}:{opened}: this block has no end"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def with_blocks(language: str, *, runs: bool) -> list[Path]:
    """Pages that have blocks of a language which are run, or are not."""
    return [page for page in PAGES if any(block.language == language and block.runs == runs for block in blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = {path for path in NAMED.findall(text) if "NEW" not in path and not (REPOSITORY / path).exists()}
    assert not missing, f"{page.name} names {sorted(missing)}"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {REPOSITORY / link.partition("#")[0] for link in LINK.findall(prose(REPOSITORY / "README.md"))}
    assert {*PAGES[1:]} <= linked


def test_generated_parts_are_current() -> None:
    remedy = "run `python docs/make_configuration.py` and `python docs/make_module_tables.py`"
    assert CONFIGURATION["PAGE"].read_text(encoding="utf-8") == CONFIGURATION["page"](), remedy
    text = MODULE_TABLES["PAGE"].read_text(encoding="utf-8")
    assert text == MODULE_TABLES["page"](text), remedy


def test_every_setting_of_a_run_is_explained_under_its_name() -> None:
    page = CONFIGURATION["page"]()
    for key in Config.model_fields:
        assert f"| `{key}` |" in page
    assert CONFIGURATION["field_docstrings"](Documented) == {"first": "Two lines\nof text.", "second": "Inherited."}


class Base(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    second: int = 0
    """Inherited."""


class Documented(Base):
    first: int = 0
    """Two lines
    of text."""
    third: int = 0


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language == "yaml" for block in blocks(page))], ids=name)
def test_settings_are_valid(page: Path) -> None:
    """Blocks of whole configurations (mine.yaml), of parts of one (training), and of preparations (prepare.yaml)."""
    for block in blocks(page):
        if block.language == "yaml":
            values = yaml.safe_load(block.text)
            schema = PrepareConfig if "prepare.yaml" in block.words else Config
            assert schema is PrepareConfig or {"training", "mine.yaml"} & {*block.words}, f"{page.name}:{block.line}: what is it of?"
            schema.model_validate({**TRAINING, **values} if "training" in block.words else values, strict=False)


@pytest.mark.parametrize("page", with_blocks("sh", runs=False), ids=name)
def test_commands_that_are_not_run_have_options_that_exist(page: Path) -> None:
    for block in blocks(page):
        for words in block.commands() if block.language == "sh" and not block.runs else ():
            if words[0] == "tim":
                parse(words[1:])
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def parse(arguments: list[str]) -> None:
    """Raises a usage error if `tim` has no such command or option."""
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(command.name, arguments)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: images, tars, lists, the corpus of README and a run over it."""
    folder = tmp_path_factory.mktemp("docs")
    photo_folder(folder / "images", count=10)
    photo_folder(folder / "more", count=2, first=100)
    photo_folder(folder / "paintings", count=2, first=200)
    write_folder(folder, {"listed.jpg": photo(300)})
    pq.write_table(pa.table({"file": ["listed.jpg"], "alt": ["short"], "synthetic": ["a longer caption"]}), folder / "list.parquet")
    (folder / "downloads").mkdir()
    for tar in range(2):
        write_tar(folder / "downloads" / f"{tar:05d}.tar", [("0.jpg", photo(400 + tar)), ("0.txt", b"from a tar")])
    for page in PAGES:
        for block in blocks(page):
            for file in (word for word in block.words if word.endswith(".yaml")):
                (folder / file).write_text(block.text, encoding="utf-8")
    with inside(folder):
        run("tim", *CORPUS)
        rows = table_rows(folder / "corpus")
        pq.write_table(pa.table({"key": [rows[0]["key"]], "caption": ["written anew"]}), folder / "recaptioned.parquet")
        pq.write_table(pa.table({"sha256": [rows[1]["sha256"]]}), folder / "requests.parquet")
        run("tim", "train", "photos", "corpus=corpus", "run_dir=runs/mine")
    return folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder; what a training leaves in the environment and in accelerate is forgotten afterwards."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with isolated_process():
            yield
    finally:
        os.chdir(before)


def run(program: str, *arguments: str, launches: bool = False) -> None:
    """Run a command of `tim` on little. Without `launches`, trainings of several processes are checked by `--dry-run` alone."""
    assert program == "tim", f"{program}: mark it as one that is not run: ```sh skip"
    endings = {} if launches else {**ENDINGS, "launch": ("--dry-run",)}
    typed = [*arguments[:2], *SMALLER.get(arguments[0], ()), *arguments[2:], *endings.get(arguments[0], ())]
    try:
        code = main(typed)
    except SystemExit as ended:
        code = ended.code
    assert code == 0, shlex.join([program, *typed])


def launching() -> list[Path]:
    """Pages that start several processes."""
    typed = {
        page: [words[:2] for block in blocks(page) if block.language == "sh" and block.runs for words in block.commands()]
        for page in with_blocks("sh", runs=True)
    }
    return [page for page, commands in typed.items() if ["tim", "launch"] in commands]


@pytest.mark.parametrize(
    ("page", "launches"),
    [
        *(pytest.param(page, False, id=name(page)) for page in with_blocks("sh", runs=True)),
        *(pytest.param(page, True, id=f"{name(page)}, launched", marks=pytest.mark.soak) for page in launching()),
    ],
)
def test_commands_run(page: Path, launches: bool, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    if launches:
        shutil.rmtree(folder / "runs")
    with inside(folder):
        for block in blocks(page):
            if block.language == "sh" and block.runs:
                for words in block.commands():
                    run(*words, launches=launches)
            elif block.language == "python" and block.runs:
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), {})
