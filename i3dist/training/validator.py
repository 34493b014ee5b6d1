"""Validation while a run trains."""

from dataclasses import dataclass
from functools import cached_property

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.held_out import HeldOut
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.interface import Engine
from i3dist.errors import warned
from i3dist.inference.evaluate import evaluate
from i3dist.inference.samples import beginnings, continuations
from i3dist.tracking.history import history_warning, validation_metrics
from i3dist.tracking.metrics_log import VALIDATION
from i3dist.tracking.report import progress_bar, validation_line
from i3dist.training.progress import Progress
from i3dist.training.run_log import RunLog


@dataclass
class Validator:
    """Measures the loss on a fixed subset of the validation split, which the ranks share."""

    settings: Settings
    job: Job
    corpus: Corpus
    engine: Engine
    micro_batch: int
    progress: Progress
    watchdog: Watchdog
    log: RunLog

    def validate(self) -> None:
        """Evaluate the model as it is now; training lanes do not change."""
        self.watchdog.beat("validating")
        settings, step = self.settings, self.progress.step
        result = evaluate(
            self.engine.model,
            self.held_out,
            self.corpus.tokenizer.token_bytes(),
            self.micro_batch,
            settings.train.window_chunks,
            self.job.rank,
            self.job.world_size,
            progress_bar,
        )
        line = validation_line(step, settings.train.steps, result)
        self.log.log(VALIDATION, step, validation_metrics(result), line)
        trained_with_history = step > 0 and settings.compression.gate_at(step - 1) == 1.0
        if self.log.active and trained_with_history and (warning := history_warning(result)):
            print(warning, flush=True)
        if settings.validate_.samples:
            self.watchdog.beat("sampling text")
            with warned("no samples of text"):
                if self.log.active:
                    self.log.log_samples(step, self.samples())
            collectives.barrier()  # so that the watchdog of every rank learns how long it takes

    def samples(self) -> list[dict[str, str]]:
        """What the model as it is now writes after the fixed prompts. Changes nothing."""
        return continuations(self.engine.model, self.corpus.tokenizer, self.prompts)

    @cached_property
    def prompts(self) -> list[str]:
        """How the first `validate.samples` documents of the fixed subset begin."""
        return beginnings(self.held_out, self.corpus.tokenizer, self.settings.validate_.samples)

    @cached_property
    def held_out(self) -> HeldOut:
        """The fixed subset: `validate.chunks` chunks."""
        settings = self.settings
        return self.corpus.valid.held_out(settings.model.history_chunks, settings.validate_.chunks)
