"""The suite `tiny`: tasks on which models below 150M parameters differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from limbeck.core.errors import EvaluationError, unknown_name
from limbeck.evaluate.probes import probe_description, probe_names

SUITES = ("tiny",)

_BLIMP = """
adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive animate_subject_trans causative
complex_NP_island coordinate_structure_constraint_complex_left_branch coordinate_structure_constraint_object_extraction
determiner_noun_agreement_1 determiner_noun_agreement_2 determiner_noun_agreement_irregular_1
determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2 determiner_noun_agreement_with_adj_irregular_1
determiner_noun_agreement_with_adj_irregular_2 determiner_noun_agreement_with_adjective_1
distractor_agreement_relational_noun distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2
existential_there_object_raising existential_there_quantifiers_1 existential_there_quantifiers_2
existential_there_subject_raising expletive_it_object_raising inchoative intransitive
irregular_past_participle_adjectives irregular_past_participle_verbs irregular_plural_subject_verb_agreement_1
irregular_plural_subject_verb_agreement_2 left_branch_island_echo_question left_branch_island_simple_question
matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope passive_1
passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 principle_A_domain_2
principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1
regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present sentential_negation_npi_scope
sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2 tough_vs_raising_1 tough_vs_raising_2
transitive wh_island wh_questions_object_gap wh_questions_subject_gap wh_questions_subject_gap_long_distance
wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap wh_vs_that_with_gap_long_distance
"""


@dataclass(frozen=True)
class SuiteTask:
    """One task of the suite.

    name: lm-eval's name. group: whose macro average it enters; its own name when it stands alone. metrics: those that are
    shown, the headline first. chance: accuracy of guessing where its items are not known. stock: lm-eval's own description
    below its tasks folder; None for a probe of ours.
    """

    name: str
    group: str
    metrics: tuple[str, ...]
    chance: float | None
    stock: str | None


def suite_tasks(suite: str = "tiny") -> dict[str, SuiteTask]:
    """Every task of a suite, by name, in the order in which it is run: cheap ones first.

    Raises: EvaluationError when there is no such suite.
    """
    if suite not in SUITES:
        raise EvaluationError(f"--suite: {unknown_name('suite', suite, SUITES)}")
    probes = [SuiteTask(name, name.split("_")[0], tuple(_probe_metrics(name)), None, None) for name in probe_names()]
    blimp = [
        SuiteTask(f"blimp_{name}", "blimp", ("acc",), 0.5, f"blimp/{name}.yaml") for name in _BLIMP.split()
    ]  # fmt: skip
    return {task.name: task for task in (*_SINGLE, *probes, *blimp)}


def _probe_metrics(name: str) -> list[str]:
    return [metric["metric"] for metric in probe_description(name)["metric_list"]]


_SINGLE = (
    SuiteTask("sciq", "sciq", ("acc", "acc_norm"), 0.25, "sciq/sciq.yaml"),
    SuiteTask("arc_easy", "arc_easy", ("acc", "acc_norm"), 0.25, "arc/arc_easy.yaml"),
    SuiteTask("piqa", "piqa", ("acc", "acc_norm"), 0.5, "piqa/piqa.yaml"),
    SuiteTask("winogrande", "winogrande", ("acc",), 0.5, "winogrande/default.yaml"),
    SuiteTask("lambada_openai", "lambada_openai", ("acc", "perplexity"), 0.0, "lambada/lambada_openai.yaml"),
    SuiteTask("wikitext", "wikitext", ("bits_per_byte",), None, "wikitext/wikitext.yaml"),
    SuiteTask("boolq", "boolq", ("acc",), 0.5, "super_glue/boolq/default.yaml"),
    SuiteTask("hellaswag", "hellaswag", ("acc_norm", "acc"), 0.25, "hellaswag/hellaswag.yaml"),
)


# Tasks that papers report, at chance below 150 million parameters: run when asked for by name.
_BEYOND = (
    SuiteTask("arc_challenge", "arc_challenge", ("acc", "acc_norm"), 0.25, "arc/arc_challenge.yaml"),
    SuiteTask("logiqa", "logiqa", ("acc", "acc_norm"), 0.25, "logiqa/logiqa.yaml"),
    SuiteTask("wsc", "wsc", ("acc",), 0.5, "super_glue/wsc/default.yaml"),
)


def choose_tasks(suite: str, names: Iterable[str]) -> dict[str, SuiteTask]:
    """The tasks of the given names, which may be groups; all of the suite when no name is given.

    A few tasks beyond the suite can be had by name.

    Raises: EvaluationError when a name is unknown.
    """
    known = suite_tasks(suite)
    names = list(names)
    if names:
        known |= {task.name: task for task in _BEYOND}
    groups = {task.group for task in known.values()}
    for name in names:
        if name not in known and name not in groups:
            raise EvaluationError(f"--task: {unknown_name('task', name, {*groups, *_close(name, known)})}")
    return {name: task for name, task in known.items() if not names or {name, task.group} & set(names)}


def _close(name: str, known: Mapping[str, SuiteTask]) -> list[str]:
    """Paradigms are only listed to somebody who seems to mean one."""
    return [task for task in known if not task.startswith("blimp_") or name.removeprefix("blimp_")[:6] in task]
