"""--out at a URL: the bytes of a local output, manifests last, whatever the store does."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from data_prep import retries, upload, verify
from data_prep.store import Store
from i3dist.errors import UserError
from tests.data_prep.advice import counting
from tests.data_prep.corpus import build, tree_digest

URL = "storage://user:secret@bucket/data"


class Storage(LocalFileSystem):
    """A store of its own, which is kept in `root`. Tests replace `put` to make trouble."""

    protocol = "storage"
    root: ClassVar[Path]
    put: ClassVar[Callable[[str, Path], object]]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        name = str(path).removeprefix("storage://").rpartition("@")[2].rstrip("/")
        return name if name.startswith(str(cls.root)) else f"{cls.root}/{name}".rstrip("/")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        type(self).put(lpath, Path(self._strip_protocol(rpath)))

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        shutil.copyfile(self._strip_protocol(rpath), lpath)


@pytest.fixture
def at_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that holds what is written to the URL."""
    fsspec.register_implementation("storage", Storage, clobber=True)
    Storage.clear_instance_cache()
    Storage.root, Storage.put = tmp_path / "storage", shutil.copyfile
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.001)
    yield tmp_path / "storage" / "bucket" / "data"


def make(
    corpus: tuple[Path, dict[str, str]], scratch: Path, *options: object, out: str = URL
) -> None:
    build(corpus[0], out, "--scratch", scratch, *options)  # type: ignore[arg-type]


def test_whatever_the_store_does_it_gets_the_bytes_of_a_local_output(
    corpus: tuple[Path, dict[str, str]],
    built: Path,
    at_url: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried: dict[str, int] = {}
    order = []
    disk = set()  # folders that files come from

    def trouble(path: str, place: Path) -> None:
        """Each file fails once in its middle, then once without an error."""
        disk.add(Path(path).parent)
        times = tried[place.name] = tried.get(place.name, 0) + 1
        if times == 1:
            place.write_bytes(Path(path).read_bytes()[:100])
            raise ConnectionResetError("the store has hung up")
        if times == 2:
            place.write_bytes(b"cut")
        else:
            shutil.copyfile(path, place)
            order.append(f"{place.parent.name}/{place.name}")

    Storage.put = trouble
    scratch = tmp_path / "scratch"
    make(corpus, scratch)
    assert tree_digest(at_url) == tree_digest(built)
    assert order[-2:] == ["valid/manifest.json", "train/manifest.json"]
    assert not list(scratch.iterdir())
    spilled = counting(monkeypatch)
    Storage.put = shutil.copyfile
    (train,) = (folder for folder in disk if folder.name == "train")
    for was_killed in (False, True):
        if was_killed:  # while it cleared the disk
            train.mkdir(parents=True)
        make(corpus, scratch)
        assert capsys.readouterr().out.endswith("storage://bucket/data is already complete\n")
        assert not spilled and not list(scratch.iterdir())
    with pytest.raises(UserError, match=r"^storage://bucket/data was made with seed 0, not 1: "):
        make(corpus, scratch, "--seed", 1)
    assert tree_digest(at_url) == tree_digest(built)


def test_a_store_that_fails_for_long_loses_nothing(
    corpus: tuple[Path, dict[str, str]],
    built: Path,
    at_url: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: str, place: Path) -> None:
        if place.name == "shard-000003.tar":
            raise OSError("the store is full")
        shutil.copyfile(path, place)

    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.05)
    Storage.put = full
    scratch = tmp_path / "scratch"
    with pytest.raises(UserError) as error:
        make(corpus, scratch)
    line = str(error.value)
    assert line.startswith("cannot write storage://bucket/data/valid/shard-000003.tar (OSError: ")
    assert "secret" not in line and "\n" not in line and "it continues" in line
    assert not list(at_url.rglob("manifest.json"))
    here = {path.name for path in scratch.rglob("valid/*.tar")}
    there = {path.name for path in (at_url / "valid").iterdir()} & set(tree_names(built / "valid"))
    assert "shard-000003.tar" in here and "shard-000000.tar" in there - here
    assert here | there >= {n for n in tree_names(built / "valid") if n.endswith(".tar")}

    Storage.put = shutil.copyfile
    (at_url / "train").mkdir(exist_ok=True)
    (at_url / "train" / "shard-999999.tar").write_bytes(b"of an earlier attempt")
    spilled = counting(monkeypatch)
    make(corpus, scratch, "--task", "1/2")
    assert {path.name for path in scratch.rglob("valid/*.tar")} == here, "tasks move nothing"
    make(corpus, scratch)
    assert not spilled
    assert tree_digest(at_url) == tree_digest(built)


