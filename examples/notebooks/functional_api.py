"""A notebook that drives the functional API: sizes and a rate by sliders, a state, steps, and where tokens went.

marimo edit examples/notebooks/functional_api.py
"""

import marimo

app = marimo.App(width="medium")


@app.cell
def _():
    import marimo as mo

    experts = mo.ui.slider(2, 16, value=8, label="experts")
    log_lr = mo.ui.slider(-4.0, -1.0, step=0.5, value=-2.0, label="log10 of the learning rate")
    mo.vstack([mo.md("# A state in, a state out"), experts, log_lr])
    return experts, log_lr, mo


@app.cell
def _(experts, log_lr):
    num_experts, lr = int(experts.value), 10 ** float(log_lr.value)
    return lr, num_experts


@app.cell
def _(lr, num_experts):
    import torch

    from tiny_onn_func import ModelConfig
    from training import Batch, HyperParams, hyper_step, init_state, per_token_surprise

    config = ModelConfig(257, 32, 2, 2, 1, 16, 16, num_experts, num_experts_per_tok=2)
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(4, 32, dtype=torch.int64))
    hyper = HyperParams(lr=lr)
    state, losses = init_state(config, torch.Generator().manual_seed(0)), []
    for _ in range(15):
        state, metrics = hyper_step(state, batch, hyper, config)
        losses.append(float(metrics.main_loss))
    surprise = per_token_surprise(state.params, batch, config, hyper)
    visits = surprise.isfinite().sum(dim=1)  # (layers, experts)
    return losses, surprise, visits


@app.cell
def _(losses, mo, visits):
    mo.vstack(
        [
            mo.md(f"Loss {losses[0]:.3f} before, {losses[-1]:.3f} after {len(losses)} steps; visits of each expert:"),
            mo.ui.table(
                [{"layer": i, **dict(enumerate(row))} for i, row in enumerate(visits.tolist())], selection=None
            ),
        ]
    )
    return


if __name__ == "__main__":
    app.run()
