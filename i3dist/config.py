"""The typed tree of settings: defaults are the i3-4096ctx card.

Order of precedence: the defaults below, then ``--config FILE.yaml``, then ``section.key=value``.
Values are validated when the tree is built; whatever is wrong becomes one line that names the key,
the value, the legal range and the remedy.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from i3dist.cli.paths import literal_name, literal_path
from i3dist.cli.settings_file import Literals, Nothing, read_values, write_values
from i3dist.errors import UserError

Auto = Literal["auto"]
OnDamage = Literal["stop", "quarantine"]
Device = Literal["auto", "cpu", "cuda"]
Count = Annotated[int, Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# JSON is Unicode: what is not in the name of a folder becomes "?" there.
AnyPath = Annotated[
    Path,
    PlainSerializer(lambda path: str(path).encode("utf-8", "replace").decode(), when_used="json"),
]
# May be left empty, or null, in a file.
Kind = TypeVar("Kind")
OrNothing = Annotated[
    Kind | None,
    BeforeValidator(lambda value: None if isinstance(value, Nothing) else value),
]

CARD_VOCAB_SIZE = 32_000


class Section(BaseModel):
    """A frozen group of settings. Field docstrings are what ``--help`` shows."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class RunSettings(Section):
    """Where one run keeps what it makes."""

    path: AnyPath = Path("runs/i3-4096ctx")
    """Folder of the run: checkpoints, logs, plots, final weights."""


class DataSettings(Section):
    """What the run reads."""

    path: AnyPath = Path("data/fineweb-edu")
    """Output folder of data_prep/shard.py, with train/ and valid/ in it."""
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    """Loader processes per rank; 0 reads in the training process. Never changes the stream."""
    on_damage: OnDamage = "stop"
    """Where a training shard is not what its manifest says: stop, or say what is lost and let its
    lane idle for as long. Missing shards, and those of validation, always stop the run."""


class ModelSettings(Section):
    """The architecture. Defaults: i3-4096ctx, about 340M parameters."""

    vocab_size: Annotated[int, Field(ge=16, le=65_536)] | Auto = "auto"
    """Vocabulary; auto follows the data's tokenizer (32,000 where there is no data)."""
    d_model: Annotated[int, Field(ge=8, le=65_536)] = 1180
    """Width D of the residual stream."""
    rwkv_layers: Annotated[int, Field(ge=1, le=1024)] = 12
    """RWKV-4 blocks, at the bottom of the stack."""
    attention_layers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Causal attention blocks above them; only these see the compressed history."""
    heads: Annotated[int, Field(ge=1, le=4096)] = 8
    """Attention heads asked for; adjusts to the nearest divisor of d_model."""
    ff_mult: Annotated[int, Field(ge=1, le=64)] = 4
    """Hidden width of feed-forward and channel-mix, in units of d_model."""
    chunk_length: Annotated[int, Field(ge=2, le=65_536)] = 512
    """Tokens T of a chunk; must equal the data's."""
    latents: Annotated[int, Field(ge=1, le=4096)] = 32
    """Latent tokens M that a chunk is compressed to, at most its tokens."""
    records: Annotated[int, Field(ge=1, le=4096)] = 4
    """Records R in a latent, each of one token and D / R channels wide, which attention sees one by
    one. Adjusts as heads do, to no more than the chunk has tokens."""
    history_chunks: Annotated[int, Field(ge=1, le=1024)] = 8
    """Compressed chunks a new chunk attends to; older ones are dropped. The age of each takes a
    channel of every head: with more than 10 the card's heads are 144 channels wide, not 128."""
    state_carry: bool = False
    """Carry RWKV state over chunk ends within a document. Beyond the card: gives up the exact
    reach of history_chunks + 1 chunks, and chunks of a window side by side. Beside history it
    gained 0.017 nats more than history alone, which gains 0.120 (docs/history.md)."""

    @field_validator("latents")
    @classmethod
    def _fits(cls, latents: int, others: ValidationInfo) -> int:
        length = others.data.get("chunk_length", latents)
        if latents > length:
            raise ValueError(f"should be at most model.chunk_length = {length}")
        return latents

    @property
    def vocab(self) -> int:
        """The vocabulary as a number: the card's where it is still "auto"."""
        return CARD_VOCAB_SIZE if self.vocab_size == "auto" else self.vocab_size


