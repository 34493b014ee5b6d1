"""The typed tree of settings; the defaults are the model card of i3-4096ctx.

Later sources win: the defaults below, then ``--config FILE.yaml``, then ``section.key=value``.
Values are validated when the tree is built. An illegal one is an error of one line, which names the
setting, the value, the legal range and the remedy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)

from i3dist.cli.former_settings import BEFORE, translate
from i3dist.cli.layer_pattern import CARD_LAYERS, plain_layers, read_layers
from i3dist.cli.paths import Place, as_unicode, is_url
from i3dist.cli.settings_file import Nothing
from i3dist.cli.settings_text import commented_yaml
from i3dist.cli.settings_tree import Section, SettingsTree
from i3dist.errors import UserError
from i3dist.optim.schedules import Point, height, schedule_name

Auto = Literal["auto"]
Never = Literal["never"]
OnDamage = Literal["stop", "quarantine"]
Device = Literal["auto", "cpu", "cuda"]
Count = Annotated[int, Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Schedule = Annotated[str, AfterValidator(schedule_name)]
# A folder's name may hold bytes that are no text; in JSON they become "?".
AnyPath = Annotated[Path, PlainSerializer(as_unicode, when_used="json")]
AutoPath = Annotated[Path | Auto, PlainSerializer(as_unicode, when_used="json")]
OptionalPath = Annotated[
    Path | None,
    BeforeValidator(lambda value: None if isinstance(value, Nothing) else value),
    PlainSerializer(lambda path: path and as_unicode(path), when_used="json"),
]
AnyPlace = Annotated[
    Place,
    BeforeValidator(lambda v: Path(v) if isinstance(v, str) and not is_url(v) else v),
    PlainSerializer(as_unicode, when_used="json"),
]
# May be left empty, or be null, in a file.
OptionalName = Annotated[
    str | None, BeforeValidator(lambda value: None if isinstance(value, Nothing) else value)
]

CARD_VOCAB_SIZE = 32_000


class RunSettings(Section):
    """Where the run keeps what it makes."""

    path: AnyPath = Path("runs/i3-4096ctx")
    """Folder of the run: checkpoints, logs, plots, final weights."""


class DataSettings(Section):
    """What the run reads."""

    path: AnyPlace = Path("data/fineweb-edu")
    """Output folder of data_prep/shard.py, with train/ and valid/ in it, or its URL: http, https,
    or another that webdataset opens. pipe:COMMAND is a command that writes a file. Where {} stands
    in a URL or command, the name of a file such as train/manifest.json goes; else it is added at
    the end, after a slash."""
    cache: AutoPath = "auto"
    """Folder for shards fetched from a URL; runs and ranks of a host share it. auto is
    $XDG_CACHE_HOME/i3dist, or ~/.cache/i3dist. A disk of the host is best."""
    cache_gb: Annotated[float, Field(gt=0, le=1e6)] = 32
    """Largest size of that folder, in units of 10^9 bytes. Shards that were not used for longest
    are removed first."""
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    """Loader processes per rank; 0 reads in the training process. Never changes the stream."""
    on_damage: OnDamage = "stop"
    """What to do with a damaged training shard: stop, or report it and let its lane idle instead.
    Missing shards and damaged validation shards always stop the run."""


class ModelSettings(Section):
    """The architecture. The defaults are i3-4096ctx, about 340M parameters."""

    vocab_size: Annotated[int, Field(ge=16, le=16_777_216)] | Auto = "auto"
    """Size of the vocabulary; auto is that of the data's tokenizer (32,000 without data)."""
    d_model: Annotated[int, Field(ge=8, le=65_536)] = 1180
    """Width D of the residual stream."""
    layers: Annotated[str, AfterValidator(plain_layers)] = CARD_LAYERS
    """The stack of layers from the bottom, as COUNTxKIND joined by commas. Kinds that see the
    compressed history stand above all others (rwkv): dual-attention, with a softmax for the chunk
    and one for history, and attention, with one softmax over both. A run keeps those it began with.
    """
    heads: Annotated[int, Field(ge=1, le=4096)] = 8
    """Attention heads asked for; adjusts to the nearest divisor of d_model."""
    ff_mult: Annotated[int, Field(ge=1, le=64)] = 4
    """Hidden width of feed-forward and channel-mix, in units of d_model."""
    chunk_length: Annotated[int, Field(ge=2, le=65_536)] = 512
    """Tokens T of a chunk; must equal the data's."""
    latents: Annotated[int, Field(ge=1, le=4096)] = 32
    """Latents M that a chunk is compressed to, at most its number of tokens."""
    compressor: str = "records"
    """What makes latents. records: each is made of sub-latents for the tokens with the highest
    router scores. literal: the model card word for word; learned queries read the whole chunk, and
    a latent is one key. records has 85% of the gain of uncompressed history, literal 14%
    (docs/history.md). Or one that i3dist/model/compressor_kinds.py registers."""
    sub_latents: Annotated[int, Field(ge=1, le=4096)] = 4
    """Of records: sub-latents R of a latent, each made for one token and D / R channels wide;
    attention sees each as a key. Adjusts as heads do; a chunk has no more of them than tokens.
    literal has none and ignores it."""
    history_chunks: Annotated[int, Field(ge=1, le=1024)] = 8
    """Compressed chunks that a chunk attends to; older ones are dropped. Each takes a channel of
    every head for its age: with more than 10 the default's heads are 144 channels wide, not 128."""
    state_carry: bool = False
    """Carry recurrent state over chunk ends within a document. The model card does not: the reach
    is then no longer history_chunks + 1 chunks, and a window's chunks are read one after the other.
    History should then begin late: from step 1,000 on it gained 0.015 nats more than without, from
    step 100 on a model with carried state did not learn to use history (docs/history.md)."""

    @field_validator("latents")
    @classmethod
    def _fits(cls, latents: int, others: ValidationInfo) -> int:
        length = others.data.get("chunk_length", latents)
        if latents > length:
            raise ValueError(f"should be at most model.chunk_length = {length}")
        return latents

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of each layer, from the bottom."""
        return read_layers(self.layers)

    @property
    def vocab(self) -> int:
        """The vocabulary as a number: the model card's while it is "auto"."""
        return CARD_VOCAB_SIZE if self.vocab_size == "auto" else self.vocab_size


