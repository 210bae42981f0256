"""The stub of W&B's server, with sweeps, workspaces and reports; made from what wandb 0.31 was seen to send."""

from __future__ import annotations

import json
from typing import Any

from tests.tuner.tracking.stub_server import StubServer


class PagesServer(StubServer):
    """Keeps what is made: `sweeps` by their ids, and `views`, the project's workspaces and reports."""

    def __init__(self) -> None:
        super().__init__()
        self.projects: set[str] = set()
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.drawn: list[dict[str, Any]] = []
        """parameters that an agent is still to try; it is told to exit when it has"""

    def Viewer(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - as W&B calls it
        viewer = {"id": "u", "entity": "me", "username": "me", "email": None, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def GetDefaultEntity(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "u", "entity": "me"}}

    def UpsertSweep(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = asked["id"].removeprefix("node-") if asked["id"] else f"sweep{len(self.sweeps)}"
        self.projects.add(asked["projectName"])
        self.sweeps.setdefault(given, {"mutations": []})["mutations"].append(asked)
        self.sweeps[given]["config"] = asked["config"]
        entity = asked["entityName"] or "me"
        project = {"id": "p", "name": asked["projectName"], "entity": {"id": "e", "name": entity}}
        made = {"name": given, "project": project}
        return {"upsertSweep": {"sweep": made, "configValidationWarnings": self.warnings}}

    def SweepWithRuns(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        found = self.sweeps.get(asked["sweep"])
        if found is None:
            return {"project": {"sweep": None}}
        filters = [mutation["priorRunsFilters"] for mutation in found["mutations"]]
        runs = {run["name"] for one in filters if one for run in json.loads(one)["$or"]}
        runs |= {name for name, run in self.runs.items() if run.described.get("sweep") == asked["sweep"]}
        described = {"id": f"node-{asked['sweep']}", "name": asked["sweep"], "config": found["config"]}
        edges = [{"node": {"name": run}} for run in sorted(runs)]
        return {"project": {"sweep": described | {"runs": {"edges": edges}}}}

    def CreateAgent(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createAgent": {"agent": {"id": "agent"}}}

    def Heartbeat(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        commands: list[dict[str, Any]] = []
        if json.loads(asked["runState"]):
            pass  # what it runs has not ended
        elif self.drawn:
            args = {name: {"value": value} for name, value in self.drawn.pop(0).items()}
            commands = [{"type": "run", "run_id": f"run{len(self.drawn)}", "program": "tuner", "args": args}]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def GetProjects(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        about = {"__typename": "Project", "entityName": "me", "createdAt": "2026-11-24T00:00:00Z", "isBenchmark": False}
        edges = [{"node": about | {"id": name, "name": name, "user": None}} for name in sorted(self.projects)]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": edges}}

    def ProjectInternalId(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        there = asked["projectName"] in self.projects
        return {"project": {"id": "p", "internalId": "UHJvamVjdA=="} if there else None}

    def UpsertView2(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return self.upsertView(asked)

    def upsertView(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.views.append(asked)
        project = {"id": "p", "name": asked["projectName"], "entityName": asked["entityName"]}
        view = {"id": f"Vmlldzo{len(self.views)}", "project": project}
        view |= {key: asked[key] for key in ("name", "displayName", "description", "type", "spec")}
        return {"upsertView": {"view": view | {"updatedAt": "2026-11-24T00:00:00Z"}, "inserted": True}}
