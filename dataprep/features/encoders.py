"""The frozen models that `tim encode` runs, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.planning.config import SizeLimits
from pipeline.size_rule import Crop, SizeRule
from tim.model_kinds import CodecKind, Precision, TeacherKind, TextKind

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
    """Same as the section `codec` of a training config."""

    kind: CodecKind
    path: str | None = None
    channels: Literal[1, 3, 4] | None = None
    memory_gb: float | None = Field(default=None, gt=0)


class TextSettings(Settings):
    """Same as the section `text` of a training config. `width`: its network.params.cap_feat_dim, required for `lookup` only."""

    kind: TextKind
    path: str | None = None
    tokenizer: str | None = None
    width: Count | None = None
    max_tokens: int = Field(default=77, ge=2, le=4096)
    precision: Precision = "fp32"


class TeacherSettings(Settings):
    """Same as the section `objective.alignment` of a training config, with its train.precision."""

    kind: TeacherKind
    path: str
    precision: Precision = "fp32"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


class EncodeConfig(SizeLimits):
    """All settings of `tim encode`. Each of `max_tokens` gives a size rule as in the section `plan` of a training config.

    `patch_size`: that of the network. `flip`: also encode every image mirrored. `zstd`: compress, which saves little and slows reading.
    """

    codec: CodecSettings | None = None
    text: TextSettings | None = None
    teacher: TeacherSettings | None = None
    patch_size: Count = 1
    max_tokens: Annotated[tuple[Count, ...], BeforeValidator(_as_tuple)] = (1024,)
    flip: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    zstd: bool = False

    @model_validator(mode="after")
    def _check(self) -> EncodeConfig:
        if self.codec is None and self.text is None:
            raise ValueError("nothing to encode: give a codec, a text encoder or both (--for CONFIG, --codec KIND or --text KIND)")
        if self.teacher is not None and self.codec is None:
            raise ValueError("teacher: its tokens are on the codec's grid: give the codec, too")
        if not self.max_tokens:
            raise ValueError("max_tokens: give at least one size")
        return self

    @property
    def rules(self) -> list[SizeRule]:
        """The size rules; none without a codec. Raises ValueError if the codec's geometry is unknown."""
        if self.codec is None:
            return []
        from tim import codecs

        stride = codecs.geometry(self.codec.kind, self.codec.path, channels=self.codec.channels).factor * self.patch_size
        return [self.rule(stride=stride, max_tokens=tokens) for tokens in dict.fromkeys(self.max_tokens)]


def identity(config: EncodeConfig) -> dict[str, Any]:
    """The manifest's entries on the models: kinds, digests, and what readers need; no paths.

    Raises ValueError for models that are not available. Only the teacher is loaded.
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
            **codecs.geometry(chosen.kind, chosen.path, channels=chosen.channels)._asdict(),
            "draws": codecs.is_stochastic(chosen.kind),
        }
    if (text := config.text) is not None:
        width = text.width or encoders.width(text.kind, text.path)
        digest = None if text.path is None else encoders.digest(text.kind, text.path, tokenizer_path=text.tokenizer)
        captions = {"kind": text.kind, "digest": digest, "width": width, "max_tokens": text.max_tokens, "precision": text.precision}
    if (teacher_settings := config.teacher) is not None:
        teacher = {
            "kind": teacher_settings.kind,
            "digest": weight_files.digest(teacher_settings.path),
            "width": alignment.make(teacher_settings.kind, teacher_settings.path).width,
            "precision": teacher_settings.precision,
        }
    return {"codec": codec, "text": captions, "teacher": teacher}


@dataclass(frozen=True, slots=True)
class View:
    """An image at one size: its crop, whether it is mirrored, and its pixels, uint8 (3, h, w)."""

    crop: Crop
    flipped: bool
    pixels: Tensor


class Encoders:
    """The models of a config, loaded on a device. Models that the config does not name are None."""

    def __init__(self, config: EncodeConfig, *, device: torch.device) -> None:
        """Raises ValueError for models that are not available."""
        import torch

        from tim import alignment, codecs
        from tim.text import encoders

        self.codec: Codec | None = None
        self.text: TextEncoder | None = None
        self.teacher: AlignmentTeacher | None = None
        if (chosen := config.codec) is not None:
            self.codec = codecs.make(chosen.kind, chosen.path, channels=chosen.channels, device=device, memory_gb=chosen.memory_gb)
        if (text := config.text) is not None:
            settings = {
                "tokenizer_path": text.tokenizer,
                "width": text.width,
                "max_tokens": text.max_tokens,
                "precision": text.precision,
            }
            self.text = encoders.make(text.kind, text.path, device=device, **settings)
        if (teacher_settings := config.teacher) is not None:
            self.teacher = alignment.make(teacher_settings.kind, teacher_settings.path, device=device, precision=teacher_settings.precision)
        self._patch_size = config.patch_size
        self._dtype: torch.dtype = getattr(torch, config.dtype)

    def images(self, views: Sequence[View]) -> list[dict[str, Tensor]]:
        """The tensors of each view: its latent, the deviation if the codec is stochastic, and the teacher's tokens."""
        from pipeline.features.tensors import latent_name, tokens_name

        if not views:
            return []
        assert self.codec is not None, "views have the sizes of a codec's rules"
        images = [view.pixels for view in views]
        means, deviations = self.codec.encode(images)
        found = [{latent_name(view.crop, flipped=view.flipped): mean} for view, mean in zip(views, means, strict=True)]
        for each, view, spread in zip(found, views, deviations or [], strict=False):
            each[latent_name(view.crop, flipped=view.flipped, deviation=True)] = spread
        if self.teacher is not None:
            stride = self.codec.factor * self._patch_size
            grids = [(image.shape[1] // stride, image.shape[2] // stride) for image in images]
            tokens = self.teacher.tokens(images, grids).split([rows * columns for rows, columns in grids])
            for each, view, own in zip(found, views, tokens, strict=True):
                each[tokens_name(view.crop, flipped=view.flipped)] = own
        return [self._stored(each) for each in found]

    def captions(self, captions: Sequence[str]) -> list[Tensor]:
        """The features of each caption."""
        assert self.text is not None
        distinct = [*dict.fromkeys(captions)]
        if not distinct:
            return []
        encoded = dict(zip(distinct, self.text.encode(distinct), strict=True))
        stored = self._stored(encoded)
        return [stored[caption] for caption in captions]

    def count_cut(self, captions: Sequence[str]) -> int:
        """Number of captions longer than the text encoder's limit."""
        return 0 if self.text is None else sum(length > self.text.max_tokens for length in self.text.tokenizer.lengths(captions))

    def _stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move to the CPU, in the dtype of the shards. Raises ValueError for a value out of its range."""
        stored = {name: tensor.to(self._dtype).cpu() for name, tensor in tensors.items()}
        for name, tensor in stored.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name!r}: a feature does not fit into {str(self._dtype).removeprefix('torch.')}: use dtype=bfloat16")
        return stored
