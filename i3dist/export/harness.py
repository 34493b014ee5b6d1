"""lm-evaluation-harness on an exported model. The only file that imports it, and only when used."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from i3dist.checkpoint.exported import exported_joined, exported_settings, is_export
from i3dist.errors import UserError, reason
from i3dist.export.folder import export

MAX_LENGTH = 16_384
"""Tokens of the longest context; longer ones lose their beginning. Much more than history reaches;
logits of so many tokens take 2 GB with the card's vocabulary."""


def run_tasks(
    model: Path,
    tasks: Sequence[str],
    device: torch.device,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Args:
        model: a run's folder, a checkpoint, or an export.
        tasks: their names.
        device: what the model runs on; on the CPU in fp32.
        batch_size: rows computed at once.
        limit: use only so many examples of each task.
        folder: of a user's own tasks, as YAML files.

    Returns:
        What the harness's `simple_evaluate` returns.

    Raises:
        UserError: the harness is not installed, does not have one of the tasks or cannot load it or
            the model, or `folder` is no folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder {folder} is no folder: name one with tasks as YAML files")
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install 'i3dist[eval]'"
        ) from None
    manager = _task_manager(tasks, folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(
            f"--tasks {','.join(unknown) or repr('')}: lm-evaluation-harness has no such task; "
            "`lm_eval ls tasks` lists those it has, and --task-folder adds yours"
        )
    with exported(model) as place:
        found = simple_evaluate(
            _harness_model(place, device, batch_size, model),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
        )
    assert found is not None  # only in processes other than the first
    return dict(found)


def _task_manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """The harness's tasks, with those of a folder. One that cannot be loaded is a `UserError`."""
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):
        """A task that cannot be loaded is the user's, or the network's: one line."""

        def load(self, *names: Any, **options: Any) -> Any:
            try:
                return super().load(*names, **options)
            except Exception as error:
                raise UserError(
                    f"--tasks {','.join(tasks)}: lm-evaluation-harness cannot load them: "
                    f"{reason(error)}; see the task's YAML file, or the network for its data"
                ) from error

    return Tasks(include_path=None if folder is None else str(folder))


def table_of(found: Mapping[str, Any]) -> str:
    """The harness's own table of what `run_tasks` returned."""
    from lm_eval.utils import make_table

    return str(make_table(found))


@contextmanager
def exported(model: Path) -> Iterator[Path]:
    """Yield an export of the model: itself if it is one, else one that is removed afterwards.

    Raises:
        UserError: `model` is no trained model, or config.json lacks something or is wrong.
    """
    if is_export(model):
        exported_settings(model)
        exported_joined(model)
        yield model
        return
    with TemporaryDirectory(prefix="i3dist-") as folder:
        export(model, Path(folder, "export"))
        yield Path(folder, "export")


def _harness_model(export: Path, device: torch.device, batch_size: int, typed: Path) -> Any:
    """The harness's own model class on an export of the model `typed`, as messages call it.

    Raises:
        UserError: it cannot load the model.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """The harness itself puts <BOS> before whole texts; the tokenizer must not do so again."""

        add_bos_token: bool | None

        def loglikelihood_rolling(self, *requests: Any, **options: Any) -> list[float]:
            self.add_bos_token = False
            found = super().loglikelihood_rolling(*requests, **options)
            self.add_bos_token = None
            return found

    try:
        return Model(
            pretrained=str(export),
            trust_remote_code=True,
            max_length=MAX_LENGTH,
            batch_size=batch_size,
            device=str(device),
            dtype="float32" if device.type == "cpu" else "auto",
            softmax_dtype="float32",  # else that of the logits, which rounds log-probabilities
        )
    except (torch.OutOfMemoryError, ImportError):
        raise  # no fault of the model's
    except Exception as error:
        why = f"lm-evaluation-harness cannot load the model: {reason(error)}"
        again = "export it again" if export == typed else "restore it"
        raise UserError(f"{typed}: {why}; {again}") from error
