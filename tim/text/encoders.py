"""Text encoders: captions to feature sequences of their own lengths, never padded.

| kind | what it is |
| --- | --- |
| lookup | a frozen table of random embeddings; no weights |
| open_clip | the text tower of a CLIP (open_clip's folder), one feature a token, after its last norm |
| hf | any text encoder or language model of transformers (T5, Gemma, BERT, …): its last hidden states |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from tim.kinds import TextKind
from tim.pretrained import weight_files
from tim.pretrained.weight_files import HUB, Location, in_words
from tim.text.tokenizers import KEY, BytePairs, PretrainedTokenizer, Tokenizer, tokenizer_folder, transformers_library

BATCH_TOKENS = 16384  # that go through a tower at once
PARTS = ("text_encoder",)  # sub-folders of a pipeline that hold a text encoder
PROBES = ("red", "blue", "fox", "dog", "a", "one", "7", "東")  # of one word each, so that a tokenizer without words reads all alike


class TextEncoder(Protocol):
    """Captions to features. `width` is that of a feature; `tokenizer` says how long captions are."""

    width: int
    max_tokens: int
    tokenizer: Tokenizer

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 (M, F) of every caption; tokens beyond `max_tokens` are cut off, an end token stays."""
        ...


class LookupEncoder:
    """open_clip's byte-pair tokens, each looked up in a frozen table that is drawn from a fixed seed; positions are added.

    No weights, no download: enough for a network to learn a small vocabulary. Features have unit variance; the empty caption is
    its start and end token.
    """

    SEED = 0
    POSITION_SCALE = 0.5

    def __init__(self, *, width: int, max_tokens: int = 77, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.max_tokens = max_tokens
        pairs = BytePairs(max_tokens=max_tokens)
        self.tokenizer: Tokenizer = pairs
        generator = torch.Generator().manual_seed(self.SEED)
        self._table = torch.randn(pairs.size, width, generator=generator).to(device)
        self._positions = (self.POSITION_SCALE * torch.randn(max_tokens, width, generator=generator)).to(device)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (M, F) of every caption; tokens beyond `max_tokens` are cut off, the end token stays."""
        tokens = [torch.tensor(each, device=self._table.device) for each in self.tokenizer(captions)]
        return [self._table[each] + self._positions[: len(each)] for each in tokens]


class TowerEncoder:
    """A frozen text tower. `read` takes tokens (B, M) and which of them are not padding (B, M) to hidden states (B, M, F).

    Captions of like lengths go through together; what a caption is padded with is cut off again. `vocabulary`: token ids that the tower
    knows; `precision` bf16 is autocast.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        read: Callable[[Tensor, Tensor], Tensor],
        tokenizer: Tokenizer,
        *,
        vocabulary: int,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        network.to(device, torch.float32).eval().requires_grad_(False)
        self.max_tokens = tokenizer.max_tokens
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self._read = read
        self._vocabulary = vocabulary
        self._precision = precision
        self.width = self.encode([""])[0].shape[1]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (M, F) of every caption; tokens beyond `max_tokens` are cut off.

        Raises ValueError where a caption has no token, or one that the tower does not know.
        """
        tokens = self.tokenizer(captions)
        if not all(tokens):
            raise ValueError("the text encoder's tokenizer makes nothing of the empty caption: choose one with start or end tokens")
        if (largest := max(map(max, tokens), default=0)) >= self._vocabulary:
            raise ValueError(f"token {largest} is beyond the text encoder's {self._vocabulary}: {KEY} is of another model")
        features: dict[int, Tensor] = {}
        for batch in _alike([len(each) for each in tokens]):
            longest = max(len(tokens[i]) for i in batch)
            ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in batch], device=self.device)
            lengths = torch.tensor([len(tokens[i]) for i in batch], device=self.device)
            mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                hidden = self._read(ids, mask).float()
            features.update((i, hidden[row, : len(tokens[i])]) for row, i in enumerate(batch))
        return [features[i] for i in range(len(captions))]


TEXT_ENCODERS = get_args(TextKind)


def make(
    kind: str,
    path: str | Path | None = None,
    *,
    tokenizer_path: str | Path | None = None,
    width: int | None = None,
    max_tokens: int = 77,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> TextEncoder:
    """Make a text encoder from the weights at `path` (see `weight_files`) and the tokenizer at `tokenizer_path` (default `path`).

    `width` is that of the features: `lookup` makes them as wide as one likes, the others are refused if they are of another width.
    Raises ValueError for an unknown kind, naming the path that holds no such encoder or tokenizer, and where captions that differ have
    identical features.
    """
    if max_tokens < 2:
        raise ValueError(f"text.max_tokens {max_tokens}: the start and end tokens alone are 2")
    if kind == "lookup":
        _check_tokenizer_path(kind, tokenizer_path)
        if width is None:
            raise ValueError("text encoder lookup: give the width of its features")
        encoder = LookupEncoder(width=width, max_tokens=max_tokens, device=device)
        _check_distinct(encoder, named="text encoder lookup")
        return encoder
    found = tokenizer(kind, path, tokenizer_path=tokenizer_path, max_tokens=max_tokens)
    place = location(kind, path)
    network, read = _clip_tower(place.folder, max_tokens=max_tokens) if kind == "open_clip" else _transformers_tower(place)
    embedding: Any = network.token_embedding if kind == "open_clip" else network.get_input_embeddings()  # pyright: ignore
    encoder = TowerEncoder(network, read, found, vocabulary=len(embedding.weight), device=device, precision=precision)
    if width not in (None, encoder.width):
        raise ValueError(f"{path}: its features are {encoder.width} wide, not {width}: give network.params.cap_feat_dim={encoder.width}")
    _check_distinct(encoder, named=f"text encoder {kind}={path}")
    return encoder


def tokenizer(kind: str, path: str | Path | None = None, *, tokenizer_path: str | Path | None = None, max_tokens: int = 77) -> Tokenizer:
    """How an encoder cuts captions into tokens, at most `max_tokens` each; for it alone the weights are not loaded. Raises ValueError."""
    _check_tokenizer_path(kind, tokenizer_path)
    folder = tokenizer_location(kind, path, tokenizer_path=tokenizer_path)
    return BytePairs(max_tokens=max_tokens) if folder is None else PretrainedTokenizer(folder, max_tokens=max_tokens)


def tokenizer_location(kind: str, path: str | Path | None, *, tokenizer_path: str | Path | None = None) -> Path | None:
    """The folder of an encoder's tokenizer, None where it is CLIP's, which comes with open_clip. Raises ValueError."""
    encoder = _located(kind, path)
    if kind != "hf" or encoder is None or path is None:
        return None
    return tokenizer_folder(encoder, path=path, tokenizer=tokenizer_path)


def digest(kind: str, path: str | Path, *, tokenizer_path: str | Path | None = None) -> str:
    """sha256 that tells an encoder's weights and tokenizer from others. Raises ValueError where there are none."""
    encoder = location(kind, path)
    weights = weight_files.digest(path, parts=PARTS if kind == "hf" else ())
    folder = tokenizer_location(kind, path, tokenizer_path=tokenizer_path)
    if folder is None or (encoder.file is None and folder.resolve() == encoder.folder.resolve()):
        return weights
    return hashlib.sha256(f"{weights} {weight_files.digest(folder, weights=False)}".encode()).hexdigest()


def width(kind: str, path: str | Path | None) -> int:
    """How wide an encoder's features are, by what stands beside its weights. Raises ValueError; `lookup` has no width of its own."""
    folder = weights_folder(kind, path)
    if folder is None:
        raise ValueError(f"text encoder {kind}: give the width of its features")
    if kind == "open_clip":
        return int(_clip_config(folder).get("width", 512))
    try:
        config = transformers_library().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a model that transformers reads ({in_words(error)})") from error
    return int(config.get_text_config().hidden_size)


def weights_folder(kind: str, path: str | Path | None) -> Path | None:
    """The folder of an encoder's weights, None where it needs none. Raises ValueError for an unknown kind, or where there is no folder."""
    found = _located(kind, path)
    return None if found is None else found.folder


def location(kind: str, path: str | Path | None) -> Location:
    """Where the weights of an encoder that has some are. Raises ValueError as `weights_folder`."""
    found = _located(kind, path)
    if found is None:
        raise ValueError(f"text encoder {kind} has no weights")
    return found


def _located(kind: str, path: str | Path | None) -> Location | None:
    if kind not in TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {kind!r}: choose one of {', '.join(TEXT_ENCODERS)}")
    if kind == "lookup":
        return None
    if path is None:
        raise ValueError(f"text encoder {kind} needs its weights: give its path, a folder or {HUB}OWNER/NAME")
    found = weight_files.locate(path, parts=PARTS if kind == "hf" else ())
    wanted = "open_clip_config.json" if kind == "open_clip" else "config.json"
    if not (found.folder / wanted).is_file():
        raise ValueError(f"{found.folder}: has no {wanted}, which text encoder {kind} needs beside its weights")
    return found


def _check_tokenizer_path(kind: str, tokenizer_path: str | Path | None) -> None:
    if tokenizer_path is not None and kind != "hf":
        raise ValueError(f"{KEY}: text encoder {kind} has CLIP's tokenizer: leave it out, or use text encoder hf")


def _check_distinct(encoder: TextEncoder, *, named: str) -> None:
    """Raises ValueError where captions that differ have identical features, or features are not finite."""
    words = [*dict.fromkeys([*PROBES, *encoder.tokenizer.samples()])]
    first, *others = encoder.encode(words)
    if not all(bool(each.isfinite().all()) for each in (first, *others)):
        raise ValueError(f"{named}: its features are not finite numbers: its weights are damaged, or need text.precision=fp32")
    if all(torch.equal(first, other) for other in others):
        why = f"{words[0]!r} and {words[1]!r} have identical features, and so have all words"
        raise ValueError(f"{named}: {why}: check its weights, {KEY} and text.max_tokens={encoder.max_tokens}")


def _clip_tower(folder: Path, *, max_tokens: int) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    import open_clip

    config = _clip_config(folder)
    if config.get("hf_tokenizer_name") or config.get("hf_model_name") or config.get("tokenizer_kwargs"):
        raise ValueError(f"{folder}: its text tower has a tokenizer of its own, not CLIP's: use text encoder hf with that tower's weights")
    try:
        model: Any = open_clip.create_model(f"local-dir:{folder}")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: not a model that open_clip reads ({in_words(error)})") from error
    tower = getattr(model, "text", model)
    if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        raise ValueError(f"{folder}: its text tower is not causal as CLIP's is: use text encoder hf with that tower's weights")
    if max_tokens > tower.positional_embedding.shape[0]:
        raise ValueError(f"{folder}: reads {tower.positional_embedding.shape[0]} tokens at most, text.max_tokens is {max_tokens}")
    if tower is model:
        model.visual = torch.nn.Identity()  # the image tower is not needed

    def read(ids: Tensor, mask: Tensor) -> Tensor:  # causal: no token sees the padding behind it
        count = ids.shape[1]
        hidden = tower.token_embedding(ids) + tower.positional_embedding[:count]
        return tower.ln_final(tower.transformer(hidden, attn_mask=tower.attn_mask[:count, :count]))

    return tower, read


def _clip_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})


def _transformers_tower(place: Location) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    transformers = transformers_library()
    folder = place.folder
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        is_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # T5 and others, whose decoder is not needed
        kind = transformers.AutoModelForTextEncoding if is_encoder else transformers.AutoModel
        with weight_files.loadable(place, stem="model", pickle_stem="pytorch_model") as (weights, arguments):
            how = {**arguments, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
            network, said = kind.from_pretrained(weights, **how)
    except weight_files.FAILURES as error:
        raise weight_files.failure(place, error, library="transformers") from error
    missing = sorted(name for name in said["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"{folder}: its weights lack {missing[0]} and {len(missing) - 1} more: they are of another model than its config")
    for part in ("text_model", "language_model"):  # of models that see images, too
        network = getattr(network, part, network)

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        return network(input_ids=ids, attention_mask=mask).last_hidden_state

    return network, read


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of captions, shortest first, so many that padded to the longest they are at most `BATCH_TOKENS`, or one."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[position] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