class CompressionSettings(Section):
    """How history enters training: attention adds log g to history's logits, g from 0 to 1."""

    off_steps: CountOrZero = 100
    """Steps at the start with g = 0. The model card's 100 are enough for layers of dual-attention.
    Those of attention should first learn their own chunk: 33M tokens (docs/history.md)."""
    ramp_steps: CountOrZero = 50
    """Steps over which g then rises to 1."""
    schedule: Schedule = "linear"
    """How g rises: linear, or another of optimizer.schedule's curves."""
    join_after: Annotated[int, Field(ge=-(2**40), le=2**40)] | Never | Auto = "auto"
    """Steps after which the two softmaxes of dual-attention begin to become one, a share j at a
    time; never keeps them apart (docs/model.md). auto is 4000. With train.init_from it goes on as
    the weights ended: never, if they are apart, else 0 or less, so that the first step has their j.
    Layers of attention have one from the start."""
    join_steps: CountOrZero | Auto = "auto"
    """Steps over which j then rises to 1, on a line; auto is 2000."""

    def gate_at(self, step: int) -> float:
        """Gate g for optimizer step `step` (the first is 0)."""
        if step < self.off_steps:
            return 0.0
        ramp = Point(step - self.off_steps + 1, max(1, self.ramp_steps), 0.0, 1.0)
        return height(self.schedule, ramp)

    @property
    def joins(self) -> bool:
        """Whether two softmaxes become one at any time."""
        return self.join_after != "never"

    def joined_at(self, step: int) -> float:
        """The share j in which two softmaxes are one in optimizer step `step` (the first is 0)."""
        assert self.join_after != "auto" and self.join_steps != "auto", "join_* is not resolved"
        if self.join_after == "never" or step < self.join_after:
            return 0.0
        return min(1.0, (step - self.join_after + 1) / max(1, self.join_steps))

    def joined_after(self, steps: int) -> float:
        """The share j that weights were trained with in the last of `steps` optimizer steps."""
        return self.joined_at(max(0, steps - 1))


