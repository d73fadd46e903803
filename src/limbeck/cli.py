"""The commands. Each parses its words, calls the pipeline and prints; nothing heavy is imported before it is needed."""

from __future__ import annotations

import re
import shlex
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli_costs import efficiency
from limbeck.cli_judge import robustness
from limbeck.cli_paper import paper
from limbeck.cli_share import push
from limbeck.cli_store import capture, store_app
from limbeck.cli_tasks import BatchSize, KeepTasks, Limit, Suite, TaskCache, TaskData, Tasks, show_suite, wants_suite
from limbeck.console import Commands, quiet_stdout, say, say_beginning, show, show_facts
from limbeck.explain import explain

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a transformer into a small, fast model, and prove what was gained. Begin with: limbeck demo",
)


def _budget(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)x?", text.strip())
    if not match or not 0 < float(match[1]) <= 1e6:
        raise typer.BadParameter(f'"{text}" is not a budget. Give a factor such as 2x, 10x or 0.5x.')
    return float(match[1])


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, a run folder, or a preset's name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as stages.align.tokens=1e6."),
]
Budget = Annotated[
    float, typer.Option(parser=_budget, metavar="FACTOR", help="Multiply the tokens of every stage, such as 10x.")
]
RunFolder = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the run lives (default: runs/NAME).")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Show the report in the browser at the end.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Place = Annotated[
    str, typer.Argument(metavar="PLACE", help="A run folder, a model folder, a hub id, a .gguf file, or `embedded`.")
]
Context = Annotated[int | None, typer.Option(min=2, help="Tokens the model sees at once.")]
Stride = Annotated[int | None, typer.Option(min=1, help="Tokens between windows (default: the context).")]
MaxTokens = Annotated[int | None, typer.Option(min=16, help="Most tokens to score.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="SOURCE", help="Text to score: a file, a folder, SOURCE:SPLIT; may be repeated."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from limbeck import __version__

        show(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    plugins: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="A Python file of your own that adds pieces; may be repeated."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where a fault happened.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""
    if plugins:
        from limbeck.plugins import load_plugin

        for file in plugins:
            load_plugin(file)


@app.command()
def demo(
    budget: Budget = "1x",  # type: ignore[assignment]
    run_folder: RunFolder = None,
    open_report: Open = False,
    as_json: Json = False,
) -> None:
    """Distil the built-in teacher into an all-Hyena student, in minutes, offline."""
    _run("demo", [], budget=budget, run_folder=run_folder, open_report=open_report, as_json=as_json)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    budget: Budget = "1x",  # type: ignore[assignment]
    run_folder: RunFolder = None,
    open_report: Open = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe, from teacher to report. The same command continues a run that was stopped."""
    _run(recipe, overrides or [], budget=budget, run_folder=run_folder, open_report=open_report, as_json=as_json)


def _run(
    name: str, overrides: list[str], *, budget: float, run_folder: Path | None, open_report: bool, as_json: bool
) -> None:
    if not as_json:
        say_beginning(f"reading the recipe {name}, then teacher and text ...")
    from limbeck.recipe import with_budget
    from limbeck.recipe_io import load_recipe

    recipe = with_budget(load_recipe(name, overrides), budget)
    from limbeck import pipeline

    folder = run_folder or Path(recipe.run_folder)
    with quiet_stdout(when=as_json):
        report = pipeline.run(recipe, run_folder=folder, progress=not as_json)
    if not report:
        return
    if as_json:
        show_facts(report, as_json=True)
    else:
        _show_end(report, folder)
    if open_report:
        _open(folder / "report.html")


def _show_end(report: dict[str, Any], folder: Path) -> None:
    """The last lines of a run: what came out, where it is written, and what to type next."""
    from limbeck.plugins import plugin_words

    verdict = report["verdict"]
    limbeck = " ".join(map(shlex.quote, ["limbeck", *plugin_words()]))
    show()
    show(verdict["headline"], at_words=True)
    for mark, key in (("+", "gained"), ("-", "lost"), ("!", "warnings")):
        for line in verdict[key]:
            show(f"{mark} {line}", at_words=True)
    prompt = next((sample["prompt"] for sample in report["student"]["samples"]), "Once upon a time")
    show()
    show(f"report: {folder / 'report.html'}")
    show(f"next:   {limbeck} generate {shlex.quote(str(folder))} {shlex.quote(prompt)}")


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None, budget: Budget = "1x", as_json: Json = False) -> None:  # type: ignore[assignment]
    """Say what a recipe would cost, and whether its texts can be read. Loads no weights."""
    from limbeck.recipe import with_budget
    from limbeck.recipe_io import load_recipe

    loaded = with_budget(load_recipe(recipe, overrides or []), budget)
    from limbeck import planning

    try:
        with quiet_stdout(when=as_json):
            facts = planning.plan(loaded)
    except planning.PlanError as error:
        if error.facts:
            show_facts(_without_recipe(error.facts, as_json), as_json=as_json)
        raise
    show_facts(_without_recipe(facts, as_json), as_json=as_json)


def _without_recipe(facts: dict[str, Any], as_json: bool) -> dict[str, Any]:
    return facts if as_json else {key: value for key, value in facts.items() if key != "recipe"}


@app.command(name="eval")
def evaluate(
    place: Place,
    texts: Texts = None,
    context: Context = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    suite: Suite = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    cache: TaskCache = None,
    keep_tasks: KeepTasks = None,
    as_json: Json = False,
) -> None:
    """Score a model on text: perplexity and bits per byte, with the protocol, or on a suite of tasks."""
    scoring = {"--text": texts, "--context": context, "--stride": stride, "--max-tokens": max_tokens}
    asking = {"tasks": tasks, "data": task_data, "limit": limit, "cache": cache, "keep_tasks": keep_tasks}
    if wants_suite(suite, scoring=scoring, asking=asking):
        show_suite([place], suite, batch_size=batch_size, as_json=as_json, **asking)
        return
    from limbeck import evaluation

    with quiet_stdout(when=as_json):
        facts = evaluation.evaluate_place(
            place, texts=texts or [], context_tokens=context, stride_tokens=stride, max_tokens=max_tokens
        )
    show_facts(facts if as_json else _brief(facts), as_json=as_json)


@app.command()
def compare(
    places: Annotated[list[str], typer.Argument(metavar="PLACE PLACE...", help="Two or more run or model folders.")],
    texts: Texts = None,
    context: Context = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    suite: Suite = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    cache: TaskCache = None,
    keep_tasks: KeepTasks = None,
    as_json: Json = False,
) -> None:
    """Score several models on the same text, the first run's unless --text is given, or on a suite of tasks."""
    if len(places) < 2:
        raise typer.BadParameter("give two places or more", param_hint="PLACE")
    scoring = {"--text": texts, "--context": context, "--stride": stride, "--max-tokens": max_tokens}
    asking = {"tasks": tasks, "data": task_data, "limit": limit, "cache": cache, "keep_tasks": keep_tasks}
    if wants_suite(suite, scoring=scoring, asking=asking):
        show_suite(places, suite, batch_size=batch_size, as_json=as_json, **asking)
        return
    from limbeck import evaluation

    with quiet_stdout(when=as_json):
        found = evaluation.compare_places(
            places, texts=texts or [], context_tokens=context, stride_tokens=stride, max_tokens=max_tokens
        )
    if as_json:
        show_facts({"places": found}, as_json=True)
    else:
        scored = [facts for facts in found if "failed" not in facts]
        rows = [{"place": facts["place"]} | row for facts in scored for row in _brief(facts)["texts"]]
        show_facts({"places": rows}, as_json=False)
    if failed := [f"{facts['place']} was not scored: {facts['failed']}" for facts in found if "failed" in facts]:
        from limbeck.core.errors import EvaluationError

        raise EvaluationError("\n".join(failed))


def _brief(facts: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation that people ask for; --json has them all, and the protocol."""
    keys = ("text", "tokens", "perplexity", "bits_per_byte", "standard_error_nats")
    return facts | {"texts": [{key: row[key] for key in keys if key in row} for row in facts["texts"]]}


@app.command()
def generate(
    place: Place,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the probability to draw from.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a text with a run's student, as it is written; the text itself is not repeated."""
    from limbeck import writing

    writing.prepare_process(place)
    pieces = []
    choice: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    with quiet_stdout(when=as_json), closing(writing.generate_from(place, prompt, **choice)) as continuation:
        for piece in continuation:
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    if as_json:
        show_facts({"prompt": prompt, "text": "".join(pieces)}, as_json=True)
    else:
        print()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run folder.")],
    open_report: Open = False,
    as_json: Json = False,
) -> None:
    """Write a run's report again from its figures, and say what it says."""
    from limbeck import evaluation

    with quiet_stdout(when=as_json):
        facts = evaluation.render_report(folder)
    if as_json:
        show_facts(facts, as_json=True)
    else:
        _show_end(facts, folder)
    if open_report:
        _open(folder / "report.html")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation can do."""
    from limbeck import doctor as examination

    with quiet_stdout(when=as_json):
        facts = examination.facts()
    show_facts(facts, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from limbeck.recipe_io import json_schema

    show_facts(json_schema(), as_json=True)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset, to begin a recipe of your own.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that come with the package, or print one."""
    from limbeck.presets import preset_names, preset_summary

    if name is not None:
        from limbeck.recipe_io import find_recipe, load_recipe

        if as_json:
            show_facts(load_recipe(name).model_dump(mode="json"), as_json=True)
        else:
            print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    summaries = {name: preset_summary(name) for name in preset_names()}
    if as_json:
        show_facts({"presets": [{"name": name, "summary": text} for name, text in summaries.items()]}, as_json=True)
    else:
        show_facts(summaries, as_json=False)


def _open(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        say(f"no browser could be opened; the report is {path}")


# Those of other files come after the daily ones.
for _command in (robustness, efficiency, paper, push, capture, explain):
    app.command()(_command)
app.add_typer(store_app, name="store")