class CompressionSettings(Section):
    """How history enters training: gate g in [0, 1] adds log g to its attention logits."""

    off_steps: CountOrZero = 100
    """Steps at the start with g = 0. The card's 100 are too few for a long run: attention is to
    have learned its own chunk before (docs/history.md: 1,000 steps of 32,768 tokens)."""
    ramp_steps: CountOrZero = 50
    """Steps over which g then rises linearly to 1."""

    def gate_at(self, step: int) -> float:
        """Gate g for optimizer step `step` (the first is 0)."""
        if step < self.off_steps:
            return 0.0
        return min(1.0, (step - self.off_steps + 1) / max(1, self.ramp_steps))


class OptimizerSettings(Section):
    """AdamW with decoupled decay on matrices only; cosine learning rate with linear warm-up."""

    lr: Positive = 4e-4
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a fraction of the peak."""
    warmup_steps: CountOrZero = 100
    """Steps of linear warm-up."""
    decay_steps: Count | Auto = "auto"
    """Length of the whole curve in steps, more than warmup_steps. auto is train.steps of the run's
    start, or twice warmup_steps where the run is all warm-up, and stays."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's second-moment decay."""
    eps: Positive = 1e-8
    """AdamW's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Decoupled weight decay, on matrices only."""

    def check_curve(self) -> None:
        """See that the curve is longer than its warm-up: else the rate would fall in one step.

        For new runs; a saved one keeps the curve that it has.

        Raises:
            UserError: it is not.
        """
        if self.decay_steps != "auto" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"setting optimizer.decay_steps={self.decay_steps} should be more than "
                f"optimizer.warmup_steps={self.warmup_steps}, as it is the length of the whole "
                "curve, warm-up included; raise it, or lower optimizer.warmup_steps"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate for optimizer step `step` (the first is 0)."""
        if self.decay_steps == "auto":
            raise ValueError("optimizer.decay_steps is not resolved")
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        span = max(1, self.decay_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * cosine)


class TrainSettings(Section):
    """The optimizer step: lanes x windows x chunks x tokens."""

    steps: Count = 20_000
    """Optimizer steps of the whole run."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights and of the order of shards."""
    lanes: Count | Auto = "auto"
    """Rows G of the whole job's batch; auto is 4 per rank when a run starts, and stays."""
    schedule: Literal[1, 2] | Auto = "auto"
    """How lanes take shards. 2 (auto, in a new run): from one endless sequence, so that none ever
    waits. 1: each epoch by itself, at whose end lanes idle. A run keeps the one it began with."""
    window_chunks: Annotated[int, Field(ge=1, le=4096)] = 8
    """Consecutive chunks K of a lane trained at once. Gradient flows into latents inside it: with 1
    the compressor does not learn."""
    accumulation: Annotated[int, Field(ge=1, le=4096)] = 1
    """Successive windows of each lane that are accumulated into one step."""
    micro_batch: Count | Auto = "auto"
    """Lanes of a rank computed at once; auto is all that fit. Never changes the step's content."""
    device: Device = "auto"
    """What the job runs on: auto is CUDA where there is a GPU, else the CPU if that is fast enough
    for the model. Changes rounding only, as the number of ranks does."""
    compile: bool | Auto = "auto"
    """Compile the blocks (torch.compile) before the first step; auto does on GPUs."""
    clip: Positive = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""

    @property
    def lane_count(self) -> int:
        """`lanes` as a number, once the run has decided it."""
        if self.lanes == "auto":
            raise ValueError("train.lanes is not resolved")
        return self.lanes

    @property
    def schedule_version(self) -> Literal[1, 2]:
        """`schedule` as a number, once the run has decided it."""
        if self.schedule == "auto":
            raise ValueError("train.schedule is not resolved")
        return self.schedule


