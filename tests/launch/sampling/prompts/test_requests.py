"""The images that prompts ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.sampling.files.settings import MAX_SEED
from launch.sampling.prompts.requests import Request, expand
from launch.sampling.prompts.rows import PromptRow, argument_rows

FOX, LAKE = argument_rows(["a fox", "a lake"])
SIZES = [(16, 32), (32, 16)]


def values(requests: list[Request]) -> list[tuple[object, ...]]:
    return [(each.prompt, each.height, each.width, each.guidance, each.seed, each.steps) for each in requests]


def test_the_product_goes_prompt_by_prompt() -> None:
    found = expand([FOX, LAKE], sizes=SIZES, steps=[1, 4], guidances=[1.0, 2.0], seeds=[5, 6])
    expected = [
        (prompt, *size, guidance, seed, steps)
        for prompt in ("a fox", "a lake")
        for size in SIZES
        for guidance in (1.0, 2.0)
        for seed in (5, 6)
        for steps in (1, 4)
    ]
    assert values(found) == expected
    assert [(each.index, each.repeat) for each in found] == [(index, repeat) for index in range(2) for repeat in range(16)]


def test_count_draws_the_next_seeds() -> None:
    found = expand([FOX], sizes=SIZES[:1], seeds=[7], count=3)
    assert [each.seed for each in found] == [7, 8, 9]
    assert values(expand([FOX], sizes=SIZES[:1])) == [("a fox", 16, 32, None, 0, None)]


def test_rows_replace_what_the_command_says() -> None:
    row = replace(FOX, size=(8, 8), steps=2, guidance=3.0, seed=9, count=2, negative="a dog")
    found = expand([row, LAKE], sizes=SIZES[:1], steps=[1, 4], guidances=[1.0, 2.0])
    assert values(found)[:2] == [("a fox", 8, 8, 3.0, 9, 2), ("a fox", 8, 8, 3.0, 10, 2)]
    assert found[0].negative == "a dog"
    assert len(found) == 2 + 4


def test_zipped_lists_go_in_step() -> None:
    found = expand([FOX, LAKE], sizes=SIZES, steps=[4], seeds=[1, 2], zipped=True)
    assert values(found) == [("a fox", 16, 32, None, 1, 4), ("a lake", 32, 16, None, 2, 4)]
    found = expand([FOX], sizes=SIZES[:1], guidances=[1.0, 2.0, 3.0], zipped=True)
    assert [(each.index, each.repeat, each.guidance) for each in found] == [(0, 0, 1.0), (0, 1, 2.0), (0, 2, 3.0)]
    assert values(expand([FOX], sizes=SIZES[:1], zipped=True)) == values(expand([FOX], sizes=SIZES[:1]))
    assert expand([], sizes=SIZES, zipped=True) == expand([], sizes=SIZES) == []
    counted = expand([FOX, LAKE], sizes=SIZES, count=2, zipped=True)
    assert [(each.prompt, each.height, each.seed) for each in counted] == [
        ("a fox", 16, 0),
        ("a fox", 16, 1),
        ("a lake", 32, 0),
        ("a lake", 32, 1),
    ]


def test_no_image_comes_twice() -> None:
    assert len(expand([FOX], sizes=[*SIZES, *SIZES], steps=[1, 1], seeds=[3, 3])) == 2
    assert len(expand([FOX], sizes=SIZES[:1], seeds=[3, 3], zipped=True)) == 1
    assert len(expand([FOX, FOX], sizes=SIZES[:1])) == 2  # a prompt that is in the list twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [*SIZES, (8, 8)], "seeds": [1, 2], "zipped": True}, "--zip: 2 prompts, 3 sizes, 2 seeds: give lists of equal length"),
        ({"sizes": SIZES, "seeds": [1, 2], "count": 2}, "--count 2 and 2 seeds: give one of them"),
        ({"sizes": SIZES, "count": 0}, "--count 0"),
        ({"sizes": []}, "prompt number 1: has no size, and there is no --size"),
        ({"sizes": SIZES, "seeds": [MAX_SEED], "count": 2}, "exceeds the largest seed"),
    ],
)
def test_what_does_not_go_together_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand([FOX, LAKE], **arguments)


def test_rows_of_classes_and_texts_that_are_no_utf_8() -> None:
    assert argument_rows([3]) == [PromptRow(3, "class number 1")]
    with pytest.raises(ValueError, match=r"^prompt number 2: is not UTF-8 at character 3"):
        argument_rows(["a", "caf\udce9"])
