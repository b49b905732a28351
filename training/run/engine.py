"""One training run: its folder and lock, its first state, the loop, the summary at the end."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.distributed.team import ALONE, Team
from training.errors import UserError
from training.run.banner import banner, facts_of
from training.run.config import RunConfig
from training.run.context import Run
from training.run.device import place
from training.run.identity import check_same
from training.run.loop import run_steps
from training.run.process import disable_heap_trimming, use_threads
from training.run.schedule import bends_text, legs_of
from training.run.start import begin, check_folder, newest_checkpoint, open_new, tokenizer_of
from training.run.summary import finish
from training.storage.lock import locked
from training.storage.loggers import check_installed, logger_names
from training.storage.recorder import Recorder, no_recorder, open_recorder
from training.terminal import LOG


def train(config: RunConfig, *, resume: bool = False, team: Team = ALONE) -> dict[str, Any]:
    """Train as the configuration says, into its run folder; the summary that is also written there.

    Progress goes to the terminal's error stream. Ctrl-C saves a checkpoint and ends with KeyboardInterrupt. Of a team,
    process 0 alone writes, and has a summary; a team that torchrun has begun again goes on where there is a run.

    Raises:
        UserError: the data cannot be used, the folder holds a run and `resume` was not asked for (or the reverse), it
            is in use, it began with other settings, a logger's package is missing, or a number went wrong and
            `on_nonfinite` is `stop`.
    """
    assert config.out is not None, "the command line fills it in"
    disable_heap_trimming()
    folder = Path(config.out)
    resume = team.world.broadcast_object(resume or (team.restarts > 0 and (folder / "config.yaml").exists()))
    if not team.first:
        return _train(config, folder, resume, team)
    check_installed(logger_names(config.log) or ())
    check_folder(folder, resume)
    with locked(folder):
        check_folder(folder, resume)  # once more: another process may have come first
        try:
            return _train(config, folder, resume, team)
        except KeyboardInterrupt:
            if (folder / "config.yaml").exists():
                program = "tiny-onn" if team.world.size == 1 else "torchrun ... -m training"
                LOG.error("stopped; go on with: %s train --out %s --resume", program, folder)
            raise


def _train(config: RunConfig, folder: Path, resume: bool, team: Team) -> dict[str, Any]:
    config, placement = place(config, team.local_rank)
    use_threads(config.threads, config, placement.device)
    checkpoint = team.world.broadcast_object(newest_checkpoint(folder) if team.first else None)
    tokenizer = tokenizer_of(config, folder, checkpoint)
    run = team.one_by_one(lambda: open_new(config, folder, tokenizer, team))
    if team.world.broadcast_object(run.settings["text"]) != run.settings["text"]:
        raise UserError(f"data: expected the text of rank 0 on every rank, got another on rank {team.world.rank}")
    settings, step = (checkpoint.settings, checkpoint.step) if checkpoint is not None else (None, 0)
    check_same(run.settings, settings or {}, folder)
    if config.steps < step:
        raise UserError(
            f"steps: expected {step} or more, the steps that {folder} has made, got {config.steps}; raise it"
        )
    run = run._replace(legs=legs_of(config, settings, step), device=placement.device)
    if team.first and len(run.legs) > 1:
        LOG.info("note: %s; the score will not be that of %d steps", bends_text(run.legs), config.steps)
    state = begin(run, checkpoint, tokenizer)
    run = run._replace(first_step=int(state.step))
    if team.first:
        LOG.info("%s", banner(facts_of(run, placement)))
        if run.first_step == config.steps:
            LOG.info("note: the run has made all of its %d steps; go on with --resume and more --steps", config.steps)
    resume_step = int(state.step) if resume else None
    with _recorder(run, resume_step) as recorder:
        state, seconds, stopped = run_steps(run, state, recorder)
    state = team.whole(state, config.model)
    if not team.first:
        return {}
    if stopped is not None:
        LOG.info(
            "note: stopped after step %d of %d: %s; go on with --resume and another --stop-when, 0 for none",
            stopped.step,
            config.steps,
            stopped.reason,
        )
    return finish(run, state, seconds, stopped)


def _recorder(run: Run, resume_step: int | None) -> Recorder:
    """The recorder of rank 0, with the loggers of the settings; the other ranks record nothing."""
    if not run.team.first:
        return no_recorder()
    names = logger_names(run.config.log) or ()
    return open_recorder(run.folder, resume_step=resume_step, loggers=names, settings=asdict(run.config))
