"""The study engine: hundreds of runs, vmapped where they share their static settings, looped where they do not."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from training.data.hf_tokenizer import open_tokenizer
from training.data.tokenizer import Tokenizer, check_vocab, save_tokenizer
from training.errors import UserError
from training.run.device import choose_device, choose_precision
from training.run.initial_state import first_state
from training.run.process import disable_heap_trimming, use_threads
from training.storage.atomic import make_folder
from training.storage.checkpoint_files import version
from training.storage.lock import locked
from training.storage.results import UNFINISHED, Row, read_results, write_results
from training.study.analysis import analyse
from training.study.comparison.table import study_table
from training.study.comparison.tuning import choose, points_of
from training.study.config import StudyConfig, StudyRun, baselines_of, expand, orders_of, study_values
from training.study.group_state import teacher_of
from training.study.launch import Launch, Launcher, local_launcher
from training.study.plan import COMPARED, Group, load_plan, plan_groups, planned_at_once, save_plan
from training.study.report import write_report
from training.study.summary import empty_row
from training.study.tasks import check_texts, corpora_of, fingerprints, save_texts
from training.terminal import LOG, progress


class StudyResults(NamedTuple):
    """Results of a study; all of them are in its folder, too."""

    folder: Path
    rows: list[Row]  # of results.csv
    analysis: dict[str, Any]  # of analysis.json
    table: str  # for the terminal


def run_study(
    study: StudyConfig,
    out: str | Path,
    *,
    resume: bool = False,
    runs_at_once: int | None = None,
    launcher: Launcher = local_launcher,
) -> StudyResults:
    """Make every run of a study, score it on the held-out text, and compare the arms.

    Progress goes to the terminal's error stream. Ctrl-C saves a checkpoint and ends with KeyboardInterrupt.

    Args:
        out: the study's folder.
        resume: go on with the study in that folder: finished runs stay, the others go on from their checkpoints.
        runs_at_once: most runs of one vmapped program; None takes what memory allows.
        launcher: where the groups are trained; `training.study.ray.launcher.ray_launcher` hands them to a cluster.

    Raises:
        UserError: the data cannot be used, or the folder holds a study and `resume` was not asked for (or the reverse).
    """
    disable_heap_trimming()
    use_threads(study.base.threads, study.base, choose_device(study.base.device)[0])
    _check_folder(Path(out), resume)
    with locked(out):
        _check_folder(Path(out), resume)  # once more: another process may have come first
        study = _with_precision(study, Path(out), resume)
        try:
            with launcher(Path(out)) as launch:
                return _run_study(study, Path(out), resume, runs_at_once, launch)
        except KeyboardInterrupt:
            if (Path(out) / "study.yaml").exists():
                LOG.error("stopped; go on with: tiny-onn study --resume --out %s", out)
            raise


def _run_study(
    study: StudyConfig, folder: Path, resume: bool, runs_at_once: int | None, launch: Launch
) -> StudyResults:
    runs = expand(study)
    groups = _begin(study, runs, folder, resume, runs_at_once)
    LOG.info("%s", banner(study, runs, len(groups), folder))
    recorded = {row["run"]: row for row in read_results(folder)}
    rows = {run.id: empty_row(run) for run in runs} | recorded
    rows = _train(study, groups, rows, folder, launch)
    if study.tune_seeds:
        chosen = choose(points_of(study, rows.values()))
        compared = expand(study, chosen)[len(runs) :]
        more = _begin_compared(study, compared, groups, folder)
        LOG.info("%s", _tuned_text(chosen, len(compared)))
        rows |= {run.id: recorded.get(run.id) or empty_row(run) for run in compared}
        rows = _train(study, more, rows, folder, launch)
    analysis = analyse(folder)
    write_report(folder)
    return StudyResults(folder, [*rows.values()], analysis, study_table(analysis))


def _train(
    study: StudyConfig, groups: Sequence[Group], rows: Mapping[str, Row], folder: Path, launch: Launch
) -> dict[str, Row]:
    """Make the runs of the groups that are not finished; returns all rows, which results.csv has after each group."""
    rows = dict(rows)
    write_results([*rows.values()], folder)
    left = [group for group in groups if any(rows[run.id]["status"] == UNFINISHED for run in group.runs)]
    for group in groups:
        if group not in left:
            _forget(folder, group)
    check_texts(study, left, folder)
    runs = [run for group in groups for run in group.runs]
    done = [run for run in runs if rows[run.id]["status"] != UNFINISHED]
    total, initial = (sum(run.config.steps for run in subset) for subset in (runs, done))
    with (
        progress(total=total, initial=initial, unit="step", mininterval=0.5, smoothing=0.05) as bar,
        closing(launch(study, left, folder, bar)) as finished,
    ):
        for group, group_rows in finished:
            rows |= {row["run"]: row for row in group_rows}
            write_results([*rows.values()], folder)
            _forget(folder, group)
    return rows


def _tuned_text(chosen: Mapping[str, Mapping[str, Any]], runs: int) -> str:
    """The values that the tuning chose, before the runs that are compared."""
    arms = {
        label: ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())
        for label, values in chosen.items()
    }
    return f"tuned: {'; '.join(f'{label}: {text}' for label, text in arms.items() if text)}; {runs} runs are compared"


def banner(study: StudyConfig, runs: Sequence[StudyRun], groups: int, folder: Path) -> str:
    """Study, arms, runs, data, device and folder as aligned lines, before the first step."""
    arms = [*dict.fromkeys(run.arm for run in runs)]
    data = ", ".join(f"{name} ({text})" for name, text in study.tasks.items()) or study.base.data
    compared = len(baselines_of(study)) * len(study.seeds) * max(1, len(orders_of(study)))
    tuning = f" to tune, then {compared} that are compared" if study.tune_seeds else ""
    plural = "s" if groups != 1 else ""
    lines = {
        "study": f"{study.name}{': ' if study.question else ''}{study.question}",
        "arms": f"{len(arms)}: {', '.join(arms)}",
        "runs": f"{len(runs)} of {study.base.steps:,} steps, in {groups} vmapped program{plural}{tuning}",
        "data": data,
        "device": f"{choose_device(study.base.device)[0]}, {study.base.precision}",
        "folder": str(folder),
    }
    return "\n".join((f"tiny-onn {version()}", *(f"{name:<10}  {text}" for name, text in lines.items())))


def _with_precision(study: StudyConfig, folder: Path, resume: bool) -> StudyConfig:
    """The study with its precision spelled out: that of this machine's device, or what a resumed one began with."""
    from training.study.file import load_study  # pydantic, which the package does without

    if study.base.precision != "auto":
        return study
    if resume:
        precision = load_study(folder / "study.yaml").base.precision
    else:
        precision, _ = choose_precision("auto", choose_device(study.base.device)[0])
    return replace(study, base=replace(study.base, precision=precision))


