"""The methods: each is a credit source with an objective, published somewhere, with a recipe that runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: its name in recipes (`method:`) and on the command line.
        title: what it is called in tables and reports.
        paper: where it was published, in short.
        paper_title: the paper's title.
        arxiv: arXiv id.
        venue: conference and year.
        credit: what says which tokens earned the reward, in words.
        objective: name of the objective, a key of `tokengrain.objectives.OBJECTIVES`.
        trains: what is trained, and on what.
        recipe: path of the recipe, from the project's root.
        page: path of the documentation page, from the project's root.
    """

    name: str
    title: str
    paper: str
    paper_title: str
    arxiv: str
    venue: str
    credit: str
    objective: str
    trains: str
    recipe: str
    page: str


def _method(
    name: str,
    title: str,
    paper_title: str,
    arxiv: str,
    venue: str,
    credit: str,
    trains: str,
    page: str,
    objective: str | None = None,
) -> Method:
    return Method(
        name=name,
        title=title,
        paper=f"arXiv {arxiv}, {venue}",
        paper_title=paper_title,
        arxiv=arxiv,
        venue=venue,
        credit=credit,
        objective=name if objective is None else objective,
        trains=trains,
        recipe=f"recipes/{name}.yaml",
        page=f"docs/methods/{page}.md",
    )


_POLICY = "policy, offline pairs"
_TDPO = ("Token-level Direct Preference Optimization", "2404.11999", "ICML 2024")
_TREG = ("T-REG: Preference Optimization with Token-Level Reward Regularization", "2412.02685", "ACL 2025")
_CONTRAST = "contrastive prompting of the model itself"
_ALIGNDISTIL = (
    "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
    "2503.02832",
    "ACL 2025",
)
_CONTRAST_MODELS = "a DPO model against a reverse DPO model, whole vocabulary"
_QRM = ("Discriminative Policy Optimization for Token-Level Reward Models", "2505.23363", "ICML 2025")
_ONLINE = "policy, online"

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        _method(
            "dpo",
            "DPO",
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "2305.18290",
            "NeurIPS 2023",
            "none (every token alike)",
            _POLICY,
            "dpo",
        ),
        _method(
            "simpo",
            "SimPO",
            "SimPO: Simple Preference Optimization with a Reference-Free Reward",
            "2405.14734",
            "NeurIPS 2024",
            "none (every token alike)",
            _POLICY,
            "simpo",
        ),
        _method("tdpo1", "TDPO1", *_TDPO, "forward KL per token, whole vocabulary", _POLICY, "tdpo"),
        _method("tdpo2", "TDPO2", *_TDPO, "forward KL per token, whole vocabulary", _POLICY, "tdpo"),
        _method(
            "tgdpo",
            "TGDPO",
            "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
            "2506.14574",
            "ICML 2025",
            "log-ratio of a DPO- or SimPO-trained guide",
            "guide, then policy, offline pairs",
            "tgdpo",
        ),
        _method("treg", "T-REG (DPO)", *_TREG, _CONTRAST, _POLICY, "treg"),
        _method("treg_simpo", "T-REG (SimPO)", *_TREG, _CONTRAST, _POLICY, "treg"),
        _method(
            "rrpo",
            "RRPO",
            "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization",
            "2504.12083",
            "NeurIPS 2025",
            "spans in which chosen and rejected differ",
            _POLICY,
            "rrpo",
        ),
        _method(
            "sepo",
            "SePO",
            "Selective Preference Optimization via Token-Level Reward Function Estimation",
            "2408.13518",
            "EMNLP 2025",
            "log-ratio of a DPO-trained oracle; its best and worst tokens are selected",
            "oracle, then policy, offline pairs",
            "sepo",
        ),
        _method(
            "aligndistil",
            "AlignDistil",
            *_ALIGNDISTIL,
            _CONTRAST_MODELS,
            "two teachers, then policy, offline pairs",
            "aligndistil",
        ),
        _method(
            "qrm",
            "Q-RM",
            *_QRM,
            "none while training; the reward model then is a credit source",
            "token-level reward model, offline pairs",
            "qrm",
        ),
        _method(
            "ppo",
            "PPO",
            "Proximal Policy Optimization Algorithms",
            "1707.06347",
            "2017",
            "advantage estimation with a critic",
            "policy and critic, online",
            "rto",
        ),
        _method(
            "rto",
            "RTO",
            "DPO Meets PPO: Reinforced Token Optimization for RLHF",
            "2404.18922",
            "ICML 2025",
            "log-ratio of a DPO-trained guide, through a critic",
            "guide on pairs, then policy and critic, online",
            "rto",
            "ppo",
        ),
        _method(
            "qrm_reinforce",
            "Q-RM (REINFORCE)",
            *_QRM,
            "scores of a token-level reward model",
            "reward model on pairs, then policy, online",
            "qrm",
            "reinforce",
        ),
        _method(
            "aligndistil_online",
            "AlignDistil (on-policy)",
            *_ALIGNDISTIL,
            _CONTRAST_MODELS,
            "two teachers on pairs, then policy, online",
            "aligndistil",
            "aligndistil",
        ),
        _method(
            "grpo",
            "GRPO",
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            "2402.03300",
            "2024",
            "the group's mean (every token of a completion alike)",
            _ONLINE,
            "grpo",
        ),
        _method(
            "drgrpo",
            "Dr. GRPO",
            "Understanding R1-Zero-Like Training: A Critical Perspective",
            "2503.20783",
            "COLM 2025",
            "the group's mean (every token of a completion alike)",
            _ONLINE,
            "grpo",
            "grpo",
        ),
        _method(
            "dapo",
            "DAPO",
            "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
            "2503.14476",
            "2025",
            "the group's mean, of groups that differ; length penalty",
            _ONLINE,
            "dapo",
            "grpo",
        ),
        _method(
            "gspo",
            "GSPO",
            "Group Sequence Policy Optimization",
            "2507.18071",
            "2025",
            "the group's mean (every token of a completion alike)",
            _ONLINE,
            "gspo",
        ),
        _method(
            "dcpo",
            "DCPO",
            "DCPO: Dynamic Clipping Policy Optimization",
            "2509.02333",
            "2025",
            "all rewards that the prompt has had so far",
            _ONLINE,
            "dcpo",
        ),
        _method(
            "thr",
            "THR",
            "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning",
            "2510.03669",
            "ICLR 2026",
            "influence of a token on the group's correct completions",
            _ONLINE,
            "thr",
            "grpo",
        ),
        _method(
            "aepo",
            "AEPO (ARES)",
            "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping",
            "2510.08457",
            "ICLR 2026",
            "uncertain tokens, by the prompt's difficulty",
            _ONLINE,
            "aepo",
            "grpo",
        ),
        _method(
            "dro",
            "DRO",
            "Direct Reasoning Optimization: LLMs Can Reward And Refine Their Own Reasoning for Open-Ended Tasks",
            "2506.13351",
            "2025",
            "likelihood of the reference's tokens that depend on the reasoning",
            _ONLINE,
            "dro",
            "grpo",
        ),
    )
}
