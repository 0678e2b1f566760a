"""``doorbuster``: the verbs, in the order a person needs them. Results on stdout, talk on stderr.

Exit codes: 0 good, 1 failed, 2 wrong usage, 3 it ran and the verdict is "no", 130 interrupted.
"""

from __future__ import annotations

import difflib
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch can be imported by anything below

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from engine.errors import DoorbusterError, ScenarioError, UserError
from engine.scenario import Resolved
from engine.scenario import load as load_scenario

app = typer.Typer(
    name="doorbuster", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A workbench for flash-sale spikes against an LLM engine: the real thing and its twin, one set of policies.",
)
keys_app = typer.Typer(no_args_is_help=True, help="API keys: only their digests are ever stored.")
app.add_typer(keys_app, name="keys")
lab_app = typer.Typer(help="JupyterLab on the notebooks; several runs on one page.")
app.add_typer(lab_app, name="lab")

Scenario = Annotated[str, typer.Argument(help="a name below data/scenarios, or a TOML file")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override one value")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Seed = Annotated[int | None, typer.Option(min=0, help="of the workload; the scenario's own by default")]
Profile = Annotated[
    str | None, typer.Option(help="shape of the sale: one of workload.profiles")
]
MOST_RPS = 1e4  # beyond it the list of requests alone would fill the memory


def _rate(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and 0 < value <= MOST_RPS):
        raise typer.BadParameter(f"{value:g} is no rate: give requests per second, above 0 and up to {MOST_RPS:g}")
    return value


Rate = Annotated[float | None, typer.Option(callback=_rate, help="base rate in requests per second")]
Foreign = Annotated[
    bool, typer.Option("--accept-foreign-calibration", help="use a calibration that was measured elsewhere")
]
CalibrationFile = Annotated[Path | None, typer.Option("--calibration", help="a file of `doorbuster calibrate`")]

out = Console(highlight=False, width=None if sys.stdout.isatty() else 100)  # tables are made for 100 columns
err = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """One line for people."""
    err.print(line, markup=False, soft_wrap=True)


def emit(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def _sets(sets: list[str] | None, *more: str) -> tuple[str, ...]:
    return (*(sets or ()), *more)


def _load(scenario: str, sets: list[str] | None) -> Resolved:
    """The scenario, read before anything heavy is imported: a mistake is told at once."""
    found = load_scenario(scenario, _sets(sets))
    if found.scenario.seed < 0:
        raise ScenarioError(f"seed: {found.scenario.seed} is below 0", where=found.origins.get("seed", found.path))
    return found


def _load_sale(scenario: str, sets: list[str] | None, profile: str | None) -> Resolved:
    """The same for a verb that plays a sale: a wrong profile is told before anything is measured or written."""
    found = _load(scenario, sets)
    from sim.twin.workload import profile_of

    profile_of(found.scenario, profile or "demo")
    return found


@app.command(short_help="Is everything here that a run needs?")
def doctor(scenario: Scenario = "flash-sale", json: Json = False) -> None:
    """Is everything here that a run needs? A fix under each failure."""
    from sim.doctor import examine

    checks = examine(scenario)
    if json:
        emit(checks)
    else:
        for check in checks:
            mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
            out.print(f"{mark}  {check.name:<12} {check.found}", markup=False, soft_wrap=True)
            if check.fix:
                out.print(f"      fix: {check.fix}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if any(check.ok is False for check in checks) else 0)


@app.command(short_help="The live engine: an OpenAI-compatible server.")
def serve(
    scenario: Scenario = "flash-sale",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = a free one")] = 8077,
    model: Annotated[str | None, typer.Option(help="smollm2, tiny, fake, a hub name or a folder")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    keys: Annotated[Path | None, typer.Option(help="key file; without it one key is made and printed")] = None,
    folder: Annotated[Path | None, typer.Option(help="run folder; a new one below runs/ by default")] = None,
    upstream: Annotated[
        list[str] | None, typer.Option(help="URL of another OpenAI-compatible server, instead of replicas; repeatable")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="ingress processes over the same replicas")] = 1,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """The live engine: an OpenAI-compatible server over the scenario's policies."""
    from sim.serve import serve_until_stopped

    more = [f'model.name="{model}"'] if model else []
    more += [f'model.device="{device}"'] if device else []
    more += [f'upstreams.cli-{n}.url="{url}"' for n, url in enumerate(upstream or (), 1)]
    serve_until_stopped(scenario, _sets(sets, *more), host, port, keys, folder, workers, json, say, emit)


@app.command(short_help="Open-loop load on a running engine.")
def load(
    scenario: Scenario = "flash-sale",
    url: Annotated[str, typer.Option(help="a running engine, as `serve` prints it")] = "http://127.0.0.1:8077",
    key: Annotated[str, typer.Option(envvar="DOORBUSTER_API_KEY", help="API key, used for all classes")] = "",
    rate: Rate = None,
    profile: Profile = None,
    seed: Seed = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Open-loop load on a running engine; latencies count from the scheduled instant."""
    _load_sale(scenario, sets, profile)
    from sim.bare_load import bare_load

    summary, table, where = bare_load(scenario, _sets(sets), url, key, rate, profile, seed, say)
    if json:
        emit(summary)
    else:
        out.print(table)
    say(f"run folder {where}")


@app.command(short_help="One sale in the twin: seconds instead of minutes.")
def sim(
    scenario: Scenario = "flash-sale",
    profile: Profile = None,
    rate: Rate = None,
    seed: Seed = None,
    calibration: CalibrationFile = None,
    foreign: Foreign = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="print all values and origins, and stop")] = False,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """One sale in the twin: seconds instead of minutes.

    Without --rate the load is sized to the scenario as it stands in the file, whatever --set changes of the engine;
    --set workload.… and model.… change the load too.
    """
    resolved = _load_sale(scenario, sets, profile)
    if show_config:
        from engine.scenario import flat

        for name, value in flat(resolved.scenario).items():
            line = f"{name} = {value!r}    # {resolved.origins.get(name, 'default')}"
            out.print(line, markup=False, soft_wrap=True)
        return
    from sim.bare_sim import bare_sim

    summary, table, where = bare_sim(scenario, _sets(sets), profile, rate, seed, calibration, foreign, say)
    if json:
        emit(summary)
    else:
        out.print(table)
    say(f"run folder {where}, report {where / 'report.html'}")


@app.command(short_help="Measure what a step costs on this machine; a minute.")
def calibrate(
    scenario: Scenario = "flash-sale",
    out_file: Annotated[Path | None, typer.Option("--out", help="where to write; the cache folder by default")] = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Measure what a step and an encoding cost on this machine; about a minute."""
    resolved = _load(scenario, sets)
    from sim.twin import cost
    from sim.twin.calibrate import busy_words, describe
    from sim.twin.calibrate import calibrate as measure

    found = measure(resolved.scenario, say)
    path = out_file or cost.default_path(resolved.scenario.model.name)
    cost.save(found, path)
    if json:
        emit(found)
    else:
        for line in describe(found):
            out.print(line, markup=False, soft_wrap=True)
    for line in busy_words(found):
        say(line)
    say(f"written {path}")


@app.command(short_help="Two runs of the same arrivals, and a verdict.")
def compare(
    run_a: Annotated[Path, typer.Argument(help="a run folder, as a rule live; the comparison is measured by it")],
    run_b: Annotated[Path | None, typer.Argument(help="the other run; by default the twin in a demo's folder")] = None,
    floor: Annotated[Path | None, typer.Option(help="a second live run of the same arrivals")] = None,
    json: Json = False,
) -> None:
    """Two runs of the same arrivals, request by request: decisions, latencies, a verdict against pass marks."""
    from sim.compare_cli import compare_cli

    raise typer.Exit(0 if compare_cli(run_a, run_b, floor, json, say, emit, out) else 3)


@app.command(short_help="A journal through fresh machines: is it the same?")
def replay(
    journal: Annotated[Path, typer.Argument(help="a journal file, or a run folder")],
    sets: Sets = None,
    json: Json = False,
) -> None:
    """A journal's events through fresh machines: the same actions, or the first record that differs.

    Of a run folder, all journals are replayed, its twin's too; each --set goes to those that have its section.
    """
    from sim.twin.replay import replay_all

    results = replay_all(journal, _sets(sets))
    if json:
        emit(results[0] if len(results) == 1 else results)
    for result in results if not json else []:
        if result.identical:
            out.print(f"identical  {result.events} events  {result.journal}", markup=False, soft_wrap=True)
        elif (first := result.first_difference) is not None:
            where = f"record {first.record}, {first.at_s:.3f} s"
            out.print(f"differs at {where}  {result.journal}", markup=False, soft_wrap=True)
            out.print(f"  event    {first.event}\n  journal  {first.journal}\n  fresh    {first.fresh}", markup=False)
        if result.torn_bytes:
            say(f"{result.journal}: the last {result.torn_bytes} bytes are torn and were left out")
    raise typer.Exit(0 if all(result.identical for result in results) else 3)


@app.command(short_help="Write report.html of a run again.")
def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html of a run again: one file that opens offline."""
    from sim.again import report_again

    out.print(str(report_again(run)), markup=False, soft_wrap=True)


@app.command(short_help="One flash sale, live and in the twin; about 5 minutes.")
def demo(
    scenario: Scenario = "flash-sale",
    profile: Profile = None,
    seed: Seed = None,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="measure the machine again")] = False,
    floor: Annotated[bool, typer.Option("--floor", help="the live sale twice: how far is live from live?")] = False,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """One flash sale on a real model, live and in the twin, with a report of both: about five minutes."""
    _load_sale(scenario, sets, profile)
    from sim.demo_cli import demo_cli

    ok = demo_cli(scenario, _sets(sets), profile or "demo", seed, recalibrate, floor, json, say, emit, out)
    raise typer.Exit(0 if ok else 3)


@lab_app.callback(invoke_without_command=True)
def lab(
    context: typer.Context,
    notebook: Annotated[str, typer.Option(help="a name below notebooks, or a file")] = "00_start_here",
    port: Annotated[int, typer.Option(min=1, max=65535, help="JupyterLab takes the next free one")] = 8888,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open a browser on it")] = True,
) -> None:
    """JupyterLab on the notebooks, on this machine's loopback; its address is printed."""
    if context.invoked_subcommand is None:
        from sim.lab import open_lab

        open_lab(notebook, port, browser)


@lab_app.command("compare", short_help="Several runs, laid over each other on a page.")
def lab_compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one scenario, two to eight")],
    out_file: Annotated[Path | None, typer.Option("--out", help="where to write; below runs/ by default")] = None,
    json: Json = False,
) -> None:
    """Several runs, a column each, and their latencies laid over each other on one offline page."""
    from sim.lab import compare_runs

    summaries, table, path = compare_runs(runs, out_file)
    if json:
        emit(summaries)
    else:
        out.print(table)
    say(f"page {path}")


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="the tenant")],
    classes: Annotated[list[str] | None, typer.Option("--class", help="a traffic class; all by default")] = None,
    scenario: Annotated[str, typer.Option(help="whose classes --class may name")] = "flash-sale",
    admin: Annotated[bool, typer.Option("--admin", help="may look into all caches and flush them (/admin)")] = False,
) -> None:
    """Print a key once, and the stanza for the key file."""
    known = list(_load(scenario, None).scenario.classes) if classes else []
    for wanted in classes or ():
        if wanted not in known:
            close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
            fix = f"did you mean {close[0]}?" if close else "--scenario FILE, if it is another scenario's"
            raise UserError(f"no traffic class {wanted!r}", scenario, f"the scenario has: {', '.join(known)}", fix)
    from engine.service.auth import new_key

    key, stanza = new_key(name, classes or (), admin)
    say(f"the key, shown this once: {key}\nadd to your key file:")
    out.print(stanza, markup=False, end="")


def main() -> None:
    """Entry point: mistakes are told in words, tracebacks only with DOORBUSTER_DEBUG=1."""
    try:
        app()
    except DoorbusterError as error:
        if os.environ.get("DOORBUSTER_DEBUG"):
            raise
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
