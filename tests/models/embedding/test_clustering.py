from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.base import FloatArray, PatchTable, Progress
from models.embedding.clustering import PatchClustering
from models.embedding.report import cluster_report
from models.errors import Cancelled, InvalidInput, NotFitted, ShapeMismatch, TooFewSamples, UnknownName
from models.params import ClusteringParams
from tests import reference
from tests.models.embedding.tables import PARTS, part_table


def _params(**changes: Any) -> ClusteringParams:
    settings = {"n_clusters": 16, "n_neighbors": 5, "epochs": 6, "batch_size": 160, "learning_rate": 0.02}
    return ClusteringParams(**{**settings, **changes})


@pytest.fixture(scope="module")
def fitted() -> tuple[PatchClustering, PatchTable, FloatArray]:
    table, knowledge, images = part_table()
    model = PatchClustering(_params(epochs=25)).fit(
        table, knowledge, image_features=images, validation_classes=["class 1", "class 4"]
    )
    return model, table, knowledge


def test_class_embeddings_are_equations_7_and_8_of_its_own_assignments(
    fitted: tuple[PatchClustering, PatchTable, FloatArray],
) -> None:
    model, table, _ = fitted
    assignments = model.assign(table.features)
    expected = reference.class_embeddings(
        assignments.tolist(), table.image_index.tolist(), table.labels.tolist(), len(table.class_names)
    )
    np.testing.assert_allclose(model.class_embeddings_, expected, atol=1e-6)
    np.testing.assert_allclose(model.class_embeddings_.sum(axis=1), 1, atol=1e-5)


def test_clusters_are_the_parts_that_patches_show(fitted: tuple[PatchClustering, PatchTable, FloatArray]) -> None:
    """Patches of one part share a cluster: classes with the same parts get similar vectors."""
    model, _, knowledge = fitted
    vectors = model.class_embeddings_ - np.asarray(model.class_embeddings_.mean(axis=0))
    pairs = np.triu_indices(len(vectors), 1)
    visual, semantic = np.asarray(np.corrcoef(vectors))[pairs], np.asarray(np.corrcoef(knowledge))[pairs]
    assert np.corrcoef(visual, semantic)[0, 1] > 0.6


def test_directions_are_where_scores_of_clusters_rise(
    fitted: tuple[PatchClustering, PatchTable, FloatArray],
) -> None:
    model, table, _ = fitted
    patch = torch.from_numpy(np.asarray(table.features[:1], np.float32)).requires_grad_()
    scores = model.heads_(patch)[0][0]
    rises = torch.stack([torch.autograd.grad(score, patch, retain_graph=True)[0][0] for score in scores])
    found = model.heads_.directions()
    assert found.shape == (16, table.features.shape[1])
    torch.testing.assert_close(found, torch.nn.functional.normalize(rises, dim=1), atol=1e-5, rtol=0)


def test_training_lowers_every_loss(fitted: tuple[PatchClustering, PatchTable, FloatArray]) -> None:
    model, _, _ = fitted
    stages = [entry["stage"] for entry in model.history_]
    fit = [entry for entry in model.history_ if entry["stage"] == "fit"]
    assert stages == sorted(stages)
    assert len(fit) == model.best_epoch_
    for name in ("neighbour", "class", "semantic", "loss"):
        assert model.history_[stages.index("fit") - 1][name] < model.history_[0][name]


def test_validation_chose_the_epoch(fitted: tuple[PatchClustering, PatchTable, FloatArray]) -> None:
    model, _, _ = fitted
    choosing = [entry for entry in model.history_ if entry["stage"] == "choose"]
    assert 1 <= model.best_epoch_ <= len(choosing) <= 25
    assert all(0 <= entry["validation"] <= 1 for entry in choosing)


def test_report_counts_every_patch(fitted: tuple[PatchClustering, PatchTable, FloatArray]) -> None:
    model, table, _ = fitted
    assert sum(model.report_.patches) == len(table.features)
    assert sum(model.report_.usage) == pytest.approx(1, abs=1e-4)
    assert not model.report_.collapsed
    assert model.report_.effective_clusters > PARTS / 2


