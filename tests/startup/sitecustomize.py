"""Python reads this when it starts a program of the tests: DeepSpeed's launcher imports no MLflow.

Its autotuner would, in the command and in the process that it starts, for 1.6 s in each.
"""

import sys

LAUNCHER = ("/deepspeed", "deepspeed.launcher.launch")
if any(word.endswith(LAUNCHER) for word in sys.orig_argv[:4]):
    sys.modules["mlflow"] = None  # type: ignore[assignment]
