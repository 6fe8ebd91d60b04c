"""The inference engine with a small exact backbone: batching, isolation of bad images, limits, shutdown."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.base import FloatArray, LabelledFeatures
from models.embedding.extraction import ImageFeatures, extract_features
from models.errors import InvalidInput, UnknownName
from models.params import PatchParams
from models.zero_shot.base import create_classifier
from tests.service.harness import eventually
from tests.workers.colours import (
    BLUE,
    EMBEDDINGS,
    GREEN,
    NAMES,
    RED,
    Dot,
    MeanColour,
    classified,
    labels,
    picture,
    resident,
)
from workers.engine import Engine, EngineBusy, EngineClosed, EngineTooLate, prepare_image
from workers.predictions import ImageError, Relatives, Resident, rank


@pytest.fixture
def engine() -> Iterator[Engine]:
    threads = torch.get_num_threads()
    with Engine(decode_threads=2, max_wait_ms=50) as running:
        yield running
    assert torch.get_num_threads() == threads


def test_answers_come_in_the_order_of_the_images(engine: Engine) -> None:
    model = replace(resident(), class_names=NAMES[:3], embeddings=EMBEDDINGS[:3], is_seen=np.array([True, False, True]))
    images = [RED, BLUE, GREEN, BLUE] * 5
    assert labels(classified(engine, model, images)) == ["red", "blue", "green", "blue"] * 5
    assert classified(engine, model, []) == []
    assert engine.stats().n_images == 20
    assert engine.stats().n_waiting == 0


def test_scores_are_softmax_of_calibrated_scores_over_temperature(engine: Engine) -> None:
    answer = classified(engine, resident(), [RED], gamma=0.3, top_k=4)[0]
    assert not isinstance(answer, ImageError)
    red = float(np.float16(200 / 255))
    scores = np.array([red - 0.3, 0, -0.3, red]) / 0.1
    expected = np.exp(scores) / np.exp(scores).sum()
    assert [p.label for p in answer] == ["grey", "red", "green", "blue"]
    assert [p.score for p in answer] == pytest.approx([expected[3], expected[0], expected[1], expected[2]], rel=1e-4)
    assert [p.seen for p in answer] == [False, True, False, True]


def test_scope_and_names_choose_who_competes_and_top_k_how_many_are_told(engine: Engine) -> None:
    model = resident()
    unseen = classified(engine, model, [RED], scope="unseen")[0]
    assert not isinstance(unseen, ImageError)
    assert [p.label for p in unseen] == ["grey", "green"]
    assert sum(p.score for p in unseen) == pytest.approx(1)
    named = classified(engine, model, [RED], class_names=["blue", "red", "blue"], top_k=1)[0]
    assert not isinstance(named, ImageError)
    assert [p.label for p in named] == ["red"]
    with pytest.raises(UnknownName, match="Did you mean 'green'"):
        classified(engine, model, [RED], class_names=["gren"])
    with pytest.raises(InvalidInput, match="scope 'seen'"):
        classified(engine, model, [RED], class_names=["green"], scope="seen")
    with pytest.raises(InvalidInput, match="top_k"):
        classified(engine, model, [RED], top_k=0)


def test_residents_own_gamma_is_used_unless_another_is_given() -> None:
    features = np.array([[0.5, 0.4, 0.0]], np.float32)
    model = replace(resident(), gamma=0.2)
    classes = np.array([0, 1])
    assert rank(model, features, classes, k=1)[0][0].label == "green"
    assert rank(model, features, classes, k=1, gamma=0.0)[0][0].label == "red"


@pytest.mark.parametrize("is_seen", [True, False])
def test_gamma_changes_nothing_where_one_side_competes(is_seen: bool) -> None:
    features = np.array([[0.4, 0.5, 0.0]], np.float32)
    model = replace(resident(), is_seen=np.full(len(resident().class_names), is_seen))
    classes = np.array([0, 1])
    assert rank(model, features, classes, k=2, gamma=1e30) == rank(model, features, classes, k=2, gamma=0.0)


def test_one_bad_image_fails_alone(engine: Engine) -> None:
    answers = classified(engine, resident(), [RED, b"not an image", RED[:60], b"", GREEN])
    assert [isinstance(answer, ImageError) for answer in answers] == [False, True, True, True, False]
    assert isinstance(answers[3], ImageError)
    assert "empty" in answers[3].reason
    assert all(isinstance(a, ImageError) for a in classified(engine, resident(), [b"", b"x"]))


def test_a_single_image_never_waits_for_company() -> None:
    with Engine(max_wait_ms=5000) as engine:
        classified(engine, resident(), [RED])  # threads and first calls warm
        started = time.monotonic()
        classified(engine, resident(), [RED])
        assert time.monotonic() - started < 2.5


def test_two_backbones_are_not_mixed(engine: Engine) -> None:
    first, second = MeanColour(), MeanColour()
    futures = [engine.classify(resident(b), [RED, GREEN]) for b in (first, second) * 3]
    wait(futures, timeout=20)
    assert sum(first.batches) == sum(second.batches) == 6


def test_full_queue_refuses_at_once_and_recovers() -> None:
    backbone = MeanColour()
    backbone.go.clear()
    model = resident(backbone)
    with Engine(max_pending=3) as engine:
        first = engine.classify(model, [RED] * 3)
        with pytest.raises(EngineBusy, match="3 images are waiting and at most 3"):
            engine.classify(model, [RED])
        backbone.go.set()
        assert len(first.result(timeout=20)) == 3
        assert len(classified(engine, model, [RED] * 5)) == 5  # larger than the limit, but alone


def test_failing_backbone_fails_its_requests_and_the_engine_lives_on(engine: Engine) -> None:
    backbone = MeanColour()
    backbone.error = RuntimeError("device is sick")
    with pytest.raises(RuntimeError, match="sick"):
        classified(engine, resident(backbone), [RED, GREEN])
    backbone.error = None
    assert labels(classified(engine, resident(backbone), [BLUE], class_names=NAMES[:3])) == ["blue"]
    assert engine.stats().n_waiting == 0


def test_failing_classifier_fails_its_request_only(engine: Engine) -> None:
    class Broken:
        is_joint = False

        def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
            raise InvalidInput("no such thing")

    with pytest.raises(InvalidInput, match="no such thing"):
        classified(engine, replace(resident(), classifier=Broken()), [RED])
    assert labels(classified(engine, resident(), [RED])) == ["red"]


def test_cancelled_request_is_dropped_and_others_go_on() -> None:
    backbone = MeanColour()
    backbone.go.clear()
    with Engine(max_batch=1) as engine:
        first, second, third = (engine.classify(resident(backbone), [RED]) for _ in range(3))
        assert second.cancel()
        backbone.go.set()
        assert labels(first.result(timeout=20)) == ["red"]
        assert labels(third.result(timeout=20)) == ["red"]
        with pytest.raises(CancelledError):
            second.result()


def test_images_that_nobody_waits_for_never_reach_the_device() -> None:
    backbone = MeanColour()
    backbone.go.clear()
    with Engine(max_batch=4) as engine:
        first = engine.classify(resident(backbone), [RED])
        eventually(lambda: backbone.batches == [1])  # the device is busy from now on
        gone = engine.classify(resident(backbone), [RED] * 3)
        late = engine.classify(resident(backbone), [GREEN] * 3, timeout_s=0.1)
        eventually(lambda: engine._n_decoding == 0)
        assert gone.cancel()
        time.sleep(0.12)
        backbone.go.set()
        assert labels(first.result(timeout=20)) == ["red"]
        with pytest.raises(EngineTooLate):
            late.result(timeout=20)
        assert labels(classified(engine, resident(backbone), [BLUE], timeout_s=20)) == ["blue"]
        assert backbone.batches == [1, 1]
        assert engine.stats().n_waiting == 0


def test_an_answer_that_comes_too_late_is_none(engine: Engine) -> None:
    backbone = MeanColour()
    backbone.go.clear()
    late = engine.classify(resident(backbone), [RED], timeout_s=0.05)
    eventually(lambda: backbone.batches == [1])
    time.sleep(0.06)
    backbone.go.set()
    with pytest.raises(EngineTooLate):
        late.result(timeout=20)


def test_close_fails_what_is_unanswered_and_refuses_what_comes_later() -> None:
    backbone = MeanColour()
    backbone.go.clear()
    engine = Engine(max_batch=1, decode_threads=1)
    futures = [engine.classify(resident(backbone), [RED]) for _ in range(4)]
    while not backbone.batches:
        time.sleep(0.01)
    closing = threading.Thread(target=engine.close)
    closing.start()
    time.sleep(0.1)
    backbone.go.set()
    closing.join(timeout=20)
    assert not closing.is_alive()
    wait(futures, timeout=5)
    assert labels(futures[0].result()) == ["red"]
    assert all(isinstance(future.exception(), EngineClosed) for future in futures[1:])
    with pytest.raises(EngineClosed):
        engine.classify(resident(), [RED])
    with pytest.raises(EngineClosed):
        engine.probe()
    engine.close()  # twice is harmless


def test_many_threads_get_their_own_answers(engine: Engine) -> None:
    model = replace(resident(), class_names=NAMES[:3], embeddings=EMBEDDINGS[:3], is_seen=np.array([True, False, True]))
    wrong: list[int] = []

    def ask(number: int) -> None:
        for turn in range(10):
            index = (number + turn) % 3
            images = [(RED, GREEN, BLUE)[index], b"bad"][: 1 + turn % 2]
            if labels(classified(engine, model, images))[0] != NAMES[index]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not wrong
    assert engine.stats().n_waiting == 0


def test_relatives_are_split_at_tau_and_bad_images_told(engine: Engine) -> None:
    found, broken = engine.infer(resident(), [RED, b"junk"], tau=0.5, top_k=2).result()
    assert isinstance(broken, ImageError)
    assert isinstance(found, Relatives)
    assert [(p.label, p.seen) for p in found.similar] == [("red", True), ("grey", False)]  # both 200 / 255
    assert [p.label for p in found.dissimilar] == ["blue", "green"]
    assert all(p.score >= 0.5 for p in found.similar)
    only = engine.infer(resident(), [RED], tau=0.9, class_names=["green", "grey"]).result()[0]
    assert isinstance(only, Relatives)
    assert (only.similar, [p.label for p in only.dissimilar]) == ((), ["green", "grey"])


def test_a_joint_classifier_is_asked_about_all_its_classes(engine: Engine) -> None:
    asked: list[int] = []

    class Joint(Dot):
        is_joint = True

        def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
            asked.append(len(class_embeddings))
            return super().scores(features, class_embeddings)

    joint, plain = replace(resident(), classifier=Joint()), resident()
    for class_names in (None, ["blue", "red"]):
        assert classified(engine, joint, [RED, BLUE], class_names=class_names) == classified(
            engine, plain, [RED, BLUE], class_names=class_names
        )
    assert asked == [4, 4]


def test_features_are_those_of_the_training_extraction() -> None:
    """The same file through the engine and through the extraction of image features gives the same numbers."""
    from models.backbones import create_backbone

    rng = np.random.default_rng(0)
    files = []
    for width, height, kind in ((300, 200, "JPEG"), (90, 400, "PNG"), (20, 20, "PNG"), (700, 650, "JPEG")):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(buffer, kind)
        files.append(buffer.getvalue())
    backbone = create_backbone("small_cnn", weights=None)
    params = PatchParams(method="whole", size=64)
    extracted = list(extract_features([(str(i), partial(bytes, d)) for i, d in enumerate(files)], backbone, params))
    seen: list[FloatArray] = []

    class Keep:
        is_joint = False

        def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
            seen.append(features)
            return np.zeros((len(features), len(class_embeddings)), np.float32)

    with Engine() as engine:
        classified(engine, replace(resident(), classifier=Keep(), backbone=backbone, size=64), files)
    for row, trained in zip(seen[0], extracted, strict=True):
        assert isinstance(trained, ImageFeatures)
        np.testing.assert_allclose(row, trained.features[0].astype(np.float32), rtol=2e-3, atol=1e-3)
    assert prepare_image(files[0], 64).shape == (3, 64, 64)


def test_a_real_classifier_answers_through_the_engine(engine: Engine, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(20, 235, (90, 3))
    prototypes = rng.uniform(0.1, 0.9, (9, 3))
    nearest = np.argmin(((colours[:, None] / 255 - prototypes) ** 2).sum(axis=2), axis=1)
    used = np.unique(nearest)
    train = LabelledFeatures(
        (colours / 255).astype(np.float32), np.searchsorted(used, nearest), tuple(f"c{i}" for i in used)
    )
    model = create_classifier("eszsl").fit(train, prototypes[used].astype(np.float32))
    table = Resident(
        model, MeanColour(), 16, train.class_names, prototypes[used].astype(np.float32),
        np.ones(len(used), np.bool_), model.gamma_, model.temperature_,
    )  # fmt: skip
    answers = classified(engine, table, [picture((int(r), int(g), int(b))) for r, g, b in colours[:20]])
    expected = model.scores(train.features[:20], table.embeddings).argmax(axis=1)
    right = [train.class_names[e] == label for e, label in zip(expected, labels(answers), strict=True)]
    assert np.mean(right) >= 0.9  # float16 rounding and resizing may turn a near tie
