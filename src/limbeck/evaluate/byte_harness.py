"""Models of bytes as lm-evaluation-harness asks its models.

The likelihood of a continuation is that of the symbols of the *joined* text, context and continuation, that come after the
context's last byte: patches lie where the joined text has them, and each end of a patch counts, that of the context's last
patch (which is left open) and that of the continuation's last one too. Nothing here needs the harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import EvaluationError
from limbeck.core.symbols import BOS, EOD, EOP, PAD
from limbeck.models.symbol_streams import decode_symbols, open_prompt, text_to_bytes

DEFAULT_MAX_LENGTH = 4096
DEFAULT_NEW_PATCHES = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def check_answer(scored_TV: Tensor, text: Callable[[], str], *, first: int) -> None:
    """Raise an EvaluationError when the positions that a request is scored at hold NaN or infinity.

    text: what the model has read in this request; asked for only then. first: the number of the first position.
    """
    bad_T = ~scored_TV.isfinite().all(-1)
    if bool(bad_T.any()):
        raise _spoiled(text(), f"after its token {first + int(bad_T.nonzero()[0, 0]) + 1}")


def refuse_spoiled(decode: Callable[[Any], str]) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """A processor of logits for `generate()` that changes nothing and stops at NaN and at infinity."""

    def check(ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        bad_B = (scores_BV.isnan() | scores_BV.isposinf()).any(-1)
        if bool(bad_B.any()):
            raise _spoiled(decode(ids_BT[int(bad_B.nonzero()[0, 0])]), "after it")
        return scores_BV

    return [check]


def _spoiled(text: str, where: str) -> EvaluationError:
    return EvaluationError(
        f"the model gives logits that are not finite in the request that ends {text[-80:]!r}, {where}. Its weights hold NaN "
        "or infinity, or its number type overflows: load it in float32, or go back to an earlier checkpoint."
    )


def split_request(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What a model is given, BOS and the symbols up to the context's last byte, and what is scored, the rest."""
    given = text_to_bytes(context)
    symbols = tokenizer.encode_bytes(given + text_to_bytes(continuation))
    if not continuation:
        return [BOS, *symbols], []
    places = np.flatnonzero(np.asarray(symbols) < PAD)
    cut = int(places[len(given) - 1]) + 1 if given else 0
    return [BOS, *symbols[:cut]], symbols[cut:]


def cut_context(given: list[int], scored: int, *, max_length: int) -> list[int]:
    """Leave out whole patches after BOS until what is read, all but the last scored symbol, fits.

    The patch that is open at the end always stays, and what is scored is never cut: then more is read than fits.
    """
    if len(given) + scored - 1 <= max_length:
        return given
    starts = [1, *(place + 1 for place, symbol in enumerate(given) if symbol == EOP and place + 1 < len(given))]
    fitting = (start for start in starts if 1 + len(given) - start + scored - 1 <= max_length)
    return given[:1] + given[next(fitting, starts[-1]) :]


