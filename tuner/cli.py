"""The `tuner` command: one short function a verb. Turns errors into one message and an exit code.

Exit codes: 0 done, 1 a run that failed, 2 bad input, 130 stopped by the user.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from tuner.options import (
    ADDRESS_OR_DASHBOARD,
    COUNT,
    DASHBOARD,
    GPUS,
    MM_PER_PX,
    NO_OR_COUNT,
    PORT,
    POSITIVE,
    SEED,
    SEVERAL,
    STUDY_VARIABLE,
    WAIT,
    Rule,
    problem_of_storage,
)
from tuner.records import SearchFailed

_SHOWN_PAIRS = 20
_LAYOUTS = (
    "auto, images_masks, crack_segmentation, crack_segmentation_published, sccdnet, deepcrack, crack500, crackforest, "
    "ksdd, ksdd2, dagm, severstal, mvtec"
)
_OTHER_ADDRESS = (
    "the Ray to go on with from now on, instead of the one that the run has: host:port or auto, or local for one of "
    "this command's own; to http://HOST:PORT of a cluster's dashboard the command is submitted as a job on a run there"
)
_DESCRIPTION = "Hyperparameter search for surface-defect segmentation: search a space, end with one report."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code."""
    gc.set_threshold(100_000, 20, 50)  # what is imported stays: to look through it over and over takes longer
    parser = _parser()
    options = parser.parse_args(arguments)
    options.console = Console(stderr=True)
    handler = RichHandler(console=options.console, show_time=False, show_path=False)  # above the live display
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.WARNING, format="%(message)s", handlers=[handler]
    )
    try:
        code = int(options.function(options) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the one place where errors become messages
        if options.debug:
            raise
        kind = "" if isinstance(error, ValueError | SearchFailed) else f"{type(error).__name__}: "
        print(f"tuner {_verb(options)}: {kind}{error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt as stop:
        kept = "; what a run has finished is kept: `tuner resume RUN` goes on"
        if options.verb == "sync":
            kept = "; what is uploaded is marked: the same command goes on with the rest"
        if options.verb not in ("search", "resume", "finals", "sync"):
            kept = f"; {stop}" if str(stop) else ""
        print(f"tuner {_verb(options)}: stopped at once{kept}", file=sys.stderr)
        return 130


def _data(options: argparse.Namespace) -> str:
    """The data set that is named, or the synthetic one, which is said."""
    if options.data is None:
        options.console.print("no --data: taking the procedural crack set", style="yellow")
        return "synthetic"
    return str(options.data)


def _verb(options: argparse.Namespace) -> str:
    """The words after `tuner`."""
    return f"data {options.data_verb}" if options.verb == "data" else str(options.verb)


def search(options: argparse.Namespace) -> int:
    from tuner.pipeline import run_search

    names = ("name", "runs", "no_report", "trials", "hours", "concurrent", "cpus_per_trial", "gpus_per_trial",
             "cpu_trials", "address", "wandb", "wandb_wait", "tensorboard", "seed", "warm_start", "study",
             "storage", "profile")  # fmt: skip
    chosen = {name: getattr(options, name) for name in names}
    if DASHBOARD.holds(options.address):
        from tuner import jobs

        return jobs.search(options.space, _data(options), chosen, options.console)
    return _ended(run_search(options.space, _data(options), console=options.console, **chosen))


def resume(options: argparse.Namespace) -> int:
    from tuner import mirror
    from tuner.pipeline import at, go_on
    from tuner.run import load_search

    run = options.run
    if "://" in run and (problem := problem_of_storage(run)):
        raise ValueError(problem)
    if DASHBOARD.holds(options.address):
        from tuner import jobs

        return jobs.resume(run, options.data, options.address, options.runs, options.console)
    if mirror.is_mirror(run):
        run = mirror.bring(run, Path(options.runs), options.console)
        options.console.print(f"goes on in {run}")
    return _ended(go_on(at(load_search(run, options.data), options.address), console=options.console))


def _ended(run: Any) -> int:
    """Says how to go on, or where the report is."""
    in_repeats = not run.options.no_report and (run.info.get("repeats") or {}).get("state") == "stopped"
    if run.info["state"] == "stopped" or in_repeats:
        print(f"stopped; nothing is lost. Go on with: tuner resume {run.directory}")
        return 130
    print(run.directory if run.options.no_report else run.directory / "report" / "index.html")
    return 0


def status(options: argparse.Namespace) -> int:
    from tuner.run import load
    from tuner.status import describe, show

    found = describe(load(options.run))
    print(json.dumps(found) if options.json else show(found))
    return 0


def dashboard(options: argparse.Namespace) -> int:
    from tuner.run import load_search
    from tuner.sampler import study_name
    from tuner.tracking import dashboard

    run = load_search(options.run)
    dashboard.serve(run, study_name(run.space, run.info["id"], run.study), options.port)
    return 0


def finals(options: argparse.Namespace) -> int:
    from tuner.cluster import connected
    from tuner.finals import check_test_is_sealed
    from tuner.mirror import mirrored
    from tuner.pipeline import at, check_open_test, evaluate, full_disk_explained, repeat
    from tuner.records import OPEN_TEST
    from tuner.run import load_search

    if DASHBOARD.holds(options.address):
        from tuner import jobs

        return jobs.finals(
            options.run, options.data, options.seeds, options.open_test, options.address, options.console
        )
    run = load_search(options.run, options.data)
    check_test_is_sealed(run.directory, options.open_test)
    check_open_test(run, options.open_test, options.seeds)
    run = at(run, options.address)
    with (
        run.locked(),
        full_disk_explained(run),
        mirrored(run, options.console) as mirror,
        connected(run.options.address),
    ):
        # Configurations and their networks stay those that were chosen, whatever thresholds are chosen on.
        if not options.open_test and not repeat(run, mirror, options.console, options.seeds):
            print(f"stopped; nothing is lost. Go on with: tuner finals {run.directory}")
            return 130
        evaluate(run, options.open_test)
    print(run.directory / "evaluation" / (OPEN_TEST if options.open_test else ""))
    return 0


def report(options: argparse.Namespace) -> int:
    from tuner import report
    from tuner.run import load_search

    run = load_search(options.run)
    out = Path(options.out) if options.out else run.directory / "report"
    report.write(run.directory, out)
    _mirror(run, options.console)
    print(out / "index.html")
    return 0


def _mirror(run: Any, console: Console) -> None:
    """What a verb has written is to lie at the run's storage too, if there is one: that needs torch, a report none."""
    if run.options.storage:
        from tuner import mirror

        mirror.update(run, console)


def compare(options: argparse.Namespace) -> int:
    from tuner import report
    from tuner.report import comparison, render

    searches = comparison.read([Path(run) for run in options.run])
    if options.out:
        print(report.write_comparison(searches, Path(options.out)))
    elif options.json:
        print(json.dumps(comparison.as_json(searches), allow_nan=False))
    else:
        print(render.plain(comparison.build(searches)))
    return 0


def export(options: argparse.Namespace) -> int:
    from tuner.export import export_run
    from tuner.run import load_search

    run = load_search(options.run)
    with options.console.status("exporting, then comparing the file with the network on test images"):
        exported = export_run(run, options.format)
    _mirror(run, options.console)
    print(exported)
    return 0


def predict(options: argparse.Namespace) -> int:
    from tuner.predict import predict

    outcome = predict(options.model, options.images, options.out, options.mm_per_px, options.console)
    print(outcome)
    return 1 if outcome.counts["failed"] else 0


def next_masks(options: argparse.Namespace) -> int:
    from tuner.next_masks import propose

    outcome = propose(options.model, options.images, options.out, options.count, options.console)
    print(outcome)
    return 1 if outcome.counts["failed"] else 0


def trial(options: argparse.Namespace) -> int:
    from tuner.single import run_trial

    names = ("name", "runs", "seed", "cpus_per_trial", "gpus_per_trial", "wandb", "profile")
    chosen = {name: getattr(options, name) for name in names}
    outcome = run_trial(options.space, _data(options), options.set or (), console=options.console, **chosen)
    if not outcome.completed:
        raise SearchFailed(str(outcome))
    print(outcome)
    return 0


def plan(options: argparse.Namespace) -> int:
    from tuner.plan import plan, show

    names = ("concurrent", "cpus_per_trial", "gpus_per_trial")
    data = _data(options)
    with options.console.status("checking the data, then timing a few steps"):
        found = plan(options.space, data, **{name: getattr(options, name) for name in names})
    print(json.dumps(found) if options.json else show(found))
    return 0


def data_check(options: argparse.Namespace) -> int:
    from model import duplicates, layouts, splits
    from tuner import datasets

    path = Path(options.path)
    if datasets.is_address(options.path):
        source = datasets.Source.of(datasets.checked(options.path), 0, 0)
        source.fetch(options.console)
        path = source.folder
    samples = layouts.read(path, options.layout)
    found = splits.assign(samples, path, options.validation_share, options.test_share, options.seed)
    for name, split in zip(layouts.SPLITS, found, strict=True):
        counts = splits.counts(split)
        groups = len({sample.group for sample in split})
        print(
            f"{name:<11} {len(split):>6} images: {counts['positive']} positive ({counts['segmented']} with masks), "
            f"{counts['negative']} negative, {groups} groups"
        )
    print(f"fingerprint {splits.fingerprint(found)}; no broken file, no group or file in two splits")
    alike = duplicates.near_duplicates(found)
    print(f"{len(alike) or 'no'} pairs of near-duplicates between splits" + ("; look at them:" if alike else ""))
    for pair in alike[:_SHOWN_PAIRS]:
        print(f"  {pair}")
    return 0


def data_convert(options: argparse.Namespace) -> int:
    from model import convert, layouts, splits

    samples = layouts.read(Path(options.source), options.layout)
    kept = splits.without_leaks(samples) if options.drop_leaks else samples
    convert.write(kept, Path(options.out))
    left_out = f", {len(samples) - len(kept)} left out" if options.drop_leaks else ""
    print(f"{options.out}: {len(kept)} images{left_out}")
    return 0


def data_synth(options: argparse.Namespace) -> int:
    from model import synthetic

    out = Path(options.out)
    synthetic.write(out, count=options.count, height=options.height, width=options.width, seed=options.seed)
    print(out)
    return 0


def data_cache(options: argparse.Namespace) -> int:
    from model.data import cache_limit, cache_root, cached, make_room

    root = cache_root()
    gone = make_room(root, 0) if options.clear else []
    for path, size in cached(root):
        print(f"{path}  {size / 2**20:,.1f} MiB")
    print(f"{root}: {len(gone)} removed; at most {cache_limit() / 2**30:g} GiB are kept ($SEGDEC_TUNER_CACHE_GIB)")
    return 0


def sync(options: argparse.Namespace) -> int:
    from tuner.pipeline import watched
    from tuner.run import load
    from tuner.tracking.sync import upload

    run = load(options.run)
    if run.is_running():
        raise ValueError(f"{run.directory} is running, and its W&B files are still written; sync it when it has ended")
    counts = Counter[str]()
    for outcome in upload(run, watched(run), options.dry_run):
        print(outcome, flush=True)
        counts[outcome.state] += 1
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["failed"] or counts["left out"] else 0


def wandb_sweep(options: argparse.Namespace) -> int:
    import yaml

    from tuner.datasets import checked
    from tuner.space_file import load
    from tuner.tracking import wandb_pages
    from tuner.tracking.sweep import sweep_config

    space = load(options.space)
    file = Path(options.space)
    config = sweep_config(
        space,
        checked(_data(options)),
        source=str(file.resolve() if file.is_file() else options.space),  # agents may have another current folder
        project=wandb_pages.project(options.project),
        run_cap=space.budget.trials,
    )
    if not options.register:
        print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")
        return 0
    sweep, problems = wandb_pages.register_sweep(config)
    for problem in problems:
        print(f"tuner wandb-sweep: {problem}", file=sys.stderr)
    if sweep:
        print(f"sweep {sweep['id']}\n{sweep['url']}\nwandb agent {sweep['entity']}/{sweep['project']}/{sweep['id']}")
    return 1 if problems else 0


def schema(_options: argparse.Namespace) -> int:
    from tuner.space_file import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tuner", description=_DESCRIPTION)
    parser.set_defaults(debug=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function: Any, name: str, text: str, example: str, into: Any = verbs) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = into.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
        made.set_defaults(function=function)
        return made

    made = verb(search, "search", "search a space, evaluate the best trial, write its report",
                "tuner search demo --data synthetic")  # fmt: skip
    made.add_argument("space", metavar="SPACE", help="a search-space file, or the name of a shipped one")
    made.add_argument(
        "--data",
        metavar="PATH",
        help="folder with images/ and masks/ that all nodes see, an address in object storage such as "
        "s3://BUCKET/FOLDER, from which each node takes what it needs, or synthetic, which is taken if not given",
    )
    made.add_argument("--name", help="the run's name; the space's if not given")
    made.add_argument("--runs", metavar="DIR", default="runs", help="where runs lie")
    made.add_argument("--trials", metavar="N", type=_count, help="instead of the space's budget")
    made.add_argument("--hours", metavar="H", type=_positive, help="instead of the space's budget")
    made.add_argument("--concurrent", metavar="N", type=_count, help="trials at once; as many as fit if not given")
    made.add_argument("--cpus-per-trial", metavar="F", type=_positive, help="CPU cores that a trial holds")
    made.add_argument(
        "--gpus-per-trial",
        metavar="F",
        type=_gpus,
        help="GPUs that a trial holds, or a part of one, which is enforced; "
        "if not given, the part that holds the space's largest trial, by its measured memory",
    )
    made.add_argument(
        "--cpu-trials", metavar="N", type=_no_or_count, default=0,
        help="trials at once that run on CPU cores alone, beside those on GPUs",
    )  # fmt: skip
    made.add_argument(
        "--address",
        metavar="ADDR",
        type=_address,
        help="a running Ray cluster, host:port or auto; local, as if not given, is a Ray of this search's own; to "
        "http://HOST:PORT of a cluster's dashboard the same command is submitted as a job, with the current folder",
    )
    made.add_argument(
        "--wandb", choices=("off", "offline", "online"), default="offline", help="log to Weights & Biases"
    )
    made.add_argument(
        "--wandb-wait", metavar="S", type=_wait, default=5.0,
        help="seconds that the end waits for uploads; the rest goes on in the background",
    )  # fmt: skip
    made.add_argument("--tensorboard", action="store_true", help="write event files to RUN/tensorboard too")
    made.add_argument("--seed", metavar="S", type=_seed, help="instead of the space's")
    made.add_argument("--warm-start", metavar="RUN", help="a run whose completed trials the sampler is to know")
    made.add_argument(
        "--study",
        metavar="URL",
        help="keep the study in a database, such as sqlite:///study.db or postgresql://HOST/NAME, not in a journal in "
        f"the run's folder; env takes the URL from ${STUDY_VARIABLE}, where it may hold a password",
    )
    made.add_argument(
        "--storage",
        metavar="URI",
        help="write checkpoints to URI/NAME and mirror the run there, so that `tuner resume URI/NAME` goes on on "
        "another machine: a path, s3://BUCKET/FOLDER, or what else fsspec or pyarrow know; never with credentials",
    )
    made.add_argument(
        "--profile", action="store_true",
        help="record the first trial for some training steps, a validation and a checkpoint: RUN/profile/ then holds "
        "where the time went, as a table and as a trace for ui.perfetto.dev",
    )  # fmt: skip
    made.add_argument("--no-report", action="store_true", help="search alone; the test split stays sealed")

    made = verb(trial, "trial", "train and judge one point of a space, outside any search; the program of a W&B sweep",
                "tuner trial demo --data synthetic --set learning_rate=0.7 threshold_rule=grid")  # fmt: skip
    made.add_argument("space", metavar="SPACE", help="a search-space file, or the name of a shipped one")
    made.add_argument(
        "--data",
        metavar="PATH",
        help="folder with images/ and masks/, an address such as s3://BUCKET/FOLDER, or synthetic, which is taken if "
        "not given",
    )
    made.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        help="searched parameters; one that is not given is as in the baseline, one that does not apply is left out",
    )
    made.add_argument("--name", help="the collection that the trial is added to; SPACE-trials if not given")
    made.add_argument("--runs", metavar="DIR", default="runs", help="where runs lie")
    made.add_argument("--seed", metavar="S", type=_seed, help="of the training; the space's if not given")
    made.add_argument(
        "--cpus-per-trial", metavar="N", type=_count, help="CPU cores that it uses; one, or a GPU's share, if not given"
    )
    made.add_argument("--gpus-per-trial", metavar="F", type=_gpus, help="0 leaves a GPU alone; one if there is any")
    made.add_argument(
        "--wandb",
        choices=("off", "offline", "online"),
        help="log to Weights & Biases; if not given, online where `wandb agent` runs this, else offline",
    )
    made.add_argument(
        "--profile", action="store_true",
        help="leave a table and a trace of some training steps, a validation and a checkpoint in the trial's profile/",
    )  # fmt: skip

    made = verb(resume, "resume", "go on with a run after any kind of stop", "tuner resume runs/demo")
    made.add_argument(
        "run", metavar="RUN_OR_URI", help="the folder of a run, or URI/NAME at its --storage, from where it is brought"
    )
    made.add_argument("--runs", metavar="DIR", default="runs", help="where a run that is brought will lie")
    made.add_argument("--address", metavar="ADDR", type=_address, help=_OTHER_ADDRESS)
    made.add_argument(
        "--data", metavar="PATH", help="folder or address where the same data lie now, if they have moved"
    )

    made = verb(status, "status", "trials by status, best so far, time left", "tuner status runs/demo --json")
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument("--json", action="store_true", help="for programs")

    made = verb(dashboard, "dashboard", "show the study live in optuna-dashboard, here alone, until Ctrl-C; read-only",
                "tuner dashboard runs/demo")  # fmt: skip
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument("--port", metavar="P", type=_port, default=8080, help="on 127.0.0.1; 0 takes any that is free")

    made = verb(finals, "finals", "repeat the best, choose, and evaluate winner and baseline, once on test",
                "tuner finals runs/demo --seeds 3")  # fmt: skip
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument(
        "--seeds", metavar="K", type=_several,
        help="train configurations that may be the best again, at most K times each with the search's own; as the "
        "space's `repeats` says, or not at all, if not given",
    )  # fmt: skip
    made.add_argument("--address", metavar="ADDR", type=_address, help=_OTHER_ADDRESS)
    made.add_argument(
        "--data", metavar="PATH", help="folder or address where the same data lie now, if they have moved"
    )
    made.add_argument(
        "--open-test",
        action="store_true",
        help="open the test split again and choose the thresholds on it, as the public scripts do; logged and stamped",
    )

    made = verb(report, "report", "write the report from the run directory", "tuner report runs/demo")
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument("--out", metavar="DIR", help="where to; RUN/report if not given")

    made = verb(compare, "compare", "set searches side by side, with paired intervals on the test images they share",
                "tuner compare runs/demo runs/demo-wide --out comparison")  # fmt: skip
    made.add_argument("run", metavar="RUN", nargs="+", help="folders of runs; each is compared with the first")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--out", metavar="DIR", help="write a page with figures there instead of tables to the terminal")
    form.add_argument("--json", action="store_true", help="for programs")

    made = verb(export, "export", "write the best network as one file that needs nothing else, or all of it as one zip",
                "tuner export runs/demo --format onnx")  # fmt: skip
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument(
        "--format",
        choices=("onnx", "torch", "report"),
        required=True,
        help="onnx: RUN/best/model.onnx; torch: RUN/best/model.pt2, for torch.export.load; report: a zip in RUN with "
        "report, model, configuration and the command that reproduces them",
    )

    made = verb(predict, "predict", "masks, overlays and sizes of cracks for new images",
                "tuner predict runs/demo photos 'more/**/*.jpg' --out cracks --mm-per-px 0.2")  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="the folder of a run, its best/, or an exported .onnx file")
    made.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders with all below them, or patterns")
    made.add_argument(
        "--out", metavar="DIR", required=True, help="a new folder, or one of earlier predictions, which it replaces"
    )
    made.add_argument("--mm-per-px", metavar="F", type=_mm_per_px, help="gives lengths and areas in mm too")

    made = verb(next_masks, "next", "rank the images that would profit most from a mask, by what a model is unsure of",
                "tuner next runs/demo photos --out next")  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="the folder of a run, its best/, or an exported .onnx file")
    made.add_argument(
        "images",
        metavar="IMAGE",
        nargs="*",
        help="files, folders with all below them, or patterns; if none is given, the run's own training images that "
        "have a label and no mask",
    )
    made.add_argument(
        "--out", metavar="DIR", required=True, help="a new folder, or one of an earlier ranking, which it replaces"
    )
    made.add_argument(
        "--count", metavar="N", type=_count, default=24, help="images that get a map of where the model is unsure"
    )

    made = verb(plan, "plan", "check a space and its data, time a few steps, forecast hours and memory; no run is made",
                "tuner plan demo --data synthetic")  # fmt: skip
    made.add_argument("space", metavar="SPACE", help="a search-space file, or the name of a shipped one")
    made.add_argument(
        "--data",
        metavar="PATH",
        help="folder with images/ and masks/, an address such as s3://BUCKET/FOLDER, or synthetic, which is taken if "
        "not given",
    )
    made.add_argument("--concurrent", metavar="N", type=_count, help="trials at once; as many as fit here if not given")
    made.add_argument("--cpus-per-trial", metavar="F", type=_positive, help="CPU cores that a trial holds")
    made.add_argument(
        "--gpus-per-trial",
        metavar="F",
        type=_gpus,
        help="GPUs that a trial holds, or a part of one; if not given, as a search would choose",
    )
    made.add_argument("--json", action="store_true", help="for programs")

    data = verbs.add_parser("data", help="check or make a data set").add_subparsers(
        dest="data_verb", required=True, metavar="VERB"
    )
    made = verb(data_check, "check", "count, find broken files, leaks and near-duplicates between splits",
                "tuner data check ~/data/cracks", into=data)  # fmt: skip
    made.add_argument(
        "path", metavar="PATH", help="folder or address of images/ and masks/, or of another known layout"
    )
    made.add_argument("--layout", default="auto", help=f"how files lie there: {_LAYOUTS}")
    made.add_argument("--validation-share", type=_share, default=0.15, help="share of the images")
    made.add_argument("--test-share", type=_share, default=0.15, help="share of the images")
    made.add_argument("--seed", type=int, default=0, help="of the random split")
    made = verb(data_convert, "convert", "write a data set as images/, masks/ and index.csv",
                "tuner data convert ~/data/KolektorSDD2 ~/data/ksdd2", into=data)  # fmt: skip
    made.add_argument("source", metavar="SRC", help="folder of any known layout")
    made.add_argument("out", metavar="OUT", help="a new folder")
    made.add_argument("--layout", default="auto", help=f"how files lie in SRC: {_LAYOUTS}")
    made.add_argument(
        "--drop-leaks", action="store_true", help="leave out images whose photo or file is in a later given split too"
    )
    made = verb(data_synth, "synth", "write the procedural crack set", "tuner data synth --out /tmp/cracks", into=data)
    made.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    made.add_argument("--count", type=_count, default=180, help="images")
    made.add_argument("--height", type=int, default=128, help="px")
    made.add_argument("--width", type=int, default=128, help="px")
    made.add_argument("--seed", type=int, default=0, help="another set")

    made = verb(data_cache, "cache", "the decoded splits of this machine, which all trials share",
                "tuner data cache --clear", into=data)  # fmt: skip
    made.add_argument("--clear", action="store_true", help="remove them; they are made again when needed")

    made = verb(sync, "sync", "upload what was logged to Weights & Biases offline", "tuner sync runs/demo --dry-run")
    made.description = (
        "Upload what was logged to Weights & Biases and is not there yet. What its files lack is first completed from "
        "the records of the trials; when all runs are there, they get a sweep, a workspace and a report, unless they "
        "have them. To be repeated as often as you like."
    )
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument(
        "--dry-run", action="store_true", help="say what would be uploaded, completed and made; contact nobody"
    )

    made = verb(wandb_sweep, "wandb-sweep", "print a space as a sweep of Weights & Biases, in YAML for `wandb sweep`",
                "tuner wandb-sweep demo > sweep.yaml")  # fmt: skip
    made.add_argument("space", metavar="SPACE", help="a search-space file, or the name of a shipped one")
    made.add_argument(
        "--data", metavar="PATH", help="where agents find the data, or synthetic, which is taken if not given"
    )
    made.add_argument("--register", action="store_true", help="make the sweep on the server instead of printing it")
    made.add_argument("--project", metavar="P", help="of the sweep; $WANDB_PROJECT or segdec-tuner if not given")

    verb(schema, "schema", "print the JSON schema of a search-space file", "tuner schema > space.schema.json")
    return parser


def _value(rule: Rule, kind: type) -> Callable[[str], Any]:
    """Reads an option that has a rule."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if not rule.holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule.wanted}, found {text!r}; {rule.way_out}")
        return value

    return read


_count = _value(COUNT, int)
_positive = _value(POSITIVE, float)
_gpus = _value(GPUS, float)
_no_or_count = _value(NO_OR_COUNT, int)
_several = _value(SEVERAL, int)
_mm_per_px = _value(MM_PER_PX, float)
_wait = _value(WAIT, float)
_seed = _value(SEED, int)
_port = _value(PORT, int)
_address = _value(ADDRESS_OR_DASHBOARD, str)
_share = _value(Rule("a share above 0 and below 0.9", lambda v: POSITIVE.holds(v) and v < 0.9), float)


if __name__ == "__main__":
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    sys.exit(main())
