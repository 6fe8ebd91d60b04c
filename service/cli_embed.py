"""`unseen embed`, `train` and `classify`: the client's work from the command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from models.errors import UnknownName
from service import steps
from service.cli_output import (
    console,
    print_error,
    readable,
    show_classifier,
    show_contributions,
    show_embedding_set,
)
from service.client import Client, UnseenError
from service.client_base import DEFAULT_URL
from service.client_http import Json
from service.client_uploads import read_folder
from service.steps import EmbedOptions, Network, private_service

Url = Annotated[str, typer.Option(envvar="UNSEEN_URL", help="Address of the service.")]
ApiKey = Annotated[str | None, typer.Option(envvar="UNSEEN_API_KEY", help="Key, if the service asks for one.")]


def embed(
    folder: Annotated[str, typer.Argument(help="Folder with <class>/<photo>; or the id of a dataset (ds_…).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File: .npz, .mat, .csv, .parquet or .safetensors.")],
    unseen: Annotated[
        str, typer.Option(help="Classes without photos, separated by commas; default: splits.json.")
    ] = "",
    knowledge: Annotated[str | None, typer.Option(help="File of word or class vectors, or an id (kn_…).")] = None,
    kind: Annotated[str | None, typer.Option(help="What the file is: word_vectors, class_vectors, attributes.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="In place of a file: a sentence-transformers model.")] = None,
    seen: Annotated[str, typer.Option(help="Classes to learn from; default: all others.")] = "",
    weights: Annotated[str | None, typer.Option(help="imagenet, scratch, random, or a .pth/.safetensors file.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Network; default: told by the weights file's name.")] = None,
    method: Annotated[str, typer.Option(help="vgse, kmeans or backbone.")] = "vgse",
    relation: Annotated[str, typer.Option(help="auto, smo or wavg.")] = "auto",
    clusters: Annotated[int | None, typer.Option(min=2, help="Visual properties: the embedding's dimension.")] = None,
    patch_size: Annotated[int | None, typer.Option(min=16, help="Pixels a side that patches are resized to.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name to use as `model` in /v1/embeddings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any parameter: clustering.epochs=20")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Start a private service, and stop it afterwards.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="With --local: keep data here, so that features are computed once.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Embeds classes, seen and unseen, from a folder of photos and knowledge about the classes' names."""
    if (knowledge is None) == (text_encoder is None):
        raise typer.BadParameter("Give one of --knowledge and --text-encoder.")
    if output.suffix.removeprefix(".") not in ("npz", "mat", "csv", "parquet", "safetensors"):
        raise typer.BadParameter(f"{output.name}: the suffix must be .npz, .mat, .csv, .parquet or .safetensors.")
    if not output.resolve().parent.is_dir():
        raise typer.BadParameter(f"There is no folder {output.resolve().parent} to write to.")
    network = Network(backbone, weights)
    params = parse_settings(set_ or [], _base_params(network, clusters, patch_size, seed))
    if data_dir is not None and not local:
        raise typer.BadParameter("--data-dir belongs to --local; a running service has its own.")
    _check_weights(network, local)
    if knowledge is not None:
        steps.check_knowledge(knowledge)
    classes = _classes(folder, names_of(unseen), names_of(seen))
    if classes.validation is not None:
        params.setdefault("validation_classes", classes.validation)
    options = EmbedOptions(classes.unseen, classes.seen, name, method, relation, params)
    with _connected(local, data_dir, network, url, api_key) as client:
        source = text_encoder or knowledge or ""
        knowledge_id = steps.add_knowledge(client, source, kind=kind, is_encoder=text_encoder is not None)
        dataset_id = folder if _is_dataset(folder) else _upload(client, Path(folder), knowledge_id, options)
        row = steps.build(client, dataset_id, knowledge_id, options)
        console.print()
        show_embedding_set(row)
        if row["n_unseen"]:
            console.print()
            show_contributions([c for c in client.classes(row["id"]) if not c["seen"]])
        client.export(row["id"], output)
    console.print(f"\nWrote {row['n_seen'] + row['n_unseen']} vectors to [bold]{escape(str(output))}[/].")
    if not local:
        console.print(f"A classifier on them: [bold]unseen train {row['id']}[/]", soft_wrap=True)


