"""Fields of analysis.json, of which `training.study.analysis` makes the values."""

from training.fields import Field, Fields
from training.storage.results import MEASURES

TOP: Fields = {
    "name": Field("text", "Name of the study."),
    "question": Field("text", "Question of the study, from its file."),
    "margin": Field("nats per token", "Smallest difference that counts, set before the runs."),
    "falsifier": Field("text", "Result that would refute the hypothesis, written before the runs."),
    "baseline": Field("text", "Arm that the others are compared with."),
    "measure": Field("text", "Column of results.csv that is compared."),
    "confidence": Field("share", "Level of the intervals, unless one has its own `level`."),
    "tuned": Field("list of text", "Axes of which each arm takes its best value."),
    "tuned_on": Field(
        "list of seeds",
        "Seeds that chose those values and are not compared; empty if the compared runs chose.",
    ),
    "note": Field("text", "Warning that the compared runs chose the tuned values; empty otherwise."),
    "warnings": Field("list of text", "Best values at the end of a tuned axis, and tuned axes that change nothing."),
    "matched_within": Field("share", "Relative difference up to which `avg_k` or `flops_per_token` count as equal."),
    "answer": Field("text", "Answer in one sentence."),
}  # fmt: skip
MEANS = tuple(key for key in MEASURES if key not in ("nats_per_token", "status"))
ARM: Fields = {  # arms.ARM
    "mean": Field("nats per token", "Mean held-out loss of the arm's finished runs."),
    "low": Field("nats per token", "Lower end of the interval of the mean; null with fewer than two seeds."),
    "high": Field("nats per token", "Upper end of it."),
    "n": Field("runs", "Runs behind the mean."),
    "seeds": Field("seeds", "Seeds behind the mean."),
    **{key: MEASURES[key]._replace(text=f"Mean of the column `{key}` over the arm's runs.") for key in MEANS},
    "diverged": Field("runs", "Runs of the arm that diverged."),
    "tuned": Field("object", "Tuned setting and the value that was chosen for this arm."),
    "points": Field("points", "Combinations of tuned values that were tried; 1 where nothing is tuned."),
    "tuning": Field(
        "object",
        "Tuned setting and its curve, all others at their best: `values`, `mean` and `scores` (nats per token) at "
        "each, `diverged` runs, the `best` value, and the `edge` of the axis at which it lies.",
    ),
    "runs": Field("list of text", "Names of the runs that are compared."),
    "routing": Field("object", "Means of the runs' routing analysis; null where none was made."),
}
PAIR: Fields = {  # against_baseline.ARM
    "difference": Field("nats per token", "Mean of the paired differences, arm - baseline; negative is better."),
    "low": Field("nats per token", "Lower end of the interval of the difference."),
    "high": Field("nats per token", "Upper end of it."),
    "level": Field("share", "Level of that interval; with the verdict `equivalent` the one that decided it."),
    "n": Field("pairs", "Pairs of runs that were compared: seeds that both arms finished."),
    "orders": Field("orders", "Orders of the tasks behind each pair; 1 in a study of one text."),
    "same_orders_low": Field(
        "nats per token",
        "Lower end of the 95 % interval of the difference for the orders that were run.",
    ),
    "same_orders_high": Field("nats per token", "Upper end of it."),
    "p": Field("probability", "p of the two-sided paired t-test of no difference, not corrected."),
    "tost_p": Field("probability", "p of the equivalence test (TOST) within the margin, not corrected."),
    "beyond_p": Field("probability", "p of the test that the difference is within the margin, not corrected."),
    "identical": Field("true or false", "True if all pairs have equal scores to the last digit."),
    "tried": Field("comparisons", "Pairs of points from which tuning chose this one; each p is multiplied by it."),
    "p_holm": Field("probability", "`p`, corrected by Holm over all comparisons of the study."),
    "tost_p_holm": Field("probability", "`tost_p`, corrected by Holm."),
    "beyond_p_holm": Field("probability", "`beyond_p`, corrected by Holm."),
    "beyond_margin": Field("true or false", "True if the difference is shown to be larger than the margin."),
    "verdict": Field("text", "`better`, `worse`, `equivalent` or `undecided`."),
    "baseline": Field("text", "Label that the arm is compared with: the baseline at the same point of the axes."),
    "effective_speedup": Field(
        "object",
        "Steps that the baseline needs for the arm's loss over the arm's own: `estimate` with `low` and `high`, "
        "`at_least` what was measured, `reached` and `early` pairs of `n`; null without held-out curves.",
    ),
    "k_matched": Field(
        "true or false",
        "True if both arms' `avg_k` are equal within `matched_within`; null if unknown.",
    ),
    "flops_matched": Field("true or false", "The same of `flops_per_token`."),
}  # fmt: skip
STREAM: Fields = {  # continual.ARM.MEASURE, in studies with `tasks`; MEASURE is a field of Continual
    "mean": Field("nats per token", "Mean of the measure over the arm's runs."),
    "low": Field("nats per token", "Lower end of the interval of the mean."),
    "high": Field("nats per token", "Upper end of it."),
    "n": Field("runs", "Runs behind the mean."),
    "difference": Field("nats per token", "Mean of the paired differences, arm - baseline; null for the baseline."),
    "difference_low": Field("nats per token", "Lower end of the interval of the difference."),
    "difference_high": Field("nats per token", "Upper end of it."),
}
