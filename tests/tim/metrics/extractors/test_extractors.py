"""Extractors give the features of the libraries whose networks they run, for images of mixed sizes, from files that are only data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tests.tim.metrics.extractors.towers import Payload, dinov2, inception, noise, transformers_clip
from tests.tim.models import clip
from tim.metrics.clip_score import clip_scores
from tim.metrics.extractors import as_clip, make_extractor

SIZES = ((32, 32), (96, 24), (40, 64), (32, 32))


def test_pixels_are_colours_and_edges_whatever_the_size() -> None:
    extractor = make_extractor("pixels", device="cpu")
    image = noise((32, 32))[0]
    features = extractor([image, image.resize((96, 64), Image.Resampling.NEAREST), image.filter(ImageFilter.BoxBlur(3))])
    assert features.shape == (3, extractor.width)
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=0.01)
    colours, edges = features[:, :192], features[:, 192:]
    assert bool((edges[2] < 0.5 * edges[0]).all())
    assert abs(float(colours[0].mean() - colours[2].mean())) < 0.01
    (flat,) = extractor([Image.new("RGB", (50, 20), (255, 0, 51))])
    assert flat.tolist() == pytest.approx([1.0] * 64 + [0.0] * 64 + [0.2] * 64 + [0.0] * 32)


def test_inception_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = inception(tmp_path / "weights.pth", monkeypatch)
    extractor = make_extractor(f"inception={tmp_path / 'weights.pth'}", device="cpu", batch=2)
    images = noise((64, 48), (32, 32), (64, 48), (64, 48))
    with torch.no_grad():
        expected = torch.cat([network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0] for image in images])
    assert extractor.kind == "inception"
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std(0).mean()) > 1e-3


@pytest.mark.parametrize("form", ["folder", "file"])
def test_open_clip_is_that_of_the_library(form: str, tmp_path: Path) -> None:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    folder = clip(tmp_path / "tiny-clip")
    if form == "file":
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-clip.json")
    name = f"local-dir:{folder}" if form == "folder" else "tiny-clip"
    file = None if form == "folder" else str(folder / "open_clip_model.safetensors")
    model: Any = open_clip.create_model(name, pretrained=file)
    model.eval()
    preprocess: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    extractor = as_clip(make_extractor(f"open_clip={folder}" if form == "folder" else f"open_clip={name}:{file}", device="cpu", batch=3))
    images = noise((32, 32), (64, 64), (32, 32), (80, 80))
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(image) for image in images]))
        texts = model.encode_text(open_clip.get_tokenizer(name)(["a red image", "blue"]))
    assert (extractor.kind, extractor.width) == ("clip", 32)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.texts(["a red image", "blue"]), texts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_transformers_clip_is_that_of_the_library(kind: str, tmp_path: Path) -> None:
    import transformers

    folder = transformers_clip(tmp_path / "model", kind=kind)
    extractor = as_clip(make_extractor(f"hf={folder}", device="cpu", batch=2))
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    images, texts = noise((32, 32), (64, 64), (80, 80)), ["a red image", "the", "a a a a a a a a a a a"]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens, pixel_values=processor(images=images, return_tensors="pt")["pixel_values"])
    assert extractor.kind == kind.lower()
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(extractor(images), found.image_embeds), torch.ones(3), rtol=0, atol=1e-5)  # theirs have unit length
    torch.testing.assert_close(cosine(extractor.texts(texts), found.text_embeds), torch.ones(3), rtol=0, atol=1e-5)
    expected = 100 * (found.image_embeds * found.text_embeds).sum(1).clamp(min=0)
    torch.testing.assert_close(clip_scores(extractor, images, texts), expected, rtol=1e-4, atol=1e-4)


def test_dinov2_is_its_class_token(tmp_path: Path) -> None:
    import transformers

    extractor = make_extractor(f"hf={dinov2(tmp_path / 'model')}", device="cpu")
    model: Any = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    processor: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    images = noise((28, 28), (28, 28))
    pixels = processor(images=images, return_tensors="pt", do_resize=False)["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
    assert (extractor.kind, extractor.width) == ("dinov2", 16)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="CLIP score needs a model of images and texts, not dinov2"):
        as_clip(extractor)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"open_clip": clip(root / "clip"), "hf": dinov2(root / "dinov2")}


@pytest.mark.parametrize("kind", ["pixels", "open_clip", "hf"])
def test_features_depend_on_the_image_alone(kind: str, folders: dict[str, Path]) -> None:
    text = kind if kind == "pixels" else f"{kind}={folders[kind]}"
    extractor = make_extractor(text, device="cpu", batch=3)
    images = noise(*SIZES)
    together = extractor(images)
    assert together.shape == (4, extractor.width)
    assert together.dtype == torch.float32
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(extractor([image])[0], features, rtol=1e-4, atol=1e-5)
    assert extractor([]).shape == (0, extractor.width)
    assert torch.equal(extractor([images[0].convert("L")]), extractor([images[0].convert("L").convert("RGB")]))


@pytest.mark.parametrize("kind", ["pixels", "open_clip", "hf"])
def test_all_of_a_wide_image_is_seen(kind: str, folders: dict[str, Path]) -> None:
    extractor = make_extractor(kind if kind == "pixels" else f"{kind}={folders[kind]}", device="cpu")
    image = noise((128, 32))[0]
    changed = image.copy()
    changed.paste((255, 0, 0), (112, 0, 128, 32))
    first, second = extractor([image, changed])
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["open_clip", "hf"])
def test_a_digest_is_of_weights_and_preprocessing(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return make_extractor(f"{kind}={folder}", device="cpu").digest

    other = shutil.copytree(folders[kind], tmp_path / "elsewhere")
    assert digest(other) == digest(folders[kind])
    settings = other / ("open_clip_config.json" if kind == "open_clip" else "preprocessor_config.json")
    content = json.loads(settings.read_text())
    (content["preprocess_cfg"] if kind == "open_clip" else content).update({"mean": [0.4] * 3, "image_mean": [0.4] * 3})
    settings.write_text(json.dumps({**content} if kind == "hf" else {**content, "preprocess_cfg": {"mean": [0.4] * 3}}))
    assert digest(other) != digest(folders[kind])


def test_code_in_weights_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folders["hf"], folder)
    (folder / "model.safetensors").unlink()
    clip_folder = shutil.copytree(folders["open_clip"], tmp_path / "clip")
    (clip_folder / "open_clip_model.safetensors").unlink()
    files = (tmp_path / "inception.pth", folder / "pytorch_model.bin", clip_folder / "open_clip_pytorch_model.bin", tmp_path / "w.pt")
    for file in files:
        torch.save({"weight": Payload(ran)}, file)
    for text in (f"inception={files[0]}", f"hf={folder}", f"open_clip={clip_folder}", f"open_clip=ViT-S-32-alt:{files[3]}"):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            make_extractor(text, device="cpu")
        assert not ran.exists()
    torch.load(files[0], weights_only=False)  # the payload works
    assert ran.exists()


def test_what_cannot_be_had_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for text, said in (
        ("inception", "expected pixels, inception=FILE"),
        ("vgg=x", "expected pixels, inception=FILE"),
        ("pixels=x", "expected pixels, inception=FILE"),
        (f"inception={tmp_path / 'none.pth'}", r"no such file; bring https://"),
        (f"inception={tmp_path / 'other.pth'}", r"other\.pth: not the weights of FID's Inception v3"),
        (f"open_clip={tmp_path / 'none'}", "no such folder; give a folder with open_clip_config.json"),
        (f"open_clip={folders['hf']}", "not an open_clip folder"),
        ("open_clip=ViT-Q:x", "ViT-Q is not an architecture of open_clip"),
        ("open_clip=ViT-B-32:none.pt", "none.pt: no such file with weights of ViT-B-32"),
        (f"hf={tmp_path / 'none'}", "no such folder"),
        (f"hf={folders['open_clip']}", "not a model that transformers reads"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            make_extractor(text, device="cpu")
        assert "\n" not in str(caught.value)
    folder = shutil.copytree(folders["hf"], tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        make_extractor(f"hf={folder}", device="cpu")
