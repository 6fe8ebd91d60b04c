"""`unseen embed`, `train` and `classify`: what is wrong is told before anything is sent, and what is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.client import Client, UnseenError
from tests.service.harness import LiveApi, png
from tests.service.test_cli import make_photos, unseen

NOWHERE = "http://127.0.0.1:1"
"""Nothing listens there: whoever asks it fails in another way than these tests expect."""


def run(*arguments: str, url: str = NOWHERE) -> Result:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, [*arguments, "--url", url])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", n=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--knowledge", "nofile.npz"], "There is no file nofile.npz"),
        (["--knowledge", "kn_1", "--seen", "sqare_red,square_green"], "Did you mean 'square_red'"),
        (["--knowledge", "kn_1", "--weights", "folder/none.pth"], "There is no file folder/none.pth"),
        (["--knowledge", "kn_1", "--weights", "none.pth", "--local"], "There is no file none.pth"),
    ],
)
def test_embed_looks_at_this_machines_files_before_it_asks_anybody(
    photos: Path, options: list[str], message: str
) -> None:
    result = run("embed", str(photos), "-o", str(photos / "out.npz"), *options)
    assert isinstance(result.exception, UnseenError)
    assert message in str(result.exception)


def test_embed_sends_no_photo_before_the_service_knows_the_weights(photos: Path, live_api: LiveApi) -> None:
    url = f"http://127.0.0.1:{live_api.port}"
    options = ["--knowledge", live_api.knowledge(), "--backbone", "resnet50", "--weights", "misspelt.pth"]
    result = run("embed", str(photos), "-o", str(photos / "out.npz"), *options, url=url)
    assert "/params/backbone/weights: 'misspelt.pth'" in str(result.exception)
    assert "Upload" not in result.output
    with Client(url) as client:
        assert list(client.list_all("datasets")) == []


def test_train_needs_class_embeddings(start_api: Callable[..., LiveApi]) -> None:
    result = run("train", url=f"http://127.0.0.1:{start_api().port}")
    assert "Make some with 'unseen embed'" in str(result.exception)


def test_photos_below_the_score_are_marked(live_api: LiveApi, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    classifier = live_api.classifier()
    arguments = ["classify", str(tmp_path / "a.png"), "--classifier", classifier]
    url = f"http://127.0.0.1:{live_api.port}"
    assert "abstained" in run(*arguments, "--min-score", "1", url=url).output
    assert "abstained" not in run(*arguments, url=url).output


def test_a_refusal_for_want_of_a_key_says_how_to_give_one(start_api: Callable[..., LiveApi], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    api = start_api(api_keys=f"ann:{'0' * 64}:admin")
    answer = unseen("classify", str(tmp_path / "a.png"), "--url", f"http://127.0.0.1:{api.port}")
    assert answer.returncode == 1
    assert "Give a key with --api-key, or in UNSEEN_API_KEY." in answer.stderr
