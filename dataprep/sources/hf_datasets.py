"""Data sets of the `datasets` library as sources: saved to disk, or on the Hugging Face hub, from where they are streamed.

Nothing is decoded, nothing is kept in a cache, and no code that comes with a data set is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataprep.sources.column_mapping import ColumnConfig, choose, describe
from dataprep.sources.files.file_listing import Listing
from dataprep.sources.files.paths import base_name, facts
from dataprep.sources.image_list import sample_of
from dataprep.sources.raw_sample import RawSample
from pipeline.corpus.record_fields import CLASS_NAME
from pipeline.errors import one_line
from pipeline.storage.remote import is_remote

if TYPE_CHECKING:
    from datasets import Features, IterableDataset, IterableDatasetDict

_ON_HUB = re.compile(r"hf:(?://datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[^@/]+))?", re.ASCII)
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"  # what `save_to_disk` writes


def is_on_hub(spec: str) -> bool:
    """Whether `hf:NAME` or `hf://datasets/NAME`, with an owner before or `@REVISION` after the name, is meant; files in it are not."""
    return _ON_HUB.fullmatch(spec) is not None


def is_saved(files: Listing) -> bool:
    """Whether the files of a folder are what `save_to_disk` writes."""
    return _SPLITS in files or (_STATE in files and _INFO in files)


class HubDataset:
    """One split of a data set, read in its order.

    `path` is `hf:NAME`, `hf://datasets/NAME`, or a folder or URL that `save_to_disk` wrote. `split` may be left out where there is one, or
    one called train; `subset` is the hub's word for a configuration.
    """

    layout = "datasets"
    tags: tuple[str, ...] = ()

    def __init__(self, path: str, *, name: str, columns: ColumnConfig, split: str | None = None, subset: str | None = None) -> None:
        self.name = name
        self.path = path
        match = _ON_HUB.fullmatch(path)
        self._is_ours = match is None and not is_remote(path)
        self.root = Path(path).resolve() if self._is_ours else None
        try:
            if match:
                self._digest, splits = _open_on_hub(match["repo"], revision=match["revision"], subset=subset)
            else:
                self._digest, splits = _open_saved(path)
            self.split, self._dataset = _choose_split(splits, split=split, place=path)
        except Exception as error:  # whatever the library raises for what it does not find or cannot read
            raise ValueError(f"{path}: {one_line(error)}") from error
        features: Features | Mapping[str, Any] = self._dataset.features or next(iter(self._dataset), {})
        self._class_names = {column: feature.names for column, feature in features.items() if hasattr(feature, "int2str")}
        inner = features.get("json")  # of WebDataset shards: what is in it counts as columns
        names = [*(inner if isinstance(inner, Mapping) else ()), *(column for column in features if column != "json")]
        images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
        self.columns = choose(columns, names=list(dict.fromkeys(names)), images=images, place=path)

    def reads(self) -> str:
        """What is read, and from which columns, in a sentence."""
        return f"{self.name}: {self.path if not self._is_ours else base_name(self.path)}, split {self.split}, {describe(self.columns)}"

    def expected(self) -> int | None:
        """How many inputs there are, where that is known without reading them."""
        known = (self._dataset.info.splits or {}).get(self.split)
        return known.num_examples or None if known else None

    def digest(self) -> str:
        """Of a data set on the hub, its commit; of a saved one, what it says of itself and the names and sizes of its files."""
        return hashlib.sha256(f"{self._digest}\0{self.split}".encode()).hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All rows of the split. Raises RuntimeError where it breaks off."""
        rows = iter(self._dataset)
        number = 0
        while True:
            try:
                record = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a network that is gone, a file that is damaged: what follows is not known
                raise RuntimeError(f"{self.path}: breaks off after {number} rows ({one_line(error)}); run the command again") from error
            number += 1
            yield self._sample(record, where=f"{self.split}:{number}")

    def notes(self) -> list[str]:
        """Nothing is left out."""
        return []

    def _sample(self, record: Mapping[str, Any], *, where: str) -> RawSample:
        record = dict(record)
        inner = record.pop("json", None)
        record = {**(inner if isinstance(inner, Mapping) else {}), **record}
        url, key = record.pop("__url__", None), record.pop("__key__", None)
        for column, names in self._class_names.items():
            label = record.get(column)
            if column in self.columns.labels and isinstance(label, int) and 0 <= label < len(names):
                record.setdefault(CLASS_NAME, names[label])
        place = f"{base_name(url)}/{key}" if isinstance(url, str) and isinstance(key, str) else where
        folder = self.path if self._is_ours else None
        return sample_of(record, source=self.name, columns=self.columns, where=place, folder=folder)


def _open_on_hub(repo: str, *, revision: str | None, subset: str | None) -> tuple[str, Mapping[str, IterableDataset]]:
    """The commit, and the splits as of this very commit."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(repo, revision=revision).sha
    assert commit
    splits: IterableDatasetDict = load_dataset(f"hf://datasets/{repo}", name=subset, revision=commit, streaming=True)
    return f"{commit} {subset}", {str(name): split.decode(False) for name, split in splits.items()}


def _open_saved(path: str) -> tuple[str, Mapping[str, IterableDataset]]:
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(path)
    found = {"all": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    told = []
    for split in found.values():
        files = [entry["filename"] for entry in split.cache_files]
        told.append(f"{split._fingerprint} {split.num_rows} {'' if is_remote(path) else facts(files)}")
    return json.dumps(told), {str(name): split.to_iterable_dataset().decode(False) for name, split in found.items()}


def _choose_split(splits: Mapping[str, IterableDataset], *, split: str | None, place: str) -> tuple[str, IterableDataset]:
    wanted = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if wanted not in splits:
        raise ValueError(f"has no split {wanted}; there are {', '.join(splits)}: say which one by sources.NAME.split")
    return wanted, splits[wanted]
