"""pyproject.toml declares what the programs import, and nothing that only tests need."""

import re
import sys
import tomllib

from tests.test_imports import ROOT, imports, modules

# Declared under another name than it is imported by.
NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "nvidia-ml-py": "pynvml"}
# Code that exports hold for the users of transformers; i3dist itself does not import it.
EXPORTED = ROOT / "i3dist" / "export" / "files"
# Of the extra "eval": what uses them says so where they are missing.
OPTIONAL = {"lm_eval"}
# Come with torch, where there are GPUs, and with pydantic, as the module of its schemas.
WITH_OTHERS = {"triton", "pydantic_core"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = {re.split("[>=]", word)[0] for word in project["dependencies"]}
    declared = {NAMES.get(word, word) for word in words}
    files = [path for folder in ("i3dist", "launch", "data_prep") for path in modules(folder)]
    importing = [path for path in files if path.parent != EXPORTED]
    used = {name.partition(".")[0] for path in importing for name in imports(path)}
    ours = {"i3dist", "data_prep"} | WITH_OTHERS | OPTIONAL
    assert used - set(sys.stdlib_module_names) - ours == declared
