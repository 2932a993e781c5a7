"""Text encoders: captions to feature sequences of different lengths, without padding.

| kind | what it is |
| --- | --- |
| lookup | a frozen table of random embeddings; no weights |
| open_clip | the text tower of a CLIP (open_clip's folder), one feature per token, after its last norm |
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

from tim.model_kinds import TextKind
from tim.pretrained import weight_files
from tim.pretrained.headers import read_header
from tim.pretrained.weight_files import HUB, Location, one_line
from tim.text.tokenizers import KEY, BytePairs, PretrainedTokenizer, Tokenizer, tokenizer_folder, transformers_library

BATCH_TOKENS = 16384  # per batch, padding included
BUCKET = 16  # lengths in one batch differ by less
PARTS = ("text_encoder",)  # sub-folders of a diffusers pipeline with a text encoder
PROBES = ("red", "blue", "fox", "dog", "a", "one", "7", "東")  # single words, which a tokenizer without vocabulary cannot tell apart


class TextEncoder(Protocol):
    """Captions to features of size `width`. `tokenizer` gives the captions' lengths."""

    width: int
    max_tokens: int
    tokenizer: Tokenizer

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 (M, F) per caption, truncated to `max_tokens` tokens; an end token stays."""
        ...


class LookupEncoder:
    """open_clip's byte-pair tokens, looked up in a frozen random table with a fixed seed, plus position embeddings.

    Needs no weights and no download; enough to learn a small vocabulary. Features have unit variance. The empty caption is a start and
    an end token.
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
        """Features (M, F) per caption, truncated to `max_tokens` tokens; the end token stays."""
        tokens = [torch.tensor(each).to(self._table.device, non_blocking=True) for each in self.tokenizer(captions)]
        return [self._table[each] + self._positions[: len(each)] for each in tokens]


class TowerEncoder:
    """A frozen text tower. `forward` maps tokens (B, M) and a mask without padding (B, M) to hidden states (B, M, F).

    Captions of similar lengths are batched; padding is masked, and removed afterwards. In fp32 the features of a caption differ with its
    neighbours by rounding only, in relative terms 1e-6; in bf16 by 1e-2. `vocabulary`: number of token ids; `precision` bf16 is autocast.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        forward: Callable[[Tensor, Tensor], Tensor],
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
        self._network = network
        self._forward = forward
        self._vocabulary = vocabulary
        self._precision = precision
        self.width = self.encode([""])[0].shape[1]

    def to(self, device: torch.device | str) -> None:
        """Move the weights to another device, which `encode` then runs on."""
        self.device = torch.device(device)
        self._network.to(self.device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (M, F) per caption, truncated to `max_tokens` tokens.

        Raises ValueError for a caption without tokens and for an unknown token.
        """
        tokens = self.tokenizer(captions)
        if not all(tokens):
            raise ValueError("the text encoder's tokenizer gives no tokens for the empty caption: choose one with start or end tokens")
        if (largest := max(map(max, tokens), default=0)) >= self._vocabulary:
            raise ValueError(f"token {largest} is beyond the text encoder's vocabulary of {self._vocabulary}: {KEY} is of another model")
        features: dict[int, Tensor] = {}
        for batch in _similar_lengths([len(each) for each in tokens]):
            longest = max(len(tokens[i]) for i in batch)
            lengths = torch.tensor([len(tokens[i]) for i in batch])
            mask = (torch.arange(longest) < lengths[:, None]).long().to(self.device, non_blocking=True)
            ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in batch]).to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                hidden = self._forward(ids, mask).float()
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

    `width`: feature width; `lookup` supports any, other encoders must match it. Raises ValueError for an unknown kind, for a path without
    such an encoder or tokenizer, and if different captions have identical features.
    """
    if max_tokens < 2:
        raise ValueError(f"text.max_tokens {max_tokens}: must be at least 2, for the start and end tokens")
    if kind == "lookup":
        _check_tokenizer_path(kind, tokenizer_path)
        if width is None:
            raise ValueError("text encoder lookup: give the width of its features")
        encoder = LookupEncoder(width=width, max_tokens=max_tokens, device=device)
        _check_distinct(encoder, named="text encoder lookup")
        return encoder
    tokens = tokenizer(kind, path, tokenizer_path=tokenizer_path, max_tokens=max_tokens)
    source = location(kind, path)
    network, forward = _clip_tower(source.folder, max_tokens=max_tokens) if kind == "open_clip" else _transformers_tower(source)
    embedding: Any = network.token_embedding if kind == "open_clip" else network.get_input_embeddings()  # pyright: ignore
    encoder = TowerEncoder(network, forward, tokens, vocabulary=len(embedding.weight), device=device, precision=precision)
    if width not in (None, encoder.width):
        raise ValueError(f"{path}: its features have width {encoder.width}, not {width}: set network.params.cap_feat_dim={encoder.width}")
    _check_distinct(encoder, named=f"text encoder {kind}={path}")
    return encoder


def tokenizer(kind: str, path: str | Path | None = None, *, tokenizer_path: str | Path | None = None, max_tokens: int = 77) -> Tokenizer:
    """The tokenizer of an encoder, truncating to `max_tokens`. Does not load the encoder's weights. Raises ValueError."""
    _check_tokenizer_path(kind, tokenizer_path)
    folder = tokenizer_location(kind, path, tokenizer_path=tokenizer_path)
    return BytePairs(max_tokens=max_tokens) if folder is None else PretrainedTokenizer(folder, max_tokens=max_tokens)


