"""Cloud Storage in one process: what gcsfs and tensorstore use of its JSON interface, with the buckets in memory.

References:
  https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import contextlib
import email
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Buckets:
    """Objects by bucket and name, each with its bytes and its generation.

    Attributes:
      objects: ``{(bucket, name): (data, generation)}``.
      requests: method and path of each request, as they came.
      address: of the server, once it runs.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, tuple[str, str]] = {}
        self.generation = 0
        self.lock = threading.Lock()
        self.address = ""

    def environment(self) -> dict[str, str]:
        """Returns the variables by which the clients find it, and need no account."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # tensorstore
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it looks for an account of Google's
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[Buckets]:
        handler = type("Handler", (_Handler,), {"buckets": self})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            server.daemon_threads = True
            self.address = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for b, name in self.objects if b == bucket and name.startswith(prefix))

    def put(self, bucket: str, name: str, data: bytes, expected: str | None) -> tuple[int, Any]:
        with self.lock:
            if not self._matches(bucket, name, expected):
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
            self.generation += 1
            self.objects[bucket, name] = (data, self.generation)
        return 200, self.describe(bucket, name)

    def delete(self, bucket: str, name: str, expected: str | None) -> tuple[int, Any]:
        with self.lock:
            if (bucket, name) not in self.objects:
                return 404, {"error": {"code": 404, "message": "notFound"}}
            if not self._matches(bucket, name, expected):
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
            del self.objects[bucket, name]
        return 204, b""

    def _matches(self, bucket: str, name: str, expected: str | None) -> bool:
        # Generation 0 stands for an object that is not there.
        return expected is None or int(expected) == self.objects.get((bucket, name), (b"", 0))[1]

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": "2025-01-01T00:00:00.000Z",
            "updated": "2025-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in self.names(bucket, prefix):
            if not query.get("startOffset", "") <= name or name >= query.get("endOffset", "\U0010ffff"):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(self.describe(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    buckets: Buckets

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # A client that was killed.
            self.end_headers()
            self.wfile.write(data)

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.buckets.requests.append(f"{self.command} {split.path}")
        code, answer, headers = self.respond(self.command, split.path, query, body)
        self.answer(code, answer, **headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def respond(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        held = self.buckets
        if path == "/batch/storage/v1":
            return self.batch(body)
        upload = re.fullmatch(r"/upload(?:/storage/v1)?/b/([^/]+)/o", path)
        if upload:
            return self.upload(unquote(upload[1]), query, body)
        bucket_and_name = (
            r"(?:/download)?(?:/storage/v1)?/b/([^/]+)(?:/o(?:/([^/]+)(?:/(rewriteTo|copyTo|moveTo)/(.+))?)?)?"
        )
        found = re.fullmatch(bucket_and_name, path)
        if not found:
            return 404, {"error": {"code": 404, "message": f"no {path}"}}, {}
        bucket, name = unquote(found[1]), unquote(found[2] or "")
        if not name:
            if path.endswith("/o"):
                return 200, held.listing(bucket, query), {}
            return 200, {"kind": "storage#bucket", "name": bucket, "location": "EU", "storageClass": "STANDARD"}, {}
        if found[3]:
            return self.copy(bucket, name, found[3], found[4], query)
        if method == "DELETE":
            return *held.delete(bucket, name, query.get("ifGenerationMatch")), {}
        if (bucket, name) not in held.objects:
            return 404, {"error": {"code": 404, "message": "notFound"}}, {}
        if query.get("alt") != "media":
            return 200, held.describe(bucket, name), {}
        return self.media(*held.objects[bucket, name], query)

    def media(self, data: bytes, generation: int, query: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        headers = {"x-goog-generation": str(generation), "Content_Type": "application/octet-stream"}
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", headers
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return 412, {"error": {"code": 412}}, headers
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not part:
            return 200, data, headers
        first = int(part[1]) if part[1] else max(len(data) - int(part[2]), 0)
        last = min(int(part[2]) if part[1] and part[2] else len(data) - 1, len(data) - 1)
        if first > last:
            return 416, b"", headers | {"Content_Range": f"bytes */{len(data)}"}
        return 206, data[first : last + 1], headers | {"Content_Range": f"bytes {first}-{last}/{len(data)}"}

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        held, kind = self.buckets, query.get("uploadType")
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts: Any = email.message_from_bytes(head + body).get_payload()
            # Not the parser's second part, which it takes for text and whose line ends it changes.
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            line = b"\r\n" if b"\r\n\r\n" in body else b"\n"
            data = body.split(f"--{boundary[1]}".encode())[2].partition(2 * line)[2].removesuffix(line)
            return *held.put(
                bucket, json.loads(parts[0].get_payload())["name"], data, query.get("ifGenerationMatch")
            ), {}
        if kind == "resumable" and "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            token = str(len(held.uploads))
            held.uploads[token] = (name, "")
            held.objects[f"upload {token}", name] = (b"", 0)
            location = f"{held.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={token}"
            return 200, {}, {"Location": location}
        if kind == "resumable":
            name, _ = held.uploads[query["upload_id"]]
            place = (f"upload {query['upload_id']}", name)
            so_far = held.objects[place][0] + body
            if self.headers.get("Content-Range", "").endswith("/*"):
                held.objects[place] = (so_far, 0)
                return 308, b"", {"Range": f"bytes=0-{len(so_far) - 1}"}
            del held.objects[place]
            return *held.put(bucket, name, so_far, None), {}
        return *held.put(bucket, query["name"], body, query.get("ifGenerationMatch")), {}

    def copy(
        self, bucket: str, name: str, verb: str, rest: str, query: dict[str, str]
    ) -> tuple[int, Any, dict[str, str]]:
        held = self.buckets
        if (bucket, name) not in held.objects:
            return 404, {"error": {"code": 404, "message": "notFound"}}, {}
        there = re.fullmatch(r"(?:b/([^/]+)/)?o/(.+)", rest)
        assert there, rest
        target = unquote(there[1] or bucket)
        data = held.objects[bucket, name][0]
        code, made = held.put(target, unquote(there[2]), data, query.get("ifGenerationMatch"))
        if verb == "moveTo" and code == 200:
            held.delete(bucket, name, None)
        if verb == "rewriteTo" and code == 200:
            made = {"done": True, "resource": made, "totalBytesRewritten": str(len(data)), "objectSize": str(len(data))}
        return code, made, {}

    def batch(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Deletions, many in one request."""
        answers = []
        for method, path in re.findall(rb"^(DELETE) (\S+) HTTP/1.1", body, re.MULTILINE):
            code, _, _ = self.respond(method.decode(), urlsplit(path.decode()).path, {}, b"")
            answers.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {code} OK\r\n\r\n\r\n")
        data = ("".join(answers) + "--part--\r\n").encode()
        return 200, data, {"Content_Type": "multipart/mixed; boundary=part"}
