from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.base import Progress
from models.errors import InvalidInput, MissingKnowledge
from models.knowledge.base import require
from models.knowledge.text_encoder import SAME_LOAD, TextEncoder


class LetterCounts:
    """A fake encoder: how often each letter occurs, so that expected numbers can be written down."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
        self.batches.append(texts)
        return np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float64)


def test_names_are_encoded_as_readable_sentences() -> None:
    fake = LetterCounts()
    encoder = TextEncoder("fake", "a drawing of a {}.", encode=fake)
    lookup = encoder.lookup(["grizzly_bear", "002.Laysan_Albatross"])
    assert fake.batches[-1] == ["a drawing of a grizzly bear.", "a drawing of a Laysan Albatross."]
    assert (encoder.kind, encoder.dim, lookup.vectors.dtype) == ("text_encoder", 26, np.dtype(np.float32))
    assert lookup.vectors[0, 25] == 2  # the two z of grizzly
    assert lookup.resolutions[0].how == "encoded: a drawing of a grizzly bear."


def test_batches_are_limited_and_keep_the_order() -> None:
    fake, seen = LetterCounts(), list[Progress]()
    names = [f"c{'x' * i}" for i in range(1, 8)]
    lookup = TextEncoder("fake", "{}", encode=fake, batch_size=3, on_progress=seen.append).lookup(names)
    assert [len(batch) for batch in fake.batches[1:]] == [3, 3, 1]
    assert lookup.vectors[:, 23].tolist() == list(range(1, 8))
    assert [(p.completed, p.total) for p in seen] == [(3, 7), (6, 7), (7, 7)]


def test_only_names_without_content_are_missing() -> None:
    lookup = TextEncoder("fake", encode=LetterCounts()).lookup(["--", "cat"])
    assert [r.found for r in lookup.resolutions] == [False, True]
    with pytest.raises(MissingKnowledge):
        require(lookup)


def test_braces_in_names_are_plain_text() -> None:
    fake = LetterCounts()
    TextEncoder("fake", encode=fake).lookup(["{} {0} {x}"])
    assert fake.batches[-1] == ["a photo of a {} {0} {x}"]


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "{}" + "x" * 1000])
def test_templates_need_exactly_one_place_for_the_name(template: str) -> None:
    with pytest.raises(InvalidInput, match="once") as caught:
        TextEncoder("fake", template, encode=LetterCounts())
    assert caught.value.field == "template"


@pytest.mark.parametrize(
    "answer",
    [np.ones((1, 3)), np.ones(2), np.array([[1, 2], [np.nan, 1]]), np.array([[1, 2], [0, 0]]), np.ones((2, 4))],
)
def test_answers_of_a_broken_encoder_are_refused(answer: np.ndarray[Any, Any]) -> None:
    """The encoder has answered with two numbers before."""
    answers = iter([np.ones((1, 2)), answer])
    with pytest.raises(InvalidInput, match="text encoder 'fake' gave"):
        TextEncoder("fake", encode=lambda texts: next(answers)).lookup(["cat", "dog"])


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="the extra 'text' is installed"
)
def test_a_missing_extra_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"'\.\[text\]'") as caught:
        TextEncoder("all-MiniLM-L6-v2")
    assert caught.value.field == "kind"


class Library:
    """Stands in for sentence-transformers and for what it brings along; `answers` are one a load, in turn."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, in_cache: tuple[str, ...] = (), hub: Any = ("some-model",)
    ) -> None:
        """hub: the models it has, or the error it answers with."""
        self.answers: list[Any] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name, members in {
            "sentence_transformers": {"SentenceTransformer": self.load},
            "transformers": {},
            "transformers.utils": {"logging": SimpleNamespace(disable_progress_bar=lambda: None)},
            "huggingface_hub": {
                "try_to_load_from_cache": lambda repo, file: "path" if repo in in_cache else None,
                "repo_exists": lambda repo: self.ask(repo, hub),
            },
        }.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)

    def ask(self, repo: str, hub: Any) -> bool:
        if isinstance(hub, Exception):
            raise hub
        if repo.count("/") > 1:
            raise ValueError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'")
        return repo in hub

    def load(self, model: str, **options: Any) -> Any:
        self.calls.append((model, options))
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return self

    def encode(self, sentences: list[str], *, batch_size: int, show_progress_bar: bool) -> np.ndarray[Any, Any]:
        assert (len(sentences), show_progress_bar) == (batch_size, False)
        return np.array([[len(sentence), 1.0] for sentence in sentences], np.float32)


