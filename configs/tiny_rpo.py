"""tiny_dpo with offline RPO (backward KL, the form that NeMo-Aligner's recipes name first) in place of DPO.

Published for Nano (arXiv 2505.00949, section 6): two rounds of offline RPO on the policy's own answers, up to 400 steps of
512 pairs each, learning rate 7e-7, KL weight 0.03 (here `beta`). Which distance was used and the reward scale are not
published. Here the given rewards are 1 and 0, and eta and the learning rate are chosen for a tiny model.
"""

import dataclasses

from configs import tiny_dpo
from lnjax.schema import RunConfig


def config() -> RunConfig:
    tiny = tiny_dpo.config()
    assert tiny.preference
    return dataclasses.replace(
        tiny,
        name="tiny_rpo",
        preference=dataclasses.replace(tiny.preference, loss="rpo_backward_kl", eta=3.0),
    )
