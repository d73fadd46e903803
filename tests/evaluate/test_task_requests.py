"""What a model is asked from our files of a task, against lm-eval's own description on the same rows."""

import pytest
from ruamel.yaml import YAML
from tests.evaluate.test_task_files import HUB_ROWS, write_rows

from limbeck.evaluate.suite import choose_tasks
from limbeck.evaluate.task_folder import prepare_tasks, stock_folder

# Texts that lm-eval's descriptions change, or might: WikiHow's brackets, double spaces, capitals, blanks at the ends.
_CHANGES = {
    "hellaswag": [
        {"activity_label": "Food and Entertaining", "ctx_a": "How to sit [header] Ada  sat. [title] Mats", "ctx_b": "ada MET Bo [step] so"},
        {"endings": [" sat. [title] X", "[substeps] ran.", "a  b   c", "met [x] [y]."], "label": "0"},
        {"ctx_a": " 2021-01-01 ", "ctx_b": "éa. {{ctx}}", "label": "2"},
    ],
    "boolq": [{"passage": "Ada -- met\nBo. ", "question": "is {{it}} so", "label": 0}, {"passage": "2021-01-01"}],
    "piqa": [{"goal": "Sit,\n\nthen run. ", "sol1": " a", "sol2": "b ", "label": 0}],
    "sciq": [{"support": "  Ada met Bo. \n", "question": " Who? ", "correct_answer": " Ada"}],
    "arc_easy": [{"choices": {"text": ["1", "2", "3", "4", "5"], "label": ["1", "2", "3", "4", "5"]}, "answerKey": "5"}],
    "winogrande": [{"sentence": "_ saw Bo_ran because  _ ran. ", "option1": " Ada", "answer": "1"}],
    "lambada_openai": [{"text": "“Ada,” said Bo ,\nand Ada 's"}],
    "blimp_wh_island": [{"sentence_good": " Who saw Cy? "}],
}  # fmt: skip


def _requests(folder, task):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = (getattr(manager, "load", None) or manager.load_task_or_group)([task])
    found = loaded.get("tasks", loaded)[task]
    found.build_all_requests(limit=None, rank=0, world_size=1)
    return [
        (request.doc_id, request.idx, request.request_type, request.args, found.doc_to_target(request.doc))
        for request in found.instances
    ]


@pytest.mark.parametrize("task", _CHANGES)
def test_the_requests_are_those_of_the_harness(task, tmp_path):
    row = HUB_ROWS[task]
    path = write_rows(tmp_path / "data" / f"{task}.arrow", [row, *(row | change for change in _CHANGES[task])])
    ready, missing = prepare_tasks(choose_tasks("tiny", [task]).values(), data=path.parent, folder=tmp_path / "ours")
    assert not missing
    split = "train" if task.startswith("blimp_") else "test" if task == "lambada_openai" else "validation"
    stock = {
        "include": str(stock_folder() / str(ready[task].task.stock)), "task": task, "dataset_path": "arrow", "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path)}}, "training_split": None, "validation_split": None, "test_split": None,
    } | {"test_split" if split == "test" else "validation_split": split}  # fmt: skip
    (tmp_path / "stock").mkdir()
    YAML(typ="safe").dump(stock, tmp_path / "stock" / f"{task}.yaml")
    ours, theirs = _requests(tmp_path / "ours", task), _requests(tmp_path / "stock", task)
    assert len(ours) >= len(_CHANGES[task]) + 1
    assert ours == theirs
