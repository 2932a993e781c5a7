"""An open_clip model, and scores computed from its embeddings. The only module of `tim score` that imports open_clip."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline.errors import one_line
from pipeline.images import Pixels
from tim.model_kinds import Dtype

if TYPE_CHECKING:
    from torch import Tensor

HUB = "hf-hub:"
_CONFIG = "open_clip_config.json"


class Clip:
    """An open_clip model with its preprocessing and tokenizer.

    Args:
        model: a folder with open_clip_config.json and weights, `hf-hub:ORG/NAME`, or the name of an open_clip architecture.
        weights: for an architecture: a file, or the tag of published weights.
        device: a torch device; None for a GPU if there is one.

    Raises ValueError for an unknown model, and RuntimeError, with the file to provide, if it cannot be loaded.
    """

    def __init__(self, model: str, *, weights: str | None = None, precision: Dtype = "fp32", device: str | None = None) -> None:
        import open_clip
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        name, remedy = _resolve(model, weights=weights)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._model: Any = open_clip.create_model(
                name, pretrained=weights, precision=precision, device=self.device, require_pretrained=True
            ).eval()
            self._tokenize: Any = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, the hub and the network raise many types
            raise RuntimeError(f"model {model} cannot be loaded ({one_line(error)}): {remedy}") from error
        facts = PreprocessCfg(**self._model.visual.preprocess_cfg)
        self.size: int = max(facts.size) if isinstance(facts.size, (tuple, list)) else facts.size
        """Longer side of the model's input, in pixels."""
        self._transform: Any = image_transform_v2(facts, is_train=False)
        self._dtype = open_clip.get_input_dtype(precision) or torch.float32

    @property
    def scale(self) -> float:
        """Factor of similarities before a softmax."""
        return float(self._model.logit_scale.detach().exp())

    def preprocess(self, pixels: Pixels) -> Tensor:
        """(H, W, 3) uint8 → (3, size, size), by open_clip's transform. Thread-safe."""
        return self._transform(Image.fromarray(pixels))

    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        """Preprocessed images → normalized embeddings (B, D) float32."""
        import torch

        with torch.inference_mode():
            batch = torch.stack(list(images)).to(self.device, self._dtype)
            return torch.nn.functional.normalize(self._model.encode_image(batch).float(), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut at the model's length → normalized embeddings (B, D) float32."""
        import torch

        with torch.inference_mode():
            tokens = self._tokenize(list(texts)).to(self.device)
            return torch.nn.functional.normalize(self._model.encode_text(tokens).float(), dim=-1)


class Head:
    """A chain of linear layers from a file, such as LAION's aesthetic predictors. Raises ValueError for other files."""

    def __init__(self, file: Path, *, device: Any) -> None:
        self.file = file
        try:
            state = _read_state(file)
        except Exception as error:  # each reader raises its own
            raise ValueError(f"aesthetic: {file} cannot be read ({one_line(error)}): give a head's weights (.safetensors, .pth)") from error
        names = sorted((name for name in state if name.endswith("weight")), key=_layer_number)
        self._layers = [(state[name].float().to(device), _bias(state, name, device=device)) for name in names]
        widths = [tuple(weight.shape) for weight, _ in self._layers]
        is_linear = bool(widths) and all(len(shape) == 2 for shape in widths)
        if not is_linear or widths[-1][0] != 1 or any(after[1] != before[0] for before, after in pairwise(widths)):
            raise ValueError(f"aesthetic: {file} is not a chain of linear layers with one output")
        self.width = widths[0][1]

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Normalized (B, D) → (B,). Raises ValueError if the head was trained on embeddings of another width."""
        if embeddings.shape[1] != self.width:
            raise ValueError(
                f"aesthetic: {self.file} is for embeddings of {self.width} numbers, the model gives {embeddings.shape[1]}: "
                "use the model that it was trained with"
            )
        for weight, bias in self._layers:
            embeddings = embeddings @ weight.T + bias
        return embeddings[:, 0]


def probability(images: Tensor, *, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Zero-shot: (B, D) images against (P, D) and (N, D) texts → (B,), the softmax over all texts summed over the positive ones."""
    import torch

    logits = scale * images @ torch.cat([positive, negative]).T
    return logits.softmax(dim=-1)[:, : len(positive)].sum(dim=-1)


def model_file(model: str, *, weights: str | None) -> Path | None:
    """The local file with the model's weights; None if they come from the hub."""
    if Path(model).is_dir():
        return next(iter(sorted(Path(model).glob("open_clip*model*"))), None)
    return Path(weights) if weights is not None and Path(weights).is_file() else None


def _resolve(model: str, *, weights: str | None) -> tuple[str, str]:
    """(open_clip's name of a model, remedy if it cannot be loaded)"""
    import open_clip

    if Path(model).is_dir():
        if not (Path(model) / _CONFIG).is_file() or model_file(model, weights=None) is None:
            raise ValueError(f"model {model}: is not an open_clip folder: it needs {_CONFIG} and open_clip_model.safetensors beside it")
        return f"local-dir:{model}", "bring the files of this model again"
    if model.startswith(HUB):
        files = f"{_CONFIG}, open_clip_model.safetensors and the tokenizer's files"
        page = f"https://huggingface.co/{model.removeprefix(HUB)}"
        return model, f"without the network, bring {files} of {page} in a folder, and give it as model=FOLDER"
    if model not in open_clip.list_models():
        raise ValueError(f"model {model}: is neither a folder, {HUB}ORG/NAME nor an open_clip architecture such as ViT-B-32")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is None:
        raise ValueError(f"model {model}: needs weights: give weights=FILE, or a tag ({', '.join(tags) or 'it has none'})")
    if Path(weights).is_file():
        return model, "are these the weights of this architecture?"
    if weights not in tags:
        raise ValueError(f"weights {weights}: there is no such file, and the tags of {model} are {', '.join(tags) or 'none'}")
    published = open_clip.get_pretrained_cfg(model, weights)
    hub, url = published.get("hf_hub", ""), published.get("url", "")
    repository, _, file = hub.rpartition("/")
    where = f"{file or 'open_clip_model.safetensors'} of https://huggingface.co/{repository}" if hub else url
    return model, f"without the network, bring {where} and give it as weights=FILE"


def _read_state(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _layer_number(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _bias(state: dict[str, Any], weight: str, *, device: Any) -> Any:
    found = state.get(weight.removesuffix("weight") + "bias")
    return 0.0 if found is None else found.float().to(device)
