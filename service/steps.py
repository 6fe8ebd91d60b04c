"""The steps from photos to predictions, as `unseen embed` and `unseen demo` take them: over REST, with bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from models.backbone_names import network_of
from service.cli_output import console, duration, follow, print_rejected, upload_bar
from service.client import Client, FolderUpload, UnseenError
from service.client_http import Json
from service.local import LocalService


@dataclass
class Network:
    """The network for features. `weights`: imagenet, scratch, random, or a file; None: the service's default."""

    name: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.weights is not None:
            self.name = network_of(Path(self.weights).name) or ("small_cnn" if self.weights == "scratch" else None)

    @property
    def weights_dir(self) -> Path | None:
        """The folder that the service must read weights from, if they are a file of this machine."""
        path = Path(self.weights) if self.weights else None
        return path.parent if path is not None and path.is_file() else None

    def params(self) -> Json:
        """BackboneParams as JSON, without what the service decides."""
        weights = Path(self.weights).name if self.weights else None
        return {key: value for key, value in (("name", self.name), ("weights", weights)) if value is not None}


@dataclass
class EmbedOptions:
    """What an embedding set is asked for, beside its dataset and knowledge."""

    unseen: Sequence[str]
    seen: Sequence[str] | None = None
    name: str | None = None
    method: str = "vgse"
    relation: str = "auto"
    params: Json = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """The fields of `Client.create_embedding_set`."""
        fields: dict[str, Any] = {
            "unseen_classes": list(self.unseen),
            "seen_classes": self.seen,
            "method": self.method,
            "relation": self.relation,
            "params": self.params,
        }
        return fields | ({"name": self.name} if self.name else {})


@contextmanager
def private_service(data_dir: Path, weights_dir: Path | None = None) -> Iterator[tuple[LocalService, Client]]:
    """A service of our own, ready, and its client; stopped at the end."""
    with LocalService(data_dir, weights_dir=weights_dir) as service, Client(service.url, api_key="") as client:
        with console.status("Starting the service …"):
            service.wait_until_ready(client)
        yield service, client


def upload(
    client: Client, folder: Path, *, classes: Sequence[str] | None = None, test_classes: Sequence[str] = ()
) -> tuple[Json, FolderUpload]:
    """A new dataset with the folder's images (of `classes`, if given), and what became of them."""
    dataset = new_dataset(client, folder)
    return dataset, fill(client, dataset["id"], folder, classes=classes, test_classes=test_classes)


def new_dataset(client: Client, folder: Path) -> Json:
    """An empty dataset named like the folder."""
    return client.create_dataset(folder.resolve().name[:200] or "images")


def fill(
    client: Client,
    dataset_id: str,
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    test_classes: Sequence[str] = (),
) -> FolderUpload:
    """Uploads the folder's images (of `classes`, if given), and says which were not taken."""
    with upload_bar("Upload") as advance:
        report = client.upload_folder(
            dataset_id, folder, classes=classes, test_classes=test_classes, on_progress=advance
        )
    print_rejected(report.rejected)
    return report


def check_knowledge(source: str) -> None:
    """UnseenError unless `source` is a file, or else the id of a knowledge source."""
    if not Path(source).is_file() and not source.startswith("kn_"):
        raise UnseenError(f"There is no file {source}. Give a file of vectors, or the id of a knowledge source (kn_…).")


def add_knowledge(client: Client, source: str, *, kind: str | None = None, is_encoder: bool = False) -> str:
    """The id of the knowledge in a file or text encoder, added and read; an id (kn_…) is returned as it is."""
    if is_encoder:
        job = client.add_knowledge(source, model=source)
    else:
        check_knowledge(source)
        if not Path(source).is_file():
            return source
        job = client.add_knowledge(Path(source).name[:200], file=source, kind=kind)
    return str(follow(client, job, "Knowledge")["resource"]["id"])


def check_options(client: Client, dataset_id: str, knowledge_id: str, options: EmbedOptions) -> None:
    """UnseenError for what is wrong with method, relation, network and weights, before the dataset holds any image."""
    cost = client.create_embedding_set(dataset_id, knowledge_id, validate_only=True, **options.request())
    _refuse([p for p in cost["problems"] if not p["pointer"].endswith("_classes")])


def build(client: Client, dataset_id: str, knowledge_id: str, options: EmbedOptions) -> Json:
    """An embedding set, built: its row. UnseenError lists everything that is wrong with the request."""
    request = options.request()
    cost = client.create_embedding_set(dataset_id, knowledge_id, validate_only=True, **request)
    _refuse(cost["problems"])
    for warning in cost["warnings"][:20]:
        console.print(f"[yellow]{escape(warning['message'])}[/]", soft_wrap=True)
    if cost["seconds"]:
        about = f"{cost['n_patches']:,} patches of {cost['n_images']:,} images"
        console.print(f"[dim]{about}, about {duration(cost['seconds'])} ({cost['basis']})[/]")
    job = client.create_embedding_set(dataset_id, knowledge_id, **request)
    return client.embedding_set(follow(client, job, "Class embeddings")["resource"]["id"])


def train(client: Client, title: str, dataset_id: str, **request: Any) -> Json:
    """A classifier, trained and evaluated: its row."""
    job = client.create_classifier(dataset_id, **request)
    return client.classifier(follow(client, job, title)["resource"]["id"])


def _refuse(problems: Sequence[Json]) -> None:
    if problems:
        lines = "\n  ".join(f"{p['pointer']}: {p['message']}" for p in problems[:20])
        raise UnseenError(f"The request cannot be fulfilled:\n  {lines}")
