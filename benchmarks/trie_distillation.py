"""A model of bytes taught by a BPE teacher through the trie of its tokens, beside the same model taught by the text alone.

The student's patches end where the teacher's tokens do. Arms, all with the same start, text, order and updates: `control`
(cross entropy), `cheap` (KL of the conditionals at the nodes the text goes through, and cross entropy), `exact` (KL over the
teacher's likeliest whole tokens, and cross entropy). Differences are paired by seed. The gate: along the text the teacher's
conditionals multiply to its token probabilities; and the student is causal.

    python -m benchmarks trie_distillation
    python -m benchmarks trie_distillation --teacher models/teacher --train train.txt --valid valid.txt
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from benchmarks import _tiny as tiny
from benchmarks._kept import keep
from benchmarks.byte_pool import QUICK, QUICK_TRUNK
from limbeck.core.types import Batch
from limbeck.data.text import read_documents
from limbeck.evaluate.quality import score_text
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.teacher import LoadedTeacher, load_teacher
from limbeck.models.tokenizers import encoder
from limbeck.teachers.base import Wanted
from limbeck.teachers.trie import TrieTeacher
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.lesson import Lesson
from limbeck.train.trie import TrieLesson

STUDENT: dict[str, Any] = {
    "model_type": "limbeck_bytepool", "local_width": 96, "encoder_layers": 2, "decoder_layers": 3, "local_heads": 3,
    "local_feed_forward": 384, "ngram_rows": 4096, "trunk": {"width": 128, "layers": 4, "heads": 2, "feed_forward": 512},
}  # fmt: skip
ARMS = ("control", "cheap", "exact")


def options(arguments: list[str]) -> argparse.Namespace:
    """The options, with a test's sizes for --quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks trie_distillation", description=__doc__)
    tiny.add_options(parser, folder="bench-trie")
    parser.add_argument("--teacher", default="embedded", help="`embedded`, or a model folder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--text-bytes", type=int, default=500_000, help="distinct bytes of training text; 0: all of it")
    parser.add_argument("--train-bytes", type=int, default=1_000_000, help="bytes each student reads")
    parser.add_argument("--batch-bytes", type=int, default=2048)
    parser.add_argument("--context-bytes", type=int, default=768)
    parser.add_argument("--weight", type=float, default=0.7, help="of the teacher's term; cross entropy has the rest")
    parser.add_argument("--paths", type=int, default=8, help="tokens that the exact form follows at each patch")
    parser.add_argument("--points", type=int, default=4, help="points of the curve")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.train_bytes, chosen.batch_bytes, chosen.context_bytes = 6000, 1024, 256
        chosen.text_bytes, chosen.valid_bytes, chosen.points, chosen.seeds = 20_000, 4096, 2, chosen.seeds[:2]
    return chosen


def lesson_of(arm: str, student: Any, teacher: LoadedTeacher, tokenizer: Any, chosen: argparse.Namespace) -> Lesson:
    """What an arm learns from."""
    text = Term("cross_entropy", weight=lambda progress: 1.0 if arm == "control" else 1 - chosen.weight)
    if arm == "control":
        return DistilLesson(student, None, [text])
    own = "forward_kl" if arm == "cheap" else "byte_trie"
    terms = [Term(own, weight=lambda progress: chosen.weight), text]
    paths = 0 if arm == "cheap" else chosen.paths
    source = TrieTeacher(teacher.model, teacher.tokenizer, tokenizer, paths=paths, name=teacher.source)
    return DistilLesson(student, source, terms) if arm == "cheap" else TrieLesson(student, source, terms)


def gate(teacher: LoadedTeacher, tokenizer: ByteTokenizer, text: tiny.Text, config: dict[str, Any]) -> None:
    """Refuse to teach what is not right."""
    tiny.check_lossless(tokenizer, text.valid[:20])
    tokens = encoder(teacher.tokenizer)([text.valid[0]])[0][:80]
    pieces = [teacher.tokenizer.decode([token]) for token in tokens]
    symbols = encoder(tokenizer)(["".join(pieces)])[0]
    device = teacher.model.device
    was = teacher.model.dtype
    teacher.model.double()
    source = TrieTeacher(teacher.model, teacher.tokenizer, tokenizer, name=teacher.source)
    source.prepare(Wanted(logits=True))
    ids_BT = torch.tensor([symbols])
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT[:, 0] = False
    found = source.targets(Batch(ids_BT, mask_BT))
    assert found.logits is not None
    logits_BTV = found.logits.head(found.logits.hidden_BTD)  # type: ignore[union-attr]
    after_first = symbols.index(259) + 1  # the first patch may have been cut, so nothing is said of it
    along = logits_BTV.log_softmax(-1)[0, after_first - 1 : -1].gather(1, ids_BT[0, after_first:, None]).sum()
    opening = [
        teacher.tokenizer.bos_token_id if teacher.tokenizer.bos_token_id is not None else teacher.tokenizer.eos_token_id
    ]
    with torch.no_grad():
        whole = teacher.model(input_ids=torch.tensor([opening + tokens], device=device)).logits.log_softmax(-1).cpu()
    direct = whole[0, 1:-1].gather(1, torch.tensor(tokens[1:])[:, None]).sum()
    teacher.model.to(was)
    print(f"gate: {len(tokens) - 1} tokens cost the teacher {-direct:.6f} nats, symbol by symbol {-along:.6f}")
    # Special tokens, which text never holds, are left out of the trie: a little mass may go back to the others.
    assert -1e-6 < float(along - direct) < 1e-2 * abs(float(direct)), (
        "the trie does not give the teacher's probabilities"
    )
    tiny.check_causal_and_cached(tiny.new_model(config, seed=0, device="cpu"), ids_BT[:, :80])
    print("gate: the student is causal, step by step equals one pass")


