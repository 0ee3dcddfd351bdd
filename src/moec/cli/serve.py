"""``moec serve``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.cli.loading import load_model
from moec.cli.options import (
    bundle_argument,
    json_option,
    prefix_caching_option,
    processor_options,
    routing_options,
)
from moec.cli.output import print_json_line
from moec.errors import RequestError

if TYPE_CHECKING:
    from typing import Unpack

    from moec.cli.options import LoadOptions


@click.command("serve", short_help="Answer HTTP requests, as OpenAI's API does.")
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0: any.",
)
@click.option(
    "--served-model-name", metavar="NAME", help="What clients call the model.  [default: the folder's name]"
)
@click.option(
    "--api-key",
    envvar="MOEC_API_KEY",
    metavar="KEY",
    help="What clients must send as a bearer token; better given in the environment, as MOEC_API_KEY.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Most sequences that run together.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Most sequences that wait for those; who comes then is told to try again (429).",
)
@click.option(
    "--cache-tokens",
    type=click.IntRange(min=1),
    help="Room in the key-value cache, in tokens of all sequences together.  [default: see docs/serving.md]",
)
@prefix_caching_option
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Jinja template of conversations.  [default: the checkpoint's]",
)
@click.option(
    "--max-body",
    type=click.IntRange(min=1),
    default=4 << 20,
    show_default=True,
    metavar="BYTES",
    help="Most bytes of a request's body.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long requests may go on once the server is told to stop.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Web pages that may use the server (CORS), such as https://example.org, or *. May be repeated.",
)
@click.option("--log-requests", is_flag=True, help="A line for each response, to stderr.")
@processor_options
@routing_options
@json_option
def command(
    bundle: Path,
    host: str,
    port: int,
    served_model_name: str | None,
    api_key: str | None,
    max_batch: int,
    max_waiting: int,
    cache_tokens: int | None,
    prefix_caching: bool | None,
    chat_template: Path | None,
    max_body: int,
    grace: float,
    allow_origin: tuple[str, ...],
    log_requests: bool,
    as_json: bool,
    **loading: Unpack[LoadOptions],
) -> None:
    """Answer HTTP requests with the model in BUNDLE, as OpenAI's API does, until SIGINT or SIGTERM.

    Sampling follows the checkpoint's generation config unless a request says otherwise; docs/serving.md has the
    endpoints and their fields. With --json one line of JSON says where it listens, once it does.

    \b
    Example:
      moec serve tiny.moec --port 8000
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "In the beginning God"}'
    """
    from moec.runtime import Tokenizer
    from moec.runtime.serving.server import Options, Server, bind, stopped_by_signals

    if api_key == "":
        raise click.UsageError("--api-key is empty")
    path = bundle.resolve()
    options = Options(
        served_model_name or path.name, api_key, max_waiting, max_body, grace, allow_origin, log_requests
    )
    if log_requests:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    template = None if chat_template is None else _read_template(chat_template)
    with (
        bind(host, port) as listener,
        load_model(
            bundle,
            max_batch=max_batch,
            cache_tokens=cache_tokens,
            prefix_caching=prefix_caching,
            **loading,
        ) as model,
    ):
        tokenizer = Tokenizer(model.path / "tokenizer", template)
        server = Server(model, tokenizer, options, listener)

        def started() -> None:
            address, number = listener.getsockname()[:2]
            url = f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}"
            if as_json:
                print_json_line({"url": url, "model": options.name, "pid": os.getpid()})
            else:
                click.echo(f"{options.name} is served at {url}; Ctrl-C stops it", err=True)

        with stopped_by_signals(server):
            server.run(started)


def _read_template(path: Path) -> str:
    from moec.runtime.chat_templates import check_template

    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"Cannot read {path}.", f"{error}.", "Give a Jinja template in UTF-8.") from error
    check_template(template, str(path))
    return template