def train(
    embedding_set: Annotated[str | None, typer.Argument(help="Id (es_…); default: the newest that is ready.")] = None,
    method: Annotated[str, typer.Option(help="sje, eszsl, …; docs/methods.md has them all.")] = "sje",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any parameter of the method: epochs=20")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=16, help="Pixels a side that photos are resized to; default: the patches'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    name: Annotated[str | None, typer.Option(help="What to call it.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Trains a classifier on class embeddings and their photos, and measures it on photos kept for that."""
    request: Json = {"method": method, "params": parse_settings(set_ or [], {}), "seed": seed}
    request |= {key: value for key, value in (("name", name), ("image_size", image_size)) if value is not None}
    with Client(url, api_key) as client:
        row = client.embedding_set(embedding_set) if embedding_set else _newest_set(client)
        classifier = steps.train(client, "Classifier", row["dataset_id"], embedding_set_id=row["id"], **request)
    console.print()
    show_classifier(classifier)
    console.print(
        f"\nWhat do photos show? [bold]unseen classify PHOTO … --classifier {classifier['id']}[/]", soft_wrap=True
    )


def _newest_set(client: Client) -> Json:
    """The newest embedding set that is ready."""
    for row in client.list_all("embedding-sets"):
        if row["status"] == "ready":
            return row
    raise UnseenError("There are no class embeddings to train on yet. Make some with 'unseen embed'.")


def classify(
    images: Annotated[list[Path], typer.Argument(help="Photos.", exists=True, dir_okay=False)],
    classifier: Annotated[str | None, typer.Option(help="Id (cl_…); default: the newest that is ready.")] = None,
    scope: Annotated[Literal["unseen", "seen", "all"], typer.Option(help="Which classes compete.")] = "all",
    names: Annotated[str, typer.Option(help="Only these classes compete, separated by commas; new ones too.")] = "",
    top_k: Annotated[int, typer.Option(min=1, help="Labels shown for each photo.")] = 3,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Mark photos whose best score is lower as abstained.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's answer as it is.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Tells what photos show, classes without training photos included."""
    with Client(url, api_key) as client:
        answer = client.classify(
            images,
            classifier_id=classifier,
            scope=scope,
            class_names=names_of(names) or None,
            top_k=top_k,
            min_score=min_score,
        )
    if as_json:
        console.print_json(data=answer)
    else:
        _show_predictions(images, answer["data"])
    failed = [row for row in answer["data"] if row["error"]]
    if failed:
        print_error(f"{len(failed)} of {len(images)} photos could not be read.")
        raise typer.Exit(1)


def _show_predictions(images: Sequence[Path], rows: Sequence[Json]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("photo", "class", "score", ""):
        table.add_column(title, justify="right" if title == "score" else "left")
    for path, row in zip(images, rows, strict=True):
        if row["error"]:
            table.add_row(escape(str(path)), f"[red]{escape(row['error'])}[/]")
        for place, found in enumerate(row["predictions"]):
            notes = ["abstained"] if row["abstained"] and not place else []
            notes += [] if found["seen"] else ["unseen"]
            label = escape(readable(found["label"]))
            table.add_row(
                "" if place else escape(str(path)), label, f"{found['score']:.3f}", f"[dim]{', '.join(notes)}[/]"
            )
    console.print(table)


@dataclass(frozen=True)
class _Classes:
    """The classes of a run: as asked for, else as the folder's splits.json says."""

    unseen: list[str]
    seen: list[str] | None = None
    validation: list[str] | None = None


def _is_dataset(source: str) -> bool:
    return source.startswith("ds_") and not Path(source).exists()


def _classes(source: str, unseen: list[str], seen: list[str]) -> _Classes:
    """The classes asked for, else the folder's; UnseenError for a folder without photos, or without some of `seen`."""
    if _is_dataset(source):
        return _Classes(unseen, seen or None)
    _, found = read_folder(Path(source))
    for name in seen:
        if name not in found.class_names:
            raise UnseenError(f"{source}: {UnknownName('class', name, found.class_names)}")
    if unseen or seen or found.unseen_classes is None:
        return _Classes(unseen, seen or None)
    return _Classes(
        list(found.unseen_classes),
        list(found.seen_classes) if found.seen_classes is not None else None,
        list(found.validation_classes) if found.validation_classes else None,
    )


def _check_weights(network: Network, local: bool) -> None:
    """UnseenError for a file of weights that no service can find; what a running one has, it knows itself."""
    weights = network.weights or "imagenet"
    is_named = weights in ("imagenet", "scratch", "random") or network.weights_dir is not None
    if not is_named and (local or "/" in weights):
        raise UnseenError(f"There is no file {weights}. Give one, or imagenet, scratch or random, with --weights.")


def _upload(client: Client, folder: Path, knowledge_id: str, options: EmbedOptions) -> str:
    """The id of a dataset with the folder's photos, once the service has found nothing else wrong."""
    dataset_id = str(steps.new_dataset(client, folder)["id"])
    try:
        steps.check_options(client, dataset_id, knowledge_id, options)
    except UnseenError:
        client.delete(dataset_id)
        raise
    wanted = [*options.seen, *options.unseen] if options.seen else None
    steps.fill(client, dataset_id, folder, classes=wanted, test_classes=options.unseen)
    console.print(f"Dataset {dataset_id} (again, without sending photos: unseen embed {dataset_id} …)", soft_wrap=True)
    return dataset_id


@contextmanager
def _connected(local: bool, data_dir: Path | None, network: Network, url: str, api_key: str | None) -> Iterator[Client]:
    if not local:
        with Client(url, api_key) as client:
            yield client
        return
    with (
        tempfile.TemporaryDirectory(prefix="unseen-") as folder,
        private_service(data_dir or Path(folder), network.weights_dir) as (_, client),
    ):
        yield client


def names_of(text: str) -> list[str]:
    """Class names out of 'a, b,c'."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _base_params(network: Network, clusters: int | None, patch_size: int | None, seed: int) -> Json:
    params: Json = {"seed": seed}
    if network.params():
        params["backbone"] = network.params()
    if clusters is not None:
        params |= {"clustering": {"n_clusters": clusters}, "kmeans": {"n_clusters": clusters}}
    if patch_size is not None:
        params["patches"] = {"size": patch_size}
    return params


def parse_settings(settings: Sequence[str], params: Json) -> Json:
    """`params` with 'clustering.epochs=20' and the like put in; values are JSON, or else text."""
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found or not key.strip():
            raise typer.BadParameter(f"--set takes KEY=VALUE, such as clustering.epochs=20, not {setting!r}.")
        try:
            value: Any = json.loads(text)
        except ValueError:
            value = text
        target = params
        *path, last = key.strip().split(".")
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UnseenError(f"--set {setting}: {part!r} is a value and has nothing inside.")
        target[last] = value
    return params
