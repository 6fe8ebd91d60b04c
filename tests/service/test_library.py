"""What the inference process keeps loaded: the state as the API tells it, networks that become faster meanwhile."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from torch import Tensor

from tests.service.harness import LiveApi
from tests.service.tasks import trained_classifier
from workers import library as library_module
from workers.library import Library


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
    classifier, prepared, asked = trained_classifier(own_api), threading.Event(), []

    def fast(backbone: Any, size: int, settings: Any, *, may_convert: bool = True) -> Any:
        asked.append(may_convert)
        if not may_convert:
            return backbone
        assert prepared.wait(20)
        return Faster(backbone)

    monkeypatch.setattr(library_module, "fast_backbone", fast)
    library = Library(own_api.parts.database, own_api.parts.store, own_api.settings, device="cpu")
    state = library.state(classifier)
    assert library.competing_at_once(state, "all") is None
    first = library.competing(state, "all", None).resident
    again = library.competing_at_once(state, "unseen")
    assert again is not None
    assert again.resident.backbone is first.backbone
    assert again.resident.class_names == ("zebra",)
    assert not isinstance(first.backbone, Faster)
    prepared.set()
    deadline = time.monotonic() + 20
    while not isinstance(library.competing(state, "all", None).resident.backbone, Faster):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert asked == [False, True]
    library.competing(state, "all", None)
    assert library.resident_names() == [classifier]
