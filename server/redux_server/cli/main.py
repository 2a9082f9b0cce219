"""The command line: verbs, their flags, and which function runs each. Holds no work of its own.

Verbs are imported when they run, so that ``keys list`` does not wait for a web framework, nor
``serve`` for torch.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from redux_pipelines.contract.types import (
    EMPTY_PROMPTS,
    FITS,
    MAX_PICTURES,
    MAX_POOLING,
    MAX_WEIGHT,
    OUTPUT_FORMATS,
    QUALITIES,
    WARM_UP_SIZES,
)
from redux_server import __version__
from redux_server.settings import (
    ClientSettings,
    ModelSettings,
    ServerSettings,
    SettingsError,
    UsageError,
    add_flags,
    build,
    flag_name,
)

EXIT_USAGE = 2
Verb = Callable[[argparse.Namespace], int]
_LICENCE = (
    "FLUX.1 [dev] and FLUX.1 Redux [dev] weights are licensed for non-commercial use only; "
    "with Redux that goes for [schnell] too."
)
_WARM_UP_SIZES = ",".join(f"{width}x{height}" for width, height in WARM_UP_SIZES)
_LARGEST_CARD_GB = 1000
_DATABASE_FIELDS = ("data_dir", "database_url")
_DEMO_FIELDS = (
    "model",
    "base",
    "redux",
    "revision",
    "backend",
    "device",
    "dtype",
    "transformer_dtype",
    "quality",
    "memory",
)


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, not in a page of usage, and takes no shortened flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError``."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def run(arguments: Sequence[str]) -> int:
    """Parse ``arguments`` and run their verb; returns the exit code."""
    try:
        given = build_parser().parse_args(arguments)
        verb: Verb = given.verb
        return verb(given)
    except (UsageError, SettingsError) as error:
        print(f"flux-redux: {error}", file=sys.stderr)
        return EXIT_USAGE
    except PermissionError as error:
        print(f"flux-redux: no permission for {error.filename}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="flux-redux",
        description="Image variations with FLUX.1 Redux, on your own GPU.",
        epilog=f"{_LICENCE} Each flag has a variable: --max-queue is FLUX_REDUX_MAX_QUEUE.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_serving(verbs)
    _add_generate(verbs)
    _add_client(verbs)
    _add_keys(verbs)
    _add_database(verbs)
    _add_weights(verbs)
    version = verbs.add_parser("version", help="print the version")
    version.set_defaults(verb=_version)
    doctor = verbs.add_parser("doctor", help="say what this machine has and what is missing")
    add_flags(doctor, ServerSettings)
    doctor.add_argument(
        "--gpu-memory",
        type=float,
        default=0.0,
        metavar="GB",
        help="say also what a card sold with so many GB would hold; needs no GPU",
    )
    doctor.set_defaults(verb=_doctor)
    return parser


def _add_serving(verbs: Any) -> None:
    serve = verbs.add_parser("serve", help="run the API and its workers", epilog=_LICENCE)
    add_flags(serve, ServerSettings)
    serve.set_defaults(verb=_serve)
    worker = verbs.add_parser(
        "worker", help="run one worker, for a server here or on another machine", epilog=_LICENCE
    )
    add_flags(worker, ServerSettings)
    worker.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    worker.set_defaults(verb=_worker)


def _add_generate(verbs: Any) -> None:
    generate = verbs.add_parser(
        "generate", help="make variations of a picture here and now", epilog=_LICENCE
    )
    generate.add_argument("image", metavar="IMAGE", help="the picture")
    generate.add_argument(
        "-o", "--out", default="out.png", metavar="OUT.png", help="where to write; or .jpg, .webp"
    )
    add_flags(generate, ModelSettings)
    _add_parameters(generate)
    add_extension_flags(generate)
    generate.add_argument("--json", action="store_true", help="end with a line of JSON")
    generate.set_defaults(verb=_generate)
    warmup = verbs.add_parser(
        "warmup", help="compile the model now, for the next start of a worker", epilog=_LICENCE
    )
    add_flags(warmup, ModelSettings)
    warmup.add_argument(
        "--sizes",
        default=_WARM_UP_SIZES,
        metavar="WxH,WxH",
        help=f"sizes to try it with; one graph serves all (default: {_WARM_UP_SIZES})",
    )
    warmup.set_defaults(verb=_warmup)


def _add_parameters(
    parser: argparse.ArgumentParser, *, size: str = "1024*1024", num_images: int = 1
) -> None:
    """The request's parameters, as flags."""

    def add(name: str, default: Any, help_: str) -> None:
        shown = f"{help_} (default: {default})" if default != "" else help_
        parser.add_argument(flag_name(name), default=default, type=type(default), help=shown)

    add("prompt", "", "what the image should also show")
    add("size", size, "WIDTH*HEIGHT")
    add("seed", -1, "-1 picks one")
    add("num_inference_steps", 28, "1 to 50")
    add("guidance_scale", 3.5, "1 to 20")
    add("num_images", num_images, "1 to 4")
    parser.add_argument(
        "--no-safety-checker",
        dest="enable_safety_checker",
        action="store_false",
        help="do not check the images",
    )


