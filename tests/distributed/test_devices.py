"""What a job runs on: what is chosen, and what is refused where a GPU is missing or not seen."""

from pathlib import Path

import pytest
import torch

from i3dist.config import Device, Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed import devices
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.training.continuing import FREE_TO_CHANGE
from i3dist.training.run import settle
from i3dist.training.summary import refuse_large
from tests.conftest import QUICK, ROOT, error_line, program

CARD = Settings.load(None, ["train.lanes=4"])
TINY = Settings.load(Path("configs/tiny.yaml"), ["train.lanes=64", "train.window_chunks=64"])
GRANTS = [
    {"SLURM_GPUS_ON_NODE": "2"},
    {"SLURM_JOB_GPUS": "0,1"},
    {"SLURM_STEP_GPUS": "3"},
    {"CUDA_VISIBLE_DEVICES": "0,1"},
    {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"},
    {"CUDA_VISIBLE_DEVICES": "0,-1", "SLURM_GPUS_ON_NODE": "1"},
    {"SLURM_GPUS_ON_NODE": "1", "CROSS_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0"},
]
NONE_GRANTED = [
    {},
    {"SLURM_GPUS_ON_NODE": "0"},
    {"SLURM_JOB_GPUS": "", "SLURM_GPUS_PER_NODE": "0"},
    {"CUDA_VISIBLE_DEVICES": ""},
    {"CROSS_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"},  # DeepSpeed's launcher, on CPUs too
    {"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "2"},
    {"CUDA_VISIBLE_DEVICES": "-1,0"},
    {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_GPUS": "0"},
]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without GPUs, with a torch for CPUs; returns where its devices would be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that it is put back as it was
    monkeypatch.delenv("DS_ACCELERATOR")
    return tmp_path


@pytest.mark.parametrize("environ", NONE_GRANTED, ids=str)
def test_without_a_gpu_auto_is_the_cpu_that_nobody_chose(
    host: Path, environ: dict[str, str]
) -> None:
    environ = dict(environ)
    assert devices.choose_device("auto", environ)
    assert not devices.choose_device("auto", environ | {"DS_ACCELERATOR": "cpu"})
    with pytest.raises(UserError, match=r"train\.device=cuda: there is no CUDA GPU here"):
        devices.choose_device("cuda", environ)
    assert not devices.choose_device("cpu", environ)
    assert environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "xpu", "cuda:0"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_device_that_deepspeeds_variable_may_not_name_is_one_line(
    host: Path, monkeypatch: pytest.MonkeyPatch, name: str, gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("DS_ACCELERATOR", name)
    says = f"DS_ACCELERATOR='{name}' is neither cpu nor cuda"
    for wanted in ("auto", "cpu", "cuda"):
        with pytest.raises(UserError, match=says):
            devices.choose_device(wanted)
    with pytest.raises(UserError, match=says):
        devices.pick_device("auto")


@pytest.mark.parametrize("environ", GRANTS, ids=str)
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_granted_gpus_that_torch_does_not_see_are_refused(
    host: Path, environ: dict[str, str], wanted: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(iter(environ))
    with pytest.raises(UserError, match=rf"{name}=.*build without CUDA; install.*device=cpu"):
        devices.choose_device(wanted, environ)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(UserError, match=rf"{name}=.*CUDA 12\.8, and finds no driver.*nvidia-smi"):
        devices.choose_device(wanted, environ)
    for cpu in (("cpu", {}), ("auto", {"DS_ACCELERATOR": "cpu"})):
        assert not devices.choose_device(cpu[0], environ | cpu[1])


def test_a_gpu_of_the_host_counts_as_granted_unless_it_is_hidden(host: Path) -> None:
    (host / "nvidiactl").touch()
    assert devices.choose_device("auto", {})
    (host / "nvidia0").touch()
    with pytest.raises(UserError, match="nvidia0"):
        devices.choose_device("auto", {})
    assert devices.choose_device("auto", {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("environ", [*NONE_GRANTED, *GRANTS], ids=str)
def test_where_torch_sees_a_gpu_the_setting_decides(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for before in ({}, {"DS_ACCELERATOR": "cpu"}):
        for wanted, chosen in (
            ("auto", "cpu" if before else "cuda"),
            ("cuda", "cuda"),
            ("cpu", "cpu"),
        ):
            after = environ | before
            assert not devices.choose_device(wanted, after)
            monkeypatch.setenv("DS_ACCELERATOR", after["DS_ACCELERATOR"])
            assert devices.uses_cuda() == (chosen == "cuda")


def test_evaluating_and_generating_say_what_is_wrong(
    host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices.pick_device("cpu") == devices.pick_device("auto") == torch.device("cpu")
    assert [r.getMessage() for r in caplog.records if "build without CUDA" in r.getMessage()]
    with pytest.raises(UserError, match=r"^device cuda: .*build without CUDA.*or use device cpu"):
        devices.pick_device("cuda")


def test_only_large_models_are_refused_on_a_cpu() -> None:
    refuse_large(TINY)
    with pytest.raises(UserError, match=r"340M parameters.*16,384 tokens.*train\.device=cpu"):
        refuse_large(CARD)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_large_model_is_trained_on_a_cpu_that_was_chosen(
    host: Path, data: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    class GoesOnError(Exception):
        """It is not refused."""

    def goes_on(_: Job) -> None:
        raise GoesOnError

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("i3dist.distributed.host.share_threads", goes_on)
    words = [f"data.path={data}", f"run.path={host / 'run'}", f"train.device={device}"]
    settings = Settings.load(None, words)
    corpus = Corpus.open(data, settings.model)
    with pytest.raises(UserError if device == "auto" else GoesOnError):
        settle(ROOT / "configs" / "zero2.json", settings, Job.detect({}), corpus, fresh=False)


def test_a_run_may_continue_on_another_device() -> None:
    assert "train.device" in FREE_TO_CHANGE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_trainer_refuses_in_one_line_and_does_as_it_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    places = [f"data.path={data}", f"run.path={run}"]
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert "is slow to train on a CPU" in error_line(program("launch/train.py", *places))

    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    words = [*QUICK, "train.steps=1", *places]
    assert "SLURM_GPUS_ON_NODE=1" in error_line(program("launch/train.py", *words))
    assert not run.exists()
    told = program("launch/train.py", *words, "train.device=cpu")
    assert told.returncode == 0, told.stderr


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    job = Job(1, 4, 1, 4, "host1", 29500, "slurm")
    assert devices.device(job) == torch.device("cuda", 1)
    assert devices.backend() == "nccl"
    with pytest.raises(UserError, match="local rank 3 has no GPU: this host shows 2"):
        devices.device(Job(3, 4, 3, 4, "host1", 29500, "slurm"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (devices.device(job), devices.backend()) == (torch.device("cpu"), "gloo")
