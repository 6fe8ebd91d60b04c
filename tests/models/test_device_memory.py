"""Steps that do not fit a device's memory: smaller batches, said so, to the numbers of asking for those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Progress
from models.classifier_params import SJEParams
from models.device_memory import with_smaller_batches
from models.embedding import clustering
from models.embedding.clustering import PatchClustering
from models.errors import OutOfDeviceMemory
from models.generative_params import FVAEGANParams
from models.params import ClusteringParams, Params
from models.zero_shot.base import create_classifier
from models.zero_shot.f_vaegan import FVAEGAN
from models.zero_shot.sje import SJE
from tests.models.embedding.tables import part_table
from tests.models.zero_shot.made_up import made_up

VALIDATION = ("class 1", "class 5", "class 9")
SMALL = {"epochs": 3, "folds": 1}
TASKS: list[tuple[str, Callable[[int], Params]]] = [
    ("sje", lambda size: SJEParams(batch_size=size, **SMALL)),
    ("f_vaegan", lambda size: FVAEGANParams(batch_size=size, hidden_dim=16, steps_per_epoch=2, **SMALL)),
]


def refuse_above(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, limit: int) -> None:
    """The device's memory holds `limit` rows of the method's last argument."""
    original = getattr(owner, method)

    def step(*inputs: Any) -> Any:
        rows = next(value for value in inputs if isinstance(value, torch.Tensor))
        if torch.is_grad_enabled() and len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*inputs)

    monkeypatch.setattr(owner, method, step)


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_above(monkeypatch, SJE, "_loss", 20)
    refuse_above(monkeypatch, FVAEGAN, "_generate", 20)


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize(("name", "params_of"), TASKS, ids=["sje", "f_vaegan"])
def test_a_classifier_goes_on_with_half_the_batch(name: str, params_of: Callable[[int], Params]) -> None:
    data = made_up()
    notes: list[str] = []

    def note(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    def fit(size: int) -> Any:
        model = create_classifier(name, params_of(size))
        return model.fit(data.train, data.seen_embeddings, validation_classes=VALIDATION, on_progress=note)

    shrunk = fit(64)
    assert [part.split()[-4] for part in notes] == ["32", "16"]
    assert shrunk.params == params_of(16)
    assert shrunk.validation_["out_of_memory"] == notes[-1]
    asked = fit(16)
    assert "out_of_memory" not in asked.validation_
    assert len(notes) == 2
    inputs = data.unseen.features, data.unseen_embeddings
    assert np.array_equal(shrunk.scores(*inputs), asked.scores(*inputs))
    assert shrunk.history_ == asked.history_


@pytest.mark.usefixtures("small_device")
def test_assessing_for_a_search_does_so_too() -> None:
    data, notes = made_up(), []

    def assess(size: int) -> dict[str, Any]:
        return create_classifier("sje", SJEParams(batch_size=size, **SMALL)).assess(
            data.train,
            data.seen_embeddings,
            validation_classes=VALIDATION,
            on_progress=lambda progress: notes.append(progress.note),
        )

    assert assess(64) == assess(16)
    assert any("batches of 16" in text for text in notes)


def test_patch_clustering_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    table, knowledge, images = part_table()
    original = clustering.train_epoch

    def epoch(heads: Any, patches: Any, params: ClusteringParams, *rest: Any) -> Any:
        if params.batch_size > 50:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(heads, patches, params, *rest)

    monkeypatch.setattr(clustering, "train_epoch", epoch)
    notes: list[str] = []

    def fit(size: int) -> PatchClustering:
        params = ClusteringParams(n_clusters=16, n_neighbors=5, epochs=3, batch_size=size)
        return PatchClustering(params).fit(
            table,
            knowledge,
            image_features=images,
            validation_classes=["class 1", "class 4"],
            on_progress=lambda progress: notes.extend([progress.note] if progress.note else []),
        )

    shrunk, asked = fit(160), fit(40)
    assert len(notes) == 2
    assert shrunk.report_.notes[-1] == notes[-1]
    assert asked.report_.notes == ()
    assert shrunk.params == asked.params
    assert shrunk.history_ == asked.history_
    assert np.array_equal(shrunk.class_embeddings_, asked.class_embeddings_)


def test_it_gives_up_where_batches_cannot_get_smaller() -> None:
    tried = []

    def never(params: Params) -> None:
        tried.append(getattr(params, "batch_size", None))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(OutOfDeviceMemory, match=r"even hold batches of 2\. .*Tried to allocate 2.00 GiB"):
        with_smaller_batches(FVAEGANParams(batch_size=9), never, lambda _: None)
    assert tried == [9, 4, 2]
    with pytest.raises(OutOfDeviceMemory, match="knows no batches"):
        with_smaller_batches(Params(), never, lambda _: None)
