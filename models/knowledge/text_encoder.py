"""Knowledge from a sentence encoder: the vector of a class is that of 'a photo of a <name>'.

Needs the extra 'text' (sentence-transformers), imported only when an encoder is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any

import numpy as np

from models.base import OnProgress, Progress, ignore_progress
from models.errors import EXTRA, InvalidInput
from models.knowledge.base import Lookup, Resolution, Vectors
from models.knowledge.names import readable_name

DEFAULT_TEMPLATE = "a photo of a {}"
_MAX_TEMPLATE = 1000
_PROBE = "a photo of a grizzly bear, two foxes and 3 zebras"
SAME_MODEL, SAME_LOAD = 0.02, 0.001
"""How far numbers of two fingerprints may lie apart: on whatever devices; of two loads one after the other."""
_OWNERS = ("", "sentence-transformers/")  # where the library looks for a hub model
_WHAT_TO_GIVE = "Give the name of a sentence-transformers model, or the folder of a downloaded one."

Encode = Callable[[list[str]], "np.ndarray[Any, Any]"]
"""Texts to vectors (n_texts, dim)."""


class TextEncoder:
    """Encodes class names with sentence-transformers, or with the callable `encode`.

    model: a model's name on the hub, or the folder of one (loaded without running code from it).
    folder: where `model` lies, if its name does not tell.
    template: the sentence; `{}` becomes the name with separators as spaces and without a class number.
    """

    kind = "text_encoder"

    def __init__(
        self,
        model: str | Path,
        template: str = DEFAULT_TEMPLATE,
        *,
        folder: Path | None = None,
        encode: Encode | None = None,
        batch_size: int = 64,
        device: str | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        check_template(template)
        if batch_size < 1:
            raise InvalidInput(f"batch_size must be at least 1, not {batch_size}.", field="batch_size")
        self.model = str(model)
        self.template = template
        self._batch_size = batch_size
        self._on_progress = on_progress
        # An attribute, not hidden in a closure: who keeps encoders can see how large they are.
        self.network = None if encode is not None else _sentence_transformer(self.model, folder, device)
        self._encode = encode if encode is not None else _one_at_a_time(self.network)
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """Length of a vector; the first call encodes one text."""
        if self._dim is None:
            self._encode_batch([self._sentence("thing")])
        assert self._dim is not None
        return self._dim

    def lookup(self, names: Sequence[str]) -> Lookup:
        """Vectors (n_names, dim) of `names`. Only a name without letters or digits is not found."""
        sentences = [self._sentence(name) for name in names]
        known = [i for i, name in enumerate(names) if readable_name(name)]
        vectors = np.zeros((len(names), self.dim), np.float32)
        for start in range(0, len(known), self._batch_size):
            rows = known[start : start + self._batch_size]
            vectors[rows] = self._encode_batch([sentences[i] for i in rows])
            self._on_progress(Progress("encode", start + len(rows), len(known)))
        resolutions = tuple(
            Resolution(name, True, f"encoded: {sentence}", (sentence,))
            if readable_name(name)
            else Resolution(name, False, "not found", missing_tokens=(name,))
            for name, sentence in zip(names, sentences, strict=True)
        )
        return Lookup(tuple(names), vectors, resolutions)

    def fingerprint(self) -> list[float]:
        """Eight numbers that tell one model from another, by what it answers."""
        vector = self._encode_batch([_PROBE])[0].astype(np.float64)
        directions = np.cos(np.outer(np.arange(1, 9), np.arange(len(vector), dtype=np.float64) ** 2))
        return [round(float(x), 4) for x in np.sqrt(2) * directions @ vector / np.linalg.norm(vector)]

    def has_fingerprint(self, expected: Sequence[float], within: float = SAME_MODEL) -> bool:
        """Whether this is the model whose `fingerprint` was `expected`, on whatever device that was taken."""
        return bool(np.abs(np.array(self.fingerprint()) - np.array(expected)).max() <= within)

    def _sentence(self, name: str) -> str:
        return self.template.replace("{}", readable_name(name))

    def _encode_batch(self, sentences: list[str]) -> Vectors:
        """(len(sentences), dim) float32, checked: encoders are other people's code."""
        vectors = np.asarray(self._encode(sentences), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(sentences):
            raise InvalidInput(f"The text encoder {self.model!r} gave {vectors.shape} for {len(sentences)} texts.")
        if self._dim not in (None, vectors.shape[1]):
            raise InvalidInput(f"The text encoder {self.model!r} gave {vectors.shape[1]} numbers, before {self._dim}.")
        if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
            raise InvalidInput(f"The text encoder {self.model!r} gave NaN, infinite or zero vectors.")
        self._dim = int(vectors.shape[1])
        return vectors


def check_template(template: str) -> None:
    """InvalidInput unless `template` has exactly one `{}` and a sensible length."""
    if template.count("{}") != 1 or len(template) > _MAX_TEMPLATE:
        raise InvalidInput(
            f"The template {template[:80]!r} must contain {{}} once, where the class name goes, and at most "
            f"{_MAX_TEMPLATE} characters; for example {DEFAULT_TEMPLATE!r}.",
            field="template",
        )


def _sentence_transformer(model: str, folder: Path | None, device: str | None) -> Any:
    """The model, or InvalidInput with what is wrong with it. `folder`: where it is, if `model` does not tell."""
    try:
        import sentence_transformers  # noqa: F401 - only to know whether it is there
    except ImportError as error:
        raise InvalidInput(
            f"Text encoders need the extra 'text' on the machine of the worker: {EXTRA.format('text')}. "
            "Word vectors, attributes and class vectors work without it.",
            field="kind",
        ) from error
    _check_folder(model, folder or Path(model))
    try:
        return _load(str(folder or model), device)
    except InvalidInput:
        raise
    except Exception as error:  # the library raises OSError, ValueError and its hub client's own errors
        raise InvalidInput(
            f"The text encoder {model!r} cannot be loaded: {_reason(error)} {_WHAT_TO_GIVE}", field="model"
        ) from error


def _one_at_a_time(network: Any) -> Encode:
    """The encode function of a sentence-transformers model, whose tokenizer two threads must not use at once."""
    turn = Lock()

    def encode(sentences: list[str]) -> np.ndarray[Any, Any]:
        with turn:
            return np.asarray(network.encode(sentences, batch_size=len(sentences), show_progress_bar=False))

    return encode


def _load(model: str, device: str | None) -> Any:
    """The model from its folder, from the local cache, or from the hub."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if _is_downloaded(model):
        # The hub is not asked again: jobs agree with each other, and where there is no network nobody waits for it.
        with suppress(Exception):  # the download was cut short
            return SentenceTransformer(model, device=device, trust_remote_code=False, local_files_only=True)
    elif not Path(model).is_dir():
        _ask_the_hub(model)
    return SentenceTransformer(model, device=device, trust_remote_code=False)


def _is_downloaded(model: str) -> bool:
    """Whether the local cache has a hub model, together with the list of its parts (or the word that there is none)."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name that the hub could have
        return any(try_to_load_from_cache(owner + model, "modules.json") is not None for owner in _OWNERS)
    return False


def _ask_the_hub(model: str) -> None:
    """InvalidInput for a model that the hub lacks, or if it cannot be reached: the library would try for a minute."""
    from huggingface_hub import repo_exists

    try:
        exists = any(repo_exists(owner + model) for owner in _OWNERS)
    except ValueError:  # no name that the hub could have
        exists = False
    except Exception as error:  # the hub client's own errors, and those of its HTTP library
        raise InvalidInput(
            f"The text encoder {model!r} is no folder here, and the hub cannot be reached ({type(error).__name__}). "
            "Put the model's folder on the machine of the worker, and give its path (its name in UNSEEN_WEIGHTS_DIR).",
            field="model",
        ) from error
    if not exists:
        raise InvalidInput(
            f"The text encoder {model!r} is no folder here, and the hub has no model of that name. {_WHAT_TO_GIVE}",
            field="model",
        )


def _check_folder(model: str, folder: Path) -> None:
    """InvalidInput for a path where no model is. The library would ask the hub for it, or complain about its own."""
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
            raise InvalidInput(
                f"The folder {model!r} holds no text encoder: it has no modules.json and no config.json. "
                f"{_WHAT_TO_GIVE}",
                field="model",
            )
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InvalidInput(f"There is no folder {model!r} on the machine of the worker. {_WHAT_TO_GIVE}", field="model")


def _reason(error: Exception) -> str:
    """A sentence. The library's own advice would be to trust the model."""
    if isinstance(error, UnpicklingError):
        return "its weights are a pickle of more than numbers, which is never opened. Save it anew as safetensors."
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, which is never run."
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other sizes than its config.json says."
    lines = [type(error).__name__, *str(error).strip().splitlines()[:1]]
    return ": ".join(lines).rstrip(".")[:300] + "."
