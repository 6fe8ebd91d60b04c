"""What the inference process keeps loaded: the state as the API tells it, networks that become faster meanwhile."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from service.core.settings import Settings
from service.core.tables import Classifier, EmbeddingClass, EmbeddingSet
from tests.service.harness import LiveApi
from tests.service.tasks import VECTORS, trained_classifier
from workers import library as library_module
from workers.engine import Engine
from workers.inference import Inference
from workers.library import Library, prepare_apart
from workers.predictions import Resident


class Faster:
    """Computes what its network does."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone.features(images)
        return features


def test_a_network_that_takes_time_to_prepare_is_exchanged_later(
    own_api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, prepared, asked = trained_classifier(own_api)["id"], threading.Event(), []

    def prepare(classifier_id: str, _settings: Settings) -> bool:
        asked.append(classifier_id)
        return prepared.wait(20)

    def fast(backbone: Any, _size: int, _settings: Settings, *, may_prepare: bool = True) -> Any:
        assert not may_prepare or prepared.is_set()  # never in this process before another has
        return Faster(backbone) if prepared.is_set() else backbone

    monkeypatch.setattr(library_module, "prepare_apart", prepare)
    monkeypatch.setattr(library_module, "fast_backbone", fast)
    monkeypatch.setattr(library_module, "may_become_faster", lambda _backbone, _size, _settings: not prepared.is_set())
    settings = own_api.settings.model_copy(update={"backend": "auto"})
    library = Library(own_api.parts.database, own_api.parts.store, settings, device="cpu")
    state = library.state(classifier)
    assert library.competing_at_once(state, "all") is None
    first = library.competing(state, "all", None).resident
    again = library.competing_at_once(state, "unseen")
    assert again is not None
    assert again.resident.backbone is first.backbone
    assert again.resident.class_names == ("zebra",)
    assert library.competing_at_once(state, "unseen") is again  # so that requests for it are answered together
    assert library.competing(state, "unseen", None) is again
    assert not isinstance(first.backbone, Faster)
    prepared.set()
    deadline = time.monotonic() + 20
    while not isinstance(library.competing(state, "all", None).resident.backbone, Faster):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert asked == [classifier]
    library.competing(state, "all", None)
    assert library.resident_names() == [classifier]


def test_a_network_exchanged_while_a_classifier_is_opened_reaches_it(
    own_api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, settings = trained_classifier(own_api)["id"], own_api.settings.model_copy(update={"backend": "auto"})
    library = Library(own_api.parts.database, own_api.parts.store, settings, device="cpu")
    opened: list[Resident] = []

    def fast(backbone: Any, _size: int, _settings: Settings, *, may_prepare: bool = True) -> Any:
        return Faster(backbone) if may_prepare else backbone

    def open_slowly(**parts: Any) -> Resident:
        opened.append(Resident(**parts))
        if len(opened) == 1:  # its network is chosen, but nobody knows of it yet
            library._prepare(classifier, parts["backbone"], parts["size"])
        return opened[-1]

    monkeypatch.setattr(library_module, "prepare_apart", lambda _classifier, _settings: True)
    monkeypatch.setattr(library_module, "fast_backbone", fast)
    monkeypatch.setattr(library_module, "may_become_faster", lambda _backbone, _size, _settings: False)
    monkeypatch.setattr(library_module, "Resident", open_slowly)
    resident = library.competing(library.state(classifier), "all", None).resident
    assert isinstance(resident.backbone, Faster)
    assert len(opened) == 2


@pytest.mark.slow
def test_export_happens_in_a_process_of_its_own(own_api: LiveApi) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    classifier = trained_classifier(own_api)["id"]
    settings = own_api.settings.model_copy(update={"backend": "auto", "threads": 1})
    assert prepare_apart(classifier, settings)
    (kept,) = (settings.cache_dir / "networks").iterdir()
    assert (kept / "onnx" / "model.onnx").is_file()
    (measured,) = kept.glob("measured-*.json")
    assert "onnxruntime" in json.loads(measured.read_text())["measured"]
    assert not prepare_apart("cl_unknown", settings)


def test_a_new_class_of_the_set_competes_at_once_and_nothing_is_loaded_again(own_api: LiveApi) -> None:
    classifier, made = trained_classifier(own_api)["id"], own_api.embedding_set(VECTORS, unseen=("zebra",))
    with own_api.parts.database.write() as session:  # as if it had been trained on the set
        session.get_one(Classifier, classifier).embedding_set_id = made
    library = Library(own_api.parts.database, own_api.parts.store, own_api.settings, device="cpu")
    before = library.competing(library.state(classifier), "unseen", None).resident
    with own_api.parts.database.write() as session:
        vector = np.array([0.1, 0.9, 0.9], "<f4").tobytes()
        session.add(EmbeddingClass(embedding_set_id=made, name="okapi", position=3, is_seen=False, vector=vector))
        session.get_one(EmbeddingSet, made).version += 1
    after = library.competing(library.state(classifier), "unseen", None).resident
    assert (before.class_names, after.class_names) == (("zebra",), ("zebra", "okapi"))
    assert after.classifier is before.classifier
    assert after.backbone is before.backbone
    assert [name for name in library._cache.names() if name.startswith("classes:")] == [f"classes:{classifier}"]
    late = library.competing_at_once(dataclasses.replace(library.state(classifier), version=0), "unseen")
    assert late is not None  # one who read the state before gets what is there now
    assert late.resident is after


def test_a_classifier_beyond_the_limit_is_loaded_once(own_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = trained_classifier(own_api)["id"]
    settings = own_api.settings.model_copy(update={"max_resident_bytes": 1})
    library = Library(own_api.parts.database, own_api.parts.store, settings, device="cpu")
    state = library.state(classifier)
    first = library.competing(state, "all", None).resident
    monkeypatch.setattr(library_module, "load_classifier", lambda *_, **__: pytest.fail("loaded again"))
    assert library.competing(state, "all", ["cat", "zebra"]).resident.classifier is first.classifier
    held = library.competing_at_once(state, "all")
    assert held is not None
    assert held.resident is first


def test_files_of_deleted_classifiers_are_removed(own_api: LiveApi) -> None:
    library = Library(own_api.parts.database, own_api.parts.store, own_api.settings, device="cpu")
    gone, other = (trained_classifier(own_api)["id"] for _ in range(2))
    directory = own_api.settings.cache_dir / "inference"
    library.competing(library.state(gone), "all", None)
    assert [path.name for path in directory.iterdir()] == [gone]
    assert own_api.client.delete(f"/v1/classifiers/{gone}").status_code == 204
    library.competing(library.state(other), "all", None)
    assert [path.name for path in directory.iterdir()] == [other]
    assert own_api.client.delete(f"/v1/classifiers/{other}").status_code == 204
    with Engine() as engine:
        Inference(library, engine).warm_up()
    assert not list(directory.iterdir())


def test_warming_up_loads_the_newest_classifier_and_sends_an_image_through_it(own_api: LiveApi) -> None:
    library = Library(own_api.parts.database, own_api.parts.store, own_api.settings, device="cpu")
    with Engine() as engine:
        Inference(library, engine).warm_up()  # there is none yet
        assert engine.stats().n_images == 0
        trained_classifier(own_api)
        newest = trained_classifier(own_api)["id"]
        Inference(library, engine).warm_up()
        assert (library.resident_names(), engine.stats().n_images) == ([newest], 1)
