"""The contract of every zero-shot classifier, and the choosing on validation classes that all of them share.

`fit` gets training images of seen classes and nothing else, so no test image can leak into it. Groups of seen classes
take turns in standing for unseen ones, the named validation classes first (a fold each): a trial model learns from the
other seen classes, less a held-out slice of their images. Settings are chosen by T1 on the fold's images, gamma by H on
them and the slice, the temperature by likelihood on both; then the model learns from all seen classes with that choice.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.base import FloatArray, IntArray, LabelledFeatures, OnProgress, Progress, ignore_progress
from models.catalog import get_method
from models.device_memory import with_smaller_batches
from models.errors import InvalidInput, NotFitted, ShapeMismatch, TooFewSamples
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.calibration import Calibration, FoldScores, calibrate
from models.zero_shot.checkpoints import Checkpoints, Tape, digest
from models.zero_shot.checks import EmbeddingsOf, as_unseen, checked, positions, real_numbers, unit_embeddings
from models.zero_shot.folds import Rows, class_folds, held_out_slice
from models.zero_shot.scaling import FeatureScaling, Scaling

Setting = dict[str, float]
History = list[dict[str, float]]

_FORMAT = 1
_WEIGHTS, _MANIFEST = "model.safetensors", "manifest.json"


class ZeroShotModel(ABC):
    """Scores images against any classes that have an embedding, seen or not.

    Learned by `fit`: class_names_ (seen classes, in order), history_ (one dict an epoch), best_epoch_ (None where the
    method has no epochs), gamma_ (for calibrated stacking, on the scale of the scores), temperature_
    (softmax(scores / temperature_) is the probability), validation_ (what was chosen, on what, and why).
    """

    method: ClassVar[str]
    params_class: ClassVar[type[Params]]
    is_joint: bool = False
    """Whether a class's scores depend on which other classes are scored with it."""

    def __init__(self, params: Params | None = None, *, seed: int = 0, device: str = "cpu") -> None:
        self.params = params if params is not None else self.params_class()
        if not isinstance(self.params, self.params_class):
            raise InvalidInput(
                f"{type(self).__name__} takes {self.params_class.__name__}, not {type(params).__name__}.",
                field="params",
            )
        self._given = self.params  # a fit may settle or change some; the next one starts from these
        self.seed = seed
        self.device = device
        self._fitted = False
        self._tape = Tape(None, "")

    # -- what a method writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        """Learn from `train` with `setting` (None: the defaults); return the setting in full, and the history."""

    @abstractmethod
    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        """Learn from `train` with each setting there is; one dict each, in a fixed order, with its `validation_t1`.

        `validation` holds classes apart from the training ones. Empty where there is nothing to choose.
        """

    @abstractmethod
    def _pick(self, tried: list[History]) -> Setting:
        """The setting that does best over what `_try_settings` found on each fold."""

    @abstractmethod
    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        """Scores (n_images, n_classes) of scaled features and unit embeddings."""

    @abstractmethod
    def _state(self) -> dict[str, FloatArray]:
        """The learned arrays."""

    @abstractmethod
    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        """Take back what `_state` gave."""

    @abstractmethod
    def _scaling_kind(self) -> Scaling:
        """Scaling of the features that the parameters ask for."""

    # -- what callers use ----------------------------------------------------------------------------------------------

    def fit(
        self,
        features: LabelledFeatures,
        class_embeddings: FloatArray,
        *,
        validation_classes: Sequence[str] = (),
        validation_embeddings: FloatArray | EmbeddingsOf | None = None,
        on_progress: OnProgress = ignore_progress,
        checkpoints: Checkpoints | None = None,
    ) -> Self:
        """Learn from training images of seen classes; row i of `class_embeddings` belongs to class i of `features`.

        validation_classes: seen classes to choose by, as if they were unseen. None given: defaults, gamma 0.
        validation_embeddings: what classes' embeddings would be without their images, as unseen classes have theirs:
        a function from class names to rows, asked for each fold, or the rows of the validation classes (which are
        then the only fold). Left out, their rows of `class_embeddings` stand in.
        checkpoints: where epochs are kept; a fit of the same inputs goes on from there, to the same bits on a CPU.
        Where batches do not fit the device's memory, it is done with smaller ones: `params` then hold their size, and
        validation_ says so under `out_of_memory`.
        Raises ShapeMismatch, InvalidInput, TooFewSamples, OutOfDeviceMemory; lets `Cancelled` from `on_progress` pass.
        """
        self._fitted = False
        raw, embeddings, folds = self._prepared(features, class_embeddings, validation_classes, validation_embeddings)
        rows = Rows(raw, features.labels.astype(np.int64), embeddings)

        def train(params: Params) -> None:
            self.params = params
            self._tape = Tape(checkpoints, self._identity(rows, folds) if checkpoints else "")
            self._fit(rows, features.class_names, folds, on_progress)

        told = with_smaller_batches(self.params, train, lambda note: on_progress(Progress("training", 0, note=note)))
        if told:
            self.validation_["out_of_memory"] = told
        self._dims = (raw.shape[1], embeddings.shape[1])
        self._fitted = True
        return self

    def _fit(
        self,
        raw: Rows,
        names: Sequence[str],
        folds: list[tuple[IntArray, FloatArray]],
        on_progress: OnProgress,
    ) -> None:
        """Choose on the folds, then learn from all rows, whose features are not scaled yet."""
        setting, tried, calibration = self._choose(raw.features, raw.labels, names, folds, on_progress)
        self._scaling = FeatureScaling(self._scaling_kind()).fit(raw.features)
        rows = Rows(self._scaling(raw.features), raw.labels, raw.embeddings)
        used, trained = self._learn(rows, setting, on_progress)
        self.class_names_ = tuple(names)
        self.history_ = tried or trained
        self.best_epoch_ = int(used["epoch"]) if "epoch" in used else None
        # gamma and temperature were found relative to how far a model's scores spread.
        spread = self._spread(rows)
        self.gamma_, self.temperature_ = calibration.gamma * spread, calibration.temperature * spread
        self.validation_ = {**calibration.report, "setting": used}

    def assess(
        self,
        features: LabelledFeatures,
        class_embeddings: FloatArray,
        *,
        validation_classes: Sequence[str],
        validation_embeddings: FloatArray | EmbeddingsOf | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> dict[str, Any]:
        """What `fit` would report as validation_, without learning from all seen classes in the end."""
        raw, _, folds = self._prepared(features, class_embeddings, validation_classes, validation_embeddings)
        labels = features.labels.astype(np.int64)
        report: dict[str, Any] = {}

        def train(params: Params) -> None:
            self.params = params
            report.update(self._choose(raw, labels, features.class_names, folds, on_progress)[2].report)

        with_smaller_batches(self.params, train, lambda note: on_progress(Progress("choosing", 0, note=note)))
        return report

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        """Compatibility (n_images, n_classes), float32, of raw features with any classes' embeddings; no refit."""
        self._require_fitted()
        features = real_numbers(features, "features")
        if features.ndim != 2 or features.shape[1] != self._dims[0]:
            raise ShapeMismatch(f"features {features.shape} must be (n_images, {self._dims[0]}), as in training.")
        if not np.isfinite(features).all():
            bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise InvalidInput(f"The features of image {bad} hold NaN or infinite values. Remove or repair that row.")
        embeddings = unit_embeddings(class_embeddings)
        if embeddings.shape[1] != self._dims[1]:
            raise ShapeMismatch(
                f"class_embeddings {embeddings.shape} must be (n_classes, {self._dims[1]}), as in training."
            )
        return self._compatibility(self._scaling(features), embeddings)

    def save(self, directory: Path) -> None:
        """Write model.safetensors and manifest.json into `directory`, made if missing."""
        self._require_fitted()
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {**self._state(), **self._scaling.state()}
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, directory / _WEIGHTS)
        manifest = {
            "format": _FORMAT,
            "method": self.method,
            "params": self.params.model_dump(mode="json"),
            "seed": self.seed,
            "feature_dim": self._dims[0],
            "embedding_dim": self._dims[1],
            "class_names": list(self.class_names_),
            "gamma": self.gamma_,
            "temperature": self.temperature_,
            "best_epoch": self.best_epoch_,
            "history": self.history_,
            "validation": self.validation_,
        }
        (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: str = "cpu") -> Self:
        """The classifier that was saved in `directory`; InvalidInput where it is none of this class."""
        manifest = _read_manifest(directory)
        if manifest["method"] != cls.method:
            raise InvalidInput(f"The saved classifier is of method {manifest['method']!r}, not {cls.method!r}.")
        model = cls(cls.params_class.model_validate(manifest["params"]), seed=int(manifest["seed"]), device=device)
        model._dims = (int(manifest["feature_dim"]), int(manifest["embedding_dim"]))
        try:
            state = load_file(directory / _WEIGHTS)
            model._scaling = FeatureScaling.restore(model._scaling_kind(), state)
            model._restore(state)
        except (OSError, KeyError, SafetensorError) as error:
            raise InvalidInput(f"{_WEIGHTS} is missing, cut short or of another format: {error}") from error
        model.class_names_ = tuple(manifest["class_names"])
        model.gamma_, model.temperature_ = float(manifest["gamma"]), float(manifest["temperature"])
        model.best_epoch_, model.history_ = manifest["best_epoch"], manifest["history"]
        model.validation_ = manifest["validation"]
        model._fitted = True
        return model

    # -- shared work ---------------------------------------------------------------------------------------------------

    def _require_fitted(self) -> None:
        if not self._fitted:
            raise NotFitted(f"{type(self).__name__} has learned nothing yet. Call fit or load first.")

    def _prepared(
        self,
        features: LabelledFeatures,
        class_embeddings: FloatArray,
        validation_classes: Sequence[str],
        validation_embeddings: FloatArray | EmbeddingsOf | None,
    ) -> tuple[FloatArray, FloatArray, list[tuple[IntArray, FloatArray]]]:
        """Checked features and unit embeddings; of each fold its classes, and all embeddings while these are unseen."""
        self.params = self._given
        raw, embeddings = checked(features, class_embeddings)
        names = features.class_names
        held_classes = positions(names, validation_classes)
        is_table = validation_embeddings is not None and not callable(validation_embeddings)
        n_folds = 1 if is_table else int(getattr(self.params, "folds", 1))
        folds = [
            (fold, as_unseen(embeddings, fold, names, validation_embeddings))
            for fold in class_folds(len(names), held_classes, n_folds, self.seed)
        ]
        self._meet(features, embeddings)
        return raw, embeddings, folds

    def _meet(self, features: LabelledFeatures, embeddings: FloatArray) -> None:  # noqa: B027 - most have no need
        """Take in what a method needs to know of checked training features and unit embeddings before it learns."""

    def _identity(self, raw: Rows, folds: Sequence[tuple[IntArray, FloatArray]]) -> str:
        """Digest of all that decides a fit."""
        about = f"{self.method} {self.params.model_dump_json()} {self.seed}"
        return digest(about, raw.features, raw.labels, raw.embeddings, *(array for fold in folds for array in fold))

    def _choose(
        self,
        raw: FloatArray,
        labels: IntArray,
        names: Sequence[str],
        folds: list[tuple[IntArray, FloatArray]],
        on_progress: OnProgress,
    ) -> tuple[Setting | None, History, Calibration]:
        """The setting that does best over the folds, what was tried, and gamma and temperature with that setting.

        folds: the classes of each, and all classes' embeddings while these stand for unseen ones.
        """
        slice_rows, learn_rows = held_out_slice(labels, self.seed)
        trials = []
        for fold, embeddings in folds:
            trial, rows, train, held = self._trial(raw, labels, embeddings, fold, learn_rows)
            kept = np.setdiff1d(np.arange(len(names)), fold)
            trials.append((trial, rows.of(kept, slice_rows), train, held))  # not all rows: there may be many folds
        tried = [
            trial._try_settings(train, held, _part(on_progress, "choosing", i, len(trials)))
            for i, (trial, _, train, held) in enumerate(trials)
            if len(held.embeddings) > 1  # among a single class, everything is right
        ]
        tried = [history for history in tried if history]
        setting = self._pick(tried) if tried else None
        outcomes = []
        for i, (trial, seen_slice, train, held) in enumerate(trials):
            fold, embeddings = folds[i]
            kept = np.setdiff1d(np.arange(len(names)), fold)
            trial._learn(train, setting, _part(on_progress, "calibrating", i, len(trials)))
            scores = trial._compatibility(
                np.concatenate([seen_slice.features, held.features]), embeddings[np.r_[kept, fold]]
            )
            truth = np.concatenate([seen_slice.labels, held.labels + len(kept)])
            outcomes.append(FoldScores(scores / trial._spread(train), truth, len(kept), tuple(names[c] for c in fold)))
        return setting, mean_history(tried), calibrate(outcomes)

    def _trial(
        self, raw: FloatArray, labels: IntArray, embeddings: FloatArray, fold: IntArray, learn_rows: IntArray
    ) -> tuple[Self, Rows, Rows, Rows]:
        """An unfitted model of the same parameters; all rows as it scales them; its training rows; the fold's rows."""
        kept = np.setdiff1d(np.arange(len(embeddings)), fold)
        if len(kept) < 2:
            raise TooFewSamples(
                f"{len(kept)} seen class(es) remain beside {len(fold)} for validation; at least 2 are needed. "
                "Name fewer validation classes or add seen ones.",
                field="validation_classes",
            )
        scaling = FeatureScaling(self._scaling_kind()).fit(raw[learn_rows[~np.isin(labels[learn_rows], fold)]])
        rows = Rows(scaling(raw), labels, embeddings)
        trial = type(self)(self.params, seed=self.seed, device=self.device)
        trial._tape = self._tape
        return trial, rows, rows.of(kept, learn_rows), rows.of(fold)

    def _spread(self, rows: Rows) -> float:
        """How far apart the scores of one image lie: root mean square about the image's mean."""
        # A few thousand images measure it well; the step keeps every class in.
        scores = self._compatibility(rows.features[:: max(1, len(rows.features) // 4096)], rows.embeddings)
        return float(np.sqrt(np.mean((scores - scores.mean(axis=1, keepdims=True)) ** 2))) or 1.0

    def _validation_t1(self, validation: Rows) -> float:
        """T1 of the present state on validation images among the validation classes."""
        scores = self._compatibility(validation.features, validation.embeddings)
        return zsl_report(scores, validation.labels, [str(i) for i in range(len(validation.embeddings))]).t1


def create_classifier(name: str, params: Params | None = None, *, seed: int = 0, device: str = "cpu") -> ZeroShotModel:
    """A classifier of the catalog, not yet fitted; UnknownName where there is none of that name."""
    return _implementation(name)(params, seed=seed, device=device)


def load_classifier(directory: Path, *, device: str = "cpu") -> ZeroShotModel:
    """The saved classifier in `directory`, of whichever method it is."""
    return _implementation(_read_manifest(directory)["method"]).load(directory, device=device)


def _implementation(name: str) -> type[ZeroShotModel]:
    module, _, attribute = get_method(name, "classifier").path.partition(":")
    implementation: type[ZeroShotModel] = getattr(import_module(module), attribute)
    return implementation


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / _MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{_MANIFEST} cannot be read: {error}. Save the classifier again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise InvalidInput(f"{_MANIFEST} is not of format {_FORMAT}. Save the classifier again with this version.")
    return manifest


def mean_history(histories: list[History]) -> History:
    """What the folds tried, number by number the mean; a fold that stopped early stays where it was.

    The `epoch` itself is the longest fold's.
    """
    longest = max((len(history) for history in histories), default=0)
    return [
        {
            key: float((np.max if key == "epoch" else np.mean)([h[min(i, len(h) - 1)][key] for h in histories]))
            for key in histories[0][0]
        }
        for i in range(longest)
    ]


def _part(on_progress: OnProgress, phase: str, index: int, n_parts: int) -> OnProgress:
    """An `on_progress` for part `index` of `n_parts` equal ones, told as one phase."""

    def report(progress: Progress) -> None:
        total = progress.total or 1
        on_progress(Progress(phase, index * total + progress.completed, n_parts * total, progress.metrics))

    return report