def main(arguments: list[str]) -> None:
    """Train every arm under every seed; print differences; keep."""
    chosen = options(arguments)
    tiny.begin(chosen)
    text = tiny.open_text(chosen)
    if chosen.text_bytes and not chosen.quick:
        text = tiny.Text(
            tiny.first_part(text.train, chosen.folder / "text.jsonl", max_bytes=chosen.text_bytes), text.valid
        )
    teacher = load_teacher(chosen.teacher, device=chosen.device)
    tokenizer = ByteTokenizer.from_tokenizer(teacher.tokenizer)
    per_byte = tiny.tokens_per_byte(tokenizer, text.valid)
    config = (STUDENT | QUICK | {"trunk": QUICK_TRUNK}) if chosen.quick else STUDENT
    config = config | {"mean_patch_bytes": 1 / (per_byte - 1)}
    gate(teacher, tokenizer, text, config)
    passing = {"folder", "threads", "json", "device", "seeds", "arms"}
    settings = {key: value for key, value in vars(chosen).items() if key not in passing}
    figures = tiny.Figures(chosen.folder, settings | {"student": config, "teacher_fingerprint": teacher.fingerprint})
    for seed in chosen.seeds:
        for arm in chosen.arms:
            job = tiny.Job(
                arm, config, tokenizer, train_bytes=chosen.train_bytes, batch_bytes=chosen.batch_bytes,
                context_bytes=chosen.context_bytes, changes={},
                lesson=lambda student, arm=arm: lesson_of(arm, student, teacher, tokenizer, chosen),
            )  # fmt: skip
            run = figures.get(f"{arm} / {seed}", _train, job, text, chosen, seed)
            print(f"{arm}, seed {seed}: {run['bits_per_byte']:.4f} bits per byte, {run['seconds']:.0f} s")
    results = summary(figures.runs, chosen) | {"teacher": judge_teacher(teacher, text, chosen)}
    results["distinct_bytes"] = sum(len(document.encode()) for document in read_documents(text.train))
    show(results)
    keep(chosen.json, {"settings": settings, **results, "runs": figures.runs})


def _train(job: tiny.Job, text: tiny.Text, chosen: argparse.Namespace, seed: int) -> dict[str, Any]:
    return tiny.run_job(job, text, seed=seed, folder=chosen.folder, device=chosen.device, points=chosen.points)


def judge_teacher(teacher: LoadedTeacher, text: tiny.Text, chosen: argparse.Namespace) -> dict[str, Any]:
    """What the teacher itself pays for the valid text, with as much of it in sight."""
    context = max(2, round(chosen.context_bytes * tiny.tokens_per_byte(teacher.tokenizer, text.valid)))
    score = score_text(
        teacher.model, teacher.tokenizer, text.valid, context_tokens=context, max_tokens=None, device=chosen.device
    )
    return {"bits_per_byte": score.bits_per_byte, "parameters": tiny.parameters_of(teacher.model)}


def summary(runs: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """Every arm over seeds, and its lead over the control, paired by seed (positive: the teacher helped)."""
    arms = {arm: [runs[f"{arm} / {seed}"]["bits_per_byte"] for seed in chosen.seeds] for arm in chosen.arms}
    leads = {}
    for arm in chosen.arms:
        if arm != "control" and "control" in arms:
            lead = tiny.paired(arms["control"], arms[arm])
            error = lead["standard_error"]
            leads[arm] = lead | {"standard_errors": lead["mean"] / error if error else None}  # type: ignore[operator]
    first = runs[f"{chosen.arms[0]} / {chosen.seeds[0]}"]
    costs = {key: first[key] for key in ("parameters", "train_tokens", "train_bytes")}
    seconds = {arm: runs[f"{arm} / {chosen.seeds[0]}"]["seconds"] for arm in chosen.arms}
    return {"student": costs, "seconds": seconds, "bits_per_byte": arms, "lead_over_control": leads}


def show(results: dict[str, Any]) -> None:
    """Print the figures."""
    print(
        f"\nteacher: {results['teacher']['bits_per_byte']:.4f} bits per byte, {results['teacher']['parameters']:,} parameters"
    )
    read, distinct = results["student"]["train_bytes"], results["distinct_bytes"]
    print(f"student: {results['student']['parameters']:,} parameters, {read:,} bytes read, {distinct:,} distinct")
    for arm, values in results["bits_per_byte"].items():
        print(f"{arm:<10}{tiny.spread(values)}  {results['seconds'][arm]:.0f} s")
    for arm, lead in results["lead_over_control"].items():
        error, times = lead["standard_error"], lead["standard_errors"]
        told = (
            "one seed"
            if error is None
            else f"± {error:.4f} (standard error over seeds), {times or math.inf:.1f} of them"
        )
        print(f"{arm} leads the control by {lead['mean']:+.4f} {told}")