class LogSettings(Section):
    """What the run says."""

    every: Count = 10
    """Steps between lines in the terminal, metrics.jsonl and MLflow."""
    diagnose_every: CountOrZero = 500
    """Steps between looks into the model (diagnostics.jsonl): attention to history by age, rank of
    the latents, the compressor's gradient; 0 never looks."""


class ValidateSettings(Section):
    """Held-out loss, with and without history."""

    every: CountOrZero = 500
    """Steps between validations; 0 validates only before the first step and after the last."""
    chunks: Count = 1024
    """Chunks of the fixed validation subset, rounded up to whole shards."""


class CheckpointSettings(Section):
    """What the run can continue from."""

    every: CountOrZero = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep: Count = 2
    """Newest checkpoints that are kept; while steps are bad as many from before them are, too."""
    keep_every: CountOrZero = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none so."""


class GuardSettings(Section):
    """What a run does when something goes wrong."""

    bad_steps: Count = 10
    """Steps in a row that may be skipped because a loss or gradient is not finite; so many end the
    run, or roll it back."""
    rollbacks: CountOrZero = 0
    """Times in a run that so many bad steps roll it back: weights and optimizer become those of the
    newest checkpoint from before them that it has not rolled back to before, lanes start with no
    history, and training goes on behind the bad steps, not with them again. Then, where there is no
    such checkpoint, and with 0, they end it."""
    spike_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """A step is skipped where its gradient's norm exceeds this many times the running median; 0
    never skips for that."""
    spike_window: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Steps that the running median is of; before there are so many none is skipped."""
    spike_steps: Count = 3
    """Spikes in a row that are skipped at most; the next step is taken whatever its norm."""
    hang_seconds: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """A step, validation or save that takes longer ends the job, a few seconds later, with every
    rank's stacks in the log; 0 waits for ever."""


class TrackingSettings(Section):
    """MLflow. The store is MLFLOW_TRACKING_URI, or an SQLite file beside the run's folder."""

    enabled: bool = True
    """Log to MLflow; metrics.jsonl is written in any case."""
    experiment: str = "i3dist"
    """MLflow experiment."""
    run_name: OrNothing[str] = None
    """MLflow run name; the last part of run.path where it is not given."""
    system_metrics: bool = False
    """Log CPU, memory and GPU use too."""


class Settings(Section):
    """Everything that decides a run, but for the engine's own file (zero2.json)."""

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
    tracking: TrackingSettings = TrackingSettings()

    @classmethod
    def load(cls, config: Path | None = None, overrides: Sequence[str] = ()) -> "Settings":
        """Build the tree from a YAML file and ``section.key=value`` words.

        Raises:
            UserError: unreadable file, unknown key or illegal value; the line names it, and file
                and line where it is in the file.
        """
        said = read_values(config, overrides, literal_settings())
        return cls.build(said.values, said.places)

    @classmethod
    def build(cls, values: Any, places: Mapping[str, str] | None = None) -> "Settings":
        """Validate a plain nested dict; `places` begin the lines about sections and settings.

        Raises:
            UserError: unknown key or illegal value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_explain(error, places or {})) from None

    def of_saved_run(self) -> "Settings":
        """These, read from what a run has saved: a newer setting has what the run did before it."""
        flat = self.flat()
        return self.with_values(**{k: v for k, v in BEFORE.items() if flat[k] == "auto"})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict as JSON has it, in the names that users type."""
        return self.model_dump(mode="json", by_alias=True)

    def flat(self) -> dict[str, Any]:
        """One entry per setting: {"train.steps": 20000, ...}."""
        return {
            f"{section}.{key}": value
            for section, fields in self.to_dict().items()
            for key, value in fields.items()
        }

    def to_yaml(self) -> str:
        """The tree as YAML, which `load` reads back to an equal tree."""
        return write_values(self.model_dump(by_alias=True))

    def save(self, path: Path) -> None:
        """Write `to_yaml` to a file."""
        path.write_text(self.to_yaml(), encoding="utf-8")

    def with_values(self, **changes: Any) -> "Settings":
        """A copy with settings replaced: ``with_values(**{"train.lanes": 8})``."""
        values = self.model_dump(by_alias=True)
        for name, value in changes.items():
            section, key = name.split(".")
            values[section][key] = value
        return Settings.build(values)


