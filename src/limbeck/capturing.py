"""Writing a teacher down: what `limbeck capture` does, and what a run does first when its teacher is served or closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from limbeck import assembly, reading
from limbeck.core.errors import RecipeError, StoreError
from limbeck.core.runtime import StopRequest, derive_seed, highest, is_main, pick_device, set_threads, wait_for_all
from limbeck.core.symbols import SYMBOLS
from limbeck.core.types import Batch
from limbeck.data.order import Mixture
from limbeck.data.text import read_documents
from limbeck.models.anatomy import hidden_width
from limbeck.models.token_bytes import read_token_bytes
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.recipe import Recipe
from limbeck.recipe_agreement import reads_teachers_trie
from limbeck.recipe_teachers import Endpoint as EndpointWords
from limbeck.recipe_teachers import Ray, Teacher
from limbeck.store.codec import CodecSettings
from limbeck.store.manifest import Manifest, is_store, is_unfinished
from limbeck.store.sink import RowSink
from limbeck.teachers.capture import CaptureSettings, capture
from limbeck.teachers.entries import Dense, Entries, Sampled, TopK
from limbeck.teachers.live import LiveTeacher, load_live_model
from limbeck.teachers.trie import TrieTeacher
from limbeck.train.metrics import Progress, choose_progress

_BATCH_TOKENS = 4096


def capture_recipe(
    recipe: Recipe, *, folder: Path | None = None, stop: StopRequest | None = None, progress: bool = True
) -> dict[str, Any]:
    """Capture the recipe's teacher on the recipe's training windows. Returns facts of the store.

    The same command continues a capture that was stopped, and adds windows that the store does not have.
    Raises: RecipeError when the recipe's teacher cannot be captured.
    """
    words = recipe.teacher
    if words is None or words.kind not in ("source", "served", "closed"):
        kind = "no teacher" if words is None else f"teacher.{words.kind}"
        raise RecipeError(f"capture: the recipe has {kind}. Name a model (source), or an endpoint (served, closed).")
    folder = folder or Path(recipe.capture.folder or f"stores/{recipe.name}")
    show = choose_progress(progress and is_main())
    stop = stop or StopRequest()
    if words.kind != "source":
        tokenizer = reading.open_tokenizer(recipe, None, folder.parent)
        return fetch_into(recipe, tokenizer, folder, show, stop)
    device = pick_device(recipe.runtime.device)
    set_threads(recipe.runtime.threads)
    teacher = assembly.open_teacher(recipe, device)
    assert teacher is not None
    cache = folder.parent / f".{folder.name}.tokens"
    tokenizer = teacher.tokenizer
    if reads_teachers_trie(recipe):
        tokenizer = reading.same_object(reading.open_tokenizer(recipe, teacher, cache), teacher)
    enough = recipe.capture.tokens or int(1.1 * recipe.total_tokens) + 2 * recipe.student.calibration_tokens
    data = reading.open_data(recipe, tokenizer, cache, sources=recipe.data.train, max_tokens=enough)
    return _capture_live(recipe, teacher, tokenizer, data, folder, device, show, stop)


def _capture_live(
    recipe: Recipe,
    teacher: Any,
    tokenizer: Any,
    data: Mixture,
    folder: Path,
    device: Any,
    show: Progress,
    stop: StopRequest,
) -> dict[str, Any]:
    """tokenizer: of the rows that are written; the teacher's own, or bytes in patches that are its tokens."""
    words = recipe.capture
    is_sampled = words.targets == "sampled"
    entries: Entries = Sampled(words.draws, seed=derive_seed(recipe.seed, "draws")) if is_sampled else Dense()
    source: LiveTeacher | TrieTeacher
    if tokenizer is teacher.tokenizer:
        source = LiveTeacher(teacher.model, name=teacher.source, entries=entries)
    else:
        if is_sampled or words.ray is not None:
            raise RecipeError(
                "capture: predictions of bytes are kept as the top k, by one machine. Remove targets and ray."
            )
        source = TrieTeacher(
            teacher.model, teacher.tokenizer, tokenizer, entries=TopK(min(words.k, SYMBOLS)), name=teacher.source
        )
    vocabulary = source.vocabulary_size
    assert vocabulary is not None
    k = min(words.draws if is_sampled else words.k, vocabulary)
    codec = CodecSettings(vocabulary, values=words.values, k=k, mass=words.mass, sampled=is_sampled)
    context = recipe.data.context_tokens
    settings = CaptureSettings(
        codec, hidden=tuple(words.hidden_layers), rows_per_shard=words.rows_per_shard,
        fidelity_tokens=words.check_rows * context,
    )  # fmt: skip
    rows = min(data.windows, -(-(words.tokens or recipe.total_tokens) // context))
    show.start("capture", rows * context, 0)
    try:
        shared: dict[str, Any] = {
            "settings": settings, "teacher": {"name": teacher.source, "fingerprint": teacher.fingerprint},
            "tokenizer": tokenizer_fingerprint(tokenizer), "token_bytes": _token_bytes(tokenizer),
            "advance": show.advance,
        }  # fmt: skip
        batches = _batches(data, rows, max(1, _BATCH_TOKENS // context))
        if words.ray is not None:
            facts = _capture_on_ray(recipe, words.ray, entries, batches, folder, hidden_width(teacher.model), shared)
        else:
            facts = capture(
                source, batches, folder, device=device, should_stop=lambda: stop.exit_code is not None, **shared
            )
    finally:
        show.finish()
    exit_code = highest(stop.exit_code or 0)
    if exit_code and not facts["finished"]:
        raise SystemExit(exit_code)
    if is_main():
        tokenizer.save_pretrained(folder / reading.TOKENIZER_FOLDER)
    return facts


def _capture_on_ray(
    recipe: Recipe,
    words: Ray,
    entries: Entries,
    batches: Iterator[Batch],
    folder: Path,
    width: int,
    shared: dict[str, Any],
) -> dict[str, Any]:
    from functools import partial

    from limbeck.teachers.ray_capture import capture_with_ray

    assert recipe.teacher is not None
    assert recipe.teacher.source is not None
    make_source = partial(
        load_source, recipe.teacher.source, revision=recipe.teacher.revision, dtype=recipe.teacher.dtype, entries=entries,
        device="cuda" if words.gpus_per_worker else "cpu",
    )  # fmt: skip
    return capture_with_ray(
        make_source, batches, folder, hidden_width=dict.fromkeys(recipe.capture.hidden_layers, width), workers=words.workers,
        cpus_per_worker=words.cpus_per_worker, gpus_per_worker=words.gpus_per_worker, **shared,
    )  # fmt: skip


def load_source(source: str, *, revision: str | None, dtype: str, entries: Entries, device: str) -> LiveTeacher:
    """A live teacher, loaded wherever this is called: on a worker of Ray's, for one."""
    loaded = load_live_model(source, revision=revision, dtype=dtype, device=device)
    return LiveTeacher(loaded.model, name=source, entries=entries)


def _token_bytes(tokenizer: Any) -> Any:
    """The bytes of every token id; None for a tokenizer that hides them: its store serves students with the same one."""
    from limbeck.core.errors import VocabularyError

    try:
        return read_token_bytes(tokenizer).pieces
    except VocabularyError:
        return None


def _batches(data: Mixture, rows: int, at_once: int) -> Iterator[Batch]:
    """The windows that the run's stages see first, each once."""
    return (data.batch(first, min(at_once, rows - first)) for first in range(0, rows, at_once))


def fetch(recipe: Recipe, tokenizer: Any, folder: Path, show: Progress, stop: StopRequest) -> Any | None:
    """Ask a served or closed teacher all that the run will need, once, into the run's own store.

    Returns the source that training reads in the place of data.train; None for every other teacher.
    """
    if recipe.teacher is None or recipe.teacher.kind not in ("served", "closed"):
        return None
    store = folder / "store"
    if is_main() and (is_unfinished(store) or not is_store(store)):
        fetch_into(recipe, tokenizer, store, show, stop)
    wait_for_all()
    return recipe.data.train[0].model_copy(update={"source": str(store), "split": "all", "weight": 1.0})


def fetch_into(recipe: Recipe, tokenizer: Any, folder: Path, show: Progress, stop: StopRequest) -> dict[str, Any]:
    """Ask an endpoint and keep its answers as a store; answers that were given before are not asked for again."""
    assert recipe.teacher is not None
    words = recipe.teacher.served or recipe.teacher.closed
    assert words is not None
    from limbeck.teachers.answers import AnswerFile
    from limbeck.teachers.endpoint import Endpoint, EndpointSettings

    settings = EndpointSettings(
        url=words.url, model=words.model, api_key_variable=words.api_key_variable, concurrency=words.concurrency,
        requests_per_minute=words.requests_per_minute, retries=words.retries, timeout_seconds=words.timeout_seconds,
    )  # fmt: skip
    kept = AnswerFile(folder.parent / f"{folder.name}.answers.jsonl")
    show.start("asking the teacher", recipe.capture.tokens or recipe.total_tokens, 0)
    try:
        with Endpoint(settings, kept=kept) as endpoint:
            ask = _ask_served if recipe.teacher.served else _ask_closed
            facts = ask(recipe, recipe.teacher, endpoint, tokenizer, folder, show, stop)
    finally:
        show.finish()
        kept.close()
    return {"folder": str(folder)} | facts


def _ask_served(
    recipe: Recipe, teacher: Teacher, endpoint: Any, tokenizer: Any, folder: Path, show: Progress, stop: StopRequest
) -> dict[str, Any]:
    from limbeck.models.teacher import load_tokenizer
    from limbeck.store.records import batch_rows
    from limbeck.teachers.served import ServedTeacher

    words = teacher.served
    assert words is not None
    tokenizer = tokenizer if words.tokenizer is None else load_tokenizer(words.tokenizer)
    served = ServedTeacher(
        endpoint, tokenizer, top_logprobs=words.top_logprobs, max_new_tokens=words.max_new_tokens,
        temperature=words.temperature, seed=recipe.seed,
    )  # fmt: skip
    codec = CodecSettings(served.vocabulary_size, values=recipe.capture.values, k=words.top_logprobs)
    name = {"name": words.model, "url": words.url, "fingerprint": None}
    manifest = Manifest(
        "targets", name, tokenizer_fingerprint(tokenizer), served.vocabulary_size, codec.to_json(),
        rows_per_shard=recipe.capture.rows_per_shard, context_tokens=recipe.data.context_tokens,
    )  # fmt: skip
    sink = RowSink(folder, manifest)
    take = _counting(sink, show, stop, lambda row: len(row.input_ids))
    wanted = recipe.capture.tokens or recipe.total_tokens
    if words.mode == "score":
        data = reading.open_data(
            recipe, tokenizer, folder.parent / "data", sources=recipe.data.train, max_tokens=int(1.1 * wanted)
        )
        rows = min(data.windows, -(-wanted // recipe.data.context_tokens))
        written = served.score((row for batch in _batches(data, rows, 8) for row in batch_rows(batch)), sink=take)
    else:
        prompts = list(_prompts(recipe, words))
        written = served.generate(
            _repeated(prompts, words), context_tokens=recipe.data.context_tokens, sink=take,
            tokens=None if words.answers else wanted,
        )  # fmt: skip
    usage = _usage(endpoint) | {
        "finish_reasons": dict(written.finish_reasons), "empty_answers": written.empty_answers,
        "cut_answers": written.cut_answers, "cut_prompts": written.cut_prompts,
    }  # fmt: skip
    whole = sink.finish(teacher={"usage": usage})
    tokenizer.save_pretrained(folder / reading.TOKENIZER_FOLDER)
    return {
        "finished": True, "rows": whole.rows, "tokens": whole.tokens, "scored_tokens": written.scored_tokens, "usage": usage,
    }  # fmt: skip


def _ask_closed(
    recipe: Recipe, teacher: Teacher, endpoint: Any, tokenizer: Any, folder: Path, show: Progress, stop: StopRequest
) -> dict[str, Any]:
    from limbeck.teachers.closed import ClosedTeacher
    from limbeck.teachers.prompts import prompt_renderer

    words = teacher.closed
    assert words is not None
    closed = ClosedTeacher(
        endpoint, max_new_tokens=words.max_new_tokens, temperature=words.temperature, seed=recipe.seed,
        input_price=words.input_price, output_price=words.output_price,
    )  # fmt: skip
    name = {"name": words.model, "url": words.url, "fingerprint": None}
    sink = RowSink(folder, Manifest("text", name, None, None, None, rows_per_shard=recipe.capture.rows_per_shard))
    take = _counting(sink, show, stop, lambda record: len(record.completion) // 4)
    prompts = list(_prompts(recipe, words))
    told = closed.write(
        _repeated(prompts, words), sink=take,
        render=prompt_renderer(tokenizer) if any(prompt.messages for prompt in prompts) else None,
        characters=None if words.answers else 4 * (recipe.capture.tokens or recipe.total_tokens),
    )  # fmt: skip
    usage = _usage(endpoint) | {"cost": told.cost, "answers": told.texts, "empty_answers": told.empty_answers}
    whole = sink.finish(teacher={"usage": usage})
    return {"finished": True, "rows": whole.rows, "finish_reasons": dict(told.finish_reasons), "usage": usage}


def _usage(endpoint: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "now": asdict(endpoint.usage), "before": asdict(endpoint.usage_before), "retried": endpoint.retried,
        "adaptations": dict(endpoint.adaptations),
    }  # fmt: skip


def _counting(
    sink: RowSink, show: Progress, stop: StopRequest, tokens_of: Callable[[Any], int]
) -> Callable[[Any], None]:
    def take(record: Any) -> None:
        if stop.exit_code is not None:
            raise SystemExit(stop.exit_code)
        sink(record)
        show.advance(tokens_of(record), f"{sink.rows:,} rows")

    return take


def _prompts(recipe: Recipe, words: EndpointWords) -> Iterator[Any]:
    from limbeck.teachers.prompts import document_prompts, read_prompts

    if words.prompts is not None:
        yield from read_prompts(words.prompts)
        return
    documents = (text for source in recipe.data.train for text in read_documents(reading.text_source(source)))
    found = False
    for prompt in document_prompts(documents, characters=words.prompt_characters):
        found = True
        yield prompt
    if not found:
        raise StoreError("data.train holds no text that a prompt could be made of. Give teacher's prompts file.")


def _repeated(prompts: list[Any], words: EndpointWords) -> Iterator[Any]:
    """The prompts, over again until enough was said; how much is enough stops the asking, or the answers' number does."""
    import itertools

    if words.answers is None and words.temperature == 0:
        return iter(prompts)  # a second pass would be paid for and say the same
    return itertools.islice(itertools.cycle(prompts), words.answers)
