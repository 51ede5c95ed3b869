"""Credit: which tokens earned the reward. A source maps a batch to one number per completion token."""

from tokengrain.credit.base import CreditSource, checked_credit, model_fingerprint
from tokengrain.credit.contrastive import ContrastivePrompting, contrastive_token_rewards
from tokengrain.credit.guide import GuideLogRatio, guide_token_rewards
from tokengrain.credit.registry import CREDIT, CreditKind, check_credit, make_credit
from tokengrain.credit.reward_model import RewardModelCredit
from tokengrain.credit.simple import ColumnCredit, FunctionCredit, RandomCredit, Transformed
from tokengrain.credit.templates import TEMPLATES, ContrastiveTemplates, make_templates

__all__ = [
    "CREDIT",
    "TEMPLATES",
    "ColumnCredit",
    "ContrastivePrompting",
    "ContrastiveTemplates",
    "CreditKind",
    "CreditSource",
    "FunctionCredit",
    "GuideLogRatio",
    "RandomCredit",
    "RewardModelCredit",
    "Transformed",
    "check_credit",
    "checked_credit",
    "contrastive_token_rewards",
    "guide_token_rewards",
    "make_credit",
    "make_templates",
    "model_fingerprint",
]
