"""Datasets of the `datasets` library as sources: saved to disk, or streamed from the Hugging Face hub.

Images are not decoded, nothing is cached, and no code of a dataset is run.
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
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"  # written by `save_to_disk`


def is_on_hub(spec: str) -> bool:
    """Whether `spec` is `hf:NAME` or `hf://datasets/NAME`, with optional owner and `@REVISION`; false for files in a dataset."""
    return _ON_HUB.fullmatch(spec) is not None


def is_saved(files: Listing) -> bool:
    """Whether the files of a folder were written by `save_to_disk`."""
    return _SPLITS in files or (_STATE in files and _INFO in files)


class HubDataset:
    """One split of a dataset, read in order.

    `path`: `hf:NAME`, `hf://datasets/NAME`, or a folder or URL written by `save_to_disk`. `split` defaults to the only one, or to `train`.
    `subset`: the hub's name for a configuration.
    """

    layout = "datasets"
    tags: tuple[str, ...] = ()

    def __init__(self, path: str, *, name: str, columns: ColumnConfig, split: str | None = None, subset: str | None = None) -> None:
        self.name = name
        self.path = path
        match = _ON_HUB.fullmatch(path)
        self._is_local = match is None and not is_remote(path)
        self.root = Path(path).resolve() if self._is_local else None
        try:
            if match:
                self._digest, splits = _open_on_hub(match["repo"], revision=match["revision"], subset=subset)
            else:
                self._digest, splits = _open_saved(path)
            self.split, self._dataset = _choose_split(splits, split=split)
        except Exception as error:  # the library raises many types
            raise ValueError(f"{path}: {one_line(error)}") from error
        features: Features | Mapping[str, Any] = self._dataset.features or next(iter(self._dataset), {})
        self._class_names = {column: feature.names for column, feature in features.items() if hasattr(feature, "int2str")}
        inner = features.get("json")  # of WebDataset shards: its keys count as columns
        names = [*(inner if isinstance(inner, Mapping) else ()), *(column for column in features if column != "json")]
        images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
        self.columns = choose(columns, names=list(dict.fromkeys(names)), images=images, origin=path)

    def reads(self) -> str:
        """One sentence on what is read, and from which columns."""
        return f"{self.name}: {self.path if not self._is_local else base_name(self.path)}, split {self.split}, {describe(self.columns)}"

    def expected(self) -> int | None:
        """Number of inputs, None if it is unknown before they are read."""
        known = (self._dataset.info.splits or {}).get(self.split)
        return known.num_examples or None if known else None

    def digest(self) -> str:
        """Digest of the commit of a hub dataset, or of the fingerprint and the file names and sizes of a saved one."""
        return hashlib.sha256(f"{self._digest}\0{self.split}".encode()).hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All rows of the split. Raises RuntimeError if reading fails."""
        rows = iter(self._dataset)
        number = 0
        while True:
            try:
                record = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network lost or file damaged: the remaining rows are unknown
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
        path = f"{base_name(url)}/{key}" if isinstance(url, str) and isinstance(key, str) else where
        folder = self.path if self._is_local else None
        return sample_of(record, source=self.name, columns=self.columns, where=path, folder=folder)


def _open_on_hub(repo: str, *, revision: str | None, subset: str | None) -> tuple[str, Mapping[str, IterableDataset]]:
    """The commit, and the splits at this commit."""
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
    versions = []
    for split in found.values():
        files = [entry["filename"] for entry in split.cache_files]
        versions.append(f"{split._fingerprint} {split.num_rows} {'' if is_remote(path) else facts(files)}")
    return json.dumps(versions), {str(name): split.to_iterable_dataset().decode(False) for name, split in found.items()}


def _choose_split(splits: Mapping[str, IterableDataset], *, split: str | None) -> tuple[str, IterableDataset]:
    wanted = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if wanted not in splits:
        raise ValueError(f"has no split {wanted}; there are {', '.join(splits)}: choose one by sources.NAME.split")
    return wanted, splits[wanted]
