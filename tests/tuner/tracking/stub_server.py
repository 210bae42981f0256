"""A W&B server on loopback, as much of one as the runs of wandb 0.31 ask for; made from what it was seen to send.

Rows are kept as the file stream's protocol says: by line, so that an upload at an offset replaces what lies there.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)|\{\s*(\w+)")


@dataclass
class StubRun:
    """What has arrived of a run."""

    described: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None


@dataclass
class StubArtifact:
    """What has arrived of an artifact."""

    name: str
    kind: str
    run: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class StubServer(ThreadingHTTPServer):
    """`status` says what a request is answered with, by its path and body; 0 hangs up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.asked: list[str] = []
        """the GraphQL operations"""
        self.keys: set[str] = set()
        self.runs: dict[str, StubRun] = {}
        self.artifacts: list[StubArtifact] = []
        self.status: Callable[[str, bytes], int] = lambda path, body: 200

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no news."""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            asked = json.loads(body)
            operation = asked.get("operationName") or next(filter(None, _OPERATION.search(asked["query"]).groups()))
            self.asked.append(operation)
            return {"data": getattr(self, operation)(asked.get("variables") or {})}
        if path.startswith("/artifact/"):
            _, number, name = path.strip("/").split("/", 2)
            self.artifacts[int(number)].files[name] = body
            return {}
        kind, _, _, run, *rest = path.strip("/").split("/")
        if kind == "files":
            self._stream(self.runs[run], json.loads(body))
        else:
            self.runs[run].files.add("/".join(rest))
        return {}

    def UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - as W&B calls it
        is_new = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], StubRun())
        run.described |= {name: value for name, value in asked.items() if value is not None}
        project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": asked["name"], "project": project, "historyLineCount": len(run.rows)}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(asked["name"])
        if run is None:
            return {"model": {"bucket": None}}
        described = {
            "id": "b",
            "name": asked["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.described.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
            "eventsTail": "[]",
            "config": run.described.get("config"),
            "tags": run.described.get("tags"),
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"bucket": described}}

    def CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        where = f"{self.url}/storage/me/{asked['project']}/{asked['run']}"
        files = [{"name": name, "uploadUrl": f"{where}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def ServerFeaturesQuery(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        asked = asked["input"]
        self.artifacts.append(
            StubArtifact(asked["artifactCollectionName"], asked["artifactTypeName"], asked["runName"])
        )
        artifact = {
            "id": str(len(self.artifacts) - 1),
            "state": "PENDING",
            "artifactSequence": {"latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        where = f"{self.url}/artifact/{asked['artifactID']}/manifest"
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "m", "uploadUrl": where, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": file}}}

    def CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        edges = (
            [
                {"node": self._artifact_file(spec["artifactID"], spec["name"])}
                for spec in asked["input"]["artifactFiles"]
            ]
            if "input" in asked
            else [{"node": self._artifact_file(s["artifactID"], s["name"])} for s in asked["artifactFiles"]]
        )
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _artifact_file(self, artifact: str, name: str) -> dict[str, Any]:
        url = f"{self.url}/artifact/{artifact}/{name}"
        return {"id": "f", "name": name, "displayName": name, "storagePath": f"p/{name}", "uploadUrl": url,
                "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": artifact}}  # fmt: skip

    def CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.artifacts[int(asked["artifactID"])].committed = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}

    def _stream(self, run: StubRun, sent: dict[str, Any]) -> None:
        for name, chunk in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                run.rows[chunk["offset"] : chunk["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    server: StubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(self.path)
        if not self.path.startswith(("/storage/", "/artifact/")):  # whose addresses are signed
            self.server.keys.add(self.headers["Authorization"])
        status = self.server.status(self.path, body)
        if status == 0:
            self.close_connection = True
            return
        answer = self.server.answer(self.path, body) if status == 200 else {"errors": [{"message": "not today"}]}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _serve