def test_same_seed_same_bits_other_seed_other_vectors() -> None:
    table, knowledge, _ = part_table(images=4)

    def vectors(seed: int) -> FloatArray:
        return PatchClustering(_params(epochs=3), seed=seed).fit(table, knowledge).class_embeddings_

    first = vectors(3)
    torch.rand(7)  # the global generator must not matter
    assert np.array_equal(first, vectors(3))
    assert not np.array_equal(first, vectors(4))


def test_validation_classes_do_not_touch_the_fit_for_a_given_number_of_epochs() -> None:
    table, knowledge, images = part_table(images=4)
    model = PatchClustering(_params(epochs=4)).fit(
        table, knowledge, image_features=images, validation_classes=["class 0", "class 2"]
    )
    plain = PatchClustering(_params(epochs=model.best_epoch_)).fit(table, knowledge)
    assert np.array_equal(model.class_embeddings_, plain.class_embeddings_)


def test_images_of_validation_classes_do_not_train_the_choosing_run() -> None:
    """Destroying their patches changes neither losses nor clusters of that run, as long as neighbours stay."""
    table, knowledge, images = part_table(images=4)
    held_out = np.isin(table.labels[table.image_index], [0, 2])
    shuffled = np.array(table.features)
    shuffled[held_out] = shuffled[held_out][::-1]
    histories = []
    for features in (table.features, shuffled):
        model = PatchClustering(_params(epochs=2, n_neighbors=len(features) - 1)).fit(
            replace(table, features=features),
            knowledge,
            image_features=images,
            validation_classes=["class 0", "class 2"],
        )
        histories.append([entry["neighbour"] for entry in model.history_ if entry["stage"] == "choose"])
    np.testing.assert_allclose(histories[0], histories[1], rtol=0.05)


def test_leaving_losses_out_leaves_their_heads_as_they_were() -> None:
    table, knowledge, _ = part_table(images=4)
    without = _params(class_weight=0, semantic_weight=0, weight_decay=0)
    short = PatchClustering(without.model_copy(update={"epochs": 1})).fit(table, knowledge).heads_
    long = PatchClustering(without.model_copy(update={"epochs": 3})).fit(table, knowledge).heads_
    assert torch.equal(short.classes.weight, long.classes.weight)
    assert torch.equal(short.knowledge.weight, long.knowledge.weight)
    assert not torch.equal(short.clusters.weight, long.clusters.weight)


@pytest.mark.parametrize("changes", [{"head_input": "logits"}, {"squared_semantic": True}, {"double_softmax": True}])
def test_flags_train(changes: dict[str, Any]) -> None:
    table, knowledge, _ = part_table(images=4)
    model = PatchClustering(_params(epochs=8, **changes)).fit(table, knowledge)
    assert model.history_[-1]["loss"] < model.history_[0]["loss"]


def test_half_precision_memory_map_gives_what_the_array_gives(tmp_path: Path) -> None:
    table, knowledge, _ = part_table(images=4)
    half = table.features.astype(np.float16)
    np.save(tmp_path / "features.npy", half)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    results = [
        PatchClustering(_params(epochs=2)).fit(replace(table, features=features), knowledge).class_embeddings_
        for features in (half, mapped)
    ]
    assert np.array_equal(results[0], results[1])


def test_saved_and_loaded_model_is_the_same(
    fitted: tuple[PatchClustering, PatchTable, FloatArray], tmp_path: Path
) -> None:
    model, table, _ = fitted
    model.save(tmp_path / "model")
    loaded = PatchClustering.load(tmp_path / "model")
    assert np.array_equal(model.assign(table.features), loaded.assign(table.features))
    assert np.array_equal(model.class_embeddings_, loaded.class_embeddings_)
    assert (loaded.params, loaded.seed, loaded.class_names_) == (model.params, model.seed, model.class_names_)
    assert (loaded.best_epoch_, loaded.history_, loaded.report_) == (model.best_epoch_, model.history_, model.report_)
    for name, weight in model.heads_.state_dict().items():
        assert torch.equal(weight, loaded.heads_.state_dict()[name])


def test_loading_nothing_and_using_an_unfitted_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="missing"):
        PatchClustering.load(tmp_path)
    with pytest.raises(NotFitted):
        PatchClustering(_params()).assign(np.ones((2, 3), dtype=np.float32))
    with pytest.raises(NotFitted):
        PatchClustering(_params()).save(tmp_path)