class OptimizerSettings(Section):
    """AdamW with decoupled weight decay on matrices only, and the learning rate's curve."""

    kind: str = "adamw"
    """What updates the weights: adamw or lion, or one that i3dist/optim/optimizers.py registers."""
    lr: Positive = 4e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after warm-up: cosine, linear, or warmup-stable-decay (wsd)."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a fraction of the peak; with 1 it stays at its peak."""
    warmup_steps: CountOrZero = 100
    """Steps of linear warm-up."""
    decay_steps: Count | Auto = "auto"
    """Length of the whole curve in steps, more than warmup_steps. auto is train.steps when the run
    starts, or twice warmup_steps if warm-up fills the run, and then stays. A run that has ended may
    be trained further with another."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of warmup-stable-decay: the share of the curve after warm-up, at its end, in which the rate
    falls. Before, it stays at its peak."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean; in lion its weight in the direction."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the running mean of its square; in lion of the running mean."""
    eps: Positive = 1e-8
    """AdamW's denominator offset; lion has none."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Decoupled weight decay, on matrices only."""

    def check_curve(self, place: str = "") -> None:
        """Refuse a curve that warm-up fills: the rate would fall in one step.

        Only for new runs; a saved one keeps its curve. `place` begins the line.

        Raises:
            UserError: the curve is not longer than its warm-up.
        """
        if self.decay_steps != "auto" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"{place}setting optimizer.decay_steps={self.decay_steps} should be more than "
                f"optimizer.warmup_steps={self.warmup_steps}, as it is the length of the whole "
                "curve, warm-up included; raise it, or lower optimizer.warmup_steps"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate for optimizer step `step` (the first is 0)."""
        assert self.decay_steps != "auto", "optimizer.decay_steps is not resolved"
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        span = max(1, self.decay_steps - self.warmup_steps)
        fall = Point(step - self.warmup_steps, span, 1.0, self.min_lr_ratio, self.decay_fraction)
        return self.lr * height(self.schedule, fall)


class TrainSettings(Section):
    """The optimizer step: lanes x windows x chunks x tokens."""

    steps: Count = 20_000
    """Optimizer steps of the whole run."""
    init_from: OptionalPath = None
    """Trained weights to begin with, and nothing else of their run: the folder of a run that has
    ended, a checkpoint, or an exported model. Shapes and tokenizer must be the same. A run that
    continues does not read it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights and of the order of shards."""
    lanes: Count | Auto = "auto"
    """Rows G of the whole job's batch; auto is 4 per rank when a run starts, and stays."""
    schedule: Literal[1, 2] | Auto = "auto"
    """How lanes take shards. 2 (auto, in a new run): from one endless sequence, so that no lane
    waits. 1: epoch by epoch; lanes idle at its end. A run keeps the one it began with."""
    window_chunks: Annotated[int, Field(ge=1, le=4096)] = 8
    """Consecutive chunks K of a lane that are trained at once. Gradient reaches latents only inside
    a window, so with 1 the compressor does not learn to make them."""
    accumulation: Annotated[int, Field(ge=1, le=4096)] = 1
    """Windows of each lane, one after another, whose gradients make one step."""
    micro_batch: Count | Auto = "auto"
    """Lanes of a rank that are computed at once; auto is all that fit. Changes rounding only."""
    device: Device = "auto"
    """What the job runs on: auto is CUDA where there is a GPU, else the CPU if that is fast enough
    for the model. Changes rounding only, as the number of ranks does."""
    engine: Literal["zero2", "stock"] = "zero2"
    """zero2: DeepSpeed's ZeRO-2 with its slow parts replaced. stock: DeepSpeed's public API alone,
    slower, for any version of it. Changes rounding only, as the number of ranks does."""
    compile: bool | Auto = "auto"
    """Compile the blocks (torch.compile) before the first step; auto does on GPUs."""
    compile_cache: AutoPath = "auto"
    """Folder that keeps compiled code in an archive, so that a job on another host need not compile
    again; auto is run.path. Runs may share one. Who can write there can run code in your job."""
    clip: Positive = 1.0
    """Largest global gradient norm; a larger gradient is scaled down to it."""

    @property
    def lane_count(self) -> int:
        """`lanes` as a number, once the run has decided it."""
        assert self.lanes != "auto", "train.lanes is not resolved"
        return self.lanes

    @property
    def schedule_version(self) -> Literal[1, 2]:
        """`schedule` as a number, once the run has decided it."""
        assert self.schedule != "auto", "train.schedule is not resolved"
        return self.schedule


class LogSettings(Section):
    """What the run reports."""

    every: Count = 10
    """Steps between lines in the terminal, metrics.jsonl and MLflow."""
    diagnose_every: CountOrZero = 500
    """Steps between diagnoses of the model (diagnostics.jsonl): attention to history by age, rank
    of the latents, the compressor's gradient; 0 makes none."""


class ValidateSettings(Section):
    """Held-out loss, with and without history."""

    every: CountOrZero = 500
    """Steps between validations, the first of which is before step 1; 0 validates only after the
    last step."""
    chunks: Count = 1024
    """Chunks of the fixed validation subset, rounded up to whole shards."""
    samples: Annotated[int, Field(ge=0, le=256)] = 2
    """Held-out documents whose beginnings each validation continues by 64 tokens (samples.jsonl),
    to read what the model writes; 0 makes none."""


class CheckpointSettings(Section):
    """The checkpoints from which the run can continue."""

    every: CountOrZero = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep: Count = 2
    """Newest checkpoints to keep; while steps are bad, as many from before them stay too."""
    keep_every: CountOrZero = 0
    """Keep for good the checkpoint of every step that is a multiple of this; 0 keeps none so."""