def _begin(
    study: StudyConfig, runs: Sequence[StudyRun], folder: Path, resume: bool, runs_at_once: int | None
) -> list[Group]:
    """The folder with the study's description in it, and the groups; a resumed study must be the same one."""
    from training.study.file import load_study, save_study  # pydantic, which the package does without

    described, home = folder / "study.yaml", folder / "checkpoints"
    if resume:
        if _settled(load_study(described)) != _settled(study):
            raise UserError(f"--resume: expected the study of {described}, got another one; name a new --out for it")
        if runs_at_once is not None:
            raise UserError("--runs-at-once: expected none with --resume, which keeps the groups; leave it away")
        for run in runs:
            if not (folder / "runs" / run.id).exists():  # removed by hand
                _make_run_folder(run, folder, open_tokenizer(run.config.tokenizer))
        return load_plan([*runs], home)
    groups = plan_groups([*runs], runs_at_once)
    tokenizers = {run.config.tokenizer: open_tokenizer(run.config.tokenizer) for run in runs}
    for group in groups:
        config = group.runs[0].config
        check_vocab(tokenizers[config.tokenizer], config.model.vocab_size)
        if config.init is not None:
            first_state(config, tokenizers[config.tokenizer])  # what is bad is refused before anything is written
        teacher_of(config, tokenizers[config.tokenizer])
    texts = {group.name: _fingerprints(study, group, tokenizers[group.runs[0].config.tokenizer]) for group in groups}
    for run in runs:
        _make_run_folder(run, folder, tokenizers[run.config.tokenizer])
    save_plan(groups, home, runs_at_once)
    save_texts(texts, folder)
    save_study(study, described)
    return groups


def _begin_compared(study: StudyConfig, runs: Sequence[StudyRun], tuning: Sequence[Group], folder: Path) -> list[Group]:
    """Folders and groups of the runs at the chosen values, on the texts and with the tokenizer of the tuning."""
    home = folder / "checkpoints"
    check_texts(study, tuning, folder)
    first = tuning[0].runs[0]
    tokenizer = open_tokenizer("bytes" if first.config.tokenizer == "bytes" else folder / "runs" / first.id)
    for run in runs:
        if not (folder / "runs" / run.id).exists():
            _make_run_folder(run, folder, tokenizer)
    if (home / COMPARED).exists():
        return load_plan([*runs], home, COMPARED)
    groups = plan_groups([*runs], planned_at_once(home), first=len(tuning))
    save_texts({group.name: _fingerprints(study, group, tokenizer) for group in groups}, folder)
    save_plan(groups, home, name=COMPARED)
    return groups


def _fingerprints(study: StudyConfig, group: Group, tokenizer: Tokenizer) -> dict[str, str]:
    return fingerprints(corpora_of(study, group.runs[0].config, tokenizer))


def _make_run_folder(run: StudyRun, folder: Path, tokenizer: Tokenizer) -> None:
    from training.run.settings import save_settings  # pydantic

    home = folder / "runs" / run.id
    make_folder(home)
    save_tokenizer(tokenizer, home)
    save_settings(run.config, home / "config.yaml")


def _forget(folder: Path, group: Group) -> None:
    """Remove the files that a group needed only for resuming."""
    rmtree(folder / "checkpoints" / group.name, ignore_errors=True)


def _check_folder(folder: Path, resume: bool) -> None:
    """Refuse a fresh start in a folder with a study, and a resume in one without."""
    begun = (folder / "study.yaml").exists()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: expected a folder or a new name, got the file {folder}; name another one")
    if not resume and begun:
        raise UserError(
            f"--out: expected a new folder, got {folder}, which holds a study; add --resume, or name another"
        )
    if (folder / "config.yaml").exists():
        raise UserError(f"--out: expected a folder for a study, got {folder}, which holds a run; name another one")
    if resume and not begun:
        raise UserError(f"--resume: expected a study in {folder}, found none; leave --resume away")


def _settled(study: StudyConfig) -> dict[str, Any]:
    """Settings that may not change when a study is resumed: all but its short version and the device."""
    study = replace(study, base=replace(study.base, device="auto"))
    return {key: value for key, value in study_values(study).items() if key != "quick"}
