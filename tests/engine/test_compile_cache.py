"""Compiled code that travels: files of any compiler, in an archive beside the run."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from i3dist.config import Settings
from i3dist.distributed.job import Job
from i3dist.engine import compile_cache
from i3dist.engine.compile_cache import CompileCache
from i3dist.files import remove
from i3dist.training import run

GROUP = Path("triton/AB/__grp__kernel.json")
CODE = Path("inductor/cd/code.so")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """An archive that one host has made."""
    cache = CompileCache(tmp_path / "run" / "archive", tmp_path / "one" / "key")
    inside = {
        CODE: os.urandom(10_000),
        GROUP: b'{"x": "' + bytes(cache.folder / "triton/AB/x.cubin") + b'"}',
        Path("inductor/locks/a.lock"): b"",
        Path("triton/AB/tmp.pid_7"): b"half",
    }
    for path, content in inside.items():
        (cache.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (cache.folder / path).write_bytes(content)
    cache.save()
    cache.wait()
    return cache.archive


def test_another_host_has_the_same_code_with_its_own_paths(packed: Path, tmp_path: Path) -> None:
    one = tmp_path / "one" / "key"
    other = CompileCache(packed, tmp_path / "other" / "key")
    other.unpack()
    assert other.entries() == {CODE, GROUP}
    assert (other.folder / CODE).read_bytes() == (one / CODE).read_bytes()
    assert bytes(other.folder / "triton/AB/x.cubin") in (other.folder / GROUP).read_bytes()
    assert bytes(one) not in (other.folder / GROUP).read_bytes()
    assert list(other.folder.parent.iterdir()) == [other.folder], "nothing is left beside it"


def test_only_new_code_is_packed_again_and_what_is_there_stays(
    packed: Path, tmp_path: Path
) -> None:
    other = CompileCache(packed, tmp_path / "other" / "key")
    (other.folder / CODE).parent.mkdir(parents=True)
    (other.folder / CODE).write_bytes(b"mine")
    other.unpack()
    assert (other.folder / CODE).read_bytes() == b"mine"
    before = packed.stat().st_ino
    other.pack()
    assert packed.stat().st_ino == before
    (other.folder / "inductor" / "new").touch()
    other.pack()
    third = CompileCache(packed, tmp_path / "third" / "key")
    third.unpack()
    assert third.entries() == {CODE, GROUP, Path("inductor/new")}


def test_an_archive_that_a_host_has_made_or_unpacked_is_not_read_again(
    packed: Path, tmp_path: Path
) -> None:
    """Until another takes its place."""
    CompileCache(packed, tmp_path / "other" / "key").unpack()
    status = packed.stat()
    packed.write_bytes(bytes(status.st_size))
    os.utime(packed, ns=(status.st_atime_ns, status.st_mtime_ns))
    caches = [CompileCache(packed, tmp_path / name / "key") for name in ("one", "other")]
    for cache in caches:
        cache.unpack()
        cache.pack()
    assert packed.stat().st_ino == status.st_ino, "it has all that they have"
    packed.touch()
    for cache in caches:
        with pytest.raises(OSError, match="gzip"):
            cache.unpack()


def test_many_may_unpack_into_one_folder_at_once(packed: Path, tmp_path: Path) -> None:
    caches = [CompileCache(packed, tmp_path / "other" / "key") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(CompileCache.unpack, caches))
    assert caches[0].entries() == {CODE, GROUP}


def enter(run: Path, environ: dict[str, str]) -> CompileCache | None:
    """A rank waits for the others whatever its host has, as theirs may have something else."""
    settings, meet = Settings().with_values(**{"run.path": run}), mock.Mock()
    with mock.patch.object(compile_cache.collectives, "barrier", meet):
        cache, wait = compile_cache.enter(settings, Job.detect({}), environ)
        meet.assert_not_called()
        wait()
    meet.assert_called_once_with()
    return cache


@pytest.mark.parametrize("damage", ["cut", "flipped", "flipped at the end", "text"])
def test_a_damaged_archive_is_one_warning_and_adds_nothing(
    damage: str,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_cache.tempfile, "gettempdir", lambda: str(tmp_path / "one"))
    monkeypatch.setattr(compile_cache, "key_of", lambda settings: "key")
    content = bytearray(packed.read_bytes())
    at = {"cut": 0, "flipped": len(content) // 2, "flipped at the end": len(content) - 6}
    if damage == "text":
        content = bytearray(b"no archive")
    elif damage == "cut":
        del content[-100:]
    else:
        content[at[damage]] ^= 1
    (packed.parent / "compiled-key.tar.gz").write_bytes(content)
    environ: dict[str, str] = {}
    cache = enter(packed.parent, environ)
    assert cache is not None and cache.entries() == set()
    assert set(environ) == {*compile_cache.VARIABLES, compile_cache.KEEP_GRAPHS}
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(
        f"warning: {cache.archive} cannot be used, so the model is compiled anew: "
    )


def test_what_the_user_chose_stands(tmp_path: Path) -> None:
    environ = {"TRITON_CACHE_DIR": "/chosen"}
    assert enter(tmp_path, environ) is None
    assert environ == {"TRITON_CACHE_DIR": "/chosen"}
    environ = {compile_cache.KEEP_GRAPHS: "0"}
    assert enter(tmp_path, environ) is not None and environ[compile_cache.KEEP_GRAPHS] == "0"


def test_folders_that_torch_and_this_program_chose_do_not(tmp_path: Path) -> None:
    """torch writes its own into the variable, and launchers pass that on."""
    torchs = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    for environ in (torchs, {"TRITON_CACHE_DIR": tempfile.mkdtemp(prefix="triton-", dir=tmp_path)}):
        cache = enter(tmp_path, environ)
        assert cache is not None
        assert environ == {
            "TORCHINDUCTOR_CACHE_DIR": str(cache.folder / "inductor"),
            "TRITON_CACHE_DIR": str(cache.folder / "triton"),
            compile_cache.KEEP_GRAPHS: "1",
        }


def test_code_is_of_the_sources_that_it_was_compiled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To torch they are names: it would find code with the shapes and gradients of former ones."""
    extension = tmp_path / "extension.py"
    keys = {compile_cache.key_of(Settings())}
    monkeypatch.setattr(compile_cache, "LOADED", [extension])
    for text in (b"x = 1", b"x = 2", b"# coding: latin-1\nx = '\xe9'", b"x = 1"):
        extension.write_bytes(text)
        keys.add(compile_cache.key_of(Settings()))
    assert len(keys) == 4
    for package in (compile_cache.ops, compile_cache.model, compile_cache.optim):
        with monkeypatch.context() as changed:
            changed.setattr(package, "__path__", [str(tmp_path)])
            keys.add(compile_cache.key_of(Settings()))
    assert len(keys) == 7
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "kernel.py").touch()
    with monkeypatch.context() as changed:
        changed.setattr(compile_cache.ops, "__path__", [str(tmp_path)])
        assert compile_cache.key_of(Settings()) not in keys, "a package in it counts"


