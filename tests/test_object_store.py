"""A model in an S3 bucket: the real client, s3fs, against a small server on this machine that speaks what it asks for."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from xgenda.errors import ChecksumError, ModelNotFoundError
from xgenda.models import sources, store

s3fs = pytest.importorskip("s3fs")

MODEL = (2).to_bytes(8, "little") + b"{}" + bytes(range(256)) * 40
SHA = hashlib.sha256(MODEL).hexdigest()
SECRET = "averysecretaccesskey"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        server.hits.append(self.path)
        key = self.path.split("?")[0]
        body, status = server.files.get(key, b""), 200 if key in server.files else 404
        if key.startswith("/closed"):
            status, body = 403, b""
        if key == "/busy/model.safetensors" and len(server.hits) < 2:
            status, body = 503, b""
        if status == 200 and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        length = len(body)
        if key.startswith("/broken") and self.command == "GET":
            body = body[: length // 2]
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.md5(server.files.get(key, b"")).hexdigest()}"')
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command == "GET":
                self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.files, server.hits = {"/bucket/model.safetensors": MODEL}, []
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
            "NO_PROXY": "127.0.0.1",
            "XGENDA_CACHE": str(tmp_path / "cache"),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sources, "RETRIES", 0)
        s3fs.S3FileSystem.clear_instance_cache()  # which remembers the address of the last server
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()


def registered(url: str, content: bytes = MODEL) -> dict[str, store.Entry]:
    file = store.File(sha256=hashlib.sha256(content).hexdigest(), size=len(content), url=url)
    return {"tiny": store.Entry("tiny", "prior", "a test", "MIT", ("t2m",), "Europe", (file,), Path("weights.toml"), Path())}


def test_a_model_of_a_bucket(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    url = "s3://bucket/model.safetensors"
    with pytest.warns(UserWarning, match=f"Nothing vouches for {url}, which has sha256 {SHA}"):
        path, sha256 = store.find_file(url)
    assert (path.read_bytes(), sha256, path.parent) == (MODEL, SHA, tmp_path / "cache")
    asked = len(server.hits)
    assert store.find_file(url, sha256=SHA) == (path, SHA)
    assert len(server.hits) == asked
    server.files["/bucket/model.safetensors"] = MODEL + b"more"
    with pytest.warns(UserWarning, match="Nothing vouches for"):
        assert store.find_file(url)[0].read_bytes() == MODEL + b"more"


def test_a_registered_model_of_a_bucket(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    path, sha256 = store.find_file("tiny", registry=registered("s3://bucket/model.safetensors"))
    assert (path.name, sha256) == (f"tiny-{SHA[:8]}.safetensors", SHA)
    path.unlink()
    with pytest.raises(ChecksumError, match="is not the registered one and was removed"):
        store.find_file("tiny", registry=registered("s3://bucket/model.safetensors", MODEL[::-1]))
    server.files["/broken/model.safetensors"] = MODEL
    with pytest.raises((ChecksumError, ModelNotFoundError), match="Try again"):
        store.find_file("tiny", registry=registered("s3://broken/model.safetensors"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://closed/model.safetensors", "may not be read: .*Check the credentials of the object store"),
        ("s3://bucket/absent.safetensors", "s3://bucket/absent.safetensors does not exist"),
    ],
)
def test_what_a_bucket_refuses(url: str, message: str, server: http.server.ThreadingHTTPServer) -> None:
    for call in (lambda: store.find_file(url), lambda: store.find_file("tiny", registry=registered(url))):
        with pytest.raises(ModelNotFoundError, match=message) as caught:
            call()
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_bucket_that_is_busy_is_asked_again(server: http.server.ThreadingHTTPServer) -> None:
    server.files["/busy/model.safetensors"] = MODEL
    assert store.find_file("tiny", registry=registered("s3://busy/model.safetensors"))[1] == SHA
    assert server.hits.count("/busy/model.safetensors") >= 3
