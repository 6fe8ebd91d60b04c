"""The command `unseen`: starts the service or a part of it, and uses a running one. Never imports torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from models.errors import EXTRA, ModelError
from service import cli_embed
from service.cli_output import error_console, print_error, print_warning
from service.client import ApiError, Client, UnseenError
from service.core.errors import ServiceError
from service.core.settings import Settings, unknown_variables
from service.local import is_port_free

STARTING_S = 600.0
app = typer.Typer(
    name="unseen",
    help="Class embeddings, and zero-shot classification, for classes you have no pictures of.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
app.command()(cli_embed.embed)
app.command()(cli_embed.train)
app.command()(cli_embed.classify)


def _version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def main_options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What may stand before a command."""


Host = Annotated[str | None, typer.Option(help="Address to listen on; others than loopback need API keys.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of everything the service keeps.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option(min=0, help="CPU threads of a process that computes; 0: its share of the cores.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Workers a device, each with a job at a time.")]


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    device: Device = None,
    threads: Threads = None,
    workers: Workers = None,
) -> None:
    """Starts everything: API, worker, inference process, embedded Valkey and SQLite. Ctrl-C stops it."""
    from service.core.logging import configure_logging
    from service.supervisor import Supervisor

    settings = read_settings(host=host, port=port, data_dir=data_dir, device=device, threads=threads, workers=workers)
    check_listening(settings)
    require_torch()
    configure_logging(settings.log_level)
    error_console.print(f"Starting Unseen on {settings.data_dir.resolve()}. Ctrl-C stops it.", soft_wrap=True)
    threading.Thread(target=announce, args=(settings,), daemon=True).start()
    raise typer.Exit(Supervisor(settings).run())


@app.command()
def api(host: Host = None, port: Port = None, data_dir: DataDir = None) -> None:
    """Starts the API alone; workers and inference run elsewhere."""
    import uvicorn

    from service.app import create_app
    from service.core.logging import configure_logging
    from service.core.process import settle
    from service.patience import protocol_with_patience

    settings = read_settings(host=host, port=port, data_dir=data_dir)
    check_listening(settings)
    configure_logging(settings.log_level)
    uvicorn.run(
        create_app(settings, started=settle),
        host=settings.host,
        port=settings.port,
        http=protocol_with_patience(settings.request_timeout_s),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,  # event streams would hold it up
    )


@app.command()
def worker(data_dir: DataDir = None, device: Device = None, threads: Threads = None) -> None:
    """Starts one worker; it takes jobs from the queue until it is stopped."""
    run_module("workers", read_settings(data_dir=data_dir, device=device, threads=threads))


@app.command()
def inference(data_dir: DataDir = None, device: Device = None, threads: Threads = None) -> None:
    """Starts the inference process, which answers the API's classify and embed calls."""
    run_module("workers.inference", read_settings(data_dir=data_dir, device=device, threads=threads))


@app.command()
def doctor() -> None:
    """Checks this machine for what the service needs, and says what to do."""
    from service import cli_doctor

    if not cli_doctor.show(cli_doctor.examine(read_settings())):
        raise typer.Exit(1)


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Folder with <class>/<photo>; default: drawn creatures.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="A .pth/.safetensors file, or imagenet; default: scratch.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Network; default: told by the weights file's name.")] = None,
    knowledge: Annotated[Path | None, typer.Option(help="File of vectors; default: knowledge/*.npz of --data.")] = None,
    unseen: Annotated[
        str, typer.Option(help="Classes to keep unseen, separated by commas; default: splits.json.")
    ] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Where the service keeps its data; default: var/demo-…")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the service running at the end.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Small settings, for a quick look; results are poor.")] = False,
) -> None:
    """Shows everything, from photos to the recognition of classes without photos, in a service of its own."""
    from service import demo as show

    require_torch()
    names = cli_embed.names_of(unseen)
    plan = show.plan_demo(data, knowledge=knowledge, weights=weights, backbone=backbone, unseen=names, fast=fast)
    show.run(plan, data_dir or Path("var") / time.strftime("demo-%Y%m%d-%H%M%S"), keep=keep)


