"""The figures of the report, in order, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.report.benchmarks import benchmarks
from megatron_rl.report.figures import FIRST_ORDER, LAW, LAW_RESIDUALS, PHASE_TIMES, PREDICTED, CustomPlot, LinePlot
from megatron_rl.report.runs import LoggedRun
from megatron_rl.report.spending import LEDGER

Section = tuple[str, list[LinePlot | CustomPlot]]

ENTROPY: list[LinePlot | CustomPlot] = [
    LinePlot(
        "Policy entropy",
        "Mean entropy over response tokens: when it falls to 0 the policy has stopped exploring and its reward stops "
        "growing.",
        (("entropy/mean", "mean"),),
        "nats",
    ),
    LinePlot(
        "Spread of the entropy over tokens",
        "The 10th and 90th percentiles: where most tokens are near-certain from the start, the collapse happens in "
        "the upper tail.",
        (("entropy/p90", "90th percentile"), ("entropy/p10", "10th percentile")),
        "nats",
    ),
    PREDICTED,
    FIRST_ORDER,
    LAW,
    LAW_RESIDUALS,
    LinePlot(
        "Predicted ceiling",
        "The law's reward at entropy 0, fitted to the steps so far, with its 95% interval: a plateau above it says "
        "that the law no longer holds.",
        (("law/ceiling", "ceiling"), ("law/ceiling_low", "lower end"), ("law/ceiling_high", "upper end")),
        "reward",
    ),
    LinePlot(
        "Surprise of the law",
        "Distance from the law of the steps before, in half-widths of its 95% band: beyond ±1 is outside, and three "
        "steps in a row on one side raise the alarm.",
        (("law/surprise", "surprise"),),
        "half-widths",
    ),
]
PERFORMANCE: list[LinePlot | CustomPlot] = [
    LinePlot(
        "Training accuracy",
        "Fraction of sampled responses that the verifier accepts: what the entropy is being spent on.",
        (("reward/accuracy", "accuracy"),),
        "fraction",
    ),
    LinePlot(
        "Evaluation accuracy",
        "On held-out problems: tells learning from memorising the training problems.",
        (("eval/accuracy", "accuracy"),),
        "fraction",
        sparse=True,
    ),
    LinePlot(
        "Mean reward",
        "What the advantage estimator sees, penalties included; it parts from accuracy where shaping is at work.",
        (("reward/mean", "reward"),),
        "reward",
    ),
    LinePlot(
        "Response length",
        "Sampled tokens per response: collapsing policies often shorten their answers, exploring ones keep reasoning.",
        (("response/length_mean", "length"),),
        "tokens",
    ),
]
COVARIANCE: list[LinePlot | CustomPlot] = [
    LinePlot(
        "Covariance, mean",
        "Mean of (log-probability, advantage) covariance: while it is positive, policy gradient lowers the entropy "
        "(Theorem 2).",
        (("cov/mean", "batch"), ("cov/vocab_mean", "exact over the vocabulary")),
        "nats × advantage",
    ),
    LinePlot(
        "Covariance, standard deviation",
        "Its spread over tokens: a spread far above the mean says that few tokens carry the covariance.",
        (("cov/std", "std"),),
        "nats × advantage",
    ),
    LinePlot(
        "Covariance of the top tokens",
        "Means over the tokens of largest covariance: the outliers that Clip-Cov and KL-Cov restrain.",
        (("cov/top_0.02pct_mean", "top 0.02%"), ("cov/top_0.2pct_mean", "top 0.2%"), ("cov/top_2pct_mean", "top 2%")),
        "nats × advantage",
        log=True,
    ),
    LinePlot(
        "Selected fraction",
        "Share of the response tokens that the method restrains; 0 or far from the configured fraction means that it "
        "is not at work.",
        (("select/fraction", "fraction"),),
        "fraction",
    ),
    LinePlot(
        "Selected tokens",
        "Their number: with few tokens in a mini-batch the quota is a handful, and its effect is noisy.",
        (("select/count", "count"),),
        "tokens",
    ),
    LinePlot(
        "Log-probability of the selected tokens",
        "The mechanism predicts that already likely tokens with high advantage are selected: values near 0.",
        (("select/logprob_mean", "logprob"),),
        "nats",
    ),
    LinePlot(
        "Entropy at the selected tokens",
        "Entropy of the states in which they were sampled: falling further than the policy's own means restraint "
        "comes too late.",
        (("select/entropy_mean", "entropy"),),
        "nats",
    ),
]
UPDATES: list[LinePlot | CustomPlot] = [
    LinePlot(
        "Gradient norm",
        "Before clipping: spikes precede instabilities that are easily mistaken for entropy effects.",
        (("optimizer/grad_norm", "norm"),),
        "norm",
    ),
    LinePlot(
        "Learning rate",
        "The step size scales every entropy change, so compare runs only where it agrees.",
        (("optimizer/lr", "lr"),),
        "learning rate",
    ),
    LinePlot(
        "Trainer against rollout log-probabilities",
        "Absolute difference for the same tokens and weights: should stay at rounding error, or the ratios and the "
        "covariance are biased.",
        (("mismatch/abs_mean", "mean"), ("mismatch/abs_max", "maximum")),
        "nats",
        log=True,
    ),
    LinePlot(
        "Trainer against rollout, KL",
        "The same mismatch as a divergence between the sampling and the trained distribution.",
        (("mismatch/kl", "KL"),),
        "nats",
    ),
    LinePlot(
        "Staleness",
        "Age of the weights that sampled the step's tokens: above 0 the mismatch is also a distance between policies.",
        (("staleness/mean", "mean"), ("staleness/max", "largest")),
        "steps",
    ),
]
SYSTEM: list[LinePlot | CustomPlot] = [
    PHASE_TIMES,
    LinePlot(
        "Throughput",
        "Tokens processed per second of wall time, everything included: what the method costs.",
        (("throughput/tokens_per_second", "tokens/s"),),
        "tokens/s",
    ),
    LinePlot(
        "Time per step",
        "Wall time of the whole step; longer responses and evaluations show here.",
        (("time/total", "total"),),
        "seconds",
    ),
]


def sections(runs: Sequence[LoggedRun]) -> list[Section]:
    """Return the report's sections; the loss's own metrics (`loss/*`) depend on what the runs logged."""
    return [
        ("Entropy", ENTROPY),
        ("Performance", [*PERFORMANCE, *benchmarks(runs)]),
        ("Ledger", list(LEDGER)),
        ("Covariance and selected tokens", COVARIANCE),
        ("Updates", [*_loss_figures(runs), *UPDATES]),
        ("Time", SYSTEM),
    ]


def _loss_figures(runs: Sequence[LoggedRun]) -> list[LinePlot | CustomPlot]:
    names = sorted({name for run in runs for name in run.metrics() if name.startswith("loss/")})
    clips = [name for name in names if "clip" in name] or ["loss/clip_fraction"]
    figures: list[LinePlot | CustomPlot] = [
        LinePlot(
            "Clip fractions",
            "Share of tokens whose ratio left the clip range: clipping that cuts mostly likely tokens' gains slows "
            "the collapse, "
            "clipping that cuts exploration speeds it up.",
            tuple((name, name.removeprefix("loss/").replace("_", " ")) for name in clips),
            "fraction",
        )
    ]
    for name in names:
        if name not in clips:
            title = name.removeprefix("loss/").replace("_", " ")
            why = "A term or statistic that the loss reports, averaged over the step's response tokens."
            figures.append(LinePlot(f"Loss: {title}", why, ((name, title),), name))
    return figures
