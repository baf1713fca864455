"""An object store in a local folder, which fails as it is told: `flaky://` for fsspec."""

import io
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import fsspec

Failure = Literal["refused", "halfway", "short", "altered"]


class BrokenOff(io.BytesIO):
    """Sends what it has, then loses the connection."""

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size)
        if not block:
            raise ConnectionError("connection reset by the store")
        return block


class FlakyStore(fsspec.AbstractFileSystem):
    """failures: how the next requests of a file fail, by its name; requests: of each file, counted."""

    protocol = "flaky"
    root: ClassVar[Path]
    failures: ClassVar[dict[str, list[Failure]]] = {}
    requests: ClassVar[Counter[str]] = Counter()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        file = self.root / self._strip_protocol(path)
        kind = "directory" if file.is_dir() else "file"
        return {"name": self._strip_protocol(path), "size": file.stat().st_size, "type": kind}

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        entries = [self.info(f"{path}/{file.name}") for file in sorted((self.root / path).iterdir())]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> io.BytesIO:
        name = path.split("/", 1)[1]
        self.requests[name] += 1
        content = (self.root / path).read_bytes()
        half = len(content) // 2
        match self.failures[name].pop(0) if self.failures.get(name) else None:
            case "refused":
                raise ConnectionRefusedError("no answer")
            case "halfway":
                return BrokenOff(content[:half])
            case "short":
                return io.BytesIO(content[:half])
            case "altered":
                return io.BytesIO(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
            case None:
                return io.BytesIO(content)


def use_store(root: Path) -> type[FlakyStore]:
    """Registers the store of a folder, without failures."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    FlakyStore.root = root
    FlakyStore.failures.clear()
    FlakyStore.requests.clear()
    return FlakyStore
