"""A real S3 server on the loopback address, and a wire to it, from there or from hosts, that a test can cut."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest import mock

import boto3
import s3fs
from moto.server import ThreadedMotoServer

_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Wire:
    """Listens on a port of its own and passes everything on to the server, unless it is told otherwise."""

    def __init__(self, port: int, host: str) -> None:
        self._server = ("127.0.0.1", port)
        self._open: set[socket.socket] = set()
        self.state = "whole"
        """whole, cut (connections are closed at once) or busy (whatever is asked, the answer is 503)"""
        self._socket = socket.create_server((host, 0), backlog=100)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, state: str) -> None:
        self.state = state
        for each in list(self._open):  # what is on its way is lost
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.state = "whole"

    def close(self) -> None:
        self._socket.close()
        self.fail("cut")

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                came, _ = self._socket.accept()
                if self.state == "whole":
                    there = socket.create_connection(self._server)
                    self._open |= {came, there}
                    for pair in ((came, there), (there, came)):
                        threading.Thread(target=self._pass_on, args=pair, daemon=True).start()
                    continue
                with suppress(OSError):
                    if self.state == "busy":
                        came.recv(65536)
                        came.sendall(_UNAVAILABLE)
                    came.close()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open -= {source, target}


@contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[Wire]:
    """A server that this process and all that it starts find by the environment, with the bucket `bucket`. `host`: the
    address of this machine at which it is reached."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port()[1], host)
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{wire.port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "her secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with mock.patch.dict(os.environ, variables):
        s3fs.S3FileSystem.clear_instance_cache()  # one of these remembers its server
        connection = http.client.HTTPConnection(host, wire.port)
        connection.request("POST", "/moto-api/reset")  # the data are this process's, not the server's
        assert connection.getresponse().status == 200
        connection.close()
        boto3.client("s3").create_bucket(Bucket="bucket")
        try:
            yield wire
        finally:
            wire.close()
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()
