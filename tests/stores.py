"""An S3 server on loopback, and a failing one; stores of every kind, for tests of all of them."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY, SECRET = "AKIALOOPBACKONLY0001", "loopback-only-secret-0f3a9c"
BUCKET = "shelf"


def credentials(endpoint: str) -> dict[str, str]:
    """Return the environment of whoever may use the server there."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve an empty S3 with one bucket on loopback; give its address."""
    server = pytest.importorskip("moto.server")
    import boto3

    there = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    there.start()
    try:
        host, port = there.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        given = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **given).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        there.stop()


@contextmanager
def answering(*statuses: tuple[int, str]) -> Iterator[tuple[str, list[str]]]:
    """Serve these answers, the last one for ever; give the address and a list of what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = statuses[min(len(asked), len(statuses) - 1)]
            asked.append(f"{self.command} {self.path}")
            content = body.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def error_body(code: str, message: str) -> str:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