def test_progress_counts_up_and_may_cancel() -> None:
    table, knowledge, images = part_table(images=4)
    reports: list[Progress] = []
    PatchClustering(_params(epochs=3)).fit(
        table,
        knowledge,
        image_features=images,
        validation_classes=["class 0", "class 2"],
        on_progress=reports.append,
    )
    clustering = [report for report in reports if report.phase == "clustering"]
    assert [report.completed for report in clustering] == list(range(len(clustering)))
    assert clustering[-1].completed == clustering[-1].total
    assert {"loss", "neighbour", "entropy", "class", "semantic"} <= set(clustering[-1].metrics)

    def cancel(progress: Progress) -> None:
        if progress.phase == "clustering":
            raise Cancelled

    with pytest.raises(Cancelled):
        PatchClustering(_params()).fit(table, knowledge, on_progress=cancel)


class TestBadInput:
    def test_fewer_patches_than_clusters(self) -> None:
        table, knowledge, _ = part_table(images=1, patches=2)
        with pytest.raises(TooFewSamples, match="16 patches cannot fill 17 clusters"):
            PatchClustering(_params(n_clusters=17)).fit(table, knowledge)

    def test_one_class(self) -> None:
        table, knowledge, _ = part_table(n_classes=1)
        with pytest.raises(TooFewSamples, match="two seen classes"):
            PatchClustering(_params()).fit(table, knowledge)

    def test_features_that_are_not_numbers(self) -> None:
        table, knowledge, _ = part_table(images=4)
        table.features[13, 2] = np.inf
        with pytest.raises(InvalidInput, match="row 13"):
            PatchClustering(_params()).fit(table, knowledge)

    def test_knowledge_rows_that_do_not_match(self) -> None:
        table, knowledge, _ = part_table(images=4)
        with pytest.raises(ShapeMismatch, match="8 classes need one row each"):
            PatchClustering(_params()).fit(table, knowledge[:-1])

    def test_knowledge_that_is_not_a_number(self) -> None:
        table, knowledge, _ = part_table(images=4)
        knowledge[2, 0] = np.nan
        with pytest.raises(InvalidInput, match="'class 2'"):
            PatchClustering(_params()).fit(table, knowledge)

    def test_a_class_without_patches(self) -> None:
        table, knowledge, _ = part_table(images=4)
        with pytest.raises(TooFewSamples, match="'extra' has no patch"):
            PatchClustering(_params()).fit(
                replace(table, class_names=(*table.class_names, "extra")), np.vstack([knowledge, knowledge[:1]])
            )

    def test_unknown_validation_class_is_answered_with_the_nearest_name(self) -> None:
        table, knowledge, _ = part_table(images=4)
        with pytest.raises(UnknownName, match="class 3"):
            PatchClustering(_params()).fit(table, knowledge, validation_classes=["clas 3"])

    def test_more_neighbours_than_patches_are_clipped_and_noted(self) -> None:
        table, knowledge, _ = part_table(images=1, patches=4)
        model = PatchClustering(_params(n_neighbors=100, epochs=1)).fit(table, knowledge)
        assert any("lowered from 100 to 31" in note for note in model.report_.notes)

    def test_one_validation_class_is_noted(self) -> None:
        table, knowledge, _ = part_table(images=4)
        model = PatchClustering(_params(epochs=2)).fit(table, knowledge, validation_classes=["class 3"])
        assert model.best_epoch_ == 2
        assert any("two validation classes" in note for note in model.report_.notes)

    def test_image_numbers_beyond_the_labels(self) -> None:
        table, knowledge, _ = part_table(images=4)
        with pytest.raises(ShapeMismatch, match="31"):
            PatchClustering(_params()).fit(replace(table, labels=table.labels[:-1]), knowledge)


def test_report_names_dead_and_collapsed_clusters() -> None:
    even = cluster_report(np.full(10, 0.1), np.full(10, 7))
    assert (even.dead, even.collapsed) == ((), False)
    assert even.effective_clusters == pytest.approx(10)
    dead = cluster_report(np.array([0.5, 0.499, 0.001]), np.array([5, 5, 0]))
    assert dead.dead == (2,)
    assert "1 of 3 clusters are dead" in dead.summary
    collapsed = cluster_report(np.array([0.999] + [0.0001] * 10), np.array([50] + [0] * 10))
    assert collapsed.collapsed
    assert "collapsed" in collapsed.summary
