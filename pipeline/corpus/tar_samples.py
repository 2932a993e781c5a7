"""Group the members of a tar into samples. `tim prepare` and `tim index` both use it, so they find the same samples in every tar.

Members are grouped by key, in any order; samples are in the order of the first member of each key. Key and extension follow webdataset's
rule: the key ends at the first dot of the base name. If this gives a key without an image, members with a multi-part extension
(`0000.input.jpg`, `img_1_1.5x.jpg`) are matched by the last part, unless it is ambiguous which of them belong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.bounded_counter import BoundedCounter
from pipeline.corpus.record_fields import IMAGE_EXTENSIONS
from pipeline.images.masks import MASK_EXTENSION
from pipeline.storage.tar import Member

TEXT_EXTENSIONS = ("txt", "text", "caption")  # in order of preference
_KINDS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    **dict.fromkeys(TEXT_EXTENSIONS, "text"),
    "json": "json",
    "cls": "cls",
}
_HIDDEN = "hidden"
_PREFERENCE = {extension: rank for rank, extension in enumerate((*TEXT_EXTENSIONS, *IMAGE_EXTENSIONS, "json", "cls"))}


@dataclass(frozen=True, slots=True)
class TarSample:
    """The members of one sample, or the problem that makes it unusable.

    `key` is unique in its tar: a second sample of the same key is KEY~2. `name`: of the image, or of the first member. `texts` are in order
    of preference, one for each extension.
    """

    key: str
    name: str
    image: Member | None = None
    texts: tuple[Member, ...] = ()
    json: Member | None = None
    cls: Member | None = None
    mask: Member | None = None
    problem: tuple[str, str] | None = None


def kind_of(member: Member) -> str:
    """The kind of a member, from the last part of its extension: image, text, json, cls, or "" for other files."""
    return _KINDS.get(member.extension.rpartition(".")[2], "")


def is_used(member: Member) -> bool:
    """Whether a member may be part of a sample, or has a problem to report."""
    return member.problem is not None or bool(kind_of(member) and not _is_hidden(member))


def key_of(member: Member) -> str:
    """The key, without a leading `./`."""
    return member.key.removeprefix("./")


class TarSamples:
    """Group the members of one tar by key. `left_out` counts members outside samples by extension, once all samples are read.

    Memory: the names and offsets of the members of one tar.
    """

    def __init__(self, members: Iterable[Member], *, tar: str) -> None:
        self.left_out = BoundedCounter()
        self.has_dotted = False  # whether a name with several dots was left out or matched by its last part
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
        """The samples of one key, usually one."""
        parts = _split_at_repeats(group)
        if len({frozenset(member.extension for member in part) for part in parts}) > 1:
            repeated = parts[1][0]
            yield from self._rejected(key, group, detail=f"{self._tar} has two members named {repeated.name}")
            return
        for part in parts:
            yield from self._samples_with_mask(key, part)

    def _samples_with_mask(self, key: str, part: Sequence[Member]) -> Iterator[TarSample]:
        """The samples of a part. KEY.mask.png beside another image is the mask of that image."""
        masks = [member for member in part if member.extension == MASK_EXTENSION and not member.problem]
        others = [member for member in part if member not in masks]
        if not masks or not any(kind_of(member) == "image" for member in others):
            yield from self._samples_of_part(key, part)
            return
        samples = list(self._samples_of_part(key, others))
        if len(samples) == 1:
            samples = [replace(samples[0], mask=masks[0])]
        else:
            self.leave_out(masks)
        yield from samples

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
            yield self._sample(key, [*plain, *self._members_with(images[0], dotted=dotted, plain=plain)])
        elif plain:
            detail = f"several images of the key {key} ({_extensions(images)}) and no {key}.{images[0].extension.rpartition('.')[2]}"
            yield from self._rejected(key, part, detail=f"{detail}: webdataset's key ends at the first dot of a name")
        else:
            for stem, members in _by_stem(dotted).items():
                yield self._sample(stem, members)

    def _members_with(self, image: Member, *, dotted: Sequence[Member], plain: Sequence[Member]) -> list[Member]:
        """The image and, for each missing kind, the member with the image's stem or the only one of its kind."""
        chosen = [image]
        for kind in ("text", "json", "cls"):
            candidates = [member for member in dotted if kind_of(member) == kind]
            own = [member for member in candidates if _stem(member) == _stem(image)]
            if not any(kind_of(member) == kind for member in plain):
                chosen += own or (candidates if len(candidates) == 1 else [])
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
            key=self._unique_key(key),
            name=(image or members[0]).name,
            image=image,
            texts=tuple(kinds.get("text", ())),
            json=kinds.get("json", [None])[0],
            cls=kinds.get("cls", [None])[0],
            problem=next((member.problem for member in members if member.problem), None),
        )

    def _rejected(self, key: str, members: Sequence[Member], *, detail: str) -> Iterator[TarSample]:
        """One sample for each image, or a single one if there is none."""
        images = [member for member in members if kind_of(member) == "image"]
        for member in images or members[:1]:
            yield TarSample(key=self._unique_key(key), name=member.name, problem=member.problem or ("bad-record", detail))

    def leave_out(self, members: Iterable[Member]) -> None:
        """Count members outside samples."""
        for member in members:
            is_hidden = _is_hidden(member)
            self.has_dotted |= not is_hidden and "." in member.extension
            self.left_out.add(_HIDDEN if is_hidden else f".{member.extension}" if member.extension else "without extension")

    def _unique_key(self, key: str) -> str:
        """The key, with a number if an earlier sample has it."""
        unique, number = key, 2
        while unique in self._added or (unique != key and unique in self._groups):
            unique, number = f"{key}~{number}", number + 1
        self._added.add(unique)
        return unique


def _is_hidden(member: Member) -> bool:
    return not member.key or member.key.endswith("/")


def _extensions(members: Iterable[Member]) -> str:
    return ", ".join([member.extension for member in members][:3])


def _stem(member: Member) -> str:
    """The name up to its last dot."""
    return member.name.rpartition(".")[0]


def _by_stem(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Group members by name up to the last dot. In the new keys, dots of the base name are replaced."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        middle = member.extension.rpartition(".")[0]
        groups.setdefault(f"{key_of(member)}_{middle.replace('.', '_')}", []).append(member)
    return groups


def _split_at_repeats(members: Sequence[Member]) -> list[list[Member]]:
    """Split the members of one key, in tar order, before each repeated extension."""
    parts: list[list[Member]] = [[]]
    seen: set[str] = set()
    for member in members:
        if member.extension in seen:
            parts.append([])
            seen.clear()
        seen.add(member.extension)
        parts[-1].append(member)
    return parts