def test_a_model_is_loaded_on_its_device_without_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    encoder = TextEncoder("some-model", "{}", device="cuda:1")
    assert library.calls == [("some-model", {"device": "cuda:1", "trust_remote_code": False})]
    assert encoder.lookup(["cat", "okapi"]).vectors.tolist() == [[3, 1], [5, 1]]


def test_a_downloaded_model_is_taken_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, in_cache=("sentence-transformers/some-model",))
    TextEncoder("some-model")
    assert [options.get("local_files_only") for _, options in library.calls] == [True]


def test_a_download_that_was_cut_short_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, in_cache=("owner/some-model",))
    library.answers = [OSError("model.safetensors is not in the cache")]
    TextEncoder("owner/some-model")
    assert [options.get("local_files_only") for _, options in library.calls] == [True, None]


@pytest.mark.parametrize("name", ["no-such-model", "owner/no-such-model"])
def test_a_model_that_the_hub_lacks_is_told_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = Library(monkeypatch)
    with pytest.raises(
        InvalidInput, match=f"'{name}' is no folder here, and the hub has no model of that name"
    ) as caught:
        TextEncoder(name)
    assert (caught.value.field, library.calls) == ("model", [])


def test_the_librarys_own_models_need_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, hub=("sentence-transformers/all-MiniLM-L6-v2",))
    TextEncoder("all-MiniLM-L6-v2")
    assert [model for model, _ in library.calls] == ["all-MiniLM-L6-v2"]


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, hub=ConnectionError("Connection refused"))
    with pytest.raises(InvalidInput, match=r"the hub cannot be reached \(ConnectionError\)\. Put the model's folder"):
        TextEncoder("some-model")
    assert library.calls == []


