"""A notebook that reads a finished study: question, verdicts, scores and curves; it writes nothing.

marimo run examples/notebooks/read_study.py -- --folder runs/routers
"""

import marimo

app = marimo.App(width="medium")


@app.cell
def _():
    import marimo as mo

    return (mo,)


@app.cell
def _(mo):
    folder = str(mo.cli_args().get("folder") or "runs/routers")
    return (folder,)


@app.cell
def _(folder):
    import json
    from pathlib import Path

    from training.storage.recorder import read_history
    from training.storage.regular_file import read_object
    from training.storage.results import read_results

    home = Path(folder)
    analysis = read_object(home / "analysis.json")
    results = read_results(home)
    histories = {path.name: read_history(path) for path in sorted((home / "runs").iterdir())}
    return analysis, histories, json, results


@app.cell
def _(analysis, json, mo, results):
    facts = {key: value for key, value in analysis.items() if not isinstance(value, dict | list)}
    summary = mo.vstack(
        [
            mo.md("# A finished study"),
            mo.plain_text(json.dumps(facts, indent=2)),
            mo.md("## Scores of all runs"),
            mo.ui.table([dict(row) for row in results], selection=None),
        ]
    )
    summary
    return (summary,)


@app.cell
def _(histories):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for run, records in histories.items():
        axes.plot([record["step"] for record in records], [record["main_loss"] for record in records], label=run)
    axes.set(xlabel="step", ylabel="main loss (nats per token)")
    axes.legend(fontsize="small")
    figure
    return axes, figure


if __name__ == "__main__":
    app.run()
