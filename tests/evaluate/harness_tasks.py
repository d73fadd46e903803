"""Tasks of the harness's own kinds with a few items each, written into a folder, and what belongs to them."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    {"question": "the cat sat on", "choices": [" the mat", " a dog", " ran"], "answer": 0},
    {"question": "a dog ran to the", "choices": [" cat and sat", " mat", " mat on the mat the dog"], "answer": 1},
    {"question": "on the mat the dog", "choices": [" ran", " sat", " the cat sat on the mat and ran"], "answer": 2},
    {"question": "the cat", "choices": [" sat", " sat", " and"], "answer": 0},
    {"question": "and sat on the mat the dog ran and ran to the cat", "choices": [" a", " b", " mat"], "answer": 2},
]
SENTENCES = ["the cat sat on the mat", "a dog ran to the cat and sat on the mat and ran and ran", "on", "the dog " * 9]
WORDS = [
    {"context": "the cat sat on the", "word": " mat"}, {"context": "a dog ran", "word": " to the cat"},
    {"context": "and ran", "word": " and"}, {"context": "a dog ran", "word": " to the cat"}, {"context": "the", "word": " mat"},
]  # fmt: skip
PROMPTS = [
    {"prompt": "the cat sat", "answer": "on"},
    {"prompt": "a", "answer": "b"},
    {"prompt": "the dog and", "answer": ""},
]

_CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""
_ROLLING = """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
_LAST_WORD = """
task: last_word
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_WRITE = """
task: write
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" "], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: raw, filter: [{function: take_first}]}
  - {name: letters, filter: [{function: regex, regex_pattern: "([a-z]*)"}, {function: take_first}]}
"""
_DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""


def write_tasks(folder: Path) -> Path:
    """Four tasks: `choice`, `rolling`, `last_word`, `write`; and `lost`, whose data are not there."""
    rows = {"choice": CHOICES, "rolling": [{"text": text} for text in SENTENCES], "last_word": WORDS, "write": PROMPTS}
    texts = {"choice": _CHOICE, "rolling": _ROLLING, "last_word": _LAST_WORD, "write": _WRITE}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(text + _DATA.format(file=file))
    lost = _ROLLING.replace("rolling\n", "lost\n", 1) + _DATA.format(file=folder / "nowhere.jsonl")
    (folder / "lost.yaml").write_text(lost)
    return folder
