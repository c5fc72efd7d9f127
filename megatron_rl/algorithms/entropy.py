"""First-order entropy mechanics of a softmax policy, exact per state.

With the logits z of one state as free parameters, entropy H(pi) = -sum_a pi_a log pi_a has dH/dz_a = -pi_a (log pi_a +
H). A policy-gradient step on action y with advantage A moves the logits by eta * A * (e_y - pi), so

    dH = -eta * A * [ pi_y (log pi_y + H) - (sum_a pi_a^2 log pi_a + H * sum_a pi_a^2) ].

Source: arXiv 2505.22617, Theorem 1 and its appendix, with the expectation over actions replaced by the sampled one.
"""

from torch import Tensor

from megatron_rl.types import Float, Float64, TokenStats


def entropy_spent(stats: TokenStats, advantages: Float[Tensor, "T"]) -> Float64[Tensor, "T"]:
    """Return -dH / eta of each token's own update, nats per unit of logit step: the larger, the more entropy it spends.

    Raises: ValueError when the statistics lack sum_p2.
    """
    if stats.sum_p2 is None or stats.sum_p2_logp is None:
        raise ValueError("the exact entropy change needs sum_p2; compute the statistics with with_sum_p2=True")
    logp, entropy = stats.logprobs.double(), stats.entropy.double()
    chosen = logp.exp() * (logp + entropy)
    expected = stats.sum_p2_logp.double() + entropy * stats.sum_p2.double()
    return advantages.double() * (chosen - expected)
