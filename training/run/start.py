"""A run before its first step: its folder, its tokenizer, its data, its first state."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from tiny_onn_func.tree import to_device
from training.data.baselines import baselines
from training.data.batches import scored_span
from training.data.corpus import Splits, open_corpus
from training.data.hf_tokenizer import open_tokenizer, run_tokenizer
from training.data.sources import STDLIB
from training.data.streams import CHUNK
from training.data.tokenizer import BYTES, TURN_END, TURN_START, Tokenizer, check_vocab, save_tokenizer
from training.distributed.sharded_checkpoint import FOLDER, is_sharded, load_sharded, open_sharded
from training.distributed.team import ALONE, Team
from training.errors import UserError
from training.run.config import RunConfig
from training.run.context import Run, append_record
from training.run.finished import no_run
from training.run.identity import check_same, deciding
from training.run.initial_state import first_state, with_router
from training.run.schedule import read_legs
from training.run.settings import load_settings, save_settings
from training.run.teacher import open_teacher
from training.step.hyper_step import TrainState, init_state
from training.storage.checkpoint import Checkpoint, load_state, open_checkpoint
from training.storage.checkpoint_files import clean, remove_steps, steps_in
from training.storage.recorder import unbroken_upto

KINDS = ("checkpoints", FOLDER)  # folders of whole checkpoints and of those in many parts


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a fresh start in a folder with a run, and a resume in one without."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: expected a folder or a new name, got the file {folder}; name another one")
    begun = (folder / "config.yaml").exists()
    if begun and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder / 'config.yaml'}: expected a file, got something else; move it away, or restore it")
    if (folder / "study.yaml").exists():
        mend = f"`tiny-onn study --out {folder} --resume` goes on with it" if resume else "name another one"
        raise UserError(f"--out: expected a folder for a run, got {folder}, which holds a study; {mend}")
    if not begun and any(steps_in(folder / kind) for kind in KINDS):
        mend = "restore the file, or name another folder"
        raise UserError(f"--out: expected a new folder, got {folder} with checkpoints and no config.yaml; {mend}")
    if resume and not begun:
        raise UserError(f"--resume: expected a run in {folder}, found none; leave --resume away")
    study = folder.absolute().parent.parent
    if resume and folder.absolute().parent.name == "runs" and (study / "study.yaml").exists():
        whole = f"`tiny-onn study --out {study} --resume` goes on with it"
        raise UserError(f"--resume: expected a run of its own, got {folder}, a part of the study in {study}; {whole}")
    if not resume and begun:
        raise UserError(f"--out: expected a new folder, got {folder}, which holds a run; add --resume, or name another")
    for home in (folder / kind for kind in KINDS):
        if home.exists() and not home.is_dir():
            raise UserError(f"{home}: expected a folder of checkpoints, got a file; move it away")


def tokenizer_of(config: RunConfig, folder: Path, checkpoint: Checkpoint | None) -> Tokenizer:
    """Open the settings' tokenizer; a resumed run takes the copy in its folder, which they may not contradict."""
    if checkpoint is None:
        tokenizer = open_tokenizer(config.tokenizer)
    else:
        tokenizer = run_tokenizer(folder, config.tokenizer, checkpoint.tokenizer)
        there = tokenizer is not BYTES and Path(os.path.expanduser(config.tokenizer)).exists()
        if there and open_tokenizer(config.tokenizer).fingerprint != tokenizer.fingerprint:
            raise UserError(f"tokenizer: expected the one in {folder}, got another, {config.tokenizer}; leave it away")
    check_vocab(tokenizer, config.model.vocab_size)
    return tokenizer


