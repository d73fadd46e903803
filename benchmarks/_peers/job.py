"""The job that every contender does: models, rows, settings, and what is asked of the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.types import Batch
from limbeck.data.factbook import read_factbook
from limbeck.data.order import Mixture
from limbeck.data.windows import tokenise
from limbeck.models.tokenizers import encoder, train_tokenizer


@dataclass(frozen=True)
class Job:
    """Forward KL at temperature 1 from a teacher to a student of one vocabulary, both Llamas, in float32.

    AdamW at a constant rate, decay on matrices alone, gradients clipped: the same for all. `width` is the student's, the
    teacher is twice as wide. `teacher_steps`: updates on text that make the teacher more than noise.
    """

    vocabulary: int
    width: int = 192
    layers: int = 2
    rows: int = 4
    context: int = 128
    steps: int = 20
    heldout_rows: int = 8
    teacher_steps: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    device: str = "cpu"

    @property
    def step_tokens(self) -> int:
        """Tokens that one update reads."""
        return self.rows * self.context


class RowWindows:
    """Rows of tokens as the package's loop wants them."""

    def __init__(self, ids_NT: Tensor):
        self.ids_NT = ids_NT

    @property
    def context_tokens(self) -> int:
        """Tokens in each row."""
        return self.ids_NT.shape[1]

    def __len__(self) -> int:
        return len(self.ids_NT)

    def rows(self, indices: Sequence[int]) -> Batch:
        """These rows; every token but the first is scored."""
        ids_BT = self.ids_NT[list(indices)]
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        mask_BT[:, 0] = False
        return Batch(ids_BT, mask_BT)


def mixture(ids_NT: Tensor) -> Mixture:
    """The rows in the package's order."""
    return Mixture([RowWindows(ids_NT)], weights=[1.0], seed=0)


def rows_in_order(folder: Path, job: Job) -> Tensor:
    """All rows of the job in the order in which every contender reads them [steps * rows, context]."""
    return mixture(rows_of(folder)["train"]).batch(0, job.steps * job.rows).input_ids_BT


def build_model(*, vocabulary: int, width: int, layers: int, seed: int) -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=4096, use_cache=False, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prepare(folder: Path, job: Job, *, documents: int | None = None) -> None:
    """Write the job down: settings, tokenizer, rows of the factbook, a teacher that has read a little, a random student."""
    texts = list(read_factbook("train"))[:documents]
    tokenizer = train_tokenizer(texts, vocab_size=job.vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    distinct = (job.steps + job.teacher_steps) * job.rows
    ids, _ = tokenise(texts, encoder(tokenizer), end_token=0, max_tokens=distinct * job.context)
    held, _ = tokenise(
        read_factbook("valid"), encoder(tokenizer), end_token=0, max_tokens=job.heldout_rows * job.context
    )
    train_NT = _as_rows(ids, job.context, distinct)
    taught_NT, train_NT = train_NT[: job.teacher_steps * job.rows], train_NT[job.teacher_steps * job.rows :]
    rows = {"train": train_NT, "heldout": _as_rows(held, job.context, job.heldout_rows)}
    save_file(rows, folder / "rows.safetensors")
    shape = {"vocabulary": job.vocabulary, "layers": job.layers}
    teacher = build_model(width=2 * job.width, seed=1, **shape)
    _teach_a_little(teacher, taught_NT, job)
    teacher.save_pretrained(folder / "teacher")
    build_model(width=job.width, seed=0, **shape).save_pretrained(folder / "student")
    (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")


def _as_rows(ids: Any, context: int, rows: int) -> Tensor:
    return torch.from_numpy(ids[: rows * context]).long().reshape(-1, context).contiguous()


def _teach_a_little(teacher: nn.Module, rows_NT: Tensor, job: Job) -> None:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=job.learning_rate)
    for ids_BT in rows_NT.split(job.rows):
        logits_BTV = teacher(input_ids=ids_BT).logits[:, :-1]
        F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def read_job(folder: Path) -> Job:
    """The job of a folder."""
    return Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))


def rows_of(folder: Path) -> dict[str, Tensor]:
    """Rows to train on and rows to judge on."""
    return load_file(folder / "rows.safetensors")


def open_models(folder: Path, job: Job) -> tuple[Any, Any]:
    """(student, teacher) in float32 on the job's device."""
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).to(job.device)
        for name in ("student", "teacher")
    )
    return student, teacher.eval()


@torch.no_grad()
def heldout_kl(student: nn.Module, teacher: nn.Module, ids_NT: Tensor) -> float:
    """Mean KL(teacher || student) in nats a token on held-out rows, in float64."""
    was_training = student.training
    student.eval()
    found = []
    for ids_T in ids_NT.to(next(student.parameters()).device):
        student_TV, teacher_TV = (
            F.log_softmax(model(input_ids=ids_T[None]).logits[0, :-1].double(), dim=-1) for model in (student, teacher)
        )
        found.append(F.kl_div(student_TV, teacher_TV, reduction="batchmean", log_target=True))
    student.train(was_training)
    return float(torch.stack(found).mean())
