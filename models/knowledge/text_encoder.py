"""Knowledge from a sentence encoder: the vector of a class is that of 'a photo of a <name>'.

Needs the extra 'text' (sentence-transformers), imported only when an encoder is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.base import OnProgress, Progress, ignore_progress
from models.errors import InvalidInput
from models.knowledge.base import Lookup, Resolution, Vectors
from models.knowledge.names import readable_name

DEFAULT_TEMPLATE = "a photo of a {}"
_MAX_TEMPLATE = 1000

Encode = Callable[[list[str]], "np.ndarray[Any, Any]"]
"""Texts to vectors (n_texts, dim)."""


class TextEncoder:
    """Encodes class names with sentence-transformers, or with the callable `encode`.

    model: a model's name on the hub, or the folder of one (loaded without running code from it).
    template: the sentence; `{}` becomes the name with separators as spaces and without a class number.
    """

    kind = "text_encoder"

    def __init__(
        self,
        model: str | Path,
        template: str = DEFAULT_TEMPLATE,
        *,
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
        self._encode = encode if encode is not None else _sentence_transformer(self.model, device)
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


def _sentence_transformer(model: str, device: str | None) -> Encode:
    """The encode function of a sentence-transformers model."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InvalidInput(
            "Text encoders need the extra 'text': pip install 'unseen[text]' on the machine of the worker. "
            "Word vectors, attributes and class vectors work without it.",
            field="kind",
        ) from error
    try:
        loaded = SentenceTransformer(model, device=device, trust_remote_code=False)
    except Exception as error:  # the library raises OSError, ValueError and its hub client's own errors
        raise InvalidInput(
            f"The text encoder {model!r} cannot be loaded ({type(error).__name__}: {error}). Give the name of a "
            f"sentence-transformers model, or the folder of a downloaded one.",
            field="model",
        ) from error

    def encode(sentences: list[str]) -> np.ndarray[Any, Any]:
        return np.asarray(loaded.encode(sentences, batch_size=len(sentences), show_progress_bar=False))

    return encode
