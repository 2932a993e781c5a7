"""The frozen models that `tim encode` runs, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.planning.config import SizeLimits
from pipeline.size_rule import Crop, SizeRule
from tim.kinds import CodecKind, Precision, TeacherKind, TextKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tim.alignment import AlignmentTeacher
    from tim.codecs import Codec
    from tim.text.encoders import TextEncoder

Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CodecSettings(Settings):
    """As the section `codec` of a training config."""

    kind: CodecKind
    path: str | None = None


class TextSettings(Settings):
    """As the section `text` of a training config; `width` is its network.params.cap_feat_dim, which only `lookup` needs to be told."""

    kind: TextKind
    path: str | None = None
    tokenizer: str | None = None
    width: Count | None = None
    max_tokens: int = Field(default=77, ge=2, le=4096)
    precision: Precision = "fp32"


class TeacherSettings(Settings):
    """As the section `objective.alignment` of a training config, with its train.precision."""

    kind: TeacherKind
    path: str
    precision: Precision = "fp32"


def _as_several(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


class EncodeConfig(SizeLimits):
    """All settings of `tim encode`. The size rule is that of the section `plan` of a training config, for each of `max_tokens`.

    `patch_size` is the network's; `flip` encodes every image mirrored, too; `zstd` compresses, which saves little and costs time to read.
    """

    codec: CodecSettings | None = None
    text: TextSettings | None = None
    teacher: TeacherSettings | None = None
    patch_size: Count = 1
    max_tokens: Annotated[tuple[Count, ...], BeforeValidator(_as_several)] = (1024,)
    flip: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    zstd: bool = False

    @model_validator(mode="after")
    def _check(self) -> EncodeConfig:
        if self.codec is None and self.text is None:
            raise ValueError("nothing to encode: give a codec, a text encoder or both")
        if self.teacher is not None and self.codec is None:
            raise ValueError("teacher: its tokens lie on the codec's grid: give the codec, too")
        if not self.max_tokens:
            raise ValueError("max_tokens: give at least one size")
        return self

    @property
    def rules(self) -> list[SizeRule]:
        """The size rules, none without a codec. Raises ValueError where the codec's geometry is not known."""
        if self.codec is None:
            return []
        from tim import codecs

        stride = codecs.geometry(self.codec.kind, self.codec.path).factor * self.patch_size
        return [self.rule(stride=stride, max_tokens=tokens) for tokens in dict.fromkeys(self.max_tokens)]


def identity(config: EncodeConfig) -> dict[str, Any]:
    """What of the models stands in the manifest: their kinds and digests, and what the reader has to know; no path.

    Raises ValueError for models that cannot be had. Only the teacher is loaded.
    """
    from tim import alignment, codecs
    from tim.pretrained import weight_files
    from tim.text import encoders

    codec = captions = teacher = None
    if (chosen := config.codec) is not None:
        if chosen.kind != "pixel":
            codecs.weights_folder(chosen.kind, chosen.path)
        digest = None if chosen.path is None else codecs.digest(chosen.path)
        codec = {
            "kind": chosen.kind,
            "digest": digest,
            **codecs.geometry(chosen.kind, chosen.path)._asdict(),
            "draws": codecs.is_stochastic(chosen.kind),
        }
    if (words := config.text) is not None:
        width = words.width or encoders.width(words.kind, words.path)
        digest = None if words.path is None else encoders.digest(words.kind, words.path, tokenizer_path=words.tokenizer)
        captions = {"kind": words.kind, "digest": digest, "width": width, "max_tokens": words.max_tokens, "precision": words.precision}
    if (seen := config.teacher) is not None:
        teacher = {
            "kind": seen.kind,
            "digest": weight_files.digest(seen.path),
            "width": alignment.make(seen.kind, seen.path).width,
            "precision": seen.precision,
        }
    return {"codec": codec, "text": captions, "teacher": teacher}


@dataclass(frozen=True, slots=True)
class View:
    """An image at one size: uint8 (3, h, w), what was cut out of it, and whether it is mirrored."""

    crop: Crop
    flipped: bool
    pixels: Tensor


class Encoders:
    """The models of a config, loaded on a device; those that it does not name are None."""

    def __init__(self, config: EncodeConfig, *, device: torch.device) -> None:
        """Raises ValueError for models that cannot be had."""
        import torch

        from tim import alignment, codecs
        from tim.text import encoders

        self.codec: Codec | None = None
        self.text: TextEncoder | None = None
        self.teacher: AlignmentTeacher | None = None
        if (chosen := config.codec) is not None:
            self.codec = codecs.make(chosen.kind, chosen.path, device=device)
        if (words := config.text) is not None:
            settings = {
                "tokenizer_path": words.tokenizer,
                "width": words.width,
                "max_tokens": words.max_tokens,
                "precision": words.precision,
            }
            self.text = encoders.make(words.kind, words.path, device=device, **settings)
        if (seen := config.teacher) is not None:
            self.teacher = alignment.make(seen.kind, seen.path, device=device, precision=seen.precision)
        self._patch_size = config.patch_size
        self._dtype: torch.dtype = getattr(torch, config.dtype)

    def pictures(self, views: Sequence[View]) -> list[dict[str, Tensor]]:
        """What a feature shard has of each view: its latent, its deviation where the codec draws, and what a teacher sees."""
        from pipeline.features.tensors import latent_name, tokens_name

        if not views:
            return []
        assert self.codec is not None, "views have the sizes of a codec's rules"
        images = [view.pixels for view in views]
        means, deviations = self.codec.latents(images)
        found = [{latent_name(view.crop, flipped=view.flipped): mean} for view, mean in zip(views, means, strict=True)]
        for each, view, spread in zip(found, views, deviations or [], strict=False):
            each[latent_name(view.crop, flipped=view.flipped, deviation=True)] = spread
        if self.teacher is not None:
            stride = self.codec.factor * self._patch_size
            grids = [(image.shape[1] // stride, image.shape[2] // stride) for image in images]
            tokens = self.teacher.tokens(images, grids).split([rows * columns for rows, columns in grids])
            for each, view, seen in zip(found, views, tokens, strict=True):
                each[tokens_name(view.crop, flipped=view.flipped)] = seen
        return [self._stored(each) for each in found]

    def captions(self, captions: Sequence[str]) -> list[Tensor]:
        """The features of each caption."""
        assert self.text is not None
        unlike = [*dict.fromkeys(captions)]
        if not unlike:
            return []
        encoded = dict(zip(unlike, self.text.encode(unlike), strict=True))
        stored = self._stored(encoded)
        return [stored[caption] for caption in captions]

    def cut(self, captions: Sequence[str]) -> int:
        """How many of these captions are longer than the text encoder reads."""
        return 0 if self.text is None else sum(length > self.text.max_tokens for length in self.text.tokenizer.lengths(captions))

    def _stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU in the dtype of the shards. Raises ValueError where that cannot hold a value."""
        stored = {name: tensor.to(self._dtype).cpu() for name, tensor in tensors.items()}
        for name, tensor in stored.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name!r}: a feature does not fit into {str(self._dtype).removeprefix('torch.')}: use dtype=bfloat16")
        return stored
