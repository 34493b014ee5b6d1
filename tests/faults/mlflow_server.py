"""A server that speaks enough of MLflow's protocol, and misbehaves on request."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

Behaviour = Literal["good", "hangs", "slow", "fails", "hangs up"]
SLOW_S = 0.3


class MlflowServer:
    """Listens on 127.0.0.1; what it was sent is kept while it is down."""

    def __init__(self, artifacts: Path) -> None:
        self.behaviour: Behaviour = "good"
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: list[dict[str, Any]] = []
        self.requests = 0
        self._artifacts = artifacts
        self._port = 0
        self.up()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Listen, on the same port as before."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            do_POST = do_PATCH = do_GET  # noqa: N815 - the library's names

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def steps(self, name: str) -> list[int]:
        """Steps of a metric in the order of their arrival."""
        return [metric["step"] for metric in self.metrics if metric["key"] == name]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request as the present behaviour is."""
        self.requests += 1
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if self.behaviour == "hangs":
            while self.behaviour == "hangs":
                time.sleep(0.02)
            return
        if self.behaviour == "hangs up":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")
            return
        if self.behaviour == "slow":
            time.sleep(SLOW_S)
        failed = self.behaviour == "fails"
        status, reply = (500, {}) if failed else self._reply(handler.path, json.loads(body or "{}"))
        content = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _reply(self, path: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        action = path.partition("/mlflow/")[2].partition("?")[0]
        if action == "experiments/get-by-name":
            return 200, {"experiment": {"experiment_id": "1", "name": "i3dist"}}
        if action == "runs/create":
            run_id = f"{len(self.runs) + 1:032x}"
            info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1"}
            info |= {"status": "RUNNING", "lifecycle_stage": "active"}
            info["artifact_uri"] = (self._artifacts / run_id).as_uri()
            self.runs[run_id] = info
            return 200, {"run": {"info": info, "data": {}}}
        if action == "runs/get":
            info = self.runs[path.rpartition("run_id=")[2].partition("&")[0]]
            return 200, {"run": {"info": info, "data": {}}}
        if action == "runs/update":
            self.runs[request["run_id"]]["status"] = request["status"]
            return 200, {"run_info": self.runs[request["run_id"]]}
        if action == "runs/log-batch":
            self.metrics += request.get("metrics", [])
            return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": action}