# What may differ when a run continues: it changes how or how long, never what is computed.
FREE_TO_CHANGE = (
    "run.path",
    "data.path",  # the data itself is compared by its fingerprint
    "data.workers",
    "data.on_damage",  # only the content of damaged shards
    "train.steps",
    "train.micro_batch",
    "train.device",
    "train.compile",
    "log.every",
    "log.diagnose_every",
    "validate.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "guard.bad_steps",
    "guard.hang_seconds",
    "tracking.enabled",
    "tracking.experiment",
    "tracking.run_name",
    "tracking.system_metrics",
)

# Settings whose "auto" is decided when a run starts and stays the run's from then on.
DECIDED_AT_START = (
    "train.lanes",
    "train.schedule",
    "optimizer.decay_steps",
    "model.vocab_size",
)

# Those of them that came later, and what runs did before: a run that has it saved has decided it.
BEFORE = {"train.schedule": 1}


def inherit_decided(settings: Settings, saved: Settings) -> Settings:
    """Fill each "auto" of `DECIDED_AT_START` with what the saved run decided."""
    flat, before = settings.flat(), saved.flat()
    return settings.with_values(
        **{key: before[key] for key in DECIDED_AT_START if flat[key] == "auto"}
    )


def first_conflict(settings: Settings, saved: Settings) -> str | None:
    """Name the first setting that a continued run may not change, or None."""
    before = saved.flat()
    for key, value in settings.flat().items():
        if key not in FREE_TO_CHANGE and before[key] != value:
            return f"{key} is {value} but the saved run has {before[key]}"
    return None


def setting_lines() -> Iterator[tuple[str, str, str]]:
    """(name, default, description) of every setting, for ``--help``."""
    defaults = Settings().flat()
    for name, field in _fields():
        yield name, str(defaults[name]), " ".join((field.description or "").split())


def literal_settings() -> Literals:
    """How a typed text becomes the value of each setting that is a path or a name."""
    readers = {Path: literal_path, str: literal_name}
    return {
        name: reader
        for name, field in _fields()
        for kind, reader in readers.items()
        if _kinds(field.annotation) - {type(None)} == {kind}
    }


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation}


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for section, group in Settings.model_fields.items():
        section_type = group.annotation
        assert isinstance(section_type, type) and issubclass(section_type, Section)
        for key, field in section_type.model_fields.items():
            yield f"{group.alias or section}.{key}", field


def _explain(error: ValidationError, places: Mapping[str, str]) -> str:
    """The first fault of a validation as one line: place, key, value, legal range, remedy."""
    fault = error.errors(include_url=False)[0]
    # Tagged unions put their branch into the location; only setting names are wanted.
    names = [str(part) for part in fault["loc"]][:2]
    key = ".".join(names) or "the settings"
    place = places.get(key, "")
    remedies = {name: text for name, _, text in setting_lines()}
    if fault["type"] == "extra_forbidden":
        known = remedies if "." in key else {name.partition(".")[0] for name in remedies}
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{place}unknown setting {key}{hint} (launch/train.py --help lists all)"
    legal = "; ".join(
        dict.fromkeys(
            other["msg"].removeprefix("Input ").removeprefix("Value error, ")
            for other in error.errors(include_url=False)
            if [str(part) for part in other["loc"]][:2] == names
        )
    )
    if fault["input"] is None or isinstance(fault["input"], Nothing):
        legal = "has no value: give one, or leave the setting out"
    meaning = f" ({remedies[key]})" if key in remedies else ""
    return f"{place}setting {key}={repr(fault['input'])[:80]} {legal}{meaning}"