def tree_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_shard_that_changed_on_the_disk_is_not_uploaded(
    corpus: tuple[Path, dict[str, str]],
    at_url: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def damage(path: str, place: Path) -> None:
        shard = Path(path).with_name("shard-000009.tar")
        if place.name == "shard-000000.tar" and shard.exists():
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        shutil.copyfile(path, place)

    monkeypatch.setattr(upload, "UPLOADS", 1)
    Storage.put = damage
    with pytest.raises(UserError, match=r"shard-000009\.tar differs from its manifest: delete "):
        make(corpus, tmp_path / "scratch")
    assert not list(at_url.rglob("manifest.json"))


@pytest.mark.parametrize(
    "url", ["http://host/data", "memory://data", "pipe:cat", "nothing://x", "s3://[x"]
)
def test_a_url_that_keeps_no_files_is_refused(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, url: str
) -> None:
    with pytest.raises(UserError, match=r"^(cannot open|--out) .*name a folder"):
        make(corpus, tmp_path, out=url)


def test_a_url_that_cannot_be_verified_is_no_option_of_another_program() -> None:
    with pytest.raises(UserError, match=r"^cannot open nothing://x: .*name a folder$"):
        verify.main(["nothing://x"])


def test_an_output_at_a_url_is_verified_as_a_local_one(
    built: Path, at_url: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(place: Path | str) -> list[str]:
        with suppress(UserError):
            verify.main([str(place), "--workers", "1"])
        return capsys.readouterr().out.replace("storage://bucket/data", str(at_url)).splitlines()

    shutil.copytree(built, at_url)
    (line,) = lines(URL)
    assert line.startswith(f"{at_url}: sound; ")
    for name in ("shard-000001.tar", "manifest.json", "index.parquet"):
        path = at_url / "valid" / name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    shard = at_url / "train" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"ustar", b"usual", 1))
    (at_url / "train" / "shard-000000.tar").unlink()
    (at_url / "train" / "thesis.pdf").touch()
    damages = lines(at_url)
    assert lines(URL) == damages and len(damages) > 4
    shutil.rmtree(at_url)
    with pytest.raises(UserError, match="storage://bucket/data holds neither train/ nor valid/"):
        verify.main([URL])


class NotFoundError(Exception):
    """As botocore tells it."""

    response: ClassVar = {"ResponseMetadata": {"HTTPStatusCode": 404}}


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [(FileNotFoundError("no such bucket"), NotFoundError()), (NoCredentialsError("none"), None)],
)
def test_a_store_that_will_never_work_is_tried_once(
    at_url: Path, tmp_path: Path, error: Exception, cause: Exception | None
) -> None:
    tries = []

    def refuse(path: str, place: Path) -> None:
        tries.append(path)
        raise error from cause

    Storage.put = refuse
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(UserError, match=r"^cannot write storage://bucket/data/a: .*check the URL"):
        Store(URL).put(tmp_path / "a", "a")
    assert len(tries) == 1


def test_other_files_at_the_url_stay(
    corpus: tuple[Path, dict[str, str]],
    at_url: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A listing that fails is not an empty folder."""
    at_url.mkdir(parents=True)
    (at_url / "thesis.pdf").write_bytes(b"precious")
    listed = Storage.ls

    def fails_once(store: Storage, path: str, **options: object) -> object:
        monkeypatch.setattr(Storage, "ls", listed)
        raise FileNotFoundError(path) from ConnectionResetError("the store has hung up")

    monkeypatch.setattr(Storage, "ls", fails_once)
    assert Store(URL).sizes() == {"thesis.pdf": 8}
    with pytest.raises(UserError, match=r"^storage://bucket/data holds other files: choose"):
        make(corpus, tmp_path / "scratch")
    assert tree_names(at_url) == ["thesis.pdf"]


def test_scratch_is_for_urls_and_tasks_need_it(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--scratch is for an --out at a URL"):
        make(corpus, tmp_path, out=str(tmp_path / "out"))
    for step in (["--begin"], ["--task", "1/2"], ["--merge"]):
        with pytest.raises(UserError, match="work in one folder: name it with --scratch DIR"):
            build(corpus[0], URL, *step)  # type: ignore[arg-type]
