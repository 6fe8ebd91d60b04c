"""Class embeddings in their three forms, saved, loaded and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.embedding.class_embedder import ClassEmbedder, Relation
from models.embedding.relations import similarity_matrix_optimization, unit_rows, weighted_average
from models.errors import InvalidInput, ModelError, ShapeMismatch, TooFewSamples, UnknownName
from models.params import RelationParams

RNG = np.random.default_rng(0)
SEEN = RNG.dirichlet(np.ones(7), size=6)
KNOWLEDGE = RNG.normal(size=(9, 12))


def embedder(relation: Relation = "smo", **params: object) -> ClassEmbedder:
    names = tuple(f"class {i}" for i in range(6))
    return ClassEmbedder(names, SEEN, KNOWLEDGE[:6], relation, RelationParams.model_validate(params))


@pytest.mark.parametrize("alpha", [0, -1])
def test_plain_smo_is_equation_12_at_unit_length(alpha: int) -> None:
    vectors, relations = embedder(alpha=alpha, ridge=0.1).embed(KNOWLEDGE[6:])
    knowledge = unit_rows(KNOWLEDGE)
    expected = similarity_matrix_optimization(knowledge[6:], knowledge[:6], alpha=alpha, ridge=0.1)
    np.testing.assert_allclose(relations, expected)
    composed = expected @ SEEN
    np.testing.assert_allclose(vectors, composed / np.linalg.norm(composed, axis=1, keepdims=True))


def test_centred_wavg_centres_the_average_and_not_its_short_printed_form() -> None:
    vectors, relations = embedder("wavg", form="centred", n_neighbors=3).embed(KNOWLEDGE[6:])
    weights = weighted_average(KNOWLEDGE[6:], KNOWLEDGE[:6], n_neighbors=3)
    shares = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(relations, shares)
    centred = shares @ SEEN - SEEN.mean(axis=0)
    np.testing.assert_allclose(vectors, centred / np.linalg.norm(centred, axis=1, keepdims=True))


def test_wavg_whose_weights_underflow_still_has_a_direction() -> None:
    vectors, relations = embedder("wavg", eta=1000).embed(KNOWLEDGE[6:])
    nearest = np.argmax(unit_rows(KNOWLEDGE[6:]) @ unit_rows(KNOWLEDGE[:6]).T, axis=1)
    np.testing.assert_array_equal(relations.argmax(axis=1), nearest)
    assert np.isfinite(vectors).all()


def test_fused_halves_are_the_centred_vector_and_the_centred_knowledge() -> None:
    fused, _ = embedder(form="fused").embed(KNOWLEDGE[6:])
    centred, _ = embedder(form="centred").embed(KNOWLEDGE[6:])
    knowledge = unit_rows(KNOWLEDGE)
    expected = unit_rows(knowledge[6:] - knowledge[:6].mean(axis=0))
    np.testing.assert_allclose(fused * np.sqrt(2), np.hstack([centred, expected]))


@pytest.mark.parametrize("form", ["plain", "centred", "fused"])
@pytest.mark.parametrize("relation", ["smo", "wavg"])
def test_every_vector_has_length_one_and_the_stated_width(relation: Relation, form: str) -> None:
    model = embedder(relation, form=form)
    for vectors in (model.seen_vectors(), model.embed(KNOWLEDGE[6:])[0]):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
        assert vectors.shape[1] == model.embedding_dim


def test_a_seen_class_asked_as_unseen_gets_its_own_vector() -> None:
    model = embedder(form="fused", alpha=0, ridge=0)
    np.testing.assert_allclose(model.embed(KNOWLEDGE[:6])[0], model.seen_vectors(), atol=1e-5)


def test_one_class_at_a_time_equals_all_at_once() -> None:
    model = embedder()
    together = model.embed(KNOWLEDGE[6:])[0]
    alone = np.vstack([model.embed(row[None])[0] for row in KNOWLEDGE[6:]])
    np.testing.assert_allclose(together, alone, atol=1e-10)


def test_contributions_are_sorted_by_size_and_named() -> None:
    found = embedder().contributions(np.array([0.1, 0.0, -0.6, 0.3, 0.0, 0.2]), k=10)
    assert found == [("class 2", -0.6), ("class 3", 0.3), ("class 5", 0.2), ("class 0", 0.1)]
    assert embedder().contributions(np.array([0.1, 0.0, -0.6, 0.3, 0.0, 0.2]), k=1) == [("class 2", -0.6)]
    with pytest.raises(ShapeMismatch, match="6 seen classes"):
        embedder().contributions(np.ones(5))


def test_saved_and_loaded_gives_the_same_vectors(tmp_path: Path) -> None:
    model = embedder("wavg", form="fused", n_neighbors=2, eta=1.5)
    model.save(tmp_path / "set")
    loaded = ClassEmbedder.load(tmp_path / "set")
    assert loaded.class_names == model.class_names
    assert loaded.params == model.params
    np.testing.assert_array_equal(loaded.embed(KNOWLEDGE[6:])[0], model.embed(KNOWLEDGE[6:])[0])


def test_a_future_format_is_refused(tmp_path: Path) -> None:
    embedder().save(tmp_path)
    manifest = tmp_path / "class_embedder.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(InvalidInput, match="format 99"):
        ClassEmbedder.load(tmp_path)


def test_one_seen_class_works_plain_and_says_why_not_otherwise() -> None:
    one = ClassEmbedder(("a",), SEEN[:1], KNOWLEDGE[:1], "smo", RelationParams())
    np.testing.assert_allclose(one.embed(KNOWLEDGE[6:])[0], np.repeat(unit_rows(SEEN[:1]), 3, axis=0))
    with pytest.raises(TooFewSamples, match="use the form 'plain'"):
        ClassEmbedder(("a",), SEEN[:1], KNOWLEDGE[:1], "smo", RelationParams(form="centred"))


@pytest.mark.parametrize(
    ("embeddings", "knowledge", "relation", "error"),
    [
        (SEEN[:5], KNOWLEDGE[:6], "smo", ShapeMismatch),
        (SEEN, KNOWLEDGE[:5], "smo", ShapeMismatch),
        (np.full_like(SEEN, np.nan), KNOWLEDGE[:6], "smo", InvalidInput),
        (SEEN, KNOWLEDGE[:6] * 0, "smo", InvalidInput),
        (SEEN, KNOWLEDGE[:6], "sno", UnknownName),
    ],
)
def test_bad_construction(
    embeddings: np.ndarray, knowledge: np.ndarray, relation: Relation, error: type[ModelError]
) -> None:
    with pytest.raises(error):
        ClassEmbedder(tuple("abcdef"), embeddings, knowledge, relation, RelationParams())


def test_bad_knowledge_of_an_unseen_class() -> None:
    with pytest.raises(ShapeMismatch, match="5 knowledge dimensions and seen classes 12"):
        embedder().embed(np.ones((1, 5)))
    with pytest.raises(InvalidInput, match="all zeros"):
        embedder("wavg").embed(np.zeros((1, 12)))