@app.command()
def bench(
    plan: Annotated[Path, typer.Argument(help="YAML file: datasets, knowledge, embeddings, classifiers, seeds.")],
    data: Annotated[Path, typer.Option(help="Folder that holds the datasets' folders.")] = Path(),
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default: bench/out/<name>.")] = None,
    url: Annotated[str | None, typer.Option(help="A running service; default: one of its own.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where a service of its own keeps its data.")] = Path("var/bench"),
    weights_dir: Annotated[Path | None, typer.Option(help="Folder of weights for a service of its own.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write the tables of what is there; run nothing.")] = False,
) -> None:
    """Measures methods x knowledge x datasets, resumes where it stopped, and writes Markdown, CSV and JSON."""
    from service import cli_bench

    if not cli_bench.bench(plan, data, out, url=url, data_dir=data_dir, weights_dir=weights_dir, report=report):
        raise typer.Exit(1)


@app.command()
def openapi(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: standard output.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only tell whether the file is up to date.")] = False,
) -> None:
    """Writes the OpenAPI document."""
    from service.app import create_app
    from service.openapi import document_bytes

    document = document_bytes(create_app(Settings(host="127.0.0.1", api_keys="")))
    if check:
        if output is None:
            raise typer.BadParameter("--check compares with a file: give it with --output.")
        if not output.is_file() or output.read_bytes() != document:
            print_error(f"{output} is not what the code says. Run 'make openapi' and commit it.")
            raise typer.Exit(1)
    elif output is None:
        sys.stdout.buffer.write(document)
    else:
        output.write_bytes(document)


@app.command()
def version() -> None:
    """Prints the version."""
    try:
        typer.echo(metadata.version("unseen"))
    except metadata.PackageNotFoundError:
        typer.echo("0.0.0 (a checkout that is not installed)")


def read_settings(**given: Any) -> Settings:
    """The settings of the environment, with the options that were given in their place; warns of what sets nothing."""
    for name, meant in unknown_variables(os.environ):
        advice = f"did you mean {meant}?" if meant else "docs/configuration.md lists those that do."
        print_warning(f"{name} sets nothing; {advice}")
    return Settings(**{name: value for name, value in given.items() if value is not None})


def check_listening(settings: Settings) -> None:
    """Refuses to open the service to others without keys, and a port that is taken."""
    from service.auth import Authenticator

    try:
        Authenticator(settings)
    except ValueError as error:
        raise UnseenError(str(error)) from error
    if not is_port_free(settings.host, settings.port):
        raise UnseenError(
            f"Port {settings.port} of {settings.host} is taken. Stop what listens there, or choose another with --port."
        )


def announce(settings: Settings) -> None:
    """Says where the service listens as soon as every part of it works."""
    # asked at the loopback address where it listens on all of them, as others may go through a proxy
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    with Client(_address(reached, settings.port), api_key="") as client, suppress(UnseenError):
        client.wait_until_ready(timeout=STARTING_S)
        address = _address(settings.host, settings.port)
        error_console.print(f"Unseen is ready at {escape(address)} (docs: /docs).", soft_wrap=True)


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def require_torch() -> None:
    """UnseenError with advice where the packages for computing are not installed."""
    if find_spec("torch") is None:
        raise UnseenError(
            f"Workers need torch, which is not installed here. In a checkout run: {EXTRA.format('torch')}"
        )


def run_module(module: str, settings: Settings) -> None:
    """Becomes `python -m module` with these settings; the command line itself never loads torch."""
    require_torch()
    sys.stdout.flush()
    # Options have been read into the settings, which say all there is to say.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNSEEN_")}
    os.execve(sys.executable, [sys.executable, "-m", module], inherited | settings.to_environment())


def main() -> None:
    """Entry point: expected errors are one message on stderr and exit code 1; wrong usage is 2."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that what was started is stopped in order, as with Ctrl-C
    try:
        app()
    except ValidationError as error:
        for entry in error.errors():
            name = "_".join(str(part) for part in entry["loc"])
            print_error(f"The setting UNSEEN_{name.upper()}: {entry['msg']}.")
    except ServiceError as error:
        print_error(error.detail)
    except ApiError as error:
        advice = "\n  Give a key with --api-key, or in UNSEEN_API_KEY." if error.status == 401 else ""
        print_error(f"{error}{advice}")
    except (UnseenError, ModelError) as error:
        print_error(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        return
    sys.exit(1)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
