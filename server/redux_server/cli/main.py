"""The command line: one table of verbs, their flags, and which function runs each.

Holds no work of its own. A verb is imported when it runs, so that ``keys list`` does not wait for a
web framework, nor ``serve`` for torch.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from redux_pipelines.contract.types import (
    EMPTY_PROMPTS,
    FITS,
    MAX_PICTURES,
    MAX_POOLING,
    MAX_WEIGHT,
    OUTPUT_FORMATS,
    QUALITIES,
)
from redux_server import __version__
from redux_server.cli.bench_flags import BENCH, COMPARE
from redux_server.cli.flags import Flag
from redux_server.cli.progress import note
from redux_server.settings import (
    ClientSettings,
    ModelSettings,
    ServerSettings,
    UsageError,
    add_flags,
    build,
    names_of,
)
from redux_server.storage.temporary import use_temporary_folder

EXIT_USAGE = 2
EXIT_CLOSED_PIPE = 141  # as a shell shows a program that SIGPIPE ended
_SERVERS = ("serve", "worker")  # they keep what is temporary in the data directory
_LICENCE = (
    "FLUX.1 [dev] and FLUX.1 Redux [dev] weights are licensed for non-commercial use only; "
    "with Redux that goes for [schnell] too."
)
_REQUEST = "The request"
_PICTURES = "What of the pictures counts, and how much"
_METRICS_FOLDER = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb.

    ``runs`` is ``module:function``. The function is given the ``settings``, if the verb has any,
    and by name what its own ``flags`` say; it returns the exit code. ``only`` names the settings
    that can be given as flags, if not all.
    """

    name: str
    help: str
    runs: str
    settings: type[ModelSettings] | type[ClientSettings] | None = None
    flags: Sequence[Flag] = ()
    only: Sequence[str] = ()

    def load(self) -> Callable[..., int]:
        """Import the function."""
        module, _, function = self.runs.partition(":")
        loaded: Callable[..., int] = getattr(import_module(module), function)
        return loaded

    def run(self, given: Mapping[str, Any]) -> int:
        """Build the settings and run the verb; returns the exit code.

        Raises:
            UsageError: a setting that cannot be used, or what the verb itself refuses.
        """
        _keep_metrics_in_memory()
        if self.settings is None:
            mine = {flag.dest for flag in self.flags}  # `bench compare` is parsed by `bench`, too
            return self.load()(**{name: given[name] for name in given if name in mine})
        settings = build(self.settings, given, os.environ)
        if self.name in _SERVERS and isinstance(settings, ServerSettings):
            _use_temporary_folder(settings)
        names = names_of(self.settings)
        return self.load()(settings, **{k: v for k, v in given.items() if k not in names})


def _parameters(*, size: str = "1024*1024", num_images: int = 1) -> tuple[Flag, ...]:
    """The request's parameters as the hosted API has them."""

    def flag(name: str, default: Any, help_: str) -> Flag:
        text = f"{help_} (default: {default})" if default != "" else help_
        metavar = None if isinstance(default, str) else "N"
        kind = type(default)
        return Flag(name, group=_REQUEST, default=default, type=kind, metavar=metavar, help=text)

    return (
        flag("--prompt", "", "what the image should also show"),
        flag("--size", size, "WIDTH*HEIGHT"),
        flag("--seed", -1, "-1 picks one"),
        flag("--num-inference-steps", 28, "1 to 50"),
        flag("--guidance-scale", 3.5, "1 to 20"),
        flag("--num-images", num_images, "1 to 4"),
        Flag(
            "--no-safety-checker",
            group=_REQUEST,
            dest="enable_safety_checker",
            action="store_false",
            help="do not check the images",
        ),
    )


def numbers(text: str) -> list[float]:
    """``"1,0.5"`` as numbers; argparse names this function where it is none."""
    return [float(number) for number in text.split(",")]


def _control(
    name: str, words: str | Iterable[str], help_: str, kind: Any = str, group: str = _PICTURES
) -> Flag:
    """A parameter of our own; where it is not given, it is no part of the request."""
    metavar = words if isinstance(words, str) else "{" + ",".join(words) + "}"
    suppress = argparse.SUPPRESS
    return Flag(name, group=group, type=kind, default=suppress, metavar=metavar, help=help_)


