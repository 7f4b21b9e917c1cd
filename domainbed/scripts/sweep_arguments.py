"""The sweep script's flags, on the command line and in sweep files."""

import argparse
import os
from collections.abc import Callable, Collection, Sequence

from domainbed import command_launchers, loggers, registry
from domainbed.jobs import EXCLUSIVE
from domainbed.scripts.arguments import DomainBedParser, seconds
from domainbed.scripts.sweep_file import read_sweep_file
from domainbed.sweep_rows import Budget, SweepRow, parse_budget

DOMAINBED_FLAGS = (
    "datasets", "algorithms", "task", "n_hparams_from", "n_hparams", "output_dir", "data_dir", "seed", "n_trials",
    "command_launcher", "steps", "hparams", "holdout_fraction", "single_test_envs", "skip_confirmation",
)  # fmt: skip
REQUIRED = {
    "launch": ("output_dir", "command_launcher"),
    "delete_incomplete": ("output_dir",),
    "refit": ("input_dir", "output_dir", "seeds", "command_launcher"),
    "status": ("output_dir",),
    "retry_failed": ("output_dir", "command_launcher"),
    "cancel": ("output_dir",),
    "worker": ("output_dir",),
    "plan": (),
}
LAUNCHER_OPTIONS = (
    "workers", "threads", "retries", "isolation", "jobs_per_gpu", "max_parallel", "jobs_per_task", "slurm_partition",
    "slurm_time", "slurm_mem_gb", "slurm_cpus", "slurm_gpus", "slurm_args",
)  # fmt: skip
_STARTING = ("launch", "refit", "retry_failed", "worker", "plan")
READ_BY = {  # which commands read a flag that not all read; a sweep file, which serves them all, may hold it still
    **dict.fromkeys(("input_dir", "seeds", "criterion"), ("refit",)),
    **dict.fromkeys(("watch", "json"), ("status",)),
    "index": ("worker",),
    "no_calibration": ("plan",),
    "command_launcher": ("launch", "refit", "retry_failed", "plan", "delete_incomplete"),
    **dict.fromkeys((*LAUNCHER_OPTIONS, "save_every_s", "log_to"), _STARTING),
}
NOT_IN_FILES = ("watch", "json", "index", "no_calibration")
# Flags that a refit takes from the search, not from its user.
OF_THE_SEARCH = ("hparams", "ranges", "label", "annotation_budget", "validation_budget", "budgets")
NOT_OF_JOBS = {
    "command",
    "sweep_file",
    "output_dir",
    "seed",
    "skip_confirmation",
    *READ_BY,
}  # the others say which jobs
CRITERIA = ("aa_wga", "wga")  # model_selection's, which takes a while to import
PAIRS = "leave_one_out"  # the selection method that needs jobs with two test environments
SELECTION_METHODS = ("iid", "oracle", PAIRS, *CRITERIA)


def default_names(package: str) -> list[str]:
    """DomainBed's algorithms or datasets, as far as we have them, without the debugging ones."""
    ours = registry.names(package)
    return [name for name in registry.order(package) if name in ours and "Debug" not in name]


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return integer


