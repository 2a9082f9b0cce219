"""The flags of ``flux-redux bench`` and ``bench compare``."""

from redux_server.cli.flags import Flag, rate, seconds

_OUT = "where to write (default: bench-DATE-TIME)"
_LOAD, _WORKLOAD, _COST = "The load", "What is asked for", "What it may cost"
_A_TARGET = (
    "a server: its name, its address, and the variable that holds its key; further options: "
    "price= (dollars an image), gpu_hour= (dollars), mode=poll|sync|stream, model=, "
    "weights= (a name that targets with the same weights share), idempotency=auto|yes|no. "
    "Give it once for each server"
)
_KNEE = "look for the highest rate whose p95 stays below --slo (at most 400 --images)"
_ARRIVALS = (
    "poisson (as of users who know nothing of each other), gamma (in bursts) or even (default: "
    "poisson; with --find-knee even)"
)
_ENCODER = (
    "what likeness is measured with: auto (SigLIP of FLUX.1-Redux-dev where the Hub's cache has "
    "it, else the embedded model's), none, or the folder of a Redux checkpoint (default: auto)"
)
BENCH = (
    Flag(
        "--target",
        dest="targets",
        action="append",
        default=[],
        required=False,  # `bench compare` needs none
        metavar="NAME=URL,key_env=VAR",
        help=_A_TARGET,
    ),
    Flag("-o", "--out", default="", metavar="DIR", help=_OUT),
    Flag("--encoder", default="auto", metavar="ENCODER", help=_ENCODER),
    Flag(
        "--images",
        group=_WORKLOAD,
        type=int,
        metavar="N",
        help="how many of each target, at most (default: 20, or what --rate gives in --duration)",
    ),
    Flag(
        "--pictures",
        group=_WORKLOAD,
        default="",
        metavar="DIR",
        help="a folder of pictures, or a manifest: a JSON object a line, such as "
        '{"image": "cat.png"} (default: six bundled ones)',
    ),
    Flag(
        "--param",
        group=_WORKLOAD,
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of all requests, such as size=512*512; may be repeated",
    ),
    Flag(
        "--seed", group=_WORKLOAD, type=int, default=0, metavar="N", help="the first (default: 0)"
    ),
    Flag(
        "--clients",
        group=_LOAD,
        type=int,
        metavar="N",
        help="clients that each wait for their image (default: 1)",
    ),
    Flag(
        "--rate",
        group=_LOAD,
        type=rate,
        metavar="R",
        help="instead: images a minute, sent whatever happens, such as 30/min",
    ),
    Flag("--arrivals", group=_LOAD, default="", metavar="{poisson,gamma,even}", help=_ARRIVALS),
    Flag(
        "--burstiness",
        group=_LOAD,
        type=float,
        default=2.0,
        metavar="C",
        help="of gamma arrivals: deviation of the gaps over their mean (default: 2; Poisson is 1)",
    ),
    Flag(
        "--duration",
        group=_LOAD,
        dest="duration_s",
        type=seconds,
        metavar="T",
        help="send nothing more after so long, such as 5m; with --find-knee, that of one rate",
    ),
    Flag("--find-knee", group=_LOAD, dest="has_knee", action="store_true", help=_KNEE),
    Flag(
        "--slo",
        group=_LOAD,
        dest="slo_s",
        type=seconds,
        default=10.0,
        metavar="T",
        help="how long 95 %% of the images may take (default: 10s)",
    ),
    Flag(
        "--timeout",
        group=_LOAD,
        dest="timeout_s",
        type=seconds,
        default=300.0,
        metavar="T",
        help="a task that takes longer is an error (default: 300s)",
    ),
    Flag(
        "--poll",
        group=_LOAD,
        dest="poll_s",
        type=seconds,
        default=0.0,
        metavar="T",
        help="how often to poll (default: every 12th of the time that a task has taken so far)",
    ),
    Flag(
        "--max-cost",
        group=_COST,
        type=float,
        metavar="DOLLARS",
        help="do not start what would cost more (default: 1)",
    ),
    Flag(
        "--yes",
        group=_COST,
        dest="is_agreed",
        action="store_true",
        help="do not ask before sending anything that costs, or leaves this machine",
    ),
    Flag(
        "--dry-run",
        group=_COST,
        dest="is_dry_run",
        action="store_true",
        help="say how many images it would ask for and what they cost, and stop",
    ),
)
COMPARE = (
    Flag("old", metavar="A.json", help="the report of a run, or its folder"),
    Flag("new", metavar="B.json", help="that of a later one"),
)
