"""Which papers a recipe's parts come from, for the list at the end of a card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from limbeck.objectives.catalogue import OBJECTIVES

TITLES = {
    "1412.6550": "Romero et al., FitNets",
    "1503.02531": "Hinton et al., Distilling the Knowledge in a Neural Network",
    "1606.07947": "Kim and Rush, Sequence-Level Knowledge Distillation",
    "1807.03748": "van den Oord et al., Contrastive Predictive Coding",
    "1905.00414": "Kornblith et al., Similarity of Neural Network Representations Revisited",
    "1910.01108": "Sanh et al., DistilBERT",
    "1910.10699": "Tian et al., Contrastive Representation Distillation",
    "2002.10957": "Wang et al., MiniLM",
    "2010.15327": "Nguyen et al., Do Wide and Deep Networks Learn the Same Things?",
    "2012.15828": "Wang et al., MiniLMv2",
    "2105.08919": "Kim et al., Comparing Kullback-Leibler Divergence and Mean Squared Error Loss",
    "2302.10866": "Poli et al., Hyena Hierarchy",
    "2306.08543": "Gu et al., MiniLLM",
    "2306.13649": "Agarwal et al., Generalized Knowledge Distillation (GKD)",
    "2307.15190": "Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    "2310.18780": "Massaroli et al., Laughing Hyena Distillery",
    "2401.17574": "Ralambomihanta et al., Scavenging Hyena",
    "2402.03898": "Ko et al., DistiLLM",
    "2402.12030": "Boizard et al., Universal Logit Distillation (ULD)",
    "2404.02657": "Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation",
    "2405.14159": "Super Tiny Language Models",
    "2407.14679": "Muralidharan et al., Minitron",
    "2408.10189": "Bick et al., MOHAWK",
    "2408.15237": "Wang et al., The Mamba in the Llama",
    "2502.16982": "Liu et al., Muon is Scalable for LLM Training",
    "2503.16870": "Random Sampling Knowledge Distillation",
    "2503.20083": "Minixhofer et al., Approximate Likelihood Matching (ALM)",
    "2505.03005": "Goldstein et al., RADLADS",
    "2505.04560": "Wang et al., ABKD",
    "2512.14954": "exact predictions across tokenizers",
}
_IDENTIFIER = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def papers_of(recipe: Mapping[str, Any], *, mixers: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Title and arXiv identifier of each paper a recipe rests on, oldest first. `mixers`: one word a layer, as built."""
    found: set[str] = set()
    student, teacher = _mapping(recipe.get("student")), _mapping(recipe.get("teacher"))
    hyena = "hyena" in set(mixers)
    if hyena:
        found |= {"2302.10866", "2401.17574"}
        if _mapping(student.get("hyena")).get("filter", "modal") == "modal":
            found.add("2310.18780")
    if hyena and "attention" in set(mixers):
        found.add("2408.15237")
    if student.get("shrink"):
        found.add("2407.14679")
    if str(student.get("size", "")).startswith(("bytepool", "stlm")):
        found.add("2405.14159")
    if teacher.get("closed"):
        found.add("1606.07947")
    if teacher.get("exact") is True:
        found.add("2512.14954")
    if teacher.get("targets") == "sampled":
        found.add("2503.16870")
    stages = recipe.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        found |= _of_stage(_mapping(stage))
    return [(TITLES.get(key, "source of an objective"), key) for key in sorted(found)]


def _of_stage(stage: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    if stage.get("kind") == "align":
        found |= {"2505.03005", "2408.10189"}
    if stage.get("kind") == "distil":
        found.add("1503.02531")
    if stage.get("optimizer") == "muon":
        found.add("2502.16982")
    objectives = stage.get("objectives")
    for words in objectives if isinstance(objectives, list) else []:
        name = words if isinstance(words, str) else _mapping(words).get("objective")
        if isinstance(name, str) and name in OBJECTIVES:
            found |= set(_IDENTIFIER.findall(OBJECTIVES[name].source))
    method = str(_mapping(stage.get("on_policy")).get("method", ""))
    found |= {"mixed": {"2306.13649"}, "minillm": {"2306.08543"}, "adaptive": {"2402.03898"}}.get(method, set())
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
