"""The commands of the target store: capture, verify, inspect, merge, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.console import Commands, quiet_stdout, show, show_facts

store_app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Look after target stores: what a teacher said about a text, kept on disk.",
)  # fmt: skip
Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of a store.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Into = Annotated[Path, typer.Option("--into", metavar="DIR", help="The new store.")]


def capture(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or a preset's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as capture.k=64.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="Where the store lives (default: stores/NAME).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write down what a recipe's teacher says about the recipe's text. The same command continues a stopped capture."""
    from limbeck.recipe_io import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from limbeck.capturing import capture_recipe
    from limbeck.core.runtime import is_main, pick_device, process_group, stop_on_signals

    with process_group(pick_device(loaded.runtime.device)), quiet_stdout(when=as_json), stop_on_signals() as stop:
        facts = capture_recipe(loaded, folder=folder, stop=stop, progress=not as_json)
    if is_main():
        show_facts(facts, as_json=as_json)


@store_app.command()
def inspect(folder: Folder, as_json: Json = False) -> None:
    """What a store holds: whose targets, how many, in how many bytes, and how near they are to the teacher."""
    from limbeck.store.verify import inspect_store

    show_facts(inspect_store(folder), as_json=as_json)


@store_app.command()
def verify(
    folder: Folder,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Score a sample again with this teacher and compare.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a whole store: checksums, schema, keys, tokens, targets. Exit code 2 when anything is wrong."""
    from limbeck.store.verify import verify_store

    facts = verify_store(folder)
    if teacher is not None and not facts["problems"]:
        facts |= _score_again(folder, teacher)
    show_facts(facts, as_json=as_json)
    if facts["problems"]:
        raise typer.Exit(2)
    if not as_json:
        show("sound")


def _score_again(folder: Path, source: str) -> dict[str, Any]:
    from limbeck.store.store import TargetStore
    from limbeck.teachers.fidelity import measure_fidelity
    from limbeck.teachers.live import LiveTeacher, load_live_model

    store, loaded = TargetStore(folder), load_live_model(source)
    problems = []
    if store.teacher not in (None, loaded.fingerprint):
        problems.append(f"the store was captured from {store.teacher_name}, whose fingerprint is not that of {source}")
    live = LiveTeacher(loaded.model, name=source)
    if problems or live.vocabulary_size != store.vocabulary_size:
        return {
            "problems": problems or [f"{source} has {live.vocabulary_size} tokens, the store {store.vocabulary_size}"]
        }
    return {"fidelity": measure_fidelity(live, store, tokens=4096, device="cpu")}


@store_app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores of one teacher and tokenizer.")],
    into: Into,
    as_json: Json = False,
) -> None:
    """Put several stores into a new one, every row once."""
    import shutil

    from limbeck.reading import TOKENIZER_FOLDER
    from limbeck.store.merge import merge_stores

    facts = merge_stores(folders, into)
    tokenizers = [folder / TOKENIZER_FOLDER for folder in folders if (folder / TOKENIZER_FOLDER).is_dir()]
    if tokenizers:
        shutil.copytree(tokenizers[0], into / TOKENIZER_FOLDER, dirs_exist_ok=True)
    show_facts(facts, as_json=as_json)


@store_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of DistillKit's compressed logits.")],
    into: Into,
    teacher: Annotated[str, typer.Option(help="The name of the model that was captured.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Its tokenizer: hub id or folder; none leaves it unchecked.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a store of a DistillKit data set (either of its codecs)."""
    from limbeck.models.teacher import load_tokenizer
    from limbeck.models.tokenizers import tokenizer_fingerprint
    from limbeck.reading import TOKENIZER_FOLDER
    from limbeck.store.distillkit_rows import convert_distillkit

    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    fingerprint = None if loaded is None else tokenizer_fingerprint(loaded)
    facts = convert_distillkit(source, into, teacher=teacher, tokenizer=fingerprint)
    if loaded is not None:
        loaded.save_pretrained(into / TOKENIZER_FOLDER)
    show_facts(facts, as_json=as_json)
