"""tiny_dpo with offline RPO (backward KL) in place of DPO.

Published (arXiv 2505.00949, section 6), without the distance that was used:
    Nano   offline RPO, two rounds, up to 400 steps of 512, learning rate 7e-7, KL weight (`beta`) 0.03: config nano8b_rpo
    Super  online RPO, two rounds of 500 steps of 64, learning rate 4e-7, KL weight 1e-5, reward scale (`eta`) 3.0
    Ultra  GRPO with a reward model, 8 samples a prompt, 30 steps of 288, learning rate 3e-7, KL weight 1e-3
Here the given rewards are 1 and 0, eta is Super's, and the rest is chosen for a tiny model.
"""

import dataclasses

from configs import tiny_dpo
from lnjax.schema import RunConfig


def config() -> RunConfig:
    tiny = tiny_dpo.config()
    assert tiny.preference
    preference = dataclasses.replace(tiny.preference, loss="rpo_backward_kl", eta=3.0)
    return dataclasses.replace(tiny, name="tiny_rpo", preference=preference)
