"""Copies are found among unrelated images, which are not taken for copies."""

from __future__ import annotations

import pytest
import torch

from tests.tim.metrics.extractors.towers import noise
from tests.tim.metrics.features import features
from tim.metrics import memorised
from tim.metrics.extractors import make_extractor
from tim.metrics.memorised import copies, nearest

WIDTH = 16
TRAINING = features(3000, WIDTH, seed=0, shift=5.0)  # far from the origin: plain cosines are all near 1


def test_nearest_is_that_of_all_pairs_whatever_the_block() -> None:
    generated = features(50, WIDTH, seed=1, shift=5.0)
    centred = [torch.nn.functional.normalize(each - TRAINING.mean(0), dim=1) for each in (generated, TRAINING)]
    expected = (centred[0] @ centred[1].T).max(dim=1)
    for block in (7, 4096):
        found = nearest(generated, TRAINING, block=block)
        assert torch.equal(found.index, expected.indices)
        torch.testing.assert_close(found.similarity, expected.values.float(), rtol=0, atol=1e-5)


def test_copies_are_found_and_unrelated_images_are_not() -> None:
    generated = features(2000, WIDTH, seed=1, shift=5.0)
    copied = torch.arange(0, 2000, 100)
    generated[copied] = TRAINING[3 * copied // 2] + features(len(copied), WIDTH, seed=2, scale=0.02)
    found = copies(generated, TRAINING)
    assert bool(found.is_copy[copied].all())
    assert torch.equal(found.nearest.index[copied], 3 * copied // 2)
    assert int(found.is_copy.sum()) - len(copied) <= 8  # 2 are expected
    assert found.expected == pytest.approx(2.0)


def test_the_share_of_unrelated_images_above_the_threshold() -> None:
    generated = features(4000, WIDTH, seed=1, shift=5.0)
    for share in (0.1, 0.01):
        assert float(copies(generated, TRAINING, share=share).is_copy.double().mean()) == pytest.approx(share, rel=0.4)


def test_duplicates_among_training_images_do_not_hide_copies() -> None:
    training = torch.cat([TRAINING[:1000], TRAINING[:200] + 1e-4])
    generated = torch.cat([TRAINING[:5] + features(5, WIDTH, seed=3, scale=0.03), features(5, WIDTH, seed=1, shift=5.0)])
    found = copies(generated, training)
    assert found.is_copy.tolist() == [True] * 5 + [False] * 5
    assert found.threshold < memorised.DUPLICATE
    assert bool(copies(training[:5], torch.cat([training[:50], training[:50]])).is_copy.all())


def test_the_threshold_does_not_depend_on_blocks_and_is_from_some_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    generated = features(20, WIDTH, seed=1, shift=5.0)
    assert copies(generated, TRAINING[:300], block=64).threshold == pytest.approx(copies(generated, TRAINING[:300]).threshold, abs=1e-6)
    monkeypatch.setattr(memorised, "CALIBRATION", 500)
    some = copies(generated, TRAINING, share=0.05)
    assert some.threshold == copies(generated, TRAINING, share=0.05).threshold
    monkeypatch.undo()
    assert some.threshold == pytest.approx(copies(generated, TRAINING, share=0.05).threshold, abs=0.03)


def test_the_threshold_is_extrapolated_from_few_training_images() -> None:
    generated = features(3000, WIDTH, seed=1, shift=5.0)
    for seed in range(3):
        training = features(200, WIDTH, seed=10 + seed, shift=5.0)
        assert int(copies(generated, training).is_copy.sum()) <= 20  # 3 are expected


def test_few_training_images() -> None:
    generated = torch.cat([TRAINING[:1], features(3, WIDTH, seed=1, shift=5.0)])
    found = copies(generated, TRAINING[:20])
    assert bool(found.is_copy[0])
    assert not bool(found.is_copy[1:].any())
    with pytest.raises(ValueError, match="at least 2 images"):
        copies(generated, TRAINING[:1])
    with pytest.raises(ValueError, match="use one extractor for both"):
        nearest(generated[:, :3], TRAINING)


def test_an_image_saved_again_is_a_copy_by_its_pixels() -> None:
    extractor = make_extractor("pixels", device="cpu")
    training = noise(*[(8, 8)] * 60)
    generated = [training[7].resize((64, 64)), noise(*[(8, 8)] * 61)[60]]
    found = copies(extractor(generated), extractor(training))
    assert found.is_copy.tolist() == [True, False]
    assert int(found.nearest.index[0]) == 7
