"""From the words of a recipe to text in tokens: its tokenizer, and the windows that training and judging read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.runtime import derive_seed, rank
from limbeck.data.order import Mixture
from limbeck.data.text import TextSource, read_documents
from limbeck.data.windows import cached_windows
from limbeck.models.teacher import LoadedTeacher
from limbeck.models.tokenizers import encoder, tokenizer_fingerprint, train_tokenizer
from limbeck.recipe import Recipe
from limbeck.recipe_tokenizer import TEACHER_BORDERS, TRAINED_BORDERS
from limbeck.store.manifest import is_store, is_unfinished
from limbeck.store.store import TargetStore
from limbeck.teachers.stored_windows import StoreWindows

# Where a store keeps the tokenizer of its token ids.
TOKENIZER_FOLDER = "tokenizer"


def open_tokenizer(recipe: Recipe, teacher: LoadedTeacher | None, folder: Path) -> Any:
    """The recipe's tokenizer: the teacher's, another one by name, one trained on the recipe's text, or bytes in patches."""
    if recipe.tokenizer.segmenter is None:
        return _open_tokens(recipe, teacher, folder)
    return _kept_tokenizer(folder / "tokenizer", lambda: _byte_tokenizer(recipe, teacher, folder))


def _byte_tokenizer(recipe: Recipe, teacher: LoadedTeacher | None, folder: Path) -> Any:
    from limbeck.models.byte_tokenizer import ByteTokenizer
    from limbeck.models.teacher import load_tokenizer

    words = recipe.tokenizer
    rule = words.segmenter or ""
    limit = recipe.patch_bytes
    if rule == TRAINED_BORDERS:
        return ByteTokenizer.from_tokenizer(_trained(recipe, folder / "borders"), patch_bytes=limit)
    if rule == TEACHER_BORDERS:
        return ByteTokenizer.from_tokenizer(teachers_tokenizer(recipe, teacher), patch_bytes=limit)
    if rule.startswith("bpe:"):
        return ByteTokenizer.from_tokenizer(load_tokenizer(rule.removeprefix("bpe:")), patch_bytes=limit)
    if rule == "ngram_entropy":
        documents = (text for source in recipe.data.train for text in training_texts(source))
        return ByteTokenizer.fit_entropy(documents, bytes_per_patch=words.bytes_per_patch, patch_bytes=limit)
    return ByteTokenizer(rule, patch_bytes=limit)


def _kept_tokenizer(folder: Path, make: Callable[[], Any]) -> Any:
    """A tokenizer that is made once and read back by a continued run and by other processes."""
    from transformers import AutoTokenizer

    if not folder.exists():
        draft = folder.parent / f".{folder.name}.{rank()}.tmp"
        make().save_pretrained(draft)
        with contextlib.suppress(OSError):  # another process was first
            draft.rename(folder)
        shutil.rmtree(draft, ignore_errors=True)
    return AutoTokenizer.from_pretrained(folder)


def _trained(recipe: Recipe, folder: Path) -> Any:
    assert recipe.tokenizer.train_vocab_size is not None
    size = recipe.tokenizer.train_vocab_size
    documents = (text for source in recipe.data.train for text in training_texts(source))
    return _kept_tokenizer(folder, lambda: train_tokenizer(documents, vocab_size=size))


def _open_tokens(recipe: Recipe, teacher: LoadedTeacher | None, folder: Path) -> Any:
    words = recipe.tokenizer
    if words.train_vocab_size is not None:
        return _trained(recipe, folder / "tokenizer")
    from limbeck.models.teacher import load_tokenizer

    if words.source is not None:
        return load_tokenizer(words.source)
    if recipe.student.source is not None:
        return same_object(load_tokenizer(recipe.student.source), teacher)
    return teachers_tokenizer(recipe, teacher)


def teachers_tokenizer(recipe: Recipe, teacher: LoadedTeacher | None) -> Any:
    """The tokenizer of the recipe's teacher, which may be a model or a store. Raises: RecipeError when it brings none."""
    from limbeck.models.teacher import load_tokenizer

    if teacher is not None:
        return teacher.tokenizer
    store = None if recipe.teacher is None or recipe.teacher.store is None else Path(recipe.teacher.store).expanduser()
    if store is not None and (store / TOKENIZER_FOLDER).is_dir():
        return load_tokenizer(str(store / TOKENIZER_FOLDER))
    raise RecipeError(
        "tokenizer: this teacher brings no tokenizer. Give tokenizer.source (a hub id or a folder), or with a new "
        "student tokenizer.train_vocab_size or segmenter."
    )


def same_object(tokenizer: Any, teacher: LoadedTeacher | None) -> Any:
    """The teacher's own tokenizer where the student's does exactly the same, so that one stands for both."""
    is_same = teacher is not None and tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(teacher.tokenizer)
    return teacher.tokenizer if is_same and teacher is not None else tokenizer


def training_texts(words: Any) -> Iterator[str]:
    """The documents of a source; of a target store, the text of its rows."""
    folder = Path(words.source).expanduser()
    if not is_store(folder):
        yield from read_documents(text_source(words))
        return
    store = TargetStore(folder)
    for number in range(len(store)):
        if store.manifest.kind == "text":
            record = store.text(number)
            yield record.prompt + record.completion
        else:
            yield (store.row(number, targets=False).text or b"").decode("utf-8", errors="ignore")


def text_source(words: Any) -> TextSource:
    """A recipe's source as the data room's."""
    return TextSource(words.source, words.split, words.field, words.config, words.weight, words.rows)


def no_documents(source: TextSource) -> DataError:
    """What to say of a source in whose split there is nothing."""
    few = (
        ""
        if source.split != "heldout"
        else (
            " Every 50th document is held out, so that a text of fewer than 50 has none: give a held-out text of its own, with split: all."
        )
    )
    return DataError(f"text source {source.source} ({source.split}) is empty.{few}")


def open_data(recipe: Recipe, tokenizer: Any, folder: Path, *, sources: Sequence[Any], max_tokens: int) -> Mixture:
    """Token windows of the recipe's sources in the run's fixed order. The folder of a target store is a source too."""
    windows = [
        store_windows(recipe, words.source, tokenizer)
        or cached_windows(
            text_source(words), encoder(tokenizer), folder=folder, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            end_token=tokenizer.eos_token_id, context_tokens=recipe.data.context_tokens,
            cross_documents=recipe.data.cross_documents, max_tokens=max_tokens, packing=recipe.data.packing,
        )
        for words in sources
    ]  # fmt: skip
    return Mixture(windows, weights=[words.weight for words in sources], seed=derive_seed(recipe.seed, "data"))


def store_windows(recipe: Recipe, source: str, tokenizer: Any) -> StoreWindows | None:
    """The rows of a target store, when a text source is the folder of one; None for any other."""
    folder = Path(source).expanduser()
    if not (is_store(folder) or is_unfinished(folder)):
        return None
    store = TargetStore(folder)
    is_same = store.manifest.kind == "targets" and store.tokenizer in (None, tokenizer_fingerprint(tokenizer))
    if is_same:
        return StoreWindows(store, context_tokens=recipe.data.context_tokens)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return StoreWindows(
        store, encode=encoder(tokenizer), end_token=tokenizer.eos_token_id, padding_token=padding,
        context_tokens=recipe.data.context_tokens,
    )  # fmt: skip
