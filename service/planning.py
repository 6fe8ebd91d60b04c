"""Everything that can be known to be wrong with a request before its job is queued, and what it would cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy.orm import Session

from models.backbone_names import BACKBONE_NAMES, FIXED_SIZE_NAMES, network_of
from models.catalog import METHODS, Kind, get_method
from models.errors import InvalidInput, UnknownName, nearest_names
from models.knowledge.base import Resolution
from models.knowledge.names import normalize_class_name, validate_class_names
from models.params import FINETUNED_COST, BackboneParams, EmbeddingSetParams
from service.core import repositories
from service.core.errors import Invalid, Problem, Unavailable
from service.core.settings import Settings
from service.core.tables import Dataset
from service.inference_client import InferenceClient
from service.problems import MAX_PROBLEMS
from service.schemas import ClassifierCreate, EmbeddingSetCreate

MAX_HINTS = 10  # unknown names that are compared with all known ones
# Rates on two CPU cores, a ResNet-50's and the small network's; replaced by measurements after the first job.
DEFAULT_PATCHES_PER_S = 60.0
DEFAULT_TRAINED_PER_S = 200.0
TRAINING_IMAGE_BYTES = 3 * 96**2  # decoded, as workers hold them while a network is trained from scratch


@dataclass
class Plan:
    """Seen and unseen classes as resolved, sizes, and every problem found."""

    seen_classes: tuple[str, ...] = ()
    unseen_classes: tuple[str, ...] = ()
    n_images: int = 0
    n_patches: int = 0
    is_trained: bool = False  # whether its network is trained from scratch first
    is_finetuned: bool = False  # whether its network learns with the clusters
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def add(self, pointer: str, message: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(pointer, message))

    def findings(self) -> dict[str, Any]:
        """What an estimate says about them."""
        problems, warnings = (
            [{"pointer": p.pointer, "message": p.message} for p in found] for found in (self.problems, self.warnings)
        )
        return {"valid": not problems, "problems": problems, "warnings": warnings}

    def raise_if_invalid(self) -> None:
        """Invalid with all problems, if there are any."""
        if self.problems:
            first = self.problems[0]
            more = f" ({len(self.problems) - 1} more in errors)" if len(self.problems) > 1 else ""
            raise Invalid(first.message + more, problems=self.problems)


def dataset_class_sizes(session: Session, dataset: Dataset) -> dict[str, int]:
    """class name -> images that training may use (test rows fixed by the uploader do not count)."""
    if dataset.kind == "features":
        return {name: int(n) for name, n in dataset.summary.get("train_classes", {}).items()}
    return {c.class_name: c.n_images - c.n_test for c in repositories.class_counts(session, dataset.id)}


def plan_classes(
    plan: Plan,
    sizes: dict[str, int],
    seen: Sequence[str] | None,
    unseen: Sequence[str],
    limit: int,
    *,
    spelled: Iterable[str] | None = None,
) -> None:
    """Resolves the class lists: valid, disjoint, seen ones present with images, at least two.

    Names are compared as `normalize_class_name` does and take the spelling of `spelled` (default: of the dataset).
    """
    known = {normalize_class_name(name): name for name in (sizes if spelled is None else spelled)}
    plan.unseen_classes = _resolved(plan, "/unseen_classes", unseen, known, limit)
    keys = set(map(normalize_class_name, plan.unseen_classes))
    if seen is None:
        plan.seen_classes = tuple(n for n, size in sizes.items() if size > 0 and normalize_class_name(n) not in keys)
    else:
        plan.seen_classes = _resolved(plan, "/seen_classes", seen, known, limit)
        overlap = [name for name in plan.seen_classes if normalize_class_name(name) in keys]
        if overlap:
            plan.add("/unseen_classes", f"Both seen and unseen: {_some(overlap)}. A class is one or the other.")
    plan_known(plan, "/seen_classes", plan.seen_classes, sizes, "dataset")
    empty = [name for name in plan.seen_classes if sizes.get(name) == 0]
    if empty:
        plan.add(
            "/seen_classes", f"These classes have no training images: {_some(empty)}. Add some, or leave them out."
        )
    if len(plan.seen_classes) < 2:
        plan.add(
            "/seen_classes", f"At least 2 seen classes with images are needed; there are {len(plan.seen_classes)}."
        )
    plan.n_images = sum(sizes.get(name, 0) for name in plan.seen_classes)


def plan_known(plan: Plan, pointer: str, names: Iterable[str], known: Collection[str], where: str) -> None:
    """Every name is one of `known`; the first few that are not get the nearest one."""
    missing = [name for name in names if name not in known]
    for name in missing[:MAX_HINTS]:
        near = nearest_names(name, list(known))
        hint = f" Did you mean {near[0]!r}?" if near else ""
        plan.add(pointer, f"The {where} has no class {name!r}.{hint}")
    if len(missing) > MAX_HINTS:
        plan.add(pointer, f"Nor has it {len(missing) - MAX_HINTS:,} more: {_some(missing[MAX_HINTS:])}.")


def plan_unseen(plan: Plan, is_seen: Mapping[str, bool]) -> None:
    """No unseen class is one whose images made its embedding; is_seen: of each class of the embedding set."""
    learned = [name for name in plan.unseen_classes if is_seen.get(name)]
    if learned:
        plan.add(
            "/unseen_classes",
            f"The embedding set learned from images of {_some(learned)}, which are therefore not unseen. Leave them "
            "out, or use an embedding set in which they are unseen.",
        )


def _resolved(plan: Plan, pointer: str, names: Sequence[str], known: Mapping[str, str], limit: int) -> tuple[str, ...]:
    try:
        accepted = validate_class_names(names, max_count=limit, field=pointer[1:])
    except InvalidInput as error:
        plan.add("/" + (error.field or pointer[1:]), str(error))
        return ()
    return tuple(known.get(normalize_class_name(name), name) for name in accepted)


def plan_embedding_set(session: Session, dataset: Dataset, body: EmbeddingSetCreate, settings: Settings) -> Plan:
    """The whole check of a POST /v1/embedding-sets, but for the knowledge lookup."""
    plan = Plan()
    params: EmbeddingSetParams = body.params
    sizes = dataset_class_sizes(session, dataset)
    plan_classes(plan, sizes, body.seen_classes, body.unseen_classes, settings.max_classes)
    named: list[tuple[str, str, Kind]] = [
        ("/method", body.method, "embedding"),
        ("/relation", body.relation, "relation"),
    ]
    for pointer, name, kind in named:
        try:
            get_method(name, kind)
        except UnknownName as error:
            plan.add(pointer, str(error))
    if dataset.kind == "images":
        plan_backbone(plan, params.backbone, settings, "/params/backbone")
        plan.is_trained = params.backbone.weights == "scratch"
        plan.is_finetuned = body.method == "vgse" and params.clustering.mode == "finetune"
    elif body.method == "vgse" and params.clustering.mode == "finetune":
        plan.add("/params/clustering/mode", "Fine-tuning needs images; this dataset holds features.")
    per_image = 1 if params.patches.method == "whole" or dataset.kind == "features" else params.patches.n_patches
    plan.n_patches = plan.n_images * per_image
    n_clusters = {"vgse": params.clustering.n_clusters, "kmeans": params.kmeans.n_clusters}.get(body.method, 1)
    if plan.n_images and plan.n_patches < n_clusters:
        section = "clustering" if body.method == "vgse" else "kmeans"
        plan.add(
            f"/params/{section}/n_clusters",
            f"{n_clusters} clusters need at least as many patches; {plan.n_images} images give about {plan.n_patches}. "
            "Lower n_clusters or add images.",
        )
    plan_validation(plan, params.validation_classes, "/params/validation_classes")
    return plan


def plan_validation(plan: Plan, validation: Sequence[str] | None, pointer: str) -> None:
    """Validation classes lie inside the seen ones, each named once, and leave at least two."""
    twice = sorted(name for name, count in Counter(validation or ()).items() if count > 1)
    if twice:
        plan.add(pointer, f"Named more than once: {_some(twice)}. Name each validation class once.")
    outside = sorted(set(validation or ()) - set(plan.seen_classes)) if plan.seen_classes else []
    if outside:
        plan.add(pointer, f"Validation classes must be seen classes; these are not: {_some(outside)}.")
    elif validation and len(plan.seen_classes) - len(set(validation)) < 2:
        plan.add(pointer, "Validation classes must leave at least 2 seen classes to train on.")


def plan_backbone(plan: Plan, backbone: BackboneParams, settings: Settings, pointer: str) -> None:
    """The network exists, and its weights can be had."""
    if backbone.name not in BACKBONE_NAMES:
        plan.add(f"{pointer}/name", str(UnknownName("backbone", backbone.name, BACKBONE_NAMES)))
    if backbone.weights == "scratch" and backbone.name != "small_cnn":
        plan.add(f"{pointer}/weights", "Only 'small_cnn' is trained from scratch; give another network weights.")
    elif backbone.weights == "imagenet" and backbone.name == "small_cnn":
        plan.add(f"{pointer}/weights", "'small_cnn' has no ImageNet weights; use 'scratch'.")
    elif backbone.weights == "imagenet":
        _warn_of_download(plan, backbone.name, settings, pointer)
    elif backbone.weights not in ("scratch", "random"):
        problem = _weights_problem(backbone.weights, settings)
        if problem:
            plan.add(f"{pointer}/weights", problem)
        elif (of_file := network_of(backbone.weights)) and not backbone.name.startswith(of_file):
            plan.add(
                f"{pointer}/name",
                f"{backbone.weights!r} is named as weights of {of_file!r}, not of {backbone.name!r}. Set the name to "
                f"{of_file!r}, give another file, or rename this one.",
            )


def plan_features(plan: Plan, method: str) -> None:
    """A dataset of precomputed features serves the method: they are pooled, one vector an image."""
    known = {row.name: row for row in METHODS if row.kind == "classifier"}
    if method in known and known[method].features == "spatial":
        plan.add(
            "/method",
            f"{method!r} looks at the places of a feature map, and this dataset holds precomputed features, one vector "
            "an image. Use a dataset of images, or a method whose 'features' in GET /v1/methods is 'pooled'.",
        )


def plan_tuning(plan: Plan, params: Mapping[str, Any], network: str) -> None:
    """The network's last layers can be trained apart, where the classifier's `params` ask for it."""
    if params.get("mode") == "finetune" and network in FIXED_SIZE_NAMES:
        plan.add(
            "/params/mode",
            f"The last layers of {network!r} cannot be trained apart from the others. Use a convolutional network, or "
            "mode 'frozen'.",
        )


def plan_dimensions(plan: Plan, body: ClassifierCreate, dim: int | None, named: Sequence[str]) -> None:
    """Names fit the `dim` dimensions of the class embeddings, and vectors are given to a method that takes some.

    named: what the knowledge itself calls them.
    """
    names = body.dimension_names
    if names is not None and dim is not None and len(names) != dim:
        plan.add("/dimension_names", f"{len(names)} names for class embeddings of {dim} dimensions; give {dim}.")
    if body.dimension_knowledge_id is None:
        return
    takers = [row.name for row in METHODS if row.takes_dimension_vectors]
    if body.method not in takers:
        plan.add(
            "/dimension_knowledge_id",
            f"{body.method!r} takes no vectors of dimensions; leave it out. Methods that do: {', '.join(takers)}.",
        )
    elif names is None and not named:
        plan.add(
            "/dimension_names",
            "Nothing says what the dimensions are called, so their vectors cannot be looked up: give their names.",
        )


def _warn_of_download(plan: Plan, network: str, settings: Settings, pointer: str) -> None:
    """No file of this machine's cache has the network's name, however its words are separated."""
    files = (_letters(path.name) for path in (settings.cache_dir / "weights").glob("*"))
    if network in BACKBONE_NAMES and not any(name.startswith(_letters(network)) for name in files):
        message = (
            f"This machine has no ImageNet weights of {network!r} yet; the worker downloads them unless it has them. "
            "If it has no way out, put a file into the weights directory and name it."
        )
        plan.warnings.append(Problem(f"{pointer}/weights", message))


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _weights_problem(name: str, settings: Settings) -> str | None:
    if PurePosixPath(name).name != name or name.startswith("."):
        return f"{name!r} is no plain file name; weights are named, not addressed by path."
    if settings.weights_dir is None:
        return f"{name!r} is no known choice (imagenet, scratch, random), and the server has no UNSEEN_WEIGHTS_DIR."
    if not name.endswith((".pth", ".safetensors")):
        return f"{name!r} is neither .pth nor .safetensors."
    present = sorted(path.name for path in settings.weights_dir.glob("*"))
    if name not in present:
        return str(UnknownName("weights file", name, present))
    return None


def estimate(session: Session, plan: Plan, params: EmbeddingSetParams) -> dict[str, Any]:
    """Patches, seconds and memory of an embedding job; the rates come from the last job with this backbone."""
    measured = repositories.measured_rate(session, params.backbone.name)
    rate = measured[1] if measured else DEFAULT_PATCHES_PER_S
    where = f"measured by {measured[0]}" if measured else "a guess for two CPU cores; no finished job to go by"
    training_s, training_basis = _training_estimate(session, plan, params) if plan.is_trained else (0.0, "")
    # both runs at their longest: the one that chooses the epoch, and the one that counts
    finetuning_s = 2 * params.clustering.epochs * FINETUNED_COST * plan.n_patches / rate if plan.is_finetuned else 0.0
    if plan.is_finetuned:
        training_basis += f"; at most {finetuning_s:.0f} s to fine-tune the network, a guess from that rate"
    return {
        **plan.findings(),
        "n_images": plan.n_images,
        "n_patches": plan.n_patches,
        "seconds": round(plan.n_patches / rate + training_s + finetuning_s, 1),
        # features stay on disk; the heads, a batch, the network and what it is trained on are what a worker holds
        "memory_bytes": 1_500_000_000
        + 4 * params.clustering.batch_size * (2048 + 4 * params.clustering.n_clusters)
        + (plan.n_images * TRAINING_IMAGE_BYTES if plan.is_trained else 0)
        # pixels kept between epochs, and the activations of a step
        + (min(3 * plan.n_patches * params.patches.size**2, 2 << 30) + (1 << 30) if plan.is_finetuned else 0),
        "basis": f"{rate:.0f} patches/s, {where}{training_basis}",
    }


def _training_estimate(session: Session, plan: Plan, params: EmbeddingSetParams) -> tuple[float, str]:
    """Seconds to train the network from scratch, and how they were found."""
    measured = repositories.measured_training_rate(session, params.backbone.name)
    rate = measured or DEFAULT_TRAINED_PER_S
    seconds = params.scratch.epochs * plan.n_images / rate
    where = "measured" if measured else "a guess"
    return seconds, f"; {seconds:.0f} s to train the network at {rate:.0f} images/s, {where}; none if it was before"


async def check_knowledge(inference: InferenceClient, knowledge_id: str, plan: Plan, *, required: bool) -> None:
    """Every class must resolve, and should with all of its words. Unless `required`, goes on without the inference
    process: the job checks again."""
    if plan.problems:
        return
    try:
        names = [*plan.seen_classes, *plan.unseen_classes]
        found = (await inference.lookup(knowledge_id, names))["resolutions"]
    except Unavailable:
        if required:
            raise
        return
    unseen = set(plan.unseen_classes)
    missing = [entry for entry in found if not entry["found"]]
    for entry in missing[:MAX_PROBLEMS]:
        where = "/unseen_classes" if entry["name"] in unseen else "/seen_classes"
        near = entry["suggestions"][:3]
        hint = f" Near entries: {', '.join(map(repr, near))}." if near else ""
        plan.add(where, f"The knowledge source has no vector for {entry['name']!r}.{hint}")
    partial = [(entry["name"], warning) for entry in found if (warning := Resolution(**entry).warning) is not None]
    for name, warning in partial[:MAX_PROBLEMS]:
        plan.warnings.append(Problem("/unseen_classes" if name in unseen else "/seen_classes", warning))
    if len(missing) > MAX_PROBLEMS:
        plan.add(
            "", f"It lacks {len(missing) - MAX_PROBLEMS:,} more; GET /v1/knowledge/{knowledge_id}/lookup tells which."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