def tokenizer_location(kind: str, path: str | Path | None, *, tokenizer_path: str | Path | None = None) -> Path | None:
    """The folder of an encoder's tokenizer, None for CLIP's, which comes with open_clip. Raises ValueError."""
    encoder = _located(kind, path)
    if kind != "hf" or encoder is None or path is None:
        return None
    return tokenizer_folder(encoder, path=path, tokenizer=tokenizer_path)


def digest(kind: str, path: str | Path, *, tokenizer_path: str | Path | None = None) -> str:
    """sha256 of an encoder's weights and tokenizer. Raises ValueError if there are none."""
    encoder = location(kind, path)
    weights = weight_files.digest(path, parts=PARTS if kind == "hf" else ())
    folder = tokenizer_location(kind, path, tokenizer_path=tokenizer_path)
    if folder is None or (encoder.file is None and folder.resolve() == encoder.folder.resolve()):
        return weights
    return hashlib.sha256(f"{weights} {weight_files.digest(folder, weights=False)}".encode()).hexdigest()


def width(kind: str, path: str | Path | None) -> int:
    """Feature width of an encoder, from the config of its weights. Raises ValueError, also for `lookup`, which has no fixed width."""
    folder = weights_folder(kind, path)
    if folder is None:
        raise ValueError(f"text encoder {kind}: give the width of its features")
    if kind == "open_clip":
        return int(_clip_config(folder).get("width", 512))
    try:
        config = transformers_library().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a model that transformers reads ({one_line(error)})") from error
    return int(config.get_text_config().hidden_size)


def weights_folder(kind: str, path: str | Path | None) -> Path | None:
    """The folder of an encoder's weights, None if it has none. Raises ValueError for an unknown kind or a missing folder."""
    found = _located(kind, path)
    return None if found is None else found.folder


def location(kind: str, path: str | Path | None) -> Location:
    """Location of an encoder's weights. Raises ValueError like `weights_folder`, and for an encoder without weights."""
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
    config = "open_clip_config.json" if kind == "open_clip" else "config.json"
    if not (found.folder / config).is_file():
        raise ValueError(f"{found.folder}: has no {config}, which text encoder {kind} needs")
    return found


def _check_tokenizer_path(kind: str, tokenizer_path: str | Path | None) -> None:
    if tokenizer_path is not None and kind != "hf":
        raise ValueError(f"{KEY}: text encoder {kind} has CLIP's tokenizer: remove it, or use text encoder hf")


def _check_distinct(encoder: TextEncoder, *, named: str) -> None:
    """Raise ValueError if different captions have identical features, or if features are not finite."""
    words = [*dict.fromkeys([*PROBES, *encoder.tokenizer.samples()])]
    first, *others = encoder.encode(words)
    if not all(bool(each.isfinite().all()) for each in (first, *others)):
        raise ValueError(f"{named}: its features are not finite: its weights are damaged, or need text.precision=fp32")
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
        raise ValueError(f"{folder}: not a model that open_clip reads ({one_line(error)})") from error
    tower = getattr(model, "text", model)
    if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        raise ValueError(f"{folder}: its text tower is not causal like CLIP's: use text encoder hf with that tower's weights")
    if max_tokens > tower.positional_embedding.shape[0]:
        raise ValueError(f"{folder}: supports {tower.positional_embedding.shape[0]} tokens, text.max_tokens is {max_tokens}")
    if tower is model:
        model.visual = torch.nn.Identity()  # the image tower is not needed

    def forward(ids: Tensor, mask: Tensor) -> Tensor:  # causal: no token sees the padding behind it
        count = ids.shape[1]
        hidden = tower.token_embedding(ids) + tower.positional_embedding[:count]
        return tower.ln_final(tower.transformer(hidden, attn_mask=tower.attn_mask[:count, :count]))

    return tower, forward


def _clip_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})


def check_weights(kind: str, path: str | Path) -> None:
    """Raise ValueError unless the weights of an encoder have all names and shapes of its config. Kind hf: their values are not read."""
    source = location(kind, path)
    if kind == "open_clip":
        _clip_tower(source.folder, max_tokens=2)
        return
    read_header(weight_files.weights_file(source, stem="model", pickle_stem="pytorch_model"))
    _transformers_network(source, device_map="meta")


def _transformers_tower(source: Location) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    network = _transformers_network(source)
    for part in ("text_model", "language_model"):  # of multimodal models
        network = getattr(network, part, network)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return network(input_ids=ids, attention_mask=mask).last_hidden_state

    return network, forward


def _transformers_network(source: Location, **settings: Any) -> torch.nn.Module:
    """The network in a folder. settings: further arguments of `from_pretrained`. Raises ValueError if it does not fit its config."""
    transformers = transformers_library()
    folder = source.folder
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        is_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # T5 and others, whose decoder is not needed
        kind = transformers.AutoModelForTextEncoding if is_encoder else transformers.AutoModel
        with weight_files.loadable(source, stem="model", pickle_stem="pytorch_model") as (weights, arguments):
            options = {**arguments, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True, **settings}
            network, info = kind.from_pretrained(weights, **options)
    except weight_files.FAILURES as error:
        raise weight_files.failure(source, error, library="transformers") from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: its weights lack {missing[0]}{others}: weights and config are of different models")
    return network


def _similar_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of positions of captions, shortest first: of one bucket of lengths, and at most `BATCH_TOKENS` tokens when padded, or one
    caption."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        is_full = (len(batch) + 1) * lengths[position] > BATCH_TOKENS
        if batch and (is_full or (lengths[position] - 1) // BUCKET > (lengths[batch[0]] - 1) // BUCKET):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