def open_new(config: RunConfig, folder: Path, tokenizer: Tokenizer, team: Team = ALONE) -> Run:
    """Open a run and its data, before its first step."""
    if config.replay:
        raise UserError(f"replay: expected 0 outside a study with tasks, got {config.replay:g}; leave it away")
    teacher = open_teacher(config, tokenizer)
    corpus = open_corpus(
        config.data, holdout=config.holdout, split=config.split, sequence_length=config.sequence_length, progress=True,
        tokenizer=tokenizer,
    )  # fmt: skip
    span = scored_span(corpus.held_out, config.final_eval_bytes)
    lines = baselines(corpus.train, corpus.held_out, config.final_eval_bytes) if team.first else {}
    bytes_per_token = 1.0 if tokenizer is BYTES else span.num_bytes / span.num_targets
    if config.prompt is None:
        config = replace(config, prompt=fitting_prompt(corpus))
    return Run(config, folder, corpus, [], lines, deciding(config, corpus), bytes_per_token, teacher, team)


def fitting_prompt(corpus: Splits) -> str:
    """Choose the prompt of samples of a run on this text; "" is the beginning of a document.

    A text of which something is only context is made of chats: a user asks, and the assistant's turn begins.
    """
    if not corpus.train.targets[:CHUNK].all():
        has_turns = {TURN_START, TURN_END} <= corpus.train.tokenizer.special.keys()
        marks = (f"{TURN_START}%s\n", f"{TURN_END}\n") if has_turns else ("<|%s|>\n", "<|end|>\n")
        return f"{marks[0] % 'user'}Hello!{marks[1]}{marks[0] % 'assistant'}"
    return "def " if corpus.source.partition(":")[0] == STDLIB else ""


def begin(run: Run, checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> TrainState:
    """This rank's part of the first or resumed state; rank 0 prepares the folder for what follows."""
    config, folder, team = run.config, run.folder, run.team
    if checkpoint is not None and is_sharded(checkpoint):
        state = to_device(load_sharded(checkpoint, config.model, team.layout), run.device)
    else:
        state = team.own(to_device(_whole(run, checkpoint, tokenizer), run.device), config.model)
    if team.first:
        if checkpoint is None:
            save_tokenizer(tokenizer, folder)
        else:
            for record in unbroken_upto(folder, checkpoint.step):
                append_record(run.history, record)
            later = [path for kind in KINDS for step, path in steps_in(folder / kind) if step > checkpoint.step]
            remove_steps(later)  # damaged ones
        save_settings(config, folder / "config.yaml")
    return state


def _whole(run: Run, checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> TrainState:
    """Whole state on rank 0, which is broadcast; on the other ranks a state of the same shapes."""
    config, generator = run.config, torch.Generator().manual_seed(run.config.seed)
    if checkpoint is None and run.team.first:
        return with_router(first_state(config, tokenizer), config, [run.corpus.train])
    like = init_state(config.model, generator)
    return load_state(checkpoint, like) if checkpoint is not None and run.team.first else like


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Open the checkpoint that a run in the folder resumes from; None if there is none."""
    for kind in KINDS:
        clean(folder / kind)
    whole, sharded = (steps_in(folder / kind) for kind in KINDS)
    if sharded and sharded[-1][0] > (whole[-1][0] if whole else 0):
        return open_sharded(sharded[-1][1])
    return open_checkpoint(folder) if whole else None


def open_past(folder: str | Path) -> tuple[Run, TrainState]:
    """Open a run from its folder, without its records, and its first state.

    Raises:
        UserError: there is no run, or its data, tokenizer or first weights cannot be used any more.
    """
    home = Path(folder)
    if not (home / "config.yaml").is_file():
        raise no_run(folder)
    config = load_settings(str(home / "config.yaml"))
    checkpoint = open_checkpoint(home) if steps_in(home / "checkpoints") else None
    tokenizer = tokenizer_of(config, home, checkpoint)
    run = open_new(config, home, tokenizer)
    if checkpoint is not None:
        check_same(run.settings, checkpoint.settings, home)
    state = with_router(first_state(config, tokenizer), config, [run.corpus.train])
    return run._replace(legs=read_legs(home, config)), state