_WEIGHTS = f"0 to {MAX_WEIGHT:g}"
_MORE = f"up to {MAX_PICTURES - 1} more pictures to vary at the same time"
_MASK = "what of IMAGE counts is white in this one"
_EACH = f"one number a picture, IMAGE's first, {_WEIGHTS} (default: 1 for each)"
_POOLING = f"1 to {MAX_POOLING}; fewer keep less of the layout (default: {MAX_POOLING})"
_CONTROLS = (
    Flag("--images", group=_PICTURES, nargs="+", default=[], metavar="IMAGE", help=_MORE),
    Flag("--mask", group=_PICTURES, default="", metavar="IMAGE", help=_MASK),
    _control("--image-weights", "W,W", _EACH, numbers),
    _control(
        "--redux-strength", "S", f"how much the pictures count, {_WEIGHTS} (default: 1)", float
    ),
    _control("--redux-pooling", "N", f"tokens a side, {_POOLING}", int),
    _control("--fit", FITS, "how pictures become squares (default: squash)"),
    _control("--empty-prompt", EMPTY_PROMPTS, "what no prompt is (default: zeros)"),
    _control("--output-format", OUTPUT_FORMATS, "kind of file of the images (default: png)"),
)
_WRITTEN = "where to write; or .jpg, .webp"
_TIER = "how much may be approximated (default: as the server was started)"
_PRIORITY = "-10 to 10; while tasks of a higher one wait, no others are begun (default: 0)"
_CARD = "say also what a card sold with so many GB would hold; needs no GPU"
_DATABASE = ("data_dir", "database_url")
_DEMO = (
    *("model", "base", "redux", "revision", "backend", "device", "dtype", "transformer_dtype"),
    *("quality", "memory"),
)
VERBS = (
    Verb("serve", "run the API and its workers", "redux_server.cli.serve:serve", ServerSettings),
    Verb(
        "worker",
        "run one worker, for a server here or on another machine",
        "redux_server.worker.main:worker",
        ServerSettings,
        [Flag("--supervised", action="store_true", help=argparse.SUPPRESS)],
    ),
    Verb(
        "generate",
        "make variations of a picture here and now",
        "redux_server.cli.generate:generate",
        ModelSettings,
        [
            Flag("image", metavar="IMAGE", help="the picture"),
            Flag("-o", "--out", default="out.png", metavar="OUT.png", help=_WRITTEN),
            Flag("--json", dest="as_json", action="store_true", help="end with a line of JSON"),
            *_parameters(),
            *_CONTROLS,
        ],
    ),
    Verb(
        "warmup",
        "compile the model now, for the next start of a worker",
        "redux_server.cli.generate:warmup",
        ModelSettings,
    ),
    Verb(
        "submit",
        "send a picture to a running server",
        "redux_server.cli.submit:submit",
        ClientSettings,
        [
            Flag("image", metavar="IMAGE", help="a file or a URL"),
            Flag("--wait", action="store_true", help="show its progress, and save the images"),
            Flag("-o", "--out", default=".", metavar="DIR", help="where to save them"),
            *_parameters(),
            _control("--quality", QUALITIES, _TIER, group=_REQUEST),
            *_CONTROLS,
        ],
    ),
    Verb(
        "cancel",
        "cancel a task that was submitted",
        "redux_server.cli.submit:cancel",
        ClientSettings,
        [Flag("task_id", metavar="ID", help="its id, from `submit`")],
    ),
    Verb(
        "uploads list",
        "show the files that were uploaded with this key",
        "redux_server.cli.uploads:list_uploads",
        ClientSettings,
    ),
    Verb(
        "uploads delete",
        "delete files that were uploaded with this key",
        "redux_server.cli.uploads:delete",
        ClientSettings,
        [Flag("upload_ids", metavar="ID", nargs="+", help="ids, from `uploads list`")],
    ),
    Verb(
        "demo",
        "start a server, send it a bundled picture, save the images",
        "redux_server.cli.demo:demo",
        ServerSettings,
        [
            Flag("--image", default="", metavar="IMAGE", help="another picture than the sample"),
            Flag("-o", "--out", default="demo-output", metavar="DIR", help="where to save"),
            *_parameters(size="512*512", num_images=2),
        ],
        only=_DEMO,
    ),
    Verb(
        "keys create",
        "make a key and print it, this once",
        "redux_server.cli.admin:create",
        ServerSettings,
        [
            Flag("--name", required=True, metavar="NAME", help="whose key it is"),
            Flag("--priority", type=int, default=0, metavar="N", help=_PRIORITY),
        ],
        only=_DATABASE,
    ),
    Verb(
        "keys list",
        "show all keys, without their secrets",
        "redux_server.cli.admin:list_keys",
        ServerSettings,
        only=_DATABASE,
    ),
    Verb(
        "keys revoke",
        "make a key useless",
        "redux_server.cli.admin:revoke",
        ServerSettings,
        [Flag("key_id", metavar="ID", help="its id, from `keys list`")],
        only=_DATABASE,
    ),
    Verb(
        "db current",
        "print the version of the tables",
        "redux_server.cli.admin:current",
        ServerSettings,
        only=_DATABASE,
    ),
    Verb(
        "db upgrade",
        "bring the tables up to date, or make them",
        "redux_server.cli.admin:upgrade",
        ServerSettings,
        only=_DATABASE,
    ),
    Verb(
        "tasks unbind",
        "let any worker take the tasks that wait for a model which no ready worker runs",
        "redux_server.cli.admin:unbind",
        ServerSettings,
        only=_DATABASE,
    ),
    Verb(
        "weights quantize",
        "write a copy of a checkpoint with its transformer in fp8 (approximate)",
        "redux_server.cli.admin:quantize",
        ModelSettings,
        [Flag("--out", required=True, metavar="DIR", help="the folder to make")],
        only=("base", "revision"),
    ),
    Verb(
        "bench",
        "measure servers of the task API against each other: speed, images, cost",
        "redux_server.cli.bench:bench",
        flags=BENCH,
    ),
    Verb(
        "bench compare",
        "say what became slower between two runs; exit code 1 if something did",
        "redux_server.cli.bench:compare",
        flags=COMPARE,
    ),
    Verb("version", "print the version", "redux_server.cli.main:version"),
    Verb(
        "doctor",
        "say what this machine has and what is missing",
        "redux_server.cli.doctor.report:doctor",
        ServerSettings,
        [
            Flag(
                "--gpu-memory",
                dest="gpu_memory_gb",
                type=float,
                default=0.0,
                metavar="GB",
                help=_CARD,
            )
        ],
    ),
)
_FAMILIES = {
    "uploads": "list or delete the files of this key on a server",
    "keys": "create, list or revoke API keys",
    "db": "look at the database's tables, or bring them up to date",
    "tasks": "look after tasks that nobody works on",
    "weights": "convert checkpoints",
}


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
        try:
            given = vars(build_parser().parse_args(arguments))
            verb: Verb = given.pop("verb")
            return verb.run(given)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here a reader that has gone can be told from a fault
    except UsageError as error:
        note(str(error))
        return EXIT_USAGE
    except BrokenPipeError:
        _forget_output()
        return EXIT_CLOSED_PIPE
    except OSError as error:  # such as a --data-dir in a file, or on a disk that is read-only
        if error.filename is None:
            _forget_output()
        note(_said_of(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def _said_of(error: OSError) -> str:
    """One line; names of files may have line breaks."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return reason
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    shown = str(name) if str(name).isprintable() else ascii(name)
    if isinstance(error, PermissionError):
        return f"no permission for {shown}"
    return f"cannot use {shown}: {reason}"


def _forget_output() -> None:
    """Let what cannot be written to standard output go, or Python tries it again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; what it parses names its ``Verb`` as ``verb``."""
    parser = _Parser(
        prog="flux-redux",
        description="Image variations with FLUX.1 Redux, on your own GPU.",
        epilog=f"{_LICENCE} Each flag has a variable: --max-queue is FLUX_REDUX_MAX_QUEUE.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    families: dict[str, Any] = {"": verbs}
    parsers: dict[str, argparse.ArgumentParser] = {}
    for verb in VERBS:
        family, _, name = verb.name.rpartition(" ")
        if family not in families:
            is_verb = family in parsers  # it does something by itself, too
            parent = (
                parsers[family] if is_verb else verbs.add_parser(family, help=_FAMILIES[family])
            )
            families[family] = parent.add_subparsers(
                title="actions",
                metavar="ACTION",
                required=not is_verb,
                prog=f"flux-redux {family}",
            )
        parsers[verb.name] = families[family].add_parser(name, help=verb.help)
        _add_flags(parsers[verb.name], verb)
    return parser


def _add_flags(parser: argparse.ArgumentParser, verb: Verb) -> None:
    parser.set_defaults(verb=verb)
    parser.usage = "%(prog)s" + "".join(flag.usage for flag in verb.flags)
    if verb.settings is not None:
        parser.usage += " [FLAGS]"
        add_flags(parser, verb.settings, only=verb.only)
        if "base" in (verb.only or names_of(verb.settings)):
            parser.epilog = _LICENCE
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for flag in verb.flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(*flag.names, **flag.options)


def version() -> int:
    """Print the version."""
    print(__version__)
    return 0


def _use_temporary_folder(settings: ServerSettings) -> None:
    """Keep in the data directory what is temporary, before a library looks for where else.

    Raises:
        UsageError: nothing can be kept there.
    """
    try:
        use_temporary_folder(settings.temporary_dir)
    except OSError as error:
        raise UsageError(
            f"cannot use {error.filename or settings.temporary_dir}: {error.strerror}; choose "
            "another --data-dir, or make room there"
        ) from None


def _keep_metrics_in_memory() -> None:
    """Have no process of ours keep its counters in mapped files, as this variable would ask for.

    A full disk ends a process that touches a new page of such a file. prometheus_client looks for
    it when it is first imported, which every verb does later.
    """
    for name in _METRICS_FOLDER:
        os.environ.pop(name, None)