class GuardSettings(Section):
    """What the run does when something goes wrong."""

    bad_steps: Count = 10
    """A step whose loss or gradient is not finite is skipped; so many in a row end the run, or roll
    it back."""
    rollbacks: CountOrZero = 0
    """How often bad steps may roll the run back: weights and optimizer return to the newest
    checkpoint from before them that no earlier roll-back used, lanes start with no history, and
    training goes on after the bad steps. With 0, or without such a checkpoint, the run ends."""
    spike_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Skip a step whose gradient norm exceeds this many times the running median; 0 skips none."""
    spike_window: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Steps that the running median covers; until there are so many, no step is skipped."""
    spike_steps: Count = 3
    """Skip so many spikes in a row at most; the next step is taken whatever its norm."""
    hang_seconds: Annotated[float, Field(ge=0, le=1e6)] | Auto = "auto"
    """A step, a validation, a save or waiting for data that takes longer ends the job within
    seconds, with the stacks of every rank in the log and status 75, which asks to be started again;
    0 waits for ever. auto: ten times the longest that was seen of its kind, at least 60 for steps
    and 300 for others; until a kind, or 50 steps, were seen, 1800. Each part of the start has 1800
    at least."""
    requeues: CountOrZero = 3
    """A job that its launcher starts again by itself stops after so many starts in a row that have
    made no new checkpoint; 0 never stops it."""


class SlurmSettings(Section):
    """What slurm/train.sbatch does beyond requeueing."""

    successor: bool = False
    """When a host is lost, submit the same job again without that host, and give up this one. Slurm
    would hold it until it has declared the host down, which takes minutes."""


class TrackingSettings(Section):
    """MLflow. Its store is MLFLOW_TRACKING_URI, or an SQLite file beside the run's folder."""

    enabled: bool = True
    """Log to MLflow; metrics.jsonl is written in any case."""
    experiment: str = "i3dist"
    """MLflow experiment."""
    run_name: OptionalName = None
    """MLflow run name; by default the last part of run.path."""
    system_metrics: bool = False
    """Log CPU, memory and GPU use too."""
    log_model: bool = True
    """When the run has ended, log a copy of its model, for mlflow.pyfunc.load_model and mlflow
    models serve."""
    registered_model: OptionalName = None
    """Name in MLflow's model registry under which that model becomes the next version; by default
    it is not registered."""
    notify: OptionalName = None
    """Command that sh runs when the run begins to train, stops to be started again, fails, or ends.
    Its environment says what happened: I3DIST_EVENT is start, requeue, failure or end; I3DIST_RUN,
    _STEP, _HOST and _REASON say more. Training never waits for it; the end of the run does, for at
    most 10 s."""

    @field_validator("registered_model")
    @classmethod
    def _can_be_registered(cls, name: str | None, others: ValidationInfo) -> str | None:
        if name is None:
            return None
        marks = {"/", ":"} & set(name) or name == "." or name.startswith("..")  # MLflow's own rules
        if marks or not 1 <= len(name.strip()) <= len(name) <= 256:
            raise ValueError("should be a name of at most 256 characters without / and :")
        if not others.data.get("log_model", True):
            raise ValueError("should be left out with tracking.log_model=false: no model is logged")
        return name


class Settings(SettingsTree):
    """All that decides a run, apart from the engine's own file (zero2.json)."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    compression: CompressionSettings = CompressionSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    log: LogSettings = LogSettings()
    validate_: ValidateSettings = Field(default=ValidateSettings(), alias="validate")
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    slurm: SlurmSettings = SlurmSettings()
    tracking: TrackingSettings = TrackingSettings()

    @classmethod
    def build(cls, values: Any, places: Mapping[str, str] | None = None) -> Self:
        """As `SettingsTree.build`, with former names of settings translated."""
        return super().build(*translate(values, places or {}))

    @property
    def joins(self) -> bool:
        """Whether there are layers whose two softmaxes become one at any time."""
        return self.compression.joins and "dual-attention" in self.model.layer_kinds

    def of_saved_run(self) -> Self:
        """These, read from a saved run. What it lacks gets the value that it was trained with."""
        flat, given = self.flat(), self.given()
        lacking = {k: v for k, v in BEFORE.items() if k not in given or flat[k] == "auto"}
        return self.with_values(**lacking) if lacking else self


if __name__ == "__main__":
    print("# i3-4096ctx, the model card: every setting at its default. Made by")
    print("#   python -m i3dist.config > configs/i3-4096ctx.yaml")
    print(commented_yaml(Settings), end="")