def test_code_of_another_kind_of_cpu_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for vectors of 16 numbers computes nonsense where they have 8. A GPU's does not care."""
    for cuda in (False, True):
        monkeypatch.setattr(compile_cache.devices, "uses_cuda", lambda cuda=cuda: cuda)
        keys = set()
        for kind in ("AVX2", "AVX512"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=kind: kind)
            keys.add(compile_cache.key_of(Settings()))
        assert len(keys) == (1 if cuda else 2)


@pytest.mark.parametrize("extensions", [[], [Path("mine.py")]])
def test_functions_are_kept_in_the_folder_but_with_extensions(
    extensions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an extension imports is in no hash."""
    kept = mock.Mock()
    cache = CompileCache(tmp_path / "archive", tmp_path / "folder")
    monkeypatch.setattr(run.compiled, "keep_in", kept)
    monkeypatch.setattr(run, "LOADED", extensions)
    monkeypatch.setattr(run, "import_aside", mock.Mock())
    monkeypatch.setattr(run.compile_cache, "enter", lambda *_: (cache, mock.Mock()))
    run.prepare_compiler(Settings().with_values(**{"train.compile": True}), Job.detect({}))
    kept.assert_called_once_with(None if extensions else tmp_path / "folder" / "functions")


def test_a_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"i3dist-compiled-{os.getuid()}"
    for make in (lambda: (own.mkdir(), own.chmod(0o777)), own.touch):
        make()
        environ: dict[str, str] = {}
        assert enter(tmp_path / "run", environ) is None and not environ
        assert f"{own} must be a folder of yours alone" in capsys.readouterr().out
        remove(own)