def _environments(text: str) -> list[int]:
    """The environments in "1,2"."""
    try:
        return [int(env) for env in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of environments such as 0 or 1,2") from None


def _budget(text: str) -> Budget:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser() -> DomainBedParser:
    """The parser; whatever a sweep file may set has no default here that would hide it."""
    parser = DomainBedParser(
        DOMAINBED_FLAGS, description="Launch a grid of training runs, see how far it is, try again, cancel, or refit."
    )
    add = parser.add_argument
    add("command", choices=list(REQUIRED))
    add("sweep_file", nargs="?", help="TOML file of flags and [[rows]], right after the command")
    add("--datasets", nargs="+", metavar="NAME", help="default: DomainBed's")
    add("--algorithms", nargs="+", metavar="NAME[:PARTITION]", help="default: DomainBed's")
    add("--task", default="domain_generalization", choices=["domain_generalization", "domain_adaptation"])
    add("--n_hparams_from", type=int, default=0, help="first hparams seed")
    add("--n_hparams", type=int, default=20, help="one beyond the last hparams seed; seed 0 is the default hparams")
    add("--output_dir", help="where the jobs' directories lie; required")
    add("--data_dir", help="required unless all datasets are part of the package")
    add("--seed", type=int, default=0, help="without effect, as in DomainBed")
    add("--n_trials", type=_at_least(0), default=3, help="number of trial seeds")
    add("--command_launcher", help=f"required to launch; {', '.join(command_launchers.REGISTRY)}")
    add("--steps", type=_at_least(0), help="default: the dataset's")
    add("--hparams", metavar="JSON", help="overrides for all jobs, a JSON object")
    add("--holdout_fraction", type=float, default=0.2, help="share of each environment that is held out")
    add(
        "--uda_holdout_fraction", type=float, help="share of the test environments that --task domain_adaptation learns"
    )
    add("--single_test_envs", action="store_true", help="leave out single environments, no pairs")
    add("--selection_method", choices=SELECTION_METHODS, help=f"only the jobs it needs: pairs for {PAIRS} alone")
    add("--skip_confirmation", action="store_true", help="do not ask before launching or deleting")
    add("--test_envs_list", nargs="+", type=_environments, metavar="ENVS", help="one per job: 0 1,2 makes two")
    add("--official_test_envs", action="store_true", help="every dataset's own test environments, where it has some")
    add("--controls", action="store_true", help="each row's control (its method switched off) follows it")
    add("--ranges", metavar="JSON", help='how to draw hparams, a JSON object like {"lambda_2": "10^U(-1, 2)"}')
    add("--epochs", type=_at_least(1), help="in place of --steps")
    add("--input_dir", help="a search's output_dir (refit)")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="of the chosen draws (refit)")
    add("--criterion", default="aa_wga", choices=CRITERIA, help="what validation maximises (refit)")
    add("--watch", nargs="?", type=seconds, const=5.0, metavar="S", help="again every S (default 5) seconds (status)")
    add("--json", action="store_true", help="one JSON object in place of the table (status)")
    add("--index", type=_at_least(0), metavar="I", help="only the job of that place in the list, from 0 (worker)")
    add("--no_calibration", action="store_true", help="count jobs and steps, but don't time any (plan)")
    add("--workers", type=_at_least(1), help="commands at a time (launcher local)")
    add("--threads", type=_at_least(0), help="CPU threads of each command, 0 for no limit (launchers local, multi_gpu)")
    add(
        "--retries", type=_at_least(0), help="how often a failed job is tried again (launchers local, multi_gpu, slurm)"
    )
    add("--isolation", choices=["fork", "process"], help="how local jobs start: forked with torch loaded, or afresh")
    add("--jobs_per_gpu", type=_at_least(1), help="jobs at a time on each GPU (launcher multi_gpu)")
    add("--max_parallel", type=_at_least(1), help="tasks at a time (launcher slurm)")
    add("--jobs_per_task", type=_at_least(1), help="jobs that a task does one after the other (launcher slurm)")
    add("--slurm_partition", metavar="NAME", help="of the cluster")
    add("--slurm_time", metavar="TIME", help="limit of a task: minutes, or [D-]HH:MM:SS")
    add("--slurm_mem_gb", type=float, help="memory of a task")
    add("--slurm_cpus", type=_at_least(1), help="CPU cores of a task")
    add("--slurm_gpus", type=_at_least(0), help="GPUs of a task")
    add("--slurm_args", nargs="+", metavar="KEY=VALUE", help="further options of sbatch, as account=lab")
    add("--save_every_s", type=seconds, metavar="S", help="seconds between two snapshots of a job; default: train's")
    add("--log_to", nargs="+", metavar="TRACKER", help="also send the jobs' records to: tensorboard wandb mlflow")
    add("--label", help="what the tables call these rows")
    add("--checkpoint_freq", type=_at_least(0), help="updates between two records; default: the dataset's")
    add("--precision", choices=["fp32", "bf16"], help="default: fp32")
    add("--eval_splits", choices=["all", "selection"], help="default: all")
    add("--keep_best", choices=["aa_wga"], help="also keep the model that is best on validation")
    add("--input_pipeline", choices=["pil", "cv2", "device"], help="how image files are opened; default: pil")
    add("--confounders", nargs="+", help="whose product forms the groups, for datasets that know several")
    add("--annotation_budget", type=float, help="share of training images with a known confounder; default: 1")
    add("--validation_budget", type=float, help="share of validation images, for selection, likewise; default: 1")
    add(
        "--budgets",
        nargs="+",
        type=_budget,
        metavar="SHARE[,SHARE]",
        help="each row at each of these budgets, of training and validation images alike, or as a pair",
    )
    add("--mask_dir", help="folder of your own masks, in place of the datasets'")
    add("--explain", type=_at_least(1), metavar="N", help="measure the explanations of N images a test environment")
    add("--no_model_save", dest="skip_model_save", action="store_true", help="store no model.pkl")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line over sweep file over defaults.

    ``rows`` are the sweep file's; ``names_jobs`` is whether file or flags say which jobs are meant.

    Raises:
        OSError, ValueError: see ``read_sweep_file``; or a flag is missing, or means nothing to the command.
    """
    parser = make_parser()
    typed = args = parser.parse_args(argv)
    named = _named(parser, argv, typed)
    rows: list[SweepRow] = []
    if typed.sweep_file:
        words, rows = read_sweep_file(typed.sweep_file, parser, NOT_IN_FILES)
        rows = rows if typed.algorithms is None else []
        args = parser.parse_args(argv, parser.parse_args([typed.command, typed.sweep_file, *words]))
        _drop_overruled(args, typed)
    _check_flags(args, named)
    if args.command in _STARTING and not os.environ.get(registry.PLUGINS_VARIABLE):  # plugins may add trackers
        loggers.check(args.log_to or [])
    _drop_pairs(args)
    args.rows = rows
    args.names_jobs = bool(typed.sweep_file or named - NOT_OF_JOBS)
    if args.command != "refit":
        args.datasets = args.datasets or default_names("datasets")
        args.algorithms = args.algorithms or ([] if rows else default_names("algorithms"))
    return args


def _named(parser: argparse.ArgumentParser, argv: Sequence[str], typed: argparse.Namespace) -> set[str]:
    """The arguments that the command line holds, be their values the defaults or not."""
    unset = object()
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(typed), unset)))
    return {name for name, value in vars(found).items() if value is not unset}


def _drop_overruled(args: argparse.Namespace, typed: argparse.Namespace) -> None:
    """Takes from the file what the command line answers otherwise, as ``steps`` where ``--epochs`` is typed."""
    for one, other in [*EXCLUSIVE, *((other, one) for one, other in EXCLUSIVE)]:
        if getattr(typed, one) and not getattr(typed, other):
            setattr(args, other, None)


def _check_flags(args: argparse.Namespace, named: Collection[str]) -> None:
    for flag in REQUIRED[args.command]:
        if getattr(args, flag) is None:
            raise ValueError(f"--{flag} is required, on the command line or in the sweep file")
    for flag, commands in READ_BY.items():
        if flag in named and args.command not in commands:
            raise ValueError(f"--{flag} is for {', '.join(commands)}; {args.command} does not read it")
    if args.command == "refit" and (wrong := [flag for flag in OF_THE_SEARCH if flag in named]):
        raise ValueError(f"--{wrong[0]} means nothing to refit, which takes it from the search; leave it out")
    if args.command == "cancel" and (wrong := sorted(set(named) - NOT_OF_JOBS)):
        raise ValueError(f"--{wrong[0]} means nothing to cancel, which ends the whole sweep; leave it out")


def _drop_pairs(args: argparse.Namespace) -> None:
    """Pairs of test environments, which triple a sweep, serve a single selection method."""
    if args.selection_method == PAIRS and args.single_test_envs:
        raise ValueError(f"--selection_method {PAIRS} and --single_test_envs exclude each other; leave one of them out")
    if args.selection_method not in (None, PAIRS):
        args.single_test_envs = True
