"""Learning rates where the user gives none: the rule, and the rate of new heads.

What each method's rates are stands in its own module. Nothing here imports torch.
"""

from ftlevel.methods.rates.heads import HeadRate, choose_head_rate, set_head_rate
from ftlevel.methods.rates.rule import Rates, RunFacts

__all__ = ["HeadRate", "Rates", "RunFacts", "choose_head_rate", "set_head_rate"]
