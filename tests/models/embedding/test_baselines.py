from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.base import Progress
from models.embedding.baselines import BackboneEmbedding, KMeansEmbedding
from models.errors import InvalidInput, NotFitted, TooFewSamples
from models.params import KMeansParams, Params
from tests import reference
from tests.models.embedding.tables import PARTS, part_table


def test_backbone_embedding_is_the_mean_of_image_means() -> None:
    table, knowledge, _ = part_table(n_classes=3, images=4)
    keep = np.arange(len(table.features)) % 5 != 0  # images with different numbers of patches
    table = replace(table, features=table.features[keep], image_index=table.image_index[keep])
    model = BackboneEmbedding(Params()).fit(table, knowledge)
    expected = reference.class_embeddings(table.features.tolist(), table.image_index.tolist(), table.labels.tolist(), 3)
    np.testing.assert_allclose(model.class_embeddings_, expected, atol=1e-5)


def test_kmeans_embedding_is_the_mean_cosine_to_its_centres() -> None:
    table, knowledge, _ = part_table()
    model = KMeansEmbedding(KMeansParams(n_clusters=PARTS)).fit(table, knowledge)
    row, centre = table.features[5], model.centres_[3]
    cosine = row @ centre / np.linalg.norm(row) / np.linalg.norm(centre)
    assert model.assign(table.features)[5, 3] == pytest.approx(cosine, rel=1e-5)
    expected = reference.class_embeddings(
        model.assign(table.features).tolist(), table.image_index.tolist(), table.labels.tolist(), 8
    )
    np.testing.assert_allclose(model.class_embeddings_, expected, atol=1e-5)


@pytest.mark.parametrize("resident_bytes", [1 << 30, 1 << 14])
def test_centres_are_the_parts_whether_held_or_streamed(resident_bytes: int) -> None:
    table, knowledge, _ = part_table(images=20, noise=0.05)
    model = KMeansEmbedding(KMeansParams(n_clusters=2 * PARTS), resident_bytes=resident_bytes).fit(table, knowledge)
    nearest = model.assign(table.features).max(axis=1)
    assert np.quantile(nearest, 0.1) > 0.95


@pytest.mark.parametrize("resident_bytes", [1 << 30, 1 << 13])
def test_same_seed_same_bits(resident_bytes: int) -> None:
    table, knowledge, _ = part_table()
    vectors = [
        KMeansEmbedding(KMeansParams(n_clusters=8), seed=seed, resident_bytes=resident_bytes)
        .fit(table, knowledge)
        .class_embeddings_
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])


def test_saved_and_loaded_baselines_are_the_same(tmp_path: Path) -> None:
    table, knowledge, _ = part_table(images=4)
    model = KMeansEmbedding(KMeansParams(n_clusters=5), seed=2).fit(table, knowledge)
    model.save(tmp_path)
    loaded = KMeansEmbedding.load(tmp_path)
    assert np.array_equal(loaded.assign(table.features), model.assign(table.features))
    assert (loaded.params, loaded.seed, loaded.class_names_) == (model.params, 2, table.class_names)
    with pytest.raises(InvalidInput, match="'backbone'"):
        BackboneEmbedding.load(tmp_path)
    with pytest.raises(NotFitted):
        BackboneEmbedding(Params()).save(tmp_path)


def test_bad_input() -> None:
    table, knowledge, _ = part_table(images=1, patches=2)
    with pytest.raises(TooFewSamples, match="16 patches cannot fill 17"):
        KMeansEmbedding(KMeansParams(n_clusters=17)).fit(table, knowledge)
    table.features[3, 0] = np.nan
    with pytest.raises(InvalidInput, match="row 3"):
        BackboneEmbedding(Params()).fit(table, knowledge)


def test_progress_is_reported() -> None:
    table, knowledge, _ = part_table(images=4)
    reports: list[Progress] = []
    KMeansEmbedding(KMeansParams(n_clusters=5)).fit(table, knowledge, on_progress=reports.append)
    assert {"clustering", "embeddings"} == {report.phase for report in reports}
