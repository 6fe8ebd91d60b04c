"""Text encoders behind rows: one model for good. The library is stood in for; no extra is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.errors import InvalidInput
from models.knowledge.text_encoder import TextEncoder
from service.core.errors import Conflict, Unavailable
from service.core.settings import Settings
from service.core.tables import Knowledge
from workers import sources
from workers.sources import describe_text_encoder, fetch_weights, open_knowledge

NO_STORE: Any = None
"""Text encoders have no files."""
Opened = list[tuple[str, Path | None]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """What was opened, as (model, folder); a model's vectors follow from its name, but 'random' has new ones a load."""
    calls: Opened = []

    def make(model: str, template: str, *, folder: Path | None = None, device: str | None = None) -> TextEncoder:
        calls.append((model, folder))
        vector = np.random.default_rng(len(calls) if model == "random" else len(model)).standard_normal((1, 64))

        def encode(texts: list[str]) -> np.ndarray[Any, Any]:
            return np.repeat(vector, len(texts), axis=0)

        return TextEncoder(model, template, folder=folder, encode=encode)

    monkeypatch.setattr(sources, "TextEncoder", make)
    return calls


def row(summary: dict[str, Any]) -> Knowledge:
    return Knowledge(id="kn_1", name="text", kind="text_encoder", status="ready", summary=summary, artifacts={})


def test_a_row_says_which_model_it_was(opened: Opened, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, device="cpu")
    dim, summary = describe_text_encoder("some-model", "a {}", settings)
    assert (dim, summary["model"], summary["template"]) == (64, "some-model", "a {}")
    source = open_knowledge(row(summary), NO_STORE, settings)
    assert isinstance(source, TextEncoder)
    assert source.template == "a {}"
    assert open_knowledge(row({"model": "m", "template": "{}"}), NO_STORE, settings).dim == 64


def test_a_download_that_fails_names_the_folder_to_put_the_file_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(httpx, "stream", refuse)
    with pytest.raises(Unavailable, match=r"UNSEEN_WEIGHTS_DIR \(not set\)"):
        fetch_weights("resnet50", Settings(data_dir=tmp_path))
    with pytest.raises(Unavailable, match=f"UNSEEN_WEIGHTS_DIR \\({tmp_path}\\)"):
        fetch_weights("resnet50", Settings(data_dir=tmp_path, weights_dir=tmp_path))


def test_another_model_in_its_place_is_refused(opened: Opened, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, device="cpu")
    _, summary = describe_text_encoder("some-model", "{}", settings)
    with pytest.raises(Conflict, match="'another' has changed since knowledge 'kn_1' was made"):
        open_knowledge(row(summary | {"model": "another"}), NO_STORE, settings)


def test_a_model_that_lacks_weights_is_refused(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="answers differently each time") as caught:
        describe_text_encoder("random", "{}", Settings(data_dir=tmp_path, device="cpu"))
    assert caught.value.field == "model"


def test_a_plain_name_is_looked_for_in_the_weights_directory(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    settings = Settings(data_dir=tmp_path / "data", weights_dir=tmp_path, device="cpu")
    for model in ("mine", "owner/name", "other"):
        assert sources.open_text_encoder(model, "{}", settings).model == model
    assert opened == [("mine", tmp_path / "mine"), ("owner/name", None), ("other", None)]