def rolling_windows(symbols: list[int], *, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Windows (given, scored) over a text as the harness cuts them: each symbol is scored once; those after the first
    window have one symbol before them, and the last window reaches back as far as it can."""
    windows = []
    for start in range(0, len(symbols), max_length):
        stop = min(start + max_length, len(symbols))
        given = symbols[stop - 1 - max_length : start] if start else [BOS]
        windows.append((given, symbols[start:stop]))
    return windows


class ByteLM:
    """A model of bytes behind the harness's interface of a model (which it is registered for, and does not inherit).

    Lengths are in symbols. Rows of a batch are padded; that changes nothing but the last digits.
    """

    rank = 0
    world_size = 1

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> None:
        """max_length: most symbols that are read at a time; by default those it was trained on."""
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        usual = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        self.max_length: int = max_length or usual
        self.device = model.device
        self.cache_hook: Any = None

    @property
    def tokenizer_name(self) -> str:
        """A name for where its text is cut."""
        return f"bytes_{self.tokenizer.segmenter.name}".replace("/", "__")

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Say each answer to `cache_hook.add_partial` as soon as it is there."""
        self.cache_hook = cache_hook

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the natural logarithm of its probability, and whether each symbol is the likeliest.

        Raises: EvaluationError when logits are no numbers.
        """
        rows = []
        for context, continuation in (request.args for request in requests):
            given, scored = split_request(self.tokenizer, context, continuation)
            rows.append(((context, continuation), cut_context(given, len(scored), max_length=self.max_length), scored))
        return self._loglikelihood_tokens(rows)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Of each whole text, ends of patches included, the end of the document not.

        Raises: EvaluationError when logits are no numbers.
        """
        windows = [
            (number, window)
            for number, request in enumerate(requests)
            for window in rolling_windows(
                self.tokenizer.encode_bytes(text_to_bytes(request.args[0])), max_length=self.max_length
            )
        ]
        totals = [0.0] * len(requests)
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            answers = self._loglikelihood_tokens([(None, *window) for _, window in batch])
            for (number, _), (nats, _) in zip(batch, answers, strict=True):
                totals[number] += nats
        for request, total in zip(requests, totals, strict=True):
            self._tell("loglikelihood_rolling", (request.args[0],), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue each (context, settings) until a stop string, the end of the document, or as many *patches* as the
        settings allow tokens (256 by default). Bytes that are no UTF-8 are replaced.

        Raises: EvaluationError when logits are no numbers.
        """
        answers = [""] * len(requests)
        groups: defaultdict[str, list[int]] = defaultdict(list)
        prompts = []
        for number, request in enumerate(requests):
            context, settings = request.args
            prompt = open_prompt(self.tokenizer.encode_bytes(text_to_bytes(context)))
            prompts.append(cut_context(prompt, 1, max_length=self.max_length))
            groups[repr(sorted(settings.items()))].append(number)
        for numbers in groups.values():
            numbers.sort(key=lambda number: (-len(prompts[number]), prompts[number]))
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                settings = requests[batch[0]].args[1]
                texts = self._model_generate([prompts[number] for number in batch], settings)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = text
                    self._tell("generate_until", requests[number].args, text)
        return answers

    def _tell(self, kind: str, arguments: Any, answer: Any) -> None:
        if self.cache_hook is not None:
            self.cache_hook.add_partial(kind, arguments, answer)

    def _loglikelihood_tokens(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Answers to (what to tell it by, given, scored). Longest first, so that a batch holds rows of like length."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(
            range(len(requests)), key=lambda number: (-len(requests[number][1]) - len(requests[number][2]), number)
        )
        asked = [number for number in order if requests[number][2]]
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            scores = self._score([requests[number][1:] for number in batch])
            for number, answer in zip(batch, scores, strict=True):
                answers[number] = answer
                if requests[number][0] is not None:
                    self._tell("loglikelihood", requests[number][0], answer)
        return answers

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        logits_BTV = self._model_call([given + scored[:-1] for given, scored in rows])
        for logits_TV, (given, scored) in zip(logits_BTV, rows, strict=True):
            first = len(given) - 1
            logits_TV = logits_TV[first : first + len(scored)]
            check_answer(logits_TV, partial(_as_text, given + scored[:-1]), first=first)
            logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
            target_T = torch.tensor(scored, device=logits_TV.device)
            gold_T = logits_TV.gather(1, target_T[:, None])[:, 0]
            nats = (gold_T - logits_TV.logsumexp(-1)).double().sum()
            yield float(nats), bool((logits_TV.argmax(-1) == target_T).all())

    def _model_call(self, rows: Sequence[list[int]]) -> Tensor:
        ids_BT, mask_BT = self._pad(rows, left=False)
        padded = {} if bool(mask_BT.all()) else {"attention_mask": mask_BT}
        with torch.no_grad():
            return self.model(input_ids=ids_BT, use_cache=False, **padded).logits

    def _model_generate(self, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        stops, patches, options = read_settings(settings)
        ids_BT, mask_BT = self._pad(prompts, left=True)
        length = ids_BT.shape[1]

        def is_done(written_BT: Tensor, _scores: Any, **_options: Any) -> Tensor:
            done = [_is_done(row, stops=stops, patches=patches) for row in written_BT[:, length:].tolist()]
            return torch.tensor(done, device=written_BT.device)

        written_BT = self.model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=patches * self.tokenizer.patch_bytes, stopping_criteria=[is_done],
            logits_processor=refuse_spoiled(_as_text), pad_token_id=PAD, eos_token_id=EOD, **options,
        )  # fmt: skip
        return [_until(_as_text(row), stops) for row in written_BT[:, length:].tolist()]

    def _pad(self, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), PAD)
        for number, row in enumerate(rows):
            start = longest - len(row) if left else 0
            ids_BT[number, start : start + len(row)] = torch.tensor(row)
        ids_BT = ids_BT.to(self.device)
        return ids_BT, (ids_BT != PAD).long()


def read_settings(settings: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """A task's settings of generation: stop strings, most patches, and the rest as `generate()` takes it.

    A temperature of 0, or none, is greedy.
    """
    options = dict(settings)
    until = options.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    limits = [value for name in _LIMITS if (value := options.pop(name, None)) is not None]
    temperature = float(options.pop("temperature", None) or 0.0)
    sampled = options.pop("do_sample", None)
    options["do_sample"] = temperature > 0 if sampled is None else bool(sampled)
    if options["do_sample"] and temperature:
        options["temperature"] = temperature
    return stops, int(limits[0]) if limits else DEFAULT_NEW_PATCHES, options


def _is_done(written: list[int], *, stops: Sequence[str], patches: int) -> bool:
    data = decode_symbols(written)
    return written.count(EOP) >= patches or EOD in written or any(text_to_bytes(stop) in data for stop in stops)


def _until(text: str, stops: Sequence[str]) -> str:
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)


def _as_text(symbols: Any) -> str:
    """The bytes of a row up to the end of its document, broken ones replaced."""
    row = symbols.tolist() if isinstance(symbols, Tensor) else list(symbols)
    return decode_symbols(row[: row.index(EOD)] if EOD in row else row).decode(errors="replace")
