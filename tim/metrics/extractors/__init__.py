"""Extractors: images of any size to features, one row an image.

| text | features | weights |
| --- | --- | --- |
| `pixels` | colours and edges of a small thumbnail: a coarse check | none |
| `inception=FILE` | Inception v3 of FID, pooled, 2048 wide | torch-fidelity's file |
| `open_clip=FOLDER`, `open_clip=ARCHITECTURE:FILE` | embeddings of a CLIP of open_clip | a folder, or a file |
| `hf=FOLDER` | embeddings of a model of transformers: CLIP, SigLIP, DINOv2 and others | a folder of `save_pretrained` |

All but `pixels` resize an image by the network's own preprocessing to the square that it was trained on; `Extractor.preprocessing` says
how. Detail beyond that size, usually 224 to 299 pixels a side, is not measured.
"""

from tim.metrics.extractors.base import ClipExtractor, Extractor
from tim.metrics.extractors.make import as_clip, make_extractor

__all__ = ["ClipExtractor", "Extractor", "as_clip", "make_extractor"]
