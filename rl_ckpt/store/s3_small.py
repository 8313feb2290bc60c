"""Many small objects, read at a fraction of what the S3 client's own requests cost.

A request of botocore's takes 1 to 2 ms of one core, whatever it fetches; a commit log has a thousand records of 500
bytes. So the first object comes the ordinary way, and the others by copies of its request: the same server, headers
and signature, for another key (`Template`), sent over `s3_wire`'s sockets from the caller's threads. 1,000 records from
Ceph on loopback: about a third of the time and of the CPU.

Promises: whatever is not an ordinary good answer is asked for again the ordinary way, which retries, renews credentials
and explains; so is everything where the first request can't be copied (another kind of signature, a proxy, no signature
at all).
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError

from rl_ckpt.store.s3_bulk import BulkSession
from rl_ckpt.store.s3_wire import Exchange

_ALGORITHM = "AWS4-HMAC-SHA256"
_SAMPLES = 3  # of ordinary requests, while other threads' come in between


@dataclass(frozen=True, slots=True)
class Sent:
    """A GET as it was sent, and by whose keys."""

    url: str
    headers: Mapping[str, str | bytes]
    secret_key: str


class Template:
    """A signed GET, to be sent for other keys too. Valid as long as its signature: some minutes.

    Args:
        sent: The request.
        key: Of its object.
        bucket_path: What stands before a key in the url's path.
        scope: Of the signature.
        names: Of the signed headers.
    """

    def __init__(self, sent: Sent, bucket_path: str, scope: str, names: str) -> None:
        self._headers = {name.lower(): _text(value) for name, value in sent.headers.items()}
        url = urlsplit(sent.url)
        self._base = f"{url.scheme}://{url.netloc}"
        self._bucket_path = bucket_path
        self._scope, self._names = scope, names
        port = {"http": 80, "https": 443}[url.scheme]
        host = url.netloc.removesuffix(f":{port}")
        values = {**self._headers, "host": host}
        self._signed = "".join(f"{name}:{' '.join(values.get(name, '').split())}\n" for name in names.split(";"))
        self._signing_key = _signing_key(sent.secret_key, scope)

    @staticmethod
    def of(sent: Sent, key: str) -> Template | None:
        """The template that a request makes, where its own signature comes out by it; None where not."""
        url = urlsplit(sent.url)
        known = {name.lower(): _text(value) for name, value in sent.headers.items()}
        algorithm, _, fields = known.get("authorization", "").partition(" ")
        parts = dict(part.strip().partition("=")[::2] for part in fields.split(","))
        end = _quoted(key)
        if algorithm != _ALGORITHM or url.query or not url.path.endswith("/" + end) or url.scheme not in _SCHEMES:
            return None
        _, _, scope = parts.get("Credential", "").partition("/")
        if scope.count("/") != 3 or "x-amz-date" not in known:
            return None
        made = Template(sent, url.path.removesuffix(end), scope, parts.get("SignedHeaders", ""))
        return made if made.request(key)[1]["authorization"] == known["authorization"] else None

    def request(self, key: str) -> tuple[str, dict[str, str]]:
        """Url and headers of the GET for a key."""
        path = self._bucket_path + _quoted(key)
        payload = self._headers.get("x-amz-content-sha256", "")
        canonical = f"GET\n{path}\n\n{self._signed}\n{self._names}\n{payload}"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"{_ALGORITHM}\n{self._headers['x-amz-date']}\n{self._scope}\n{digest}"
        signature = hmac.new(self._signing_key, text.encode(), hashlib.sha256).hexdigest()
        before = self._headers["authorization"].rpartition("=")[0]
        return self._base + path, {**self._headers, "authorization": f"{before}={signature}"}


_SCHEMES = ("http", "https")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _quoted(key: str) -> str:
    return quote(key, safe="/~")


def _signing_key(secret: str, scope: str) -> bytes:
    """AWS Signature Version 4, "derive a signing key"."""
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


class SmallReads:
    """Gets whole small objects; for any number of threads.

    Args:
        ordinary: Gets the object of a key in the ordinary way.
        sample: The last GET of a whole object that was sent, and over what; None where there is none to copy.
        good: Whether the bytes of an answer are what its headers say.
    """

    def __init__(
        self,
        ordinary: Callable[[str], bytes],
        sample: Callable[[], tuple[BulkSession, Sent] | None],
        good: Callable[[Mapping[str, str], bytes], bool],
    ) -> None:
        self._ordinary = ordinary
        self._sample = sample
        self._good = good
        self._lock = threading.Lock()
        self._samples = 0
        self._short: tuple[BulkSession, Template] | None = None

    def get(self, key: str) -> bytes:
        """The object of a key; errors are the ordinary way's."""
        with self._lock:  # all wait for the first
            first = self._short is None and self._samples < _SAMPLES
            if first:
                self._samples += 1
                data = self._ordinary(key)
                self._learn(key)
                return data
        data_or_none = self._briefly(key)
        return self._ordinary(key) if data_or_none is None else data_or_none

    def _learn(self, key: str) -> None:
        found = self._sample()
        template = Template.of(found[1], key) if found is not None else None
        if found is not None and template is not None:
            self._short = (found[0], template)

    def _briefly(self, key: str) -> bytes | None:
        short = self._short
        if short is None:
            return None
        session, template = short
        exchange = Exchange(session.wires, "GET", *template.request(key), ())
        try:
            status, headers, data = exchange.run(lambda _: True)
        except BotoCoreError:
            return None
        finally:
            exchange.close()
        if status == 200 and data is not None and self._good(headers, data):
            return data
        if status != 404:  # slow down, other credentials, another region: the ordinary way knows what to do
            self._short, self._samples = None, _SAMPLES
        return None