def _add_client(verbs: Any) -> None:
    submit = verbs.add_parser("submit", help="send a picture to a running server")
    submit.add_argument("image", metavar="IMAGE", help="a file or a URL")
    add_flags(submit, ClientSettings)
    _add_parameters(submit)
    submit.add_argument(
        "--quality",
        default=argparse.SUPPRESS,
        metavar="{" + ",".join(QUALITIES) + "}",
        help="how much may be approximated (default: as the server was started)",
    )
    add_extension_flags(submit)
    submit.add_argument(
        "--wait", action="store_true", help="show its progress, and save the images"
    )
    submit.add_argument("-o", "--out", default=".", metavar="DIR", help="where to save them")
    submit.set_defaults(verb=_submit)
    cancel = verbs.add_parser("cancel", help="cancel a task that was submitted")
    cancel.add_argument("id", metavar="ID", help="its id, from `submit`")
    add_flags(cancel, ClientSettings)
    cancel.set_defaults(verb=_cancel)
    demo = verbs.add_parser(
        "demo", help="start a server, send it a bundled picture, save the images"
    )
    add_flags(demo, ServerSettings, only=_DEMO_FIELDS)
    _add_parameters(demo, size="512*512", num_images=2)
    demo.add_argument(
        "--image", default="", metavar="IMAGE", help="another picture than the sample"
    )
    demo.add_argument("-o", "--out", default="demo-output", metavar="DIR", help="where to save")
    demo.set_defaults(verb=_demo)


def _add_keys(verbs: Any) -> None:
    keys = verbs.add_parser("keys", help="create, list or revoke API keys")
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key and print it, this once")
    create.add_argument("--name", required=True, help="whose key it is")
    create.add_argument(
        "--priority",
        type=int,
        default=0,
        metavar="N",
        help="-10 to 10; while tasks of a higher one wait, no others are begun (default: 0)",
    )
    revoke = actions.add_parser("revoke", help="make a key useless")
    revoke.add_argument("id", metavar="ID", help="its id, from `keys list`")
    list_ = actions.add_parser("list", help="show all keys, without their secrets")
    for action, verb in ((create, _keys_create), (revoke, _keys_revoke), (list_, _keys_list)):
        add_flags(action, ServerSettings, only=_DATABASE_FIELDS)
        action.set_defaults(verb=verb)


def _add_database(verbs: Any) -> None:
    database = verbs.add_parser(
        "db", help="look at the database's tables, or bring them up to date"
    )
    actions = database.add_subparsers(title="actions", metavar="ACTION", required=True)
    current = actions.add_parser("current", help="print the version of the tables")
    upgrade = actions.add_parser("upgrade", help="bring the tables up to date, or make them")
    for action, verb in ((current, _db_current), (upgrade, _db_upgrade)):
        add_flags(action, ServerSettings, only=_DATABASE_FIELDS)
        action.set_defaults(verb=verb)


def _add_weights(verbs: Any) -> None:
    weights = verbs.add_parser("weights", help="convert checkpoints", epilog=_LICENCE)
    actions = weights.add_subparsers(title="actions", metavar="ACTION", required=True)
    quantize = actions.add_parser(
        "quantize",
        help="write a copy of a checkpoint with its transformer in fp8 (approximate)",
        epilog=_LICENCE,
    )
    add_flags(quantize, ModelSettings, only=("base", "revision"))
    quantize.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    quantize.set_defaults(verb=_weights_quantize)


def _server_settings(given: argparse.Namespace) -> ServerSettings:
    return build(ServerSettings, vars(given), os.environ)


def _serve(given: argparse.Namespace) -> int:

    settings = _server_settings(given)
    share_metrics()
    from redux_server.cli.serve import serve

    return serve(settings)


def _worker(given: argparse.Namespace) -> int:
    from redux_server import logs
    from redux_server.dispatch.choice import check_dispatch
    from redux_server.dispatch.local import devices
    from redux_server.worker.main import run_worker

    settings = _server_settings(given)
    check_dispatch(settings)
    found = devices(settings.device)
    if len(found) > 1:
        raise UsageError(f"a worker has one device; choose --device from {', '.join(found)}")
    logs.configure(format_=settings.log_format, level=settings.log_level)
    return run_worker(settings, device=found[0], is_supervised=given.supervised)


