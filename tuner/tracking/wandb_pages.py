"""What W&B gets beside the runs of a search: a sweep, a workspace and a report. `register` has them made.

A process of its own does it, `python -m tuner.tracking.wandb_pages`: the driver imports no wandb, and the caller's
timeout holds whatever a server does. It reads one JSON request on its standard input:

    space       `Space.to_dict()`
    search      the group of the runs
    config      the sweep's configuration; made of the space, `source` and `data` where it is not given
    source      what agents are to give `tuner trial` as the space; its name if not given
    data        what agents are to give `tuner trial` as --data; synthetic if not given
    project     where the runs lie; $WANDB_PROJECT or segdec-tuner if not given
    entity      who owns the project; the account's own if not given
    prior_runs  ids of all runs of the search so far, which the sweep is to show
    pages       whether a workspace and a report are wanted
    sweep, workspace, report    of an earlier answer, what is there already, or null; `sweep` may be an id alone

and writes the answer, `{"sweep": {"id", "url", "entity", "project"} | null, "workspace": URL | null, "report": URL |
null, "problems": [str]}`, one line after each step, of which the last one holds: what was made before a server hung is
known, and the next call goes on from there. Exit code 0 when all that was asked is there.

A workspace and a report that are there are left as they are: people edit them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from tuner import space_file
from tuner.tracking.sweep import sweep_config
from tuner.tracking.wandb_files import PROJECT
from tuner.tracking.wandb_runs import check_login, environment, without_password

TIMEOUT_S = 25.0
"""A few requests; with a server that does not answer, retries included."""

_RETRIES = {
    # wandb's own settings would try for hours; sooner or later the caller asks again.
    "WANDB__GRAPHQL_RETRY_MAX": "1",
    "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "1",
    "WANDB_HTTP_TIMEOUT": "10",
}
_LONGEST_PROBLEM = 500
_NO_PACKAGE = (
    "workspace and report need the package wandb-workspaces, which is not installed; "
    "pip install 'segdec-tuner[wandb-pages]'"
)


def project(asked: str | None = None) -> str:
    """Where runs and sweeps lie."""
    return asked or os.environ.get("WANDB_PROJECT") or PROJECT


def register_sweep(config: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """Makes a sweep that has no runs yet: the sweep as an answer describes it, and the problems.

    ValueError without an account.
    """
    check_login("a sweep on the server", "run `wandb login` or set WANDB_API_KEY, or feed the YAML to `wandb sweep`")
    answer = register({"config": config, "project": config.get("project")})
    return answer["sweep"], answer["problems"]


def register(request: dict[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Has the sweep, and the pages if wanted, made or found; the answer. Whatever goes wrong is among its problems.

    Keep the answer and hand its `sweep`, `workspace` and `report` over with the next request: nothing is made twice.
    """
    with tempfile.TemporaryDirectory(prefix="tuner-wandb-") as scratch:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tuner.tracking.wandb_pages"],
            cwd=scratch,  # with no settings of wandb
            env=_RETRIES | environment("online") | {"WANDB_DIR": scratch},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C is the caller's to handle
        )
        problem = None
        try:
            said, complained = process.communicate(json.dumps(request), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            said, complained = process.communicate()
            problem = f"W&B did not answer within {timeout_s:g} s"
        except BaseException:
            _end(process)
            process.communicate()
            raise
    answer = _last_answer(said) or _Pages(request).answer
    if problem is None and process.returncode and not answer["problems"]:
        last = [line for line in complained.splitlines() if line.strip()][-1:]
        problem = f"the process that asks W&B ended with exit code {process.returncode}: {''.join(last).strip()}"
    if problem:
        answer["problems"].append(without_password(problem))
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    """With wandb-core, which is in its group and would hold the pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_answer(said: str) -> dict[str, Any] | None:
    """Of the whole lines; one may be cut off."""
    lines = said.rpartition("\n")[0].splitlines()
    return json.loads(lines[-1]) if lines else None


def _address(url: str | None) -> str | None:
    """As it may be kept and said; wandb makes it of a base URL that may hold a password."""
    return without_password(url) if url else url


class _Pages:
    """The steps of a request. What fails is a problem of the answer, and the next step is tried."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        known = request.get("sweep") or {}
        known = {"id": known, "url": None} if isinstance(known, str) else known
        self.project = request.get("project") or known.get("project") or project()
        self.entity: str | None = request.get("entity") or known.get("entity")
        self.answer: dict[str, Any] = {
            "sweep": self._sweep(known["id"], known["url"]) if known else None,
            "workspace": _address(request.get("workspace")),
            "report": _address(request.get("report")),
            "problems": [],
        }

    def _sweep(self, sweep: str, url: str | None) -> dict[str, Any]:
        return {"id": sweep, "url": _address(url), "entity": self.entity, "project": self.project}

    def make(self, say: Callable[[dict[str, Any]], None]) -> None:
        """Tells `say` the answer after each step."""
        steps: list[tuple[str, Callable[[], None]]] = [("log in", self._log_in), ("sweep", self._make_sweep)]
        if self.request.get("pages"):
            steps += [(page, functools.partial(self._make_page, page)) for page in ("workspace", "report")]
        for name, step in steps:
            try:
                step()
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "wandb_workspaces":
                    raise
                self._problem(_NO_PACKAGE)
            except Exception as error:  # of wandb, of its server, of what it answers: never the search's end
                self._problem(f"{name}: {error}")
                if name == "log in":
                    break
            finally:
                say(self.answer)

    def _problem(self, text: str) -> None:
        line = " ".join(without_password(text).split())[:_LONGEST_PROBLEM]
        if line not in self.answer["problems"]:
            self.answer["problems"].append(line)

    def _log_in(self) -> None:
        import wandb

        self._api = wandb.Api()
        # wandb-workspaces asks for one at each turn, and each would log in; one that failed after a page was saved
        # would lose its address.
        wandb.Api = lambda: self._api
        self.entity = self.entity or self._api.settings["entity"] or self._api.default_entity

    def _make_sweep(self) -> None:
        from wandb.apis.public import sweeps  # private, but what `wandb sweep` itself calls; wandb is pinned for it

        prior = list(self.request.get("prior_runs") or [])
        where = {"project": self.project, "entity": self.entity}
        config, id_on_server = self.request.get("config"), None
        if self.answer["sweep"]:
            sweep = self.answer["sweep"]["id"]
            found = sweeps._sweep_with_runs(self._api, sweep, "{}", **where)
            self.answer["sweep"] = self._sweep(sweep, self._url(sweep))
            if not set(prior) - {run["name"] for run in found["runs"]}:
                return
            import yaml

            # As it was: W&B forbids to change a sweep that has begun.
            config, id_on_server = yaml.safe_load(found["config"]), found["id"]
        made, warnings = sweeps._upsert_sweep(
            self._api, config or self._config(), obj_id=id_on_server, prior_runs=prior, **where
        )
        if lies_in := made.get("project"):
            self.project, self.entity = lies_in["name"], (lies_in.get("entity") or {}).get("name") or self.entity
        self.answer["sweep"] = self._sweep(made["name"], self._url(made["name"]))
        for warning in warnings or []:
            self._problem(f"sweep: W&B takes it, but says {warning}")

    def _config(self) -> dict[str, Any]:
        return sweep_config(
            space_file.parse(self.request["space"]),
            self.request.get("data") or "synthetic",
            source=self.request.get("source"),
            name=self.request["search"],
        )

    def _url(self, sweep: str) -> str | None:
        from wandb.util import app_url

        if not self.entity:
            return None
        address = app_url(self._api.settings["base_url"])
        return "/".join([address, *map(quote, (self.entity, self.project)), "sweeps", quote(sweep)])

    def _make_page(self, page: str) -> None:
        if self.answer[page]:
            return
        from tuner.tracking import wandb_views

        space = space_file.parse(self.request["space"])
        made = getattr(wandb_views, page)(space, self.request["search"], self.entity, self.project)
        self.answer[page] = _address(made.save().url)


def main() -> int:
    """Answers the request on standard input."""
    # Whatever wandb prints goes to standard error: standard output holds answers alone.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        pages = _Pages(json.load(sys.stdin))
        pages.make(lambda answer: print(json.dumps(answer), file=answers, flush=True))
    return 1 if pages.answer["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
