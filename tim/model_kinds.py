"""Names of the model's variants, as configurations give them. Imports no torch."""

from __future__ import annotations

from typing import Literal

AttentionChoice = Literal["auto", "varlen", "flash", "flex", "sdpa"]
CodecKind = Literal["pixel", "sd-vae", "sd3-vae", "flux-vae", "flux2-vae", "kl", "dc-ae", "tiny"]
Derivative = Literal["finite-difference", "jvp"]
Dtype = Literal["fp32", "bf16", "fp16"]
NewCondition = Literal["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"]
Precision = Literal["fp32", "bf16"]
RopeLayout = Literal["rowcol", "centred", "legacy"]
TeacherKind = Literal["radio", "dinov2", "open_clip"]
TextKind = Literal["lookup", "open_clip", "hf"]
TransportKind = Literal["ot_fm", "trigflow", "vp", "ve", "edm"]
Weighting = Literal["tangent", "none"]

# What a command takes as a model (`launch.model_place.locate_model`), for help and errors.
MODEL_FORMS = (
    "a model folder, a run folder, a checkpoint of a run, an export of tim export --official, a weight file, or "
    "hf://OWNER/NAME[@REVISION][/FOLDER]"
)