def test_a_folder_may_have_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Messages say what the caller said, not where it lies on the server."""
    library = Library(monkeypatch)
    with pytest.raises(InvalidInput, match="The folder 'mine' holds no text encoder"):
        TextEncoder("mine", folder=tmp_path)
    (tmp_path / "config.json").touch()
    assert TextEncoder("mine", folder=tmp_path).model == "mine"
    library.answers = [OSError("no weights")]
    with pytest.raises(InvalidInput, match="'mine' cannot be loaded"):
        TextEncoder("mine", folder=tmp_path)
    assert [model for model, _ in library.calls] == [str(tmp_path)] * 2


def test_a_fingerprint_tells_models_apart_and_allows_for_rounding() -> None:
    generator = np.random.default_rng(0)
    answer = generator.standard_normal((1, 384))

    def encoder(vectors: np.ndarray[Any, Any]) -> TextEncoder:
        return TextEncoder("fake", encode=lambda texts: vectors)

    expected = encoder(answer).fingerprint()
    assert len(expected) == 8
    assert encoder(3 * answer.astype(np.float16)).has_fingerprint(expected)  # another device's arithmetic
    assert not encoder(answer + 0.1 * generator.standard_normal((1, 384))).has_fingerprint(expected)
    assert not encoder(answer[:, ::-1]).has_fingerprint(expected)
    assert not encoder(answer[:, :200]).has_fingerprint(expected)


@pytest.mark.parametrize("path", ["/no/such/folder", "./folder", "../folder", "~/folder", "a/b/c"])
def test_paths_are_never_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    library = Library(monkeypatch)
    with pytest.raises(InvalidInput, match=f"no folder '{path}' on the machine of the worker") as caught:
        TextEncoder(path)
    assert caught.value.field == "model"
    assert library.calls == []


def test_a_folder_that_is_no_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Library(monkeypatch)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(InvalidInput, match=r"holds no text encoder: it has no modules\.json") as caught:
        TextEncoder(tmp_path)
    assert caught.value.field == "model"
    assert library.calls == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError("We couldn't connect to the hub.\nCheck your connection."),
            "OSError: We couldn't connect to the hub. ",
        ),
        (ValueError("It needs its code.\nPlease pass the argument `trust_remote_code=True`."), "which is never run. "),
        (
            UnpicklingError("Re-running with `weights_only` set to `False` will succeed."),
            "Save it anew as safetensors. ",
        ),
        (RuntimeError("You set `ignore_mismatched_sizes` to `False`."), "other sizes than its config.json says. "),
        (RuntimeError(), "RuntimeError. "),
    ],
)
def test_errors_of_the_library_are_told_without_its_advice(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    library = Library(monkeypatch)
    library.answers = [error]
    with pytest.raises(InvalidInput, match="'some-model' cannot be loaded") as caught:
        TextEncoder("some-model")
    message = str(caught.value)
    assert told + "Give the name of" in message
    assert "trust_remote_code" not in message
    assert "weights_only" not in message


# ---- the real library, where the extra 'text' is installed ---------------------------------------

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sentence-transformers model: BERT of random weights that reads letter by letter, mean-pooled."""
    pytest.importorskip("sentence_transformers", reason="the extra 'text' is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        from transformers import BertConfig, BertModel, BertTokenizerFast

        folder = tmp_path_factory.mktemp("encoder")
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ALPHABET, *(f"##{c}" for c in ALPHABET)]
        BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder / "bert")
        config = BertConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder / "bert")
        modules = [Transformer(str(folder / "bert")), Pooling(16, pooling_mode="mean")]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def test_a_real_model_gives_its_own_vectors(tiny_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = TextEncoder(tiny_model, batch_size=2, device="cpu")
    lookup = encoder.lookup(["grizzly_bear", "fox", "okapi", "x" * 500])
    texts = ["a photo of a grizzly bear", "a photo of a fox", "a photo of a okapi", "a photo of a " + "x" * 500]
    expected = SentenceTransformer(str(tiny_model), device="cpu").encode(texts)
    assert (encoder.dim, lookup.vectors.dtype) == (16, np.dtype(np.float32))
    np.testing.assert_allclose(lookup.vectors, expected, atol=1e-5)
    assert len(np.unique(lookup.vectors.round(4), axis=0)) == 4
    assert sum(weights.numel() for weights in encoder.network.parameters()) > 16 * len(ALPHABET)


def test_a_real_model_is_used_by_many_threads(tiny_model: Path) -> None:
    encoder = TextEncoder(tiny_model, device="cpu")
    names = ["fox", "a bear of a longer name", "okapi"] * 8
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: encoder.lookup([name]).vectors[0], names))
    np.testing.assert_allclose(together, encoder.lookup(names).vectors, atol=1e-5)


def test_code_in_a_models_folder_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "custom.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom torch.nn import Identity as Module\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "custom.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InvalidInput, match="Python code of its own, which is never run"):
        TextEncoder(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_real_model_is_known_again_and_one_without_weights_never_is(tiny_model: Path, tmp_path: Path) -> None:
    """The library fills in missing weights with random numbers, and only logs it."""
    from safetensors.numpy import load_file, save_file

    expected = TextEncoder(tiny_model, device="cpu").fingerprint()
    assert TextEncoder(tiny_model, device="cpu").has_fingerprint(expected)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    few = {name: weight for name, weight in weights.items() if "attention" not in name}
    assert len(few) < len(weights)
    save_file(few, folder / "model.safetensors", metadata={"format": "pt"})
    first = TextEncoder(folder, device="cpu").fingerprint()
    assert not TextEncoder(folder, device="cpu").has_fingerprint(first, within=SAME_LOAD)
