"""The setting that a user meant by a name that is none: a typo, or another trainer's word."""

import difflib
from collections.abc import Collection, Mapping

LIKE_ENOUGH = 0.7  # of 1, as difflib measures it
MOST = 3  # suggestions

# What other trainers call our settings, where `suggest` finds no likeness. A word may be
# typed with or without its first part as the section: log_interval, log.interval.
SYNONYMS = {
    "run.path": "output_dir output_path output out_dir out save_dir save_path run_dir log_dir "
    "logdir checkpoint_dir checkpoint_path checkpoint_folder ckpt_dir ckpt_path dump_folder "
    "resume resume_from resume_from_checkpoint",
    "data.path": "dataset dataset_dir dataset_name data_dir data_root data_prefix data train_data "
    "train_path train_file train_files train_bin dataset_path input_dir",
    "data.workers": "dataloader_num_workers loader_workers",
    "model.d_model": "hidden_size hidden_dim dim n_embd n_embed d_embed embed_dim embedding_dim "
    "model_dim width",
    "model.layers": "num_hidden_layers depth attention_layers",
    "model.heads": "num_attention_heads attention_heads",
    "model.ff_mult": "mlp_ratio ffn_dim_multiplier mlp_mult intermediate_size d_ff",
    "model.chunk_length": "seq_len seq_length sequence_length block_size context_length ctx_len "
    "context_size max_seq_len max_seq_length max_sequence_length max_position_embeddings "
    "chunk_size",
    "model.latents": "num_latents n_latents",
    "model.sub_latents": "records",
    "model.history_chunks": "memory_size",
    "compression.ramp_steps": "compression_warmup",
    "optimizer.kind": "optimizer optim opt optimizer_type optimizer_name optim_type optim_name "
    "optimizer_class",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr max_learning_rate initial_lr",
    "optimizer.min_lr_ratio": "min_lr final_lr final_lr_frac min_learning_rate min_lr_factor "
    "alpha_f",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler scheduler_type "
    "lr_decay_style decay_type",
    "optimizer.warmup_steps": "warmup_iters num_warmup_steps lr_warmup_steps lr_warmup "
    "warmup_iterations warmup_ratio warmup_fraction",
    "optimizer.decay_steps": "lr_decay_steps lr_decay_iters decay_iters t_max",
    "optimizer.decay_fraction": "decay_ratio cooldown cooldown_frac warmdown_ratio lr_decay_ratio",
    "optimizer.beta1": "adam_beta1 b1 betas",
    "optimizer.beta2": "adam_beta2 b2",
    "optimizer.eps": "epsilon adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd",
    "train.steps": "max_steps num_steps n_steps train_steps training_steps total_steps max_iters "
    "num_iters iters iterations num_iterations train_iters max_train_steps epochs num_epochs "
    "max_epochs num_train_epochs n_epochs",
    "train.seed": "random_seed manual_seed rng_seed",
    "train.lanes": "batch_size batch global_batch_size train_batch_size total_batch_size bs rows",
    "train.micro_batch": "micro_batch_size device_batch_size local_batch_size mbs "
    "per_device_train_batch_size per_device_batch_size train_micro_batch_size_per_gpu",
    "train.accumulation": "gradient_accumulation_steps grad_accum grad_accum_steps "
    "accumulate_grad_batches accumulation_steps acc_steps",
    "train.device": "gpu accelerator",
    "train.engine": "backend strategy",
    "train.clip": "grad_clip clip_grad clip_grad_norm max_grad_norm max_norm gradient_clipping "
    "grad_norm gradient_clip_val grad_norm_clip clip_norm",
    "log.every": "log_interval log_every log_freq log_frequency log_steps logging_steps "
    "logging_interval print_every log_every_n_steps print_freq interval",
    "validate.every": "eval_interval eval_every eval_steps eval_freq val_interval val_every "
    "validation_interval validate_interval validate_freq validate_steps val_loss_every "
    "val_check_interval validation_freq validation_every validation_steps",
    "validate.chunks": "eval_iters eval_batches val_batches eval_tokens val_tokens",
    "checkpoint.every": "save_interval save_every save_steps save_freq ckpt_interval ckpt_every "
    "checkpoint_interval checkpoint_freq checkpoint_steps",
    "checkpoint.keep": "save_total_limit keep_last keep_last_n keep_latest_k max_checkpoints",
    "guard.hang_seconds": "timeout hang_timeout",
    "guard.spike_factor": "spike_threshold",
    "tracking.enabled": "mlflow wandb use_wandb use_mlflow wandb_log",
    "tracking.experiment": "project project_name wandb_project experiment_name",
    "tracking.run_name": "exp_name job_name wandb_name",
}
MEANING = {word: name for name, words in SYNONYMS.items() for word in words.split()}


def suggest(name: str, known: Collection[str]) -> list[str]:
    """The settings that a user may have meant.

    Args:
        name: what was typed, with or without a section.
        known: the settings there are, as section.key.

    Returns:
        Some of `known`, the likeliest first; none where nothing is like it.
    """
    section, _, key = name.lower().replace("-", "_").replace(" ", "_").rpartition(".")
    section = section.rpartition(".")[2]
    if f"{section}.{key}" in known:
        return [f"{section}.{key}"]
    joined = f"{section}_{key}".lstrip("_")
    meaning = MEANING | {setting.replace(".", "_"): setting for setting in known}  # train_seed
    for word in (joined, key):
        if meaning.get(word) in known:
            return [meaning[word]]
    keys = {setting: setting.partition(".")[2] for setting in known}
    here = {setting: word for setting, word in keys.items() if setting.startswith(f"{section}.")}
    found = (
        _nearest_section(section, [setting for setting in known if keys[setting] == key])
        or _like(key, here)
        or _containing(key, here)
        or _like(key, keys)
        or _containing(key, keys)
    )
    return found[:MOST]


def hint(name: str, known: Collection[str]) -> str:
    """What a message about an unknown name ends in: the settings it may mean, where all are."""
    meant = " or ".join(suggest(name, known))
    question = f"; did you mean {meant}?" if meant else ""
    return f"{question} (launch/train.py --help lists all)"


def _like(key: str, keys: Mapping[str, str]) -> list[str]:
    """The settings whose key is most like one that was typed."""
    near = difflib.get_close_matches(key, keys.values(), MOST, LIKE_ENOUGH)
    return [setting for word in dict.fromkeys(near) for setting in keys if keys[setting] == word]


def _containing(key: str, keys: Mapping[str, str]) -> list[str]:
    """The settings whose key has all words of one that was typed."""
    words = set(key.split("_"))
    return [setting for setting, word in keys.items() if words <= set(word.split("_"))]


def _nearest_section(section: str, settings: list[str]) -> list[str]:
    """Those of the settings whose section is like the one that was typed; else all."""
    sections = [setting.partition(".")[0] for setting in settings]
    near = difflib.get_close_matches(section, sections, 1, LIKE_ENOUGH)
    near += [name for name in sections if section and section.startswith(name)]  # logging: log
    return [setting for setting in settings if setting.partition(".")[0] in near] or settings
