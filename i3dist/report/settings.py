"""The settings of a run, by its folder."""

from pathlib import Path

from i3dist.checkpoint import store
from i3dist.config import Settings
from i3dist.errors import UserError


def settings_of(folder: Path) -> Settings:
    """Those that the run in a folder was trained with.

    Raises:
        UserError: the folder is not a run's, or its settings cannot be read.
    """
    if not (folder / store.SETTINGS).exists():
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}: name a run's, with {store.SETTINGS} in it")
    return Settings.load(folder / store.SETTINGS).of_saved_run()
