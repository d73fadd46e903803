"""Files of the suite's tasks with a few made-up items each, as people may have them."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = {
    "arc_easy.test.jsonl": [
        {
            "id": str(number), "question": f"What is thing {number}?", "answerKey": "B",
            "choices": {"text": ["a cat", "a mat", "a dog"], "label": ["A", "B", "C"]},
        }
        for number in range(8)
    ],
    "piqa.validation.jsonl": [{"goal": "Sit on the mat.", "sol1": "Ada sat.", "sol2": "Bo met.", "label": n % 2} for n in range(8)],
    "sub/sciq.test.jsonl": [
        {
            "question": "Who met Bo?", "distractor1": "Cy", "distractor2": "Di", "distractor3": "Eli", "correct_answer": "Ada",
            "support": "" if number else "Ada met Bo.",
        }
        for number in range(8)
    ],
    "hellaswag.jsonl": [
        {"activity_label": "Sitting", "ctx_a": "Ada met Bo.", "ctx_b": "she", "endings": ["sat.", "saw Bo.", "ran.", "met."], "label": str(n % 4)}
        for n in range(8)
    ],
    "boolq.jsonl": [{"passage": "Ada met Bo.", "question": "did ada meet bo", "answer": bool(n % 2)} for n in range(8)],
    "winogrande_xl.jsonl": [{"sentence": "Ada saw Bo so _ ran.", "option1": "Ada", "option2": "Bo", "answer": "1"}] * 8,
    "lambada_openai.jsonl": [{"context": "Ada met Bo and Bo saw", "continuation": "Ada"}, {"text": "Bo saw Ada and Ada met Bo"}] * 4,
    "blimp/adjunct_island.jsonl": [{"sentence_good": "Ada met Bo.", "sentence_bad": "Bo Ada met.", "UID": "x"}] * 8,
    "blimp/wh_island.jsonl": [{"sentence_good": "Who saw Cy?", "sentence_bad": "Who Cy saw?"}] * 8,
}  # fmt: skip
WIKITEXT = " \n = Ada = \n \n Ada met Bo . \n \n = = Life = = \n \n Bo saw Ada . \n \n = Cy = \n \n Cy met Di . \n"


def write_task_files(folder: Path) -> Path:
    """All of them below a folder."""
    for name, rows in ROWS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "wiki.test.raw").write_text(WIKITEXT, encoding="utf-8")
    return folder
