"""Text encoders: captions to feature sequences of their own lengths, never padded.

| kind | what it is |
| --- | --- |
| lookup | a frozen table of random embeddings; no weights |
| open_clip | the text tower of a CLIP (open_clip's folder), one feature a token, after its last norm |
| hf | any text encoder or language model of transformers (T5, Gemma, BERT, …): its last hidden states |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tim.byte_pairs import simple_tokenizer
from tim.pretrained import HUB, in_words, local_folder

BATCH_TOKENS = 16384  # that go through a tower at once
Tokenize = Callable[[Sequence[str]], list[list[int]]]


class TextEncoder(Protocol):
    """Captions to features. `width` is that of a feature."""

    width: int
    max_tokens: int

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
        self._tokenize = _byte_pairs(max_tokens)
        generator = torch.Generator().manual_seed(self.SEED)
        self._table = torch.randn(simple_tokenizer().vocab_size, width, generator=generator).to(device)
        self._positions = (self.POSITION_SCALE * torch.randn(max_tokens, width, generator=generator)).to(device)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (M, F) of every caption; tokens beyond `max_tokens` are cut off, the end token stays."""
        tokens = [torch.tensor(each, device=self._table.device) for each in self._tokenize(captions)]
        return [self._table[each] + self._positions[: len(each)] for each in tokens]


class TowerEncoder:
    """A frozen text tower. `read` takes tokens (B, M) and which of them are not padding (B, M) to hidden states (B, M, F).

    Captions of like lengths go through together; what a caption is padded with is cut off again. `precision` bf16 is autocast.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        read: Callable[[Tensor, Tensor], Tensor],
        tokenize: Tokenize,
        *,
        max_tokens: int,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        network.to(device, torch.float32).eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self._read = read
        self._tokenize = tokenize
        self._precision = precision
        self.width = self.encode([""])[0].shape[1]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (M, F) of every caption; tokens beyond `max_tokens` are cut off. Raises ValueError where a caption has no token."""
        tokens = self._tokenize(captions)
        if not all(tokens):
            raise ValueError("the text encoder's tokenizer makes nothing of the empty caption: choose one with start or end tokens")
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


TEXT_ENCODERS = ("lookup", "open_clip", "hf")


def make(
    kind: str,
    path: str | Path | None = None,
    *,
    width: int | None = None,
    max_tokens: int = 77,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> TextEncoder:
    """A text encoder by name, with the weights at `path`: a folder, or hf://OWNER/NAME.

    `width` is that of the features: `lookup` makes them as wide as one likes, the others are refused if they are of another width.
    Raises ValueError for an unknown kind, and naming the path that holds no such encoder.
    """
    if max_tokens < 2:
        raise ValueError(f"text.max_tokens {max_tokens}: the start and end tokens alone are 2")
    if kind == "lookup":
        if width is None:
            raise ValueError("text encoder lookup: give the width of its features")
        return LookupEncoder(width=width, max_tokens=max_tokens, device=device)
    folder = weights_folder(kind, path)
    assert folder is not None
    network, read = _clip_tower(folder, max_tokens=max_tokens) if kind == "open_clip" else _transformers_tower(folder)
    tokenize = tokenizer(kind, path, max_tokens=max_tokens)
    encoder = TowerEncoder(network, read, tokenize, max_tokens=max_tokens, device=device, precision=precision)
    if width not in (None, encoder.width):
        raise ValueError(f"{path}: its features are {encoder.width} wide, not {width}: give network.params.cap_feat_dim={encoder.width}")
    return encoder


def tokenizer(kind: str, path: str | Path | None = None, *, max_tokens: int = 77) -> Tokenize:
    """How an encoder cuts captions into tokens, at most `max_tokens` each; for it alone the weights are not loaded. Raises ValueError."""
    folder = weights_folder(kind, path)
    if kind != "hf":
        return _byte_pairs(max_tokens)
    transformers = _transformers()
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: has no tokenizer that transformers reads ({in_words(error)})") from error

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return [list(each) for each in found(list(captions), truncation=True, max_length=max_tokens)["input_ids"]]

    return tokenize


def width(kind: str, path: str | Path | None) -> int:
    """How wide an encoder's features are, by what stands beside its weights. Raises ValueError; `lookup` has no width of its own."""
    folder = weights_folder(kind, path)
    if folder is None:
        raise ValueError(f"text encoder {kind}: give the width of its features")
    if kind == "open_clip":
        return int(_clip_config(folder).get("width", 512))
    try:
        config = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a model that transformers reads ({in_words(error)})") from error
    return int(config.get_text_config().hidden_size)


def weights_folder(kind: str, path: str | Path | None) -> Path | None:
    """The folder of an encoder's weights, None where it needs none. Raises ValueError for an unknown kind, or where there is no folder."""
    if kind not in TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {kind!r}: choose one of {', '.join(TEXT_ENCODERS)}")
    if kind == "lookup":
        return None
    if path is None:
        raise ValueError(f"text encoder {kind} needs its weights: give its path, a folder or {HUB}OWNER/NAME")
    folder = local_folder(path)
    wanted = "open_clip_config.json" if kind == "open_clip" else "config.json"
    if not (folder / wanted).is_file():
        raise ValueError(f"{folder}: has no {wanted}, which text encoder {kind} needs beside its weights")
    return folder


def _byte_pairs(max_tokens: int) -> Tokenize:
    """CLIP's tokens, between a start and an end token."""
    pairs = simple_tokenizer()

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return [[pairs.sot_token_id, *pairs.encode(caption)[: max_tokens - 2], pairs.eot_token_id] for caption in captions]

    return tokenize


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


def _transformers_tower(folder: Path) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    transformers = _transformers()
    how = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **how)
        is_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # T5 and others, whose decoder is not needed
        kind = transformers.AutoModelForTextEncoding if is_encoder else transformers.AutoModel
        network, said = kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **how)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a model that transformers reads ({in_words(error)})") from error
    missing = sorted(name for name in said["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"{folder}: its weights lack {missing[0]} and {len(missing) - 1} more: they are of another model than its config")
    for part in ("text_model", "language_model"):  # of models that see pictures, too
        network = getattr(network, part, network)

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        return network(input_ids=ids, attention_mask=mask).last_hidden_state

    return network, read


def _transformers() -> Any:
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("text encoder hf needs transformers: pip install 'tim[latent]'") from None
    return transformers


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