def _generate(given: argparse.Namespace) -> int:
    from redux_server.cli.generate import generate

    return generate(given, build(ModelSettings, vars(given), os.environ))


def _warmup(given: argparse.Namespace) -> int:
    from redux_server.cli.generate import warmup

    return warmup(given, build(ModelSettings, vars(given), os.environ))


def _submit(given: argparse.Namespace) -> int:
    from redux_server.cli.submit import submit

    return submit(given, build(ClientSettings, vars(given), os.environ))


def _cancel(given: argparse.Namespace) -> int:
    from redux_server.cli.submit import cancel

    return cancel(given.id, build(ClientSettings, vars(given), os.environ))


def _demo(given: argparse.Namespace) -> int:
    from redux_server.cli.demo import demo

    return demo(given, _server_settings(given))


def _keys_create(given: argparse.Namespace) -> int:
    from redux_server.cli.admin import create

    return create(_server_settings(given), given.name, given.priority)


def _keys_list(given: argparse.Namespace) -> int:
    from redux_server.cli.admin import list_keys

    return list_keys(_server_settings(given))


def _keys_revoke(given: argparse.Namespace) -> int:
    from redux_server.cli.admin import revoke

    return revoke(_server_settings(given), given.id)


def _db_current(given: argparse.Namespace) -> int:
    from redux_server.cli.admin import current

    return current(_server_settings(given))


def _db_upgrade(given: argparse.Namespace) -> int:
    from redux_server.cli.admin import upgrade

    return upgrade(_server_settings(given))


def _weights_quantize(given: argparse.Namespace) -> int:
    from redux_server.cli.admin import quantize

    return quantize(build(ModelSettings, vars(given), os.environ), given.out)


def _version(_given: argparse.Namespace) -> int:
    print(__version__)
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from redux_server.cli.doctor.report import doctor

    if not 0 <= given.gpu_memory <= _LARGEST_CARD_GB:
        raise UsageError(f"--gpu-memory must be 0 to {_LARGEST_CARD_GB}, got {given.gpu_memory:g}")
    return doctor(_server_settings(given), gpu_memory_gb=given.gpu_memory)


# --- Extension flags ------------------------------------------------------------------------------

# DOC Flags of ``generate`` and ``submit`` for the parameters in ``redux_server.parameters``.


def add_extension_flags(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for each; one that is not given is no part of the request."""
    group = parser.add_argument_group("what of the pictures counts, and how much")
    _add_pictures(group)
    weight = f"0 to {MAX_WEIGHT:g}"
    group.add_argument(
        "--image-weights",
        type=numbers,
        default=argparse.SUPPRESS,
        metavar="W,W",
        help=f"one number a picture, IMAGE's first, {weight} (default: 1 for each)",
    )
    group.add_argument(
        "--redux-strength",
        type=float,
        default=argparse.SUPPRESS,
        metavar="S",
        help=f"how much the pictures count, {weight} (default: 1)",
    )
    group.add_argument(
        "--redux-pooling",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"tokens a side, 1 to {MAX_POOLING}; fewer keep less of the layout "
        f"(default: {MAX_POOLING})",
    )
    for name, words, help_ in (
        ("fit", FITS, "how pictures become squares (default: squash)"),
        ("empty-prompt", EMPTY_PROMPTS, "what no prompt is (default: zeros)"),
        ("output-format", OUTPUT_FORMATS, "kind of file of the images (default: png)"),
    ):
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(words) + "}",
            help=help_,
        )


def _add_pictures(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help=f"up to {MAX_PICTURES - 1} more pictures to vary at the same time",
    )
    group.add_argument(
        "--mask", default="", metavar="IMAGE", help="what of IMAGE counts is white in this one"
    )


def numbers(text: str) -> list[float]:
    """``"1,0.5"`` as numbers; argparse names this function where it is none."""
    return [float(number) for number in text.split(",")]


# --- Metrics sharing ------------------------------------------------------------------------------

# DOC Lets the processes of one server share their counters, through files in a temporary folder.
# DOC
# DOC Kept apart from ``redux_server.metrics``: prometheus_client decides when it is first imported
# DOC whether values live in memory or in files, so this has to run before.

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share_metrics() -> None:
    """Make the folder and name it in the environment, where child processes find it."""
    assert "prometheus_client" not in sys.modules, "too late: metrics are already in memory"
    if _VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="flux-redux-metrics-")
    os.environ[_VARIABLE] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
