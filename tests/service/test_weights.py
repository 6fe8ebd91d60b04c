"""Weights that a request names: whether they can be had, and belong to its network, is told before a job is queued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.backbone_names import network_of
from models.params import BackboneParams
from service.core.settings import Settings
from service.planning import Plan, plan_backbone
from tests.service.harness import LiveApi

FILE = "mobilenet_v2-imagenet1k.fp16.safetensors"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A service with a folder of weights."""
    (tmp_path / "weights").mkdir()
    return Settings(data_dir=tmp_path / "data", weights_dir=tmp_path / "weights")


def planned(settings: Settings, **backbone: str) -> Plan:
    plan = Plan()
    plan_backbone(plan, BackboneParams(**backbone), settings, "/backbone")  # type: ignore[arg-type]
    return plan


def test_networks_are_told_by_their_files() -> None:
    assert network_of(FILE) == "mobilenet_v2"
    assert network_of("resnet50-0676ba61.pth") == "resnet50"
    assert network_of("efficientnet_v2_s-dd5fe13b.pth") == "efficientnet_v2_s"
    assert network_of("mine.pth") is None


def test_weights_of_another_network_are_refused(start_api: Callable[..., LiveApi], tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    api = start_api(weights_dir=tmp_path)
    classes = {"dataset_id": api.filled_dataset({"cat": 1, "dog": 1}), "knowledge_id": api.knowledge()}

    def findings(**backbone: str) -> list[dict[str, Any]]:
        bodies = {
            "embedding-sets": {"params": {"backbone": backbone, "clustering": {"n_clusters": 4}}},
            "classifiers": {"backbone": backbone, "unseen_classes": ["zebra"]},
        }
        answers = [
            api.client.post(f"/v1/{path}?validate_only=true", json=classes | body) for path, body in bodies.items()
        ]
        return [problem for answer in answers for problem in answer.json()["problems"]]

    found = findings(weights=FILE)  # the default network is a ResNet-50
    assert [problem["pointer"] for problem in found] == ["/params/backbone/name", "/backbone/name"]
    assert all("Set the name to 'mobilenet_v2'" in problem["message"] for problem in found)
    assert findings(weights=FILE, name="mobilenet_v2") == []


@pytest.mark.parametrize("file", ["vgg16-bn.pth", "vgg16_bn-6c64b313.pth", "mine.safetensors"])
def test_names_of_files_that_may_be_the_network_s_pass(settings: Settings, file: str) -> None:
    assert settings.weights_dir
    (settings.weights_dir / file).touch()
    assert planned(settings, name="vgg16_bn", weights=file).problems == []


def test_weights_to_be_downloaded_are_warned_of(settings: Settings) -> None:
    (warning,) = planned(settings, name="mnasnet0_5").warnings
    assert warning.pointer == "/backbone/weights"
    assert "no ImageNet weights of 'mnasnet0_5' yet" in warning.message
    (settings.cache_dir / "weights").mkdir(parents=True)
    (settings.cache_dir / "weights" / "mnasnet0.5_top1_67.823-3ffadce67e.pth").touch()
    assert planned(settings, name="mnasnet0_5").warnings == []
    assert planned(settings, name="small_cnn", weights="scratch").warnings == []
