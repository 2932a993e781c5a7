"""An open_clip model that looks at images and texts, and what is computed from its embeddings: torch and open_clip come in here alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from pipeline.errors import one_line
from pipeline.images import Pixels

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16"]
HUB = "hf-hub:"
_CONFIG = "open_clip_config.json"


class Clip:
    """A model with its preprocessing and its tokenizer.

    Args:
        model: a folder with open_clip_config.json and weights, `hf-hub:ORG/NAME`, or the name of an architecture that open_clip knows.
        weights: for such an architecture: a file, or the tag of published ones.
        device: as torch calls it; None for a GPU if there is one.

    Raises ValueError for an unknown model, and RuntimeError, naming the file to bring, where it cannot be loaded.
    """

    def __init__(self, model: str, *, weights: str | None = None, precision: Precision = "fp32", device: str | None = None) -> None:
        import open_clip
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        name, to_bring = _resolve(model, weights=weights)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._model: Any = open_clip.create_model(
                name, pretrained=weights, precision=precision, device=self.device, require_pretrained=True
            ).eval()
            self._tokenize: Any = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, the hub and the network raise what they like
            raise RuntimeError(f"model {model} cannot be loaded ({one_line(error)}): {to_bring}") from error
        facts = PreprocessCfg(**self._model.visual.preprocess_cfg)
        self.size: int = max(facts.size) if isinstance(facts.size, (tuple, list)) else facts.size
        """Pixels of the longer side that the model looks at."""
        self._transform: Any = image_transform_v2(facts, is_train=False)
        self._dtype = open_clip.get_input_dtype(precision) or torch.float32

    @property
    def scale(self) -> float:
        """What similarities are multiplied with before a softmax."""
        return float(self._model.logit_scale.detach().exp())

    def preprocess(self, pixels: Pixels) -> Tensor:
        """(H, W, 3) uint8 → (3, size, size), as open_clip does it. Safe in threads."""
        return self._transform(Image.fromarray(pixels))

    def encode_images(self, pictures: Sequence[Tensor]) -> Tensor:
        """Preprocessed images → embeddings of length 1: (B, D) float32."""
        import torch

        with torch.inference_mode():
            batch = torch.stack(list(pictures)).to(self.device, self._dtype)
            return torch.nn.functional.normalize(self._model.encode_image(batch).float(), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut at the model's length → embeddings of length 1: (B, D) float32."""
        import torch

        with torch.inference_mode():
            tokens = self._tokenize(list(texts)).to(self.device)
            return torch.nn.functional.normalize(self._model.encode_text(tokens).float(), dim=-1)


class Head:
    """Linear layers without anything between them, from a file: an aesthetic predictor as LAION publishes them.

    Raises ValueError if the file is not of this kind.
    """

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
            raise ValueError(f"aesthetic: {file} is no chain of linear layers that ends in one number")
        self.width = widths[0][1]

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(B, D) of length 1 → (B,). Raises ValueError if it was trained on embeddings of another width."""
        if embeddings.shape[1] != self.width:
            raise ValueError(
                f"aesthetic: {self.file} is for embeddings of {self.width} numbers, the model gives {embeddings.shape[1]}: "
                "use the model that it was trained with"
            )
        for weight, bias in self._layers:
            embeddings = embeddings @ weight.T + bias
        return embeddings[:, 0]


def probability(pictures: Tensor, *, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Zero-shot: (B, D) images against (P, D) and (N, D) texts → (B,), the softmax over all texts summed over the positive ones."""
    import torch

    logits = scale * pictures @ torch.cat([positive, negative]).T
    return logits.softmax(dim=-1)[:, : len(positive)].sum(dim=-1)


def model_file(model: str, *, weights: str | None) -> Path | None:
    """The local file that holds the model's weights; None where they come from the hub."""
    if Path(model).is_dir():
        return next(iter(sorted(Path(model).glob("open_clip*model*"))), None)
    return Path(weights) if weights is not None and Path(weights).is_file() else None


def _resolve(model: str, *, weights: str | None) -> tuple[str, str]:
    """open_clip's name of a model, and what to bring where it cannot be loaded."""
    import open_clip

    if Path(model).is_dir():
        if not (Path(model) / _CONFIG).is_file() or model_file(model, weights=None) is None:
            raise ValueError(f"model {model}: is no folder of open_clip: it needs {_CONFIG} and open_clip_model.safetensors beside it")
        return f"local-dir:{model}", "bring the files of this model again"
    if model.startswith(HUB):
        files = f"{_CONFIG}, open_clip_model.safetensors and the tokenizer's files"
        page = f"https://huggingface.co/{model.removeprefix(HUB)}"
        return model, f"without the network, bring {files} of {page} in a folder, and give it as model=FOLDER"
    if model not in open_clip.list_models():
        raise ValueError(f"model {model}: is no folder, no {HUB}ORG/NAME and no architecture of open_clip such as ViT-B-32")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is None:
        raise ValueError(
            f"model {model}: without weights it knows nothing: give weights=FILE, or a tag ({', '.join(tags) or 'it has none'})"
        )
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
