"""Servers on loopback that stand in for S3 and for Google's storage, and a failing one, for tests of all stores."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
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


def gs_credentials(endpoint: str) -> dict[str, str]:
    """Return the environment of whoever may use the stand-in for Google's storage there."""
    return {
        "STORAGE_EMULATOR_HOST": endpoint,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which would ask Google itself what sort of bucket it is
        "NO_GCE_CHECK": "true",
    }


@contextmanager
def gs_server() -> Iterator[str]:
    """Serve an empty Google storage with one bucket on loopback; give its address. Skips where its packages are not.

    The stand-in knows no preconditions, so that of a write which must find nothing there (``ifGenerationMatch=0``,
    refused with 412) is added here.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in gs_credentials("").items():  # gcsfs looks at them as it is imported
            patch.setenv(name, value)
        pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    class ThereError(Exception):
        """An object is there that must not be."""

    class OnlyNew:
        def __init__(self, storage: Any) -> None:
            self.storage = storage

        def __getattr__(self, name: str) -> Any:
            return getattr(self.storage, name)

        def create_file(self, bucket: str, name: str, *rest: Any) -> Any:
            with suppress(NotFound):
                self.storage.get_file_obj(bucket, name)
                raise ThereError
            return self.storage.create_file(bucket, name, *rest)

    def refusing(upload: Callable[..., Any]) -> Callable[..., Any]:
        def uploaded(request: Any, response: Any, storage: Any) -> Any:
            new = request.query.get("ifGenerationMatch") == ["0"]
            try:
                return upload(request, response, OnlyNew(storage) if new else storage)
            except ThereError:
                response.status = HTTPStatus.PRECONDITION_FAILED

        return uploaded

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_multipart_upload", "_media_upload"):
            patch.setattr(objects, name, refusing(getattr(objects, name)))
        there = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        there.start()
        there._api._httpd.handle_error = lambda *_: None  # of clients that hung up, it says on the command's stderr
        try:
            yield f"http://127.0.0.1:{there._api._httpd.server_address[1]}"
        finally:
            there.stop()


@contextmanager
def answering(
    *statuses: tuple[int, str], at: Mapping[str, tuple[int, str]] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve these answers, the last one for ever; give the address and a list of what was asked.

    ``at``: path -> what it is answered, and counts for nothing.
    """
    told = at or {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = told.get(self.path) or statuses[min(len(asked), len(statuses) - 1)]
            if self.path not in told:
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
