"""Rules: what changes the weights while a model reads. Hand-made ones, learned ones, and those that were shared.

rule = dynlm.rules.from_pretrained("general")           # a name, a file, a folder, or user/repo of the hub
rule = dynlm.rules.RMS(lr=2e-3)
rule.save_pretrained("my-rule")
"""

from dynlm.optim.base import Rule
from dynlm.optim.gated import Gated
from dynlm.optim.handmade import RMS, SGD, Adam, Static
from dynlm.optim.hub import load as from_pretrained

__all__ = ["RMS", "SGD", "Adam", "Gated", "Rule", "Static", "from_pretrained"]
