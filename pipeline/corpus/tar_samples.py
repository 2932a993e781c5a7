"""Members of a tar → samples. `tim prepare` and `tim index` both use it, so that they find the same samples in every tar.

Members are joined by key, in whatever order they come; samples are in the order of the first member of each key. Key and extension follow
webdataset's rule: the key ends at the first dot of the base name. Where that leaves a key without an image, members whose extension
has several parts (`0000.input.jpg`, `img_1_1.5x.jpg`) are taken by the last part, if it is clear which of them belong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.bounded_counter import BoundedCounter
from pipeline.corpus.record_fields import IMAGE_EXTENSIONS
from pipeline.storage.tar import Member

TEXT_EXTENSIONS = ("txt", "text", "caption")  # in order of preference
_KINDS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    **dict.fromkeys(TEXT_EXTENSIONS, "text"),
    "json": "json",
    "cls": "cls",
}
_HIDDEN = "hidden"
_PREFERENCE = {extension: place for place, extension in enumerate((*TEXT_EXTENSIONS, *IMAGE_EXTENSIONS, "json", "cls"))}


@dataclass(frozen=True, slots=True)
class TarSample:
    """The members of one sample, or why it cannot be used.

    `key` is unique in its tar: a second sample of the same key is KEY~2. `name`: of the image, or else of the first member. `texts` are in
    order of preference, one for each extension.
    """

    key: str
    name: str
    image: Member | None = None
    texts: tuple[Member, ...] = ()
    json: Member | None = None
    cls: Member | None = None
    problem: tuple[str, str] | None = None


def kind_of(member: Member) -> str:
    """What a member may be to a sample, by the last part of its extension: image, text, json, cls, or "" for nothing."""
    return _KINDS.get(member.extension.rpartition(".")[2], "")


def is_used(member: Member) -> bool:
    """Whether a member may be part of a sample, or has a problem that has to be told."""
    return member.problem is not None or bool(kind_of(member) and not _is_hidden(member))


def key_of(member: Member) -> str:
    """The key, the same with and without `./` before it."""
    return member.key.removeprefix("./")


class TarSamples:
    """Join the members of one tar by key. `left_out` counts, by extension, members that are no part of a sample, once all samples are read.

    Memory: the names and offsets of the members of one tar.
    """

    def __init__(self, members: Iterable[Member], *, tar: str) -> None:
        self.left_out = BoundedCounter()
        self.has_dotted = False  # whether a name with several dots was left out or taken by its last part
        self._tar = tar
        self._added: set[str] = set()
        self._groups: dict[str, list[Member]] = {}
        for member in members:
            if is_used(member):
                self._groups.setdefault(key_of(member), []).append(member)
            else:
                self.leave_out([member])

    def __iter__(self) -> Iterator[TarSample]:
        for key in self._groups:
            group, self._groups[key] = self._groups[key], []
            yield from self._samples(key, group)

    def _samples(self, key: str, group: Sequence[Member]) -> Iterator[TarSample]:
        """The samples of one key: mostly one."""
        parts = _split_at_repeats(group)
        if len({frozenset(member.extension for member in part) for part in parts}) > 1:
            twice = parts[1][0]
            yield from self._rejected(key, group, detail=f"{self._tar} has two members of the name {twice.name}")
            return
        for part in parts:
            yield from self._samples_of_part(key, part)

    def _samples_of_part(self, key: str, part: Sequence[Member]) -> Iterator[TarSample]:
        plain = [member for member in part if member.problem or "." not in member.extension]
        dotted = [member for member in part if not member.problem and "." in member.extension]
        images = [member for member in dotted if kind_of(member) == "image"]
        if not images or any(kind_of(member) == "image" for member in plain):
            self.leave_out(dotted)
            if plain:
                yield self._sample(key, plain)
            return
        self.has_dotted = True
        if len(images) == 1:
            yield self._sample(key, [*plain, *self._beside(images[0], dotted=dotted, plain=plain)])
        elif plain:
            detail = f"several images of the key {key} ({_extensions(images)}) and no {key}.{images[0].extension.rpartition('.')[2]}"
            yield from self._rejected(key, part, detail=f"{detail}: webdataset's key ends at the first dot of a name")
        else:
            for stem, members in _by_stem(dotted).items():
                yield self._sample(stem, members)

    def _beside(self, image: Member, *, dotted: Sequence[Member], plain: Sequence[Member]) -> list[Member]:
        """The image and, of each further kind that the sample lacks, the member of the image's own stem or the only one."""
        chosen = [image]
        for kind in ("text", "json", "cls"):
            there = [member for member in dotted if kind_of(member) == kind]
            own = [member for member in there if _stem(member) == _stem(image)]
            if not any(kind_of(member) == kind for member in plain):
                chosen += own or (there if len(there) == 1 else [])
        self.leave_out([member for member in dotted if member not in chosen])
        return chosen

    def _sample(self, key: str, members: Sequence[Member]) -> TarSample:
        kinds: dict[str, list[Member]] = {}
        for member in sorted(members, key=lambda member: _PREFERENCE.get(member.extension.rpartition(".")[2], -1)):
            kinds.setdefault(kind_of(member), []).append(member)
        images = kinds.get("image", [])
        self.leave_out(images[1:])
        image = images[0] if images else None
        return TarSample(
            key=self._free(key),
            name=(image or members[0]).name,
            image=image,
            texts=tuple(kinds.get("text", ())),
            json=kinds.get("json", [None])[0],
            cls=kinds.get("cls", [None])[0],
            problem=next((member.problem for member in members if member.problem), None),
        )

    def _rejected(self, key: str, members: Sequence[Member], *, detail: str) -> Iterator[TarSample]:
        """One sample for each image, or a single one where there is none."""
        images = [member for member in members if kind_of(member) == "image"]
        for member in images or members[:1]:
            yield TarSample(key=self._free(key), name=member.name, problem=member.problem or ("bad-record", detail))

    def leave_out(self, members: Iterable[Member]) -> None:
        """Count members that are no part of a sample."""
        for member in members:
            is_hidden = _is_hidden(member)
            self.has_dotted |= not is_hidden and "." in member.extension
            self.left_out.add(_HIDDEN if is_hidden else f".{member.extension}" if member.extension else "without extension")

    def _free(self, key: str) -> str:
        """The key, if no sample before has it, or else with a number."""
        free, number = key, 2
        while free in self._added or (free != key and free in self._groups):
            free, number = f"{key}~{number}", number + 1
        self._added.add(free)
        return free


def _is_hidden(member: Member) -> bool:
    return not member.key or member.key.endswith("/")


def _extensions(members: Iterable[Member]) -> str:
    return ", ".join([member.extension for member in members][:3])


def _stem(member: Member) -> str:
    """The name up to its last dot."""
    return member.name.rpartition(".")[0]


def _by_stem(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Members by their names up to the last dot. As keys, they have no dots in their base names."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        middle = member.extension.rpartition(".")[0]
        groups.setdefault(f"{key_of(member)}_{middle.replace('.', '_')}", []).append(member)
    return groups


def _split_at_repeats(members: Sequence[Member]) -> list[list[Member]]:
    """Members of one key in the order of the tar; where an extension comes again, a further part begins."""
    parts: list[list[Member]] = [[]]
    seen: set[str] = set()
    for member in members:
        if member.extension in seen:
            parts.append([])
            seen.clear()
        seen.add(member.extension)
        parts[-1].append(member)
    return parts
